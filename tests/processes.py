"""Programs that tests run in processes of their own."""

from __future__ import annotations

import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import lookahead_fused
from lookahead_fused.backends import BACKENDS

ROOT = str(Path(lookahead_fused.__file__).parent.parent)
TESTS = str(Path(__file__).parent)
CPU = lookahead_fused.backends()["cpu"]
needs_cpu_backend = pytest.mark.skipif(not CPU.available, reason=f"backend cpu: {CPU.reason}")
needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="asks Linux's /proc")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch was built without gloo",
)

# Seconds after which a process is taken for hung: many times what any of them takes, also where its core is shared.
PATIENCE = 600
# Of the others, once one has failed: they wait for it, and may tell how that ended.
LAST_WORDS = 10


def python(script: str, prelude: str = "", **environment: str) -> Any:
    """What a script prints, from JSON; it runs in a process of its own, which may import what tests share."""
    done = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout)


def in_fork(script: str, prelude: str = "") -> Any:
    """As `python`, in a fork of a process that has torch imported, which takes longer than most scripts. For what may
    die of what it does, and does not ask how its process came to be."""
    with tempfile.TemporaryDirectory() as place:
        _finish([_start(prelude + textwrap.dedent(script), [], place, "only")], place)
        # Before it torch 2.9's gloo tells who is connected.
        return json.loads(Path(place, "only.out").read_text().splitlines()[-1])


@contextmanager
def serving(name: str) -> Iterator[None]:
    """In such a process: a backend is one, also where it stands in for a device."""
    if name in BACKENDS:
        yield
        return
    # Here, since most of them do without what this imports.
    from stand_ins import STAND_INS

    with mock.patch.dict(BACKENDS, {name: STAND_INS[name].backend()}):
        yield


# `rank` of `size`, with a process group over gloo.
_BEGIN = f"""
import datetime, os, pathlib, sys, time
import torch
import torch.distributed as dist

rank, size, place = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
store = dist.FileStore(os.path.join(place, "store"), size)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds={PATIENCE}))
"""
# All are done before any leaves; and they leave past the teardown of gloo's threads, which now and then ends in
# std::terminate. What failed before came no further than there.
_END = f"""
place = pathlib.Path(place)
(place / f"done{{rank}}").touch()
deadline = time.monotonic() + {PATIENCE}
while len(list(place.glob("done*"))) < size and time.monotonic() < deadline:
    time.sleep(0.01)
sys.stdout.flush()
os._exit(0)
"""


def two_ranks(script: str, place: Path) -> None:
    """`on_ranks` of two."""
    on_ranks(2, script, place)


def on_ranks(size: int, script: str, place: Path) -> None:
    """Runs a script on some ranks of this machine, without a network, each in a fork as of `in_fork`; fails with what
    they printed."""
    text, where = _BEGIN + script + _END, str(place)
    ranks = [_start(text, [str(rank), str(size), where], where, str(rank)) for rank in range(size)]
    _finish(ranks, where)


def _start(script: str, arguments: list[str], place: str, name: str) -> Any:
    process = _forks().Process(target=_run, args=(script, arguments, place, name), daemon=True)
    process.start()
    return process


def _finish(processes: list[Any], place: str) -> None:
    running, deadline = {process.sentinel: process for process in processes}, time.monotonic() + PATIENCE
    while running and time.monotonic() < deadline:
        for ended in multiprocessing.connection.wait(list(running), deadline - time.monotonic()):
            if running.pop(ended).exitcode != 0:
                deadline = min(deadline, time.monotonic() + LAST_WORDS)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    told = "\n".join(file.read_text() for kind in ("out", "err") for file in sorted(Path(place).glob(f"*.{kind}")))
    assert codes == [0] * len(codes), f"exit statuses {codes}, None where the time was over\n{told}"


@functools.cache
def _forks() -> Any:
    """What starts processes by forking one that has imported `forked`."""
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["forked"])
    with mock.patch.dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{TESTS}"):
        forkserver.ensure_running()
    return context


def _run(script: str, arguments: list[str], place: str, name: str) -> None:
    """What a forked process does: a program of its own, which prints into files."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    sys.argv = ["-c", *arguments]
    with open(os.path.join(place, f"{name}.out"), "w") as out, open(os.path.join(place, f"{name}.err"), "w") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        exec(compile(script, "<string>", "exec"), {"__name__": "__main__"})
