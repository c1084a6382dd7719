"""Programs that tests run in processes of their own."""

from __future__ import annotations

import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import subprocess
import sys
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
    """Runs a script on some ranks of this machine, without a network; fails with what they printed.

    A rank is forked from a process that has torch imported and has done nothing with it: to import it takes longer than
    most scripts.
    """
    text = _BEGIN + script + _END
    ranks = [_ranks().Process(target=_run, args=(text, rank, size, str(place)), daemon=True) for rank in range(size)]
    for process in ranks:
        process.start()
    running, deadline = {process.sentinel: process for process in ranks}, time.monotonic() + PATIENCE
    while running and time.monotonic() < deadline:
        for ended in multiprocessing.connection.wait(list(running), deadline - time.monotonic()):
            if running.pop(ended).exitcode != 0:
                deadline = min(deadline, time.monotonic() + LAST_WORDS)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    told = "\n".join(file.read_text() for file in sorted(place.glob("output*")))
    assert codes == [0] * size, f"exit statuses {codes}, None where the time was over\n{told}"


@functools.cache
def _ranks() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint", "lookahead_fused"]
    )
    return context


def _run(script: str, rank: int, size: int, place: str) -> None:
    """What a forked process does: a program of its own, which prints into a file."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    sys.path[:0] = [path for path in (ROOT, TESTS) if path not in sys.path]
    sys.argv = ["-c", str(rank), str(size), place]
    with open(os.path.join(place, f"output{rank}"), "w") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
        exec(compile(script, "<string>", "exec"), {"__name__": "__main__"})
