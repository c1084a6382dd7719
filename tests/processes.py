"""Programs that tests run in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
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


def python(script: str, prelude: str = "", **environment: str) -> Any:
    """What a script prints, from JSON; it runs in a process of its own, which may import what tests share."""
    done = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
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
_BEGIN = """
import datetime, os, pathlib, sys, time
import torch
import torch.distributed as dist

rank, size, place = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
store = dist.FileStore(os.path.join(place, "store"), size)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=60))
"""
# All are done before any leaves; and they leave past the teardown of gloo's threads, which now and then ends in
# std::terminate. What failed before came no further than there.
_END = """
place = pathlib.Path(place)
(place / f"done{rank}").touch()
deadline = time.monotonic() + 120
while len(list(place.glob("done*"))) < size and time.monotonic() < deadline:
    time.sleep(0.01)
sys.stdout.flush()
os._exit(0)
"""


def two_ranks(script: str, place: Path) -> None:
    """`on_ranks` of two."""
    on_ranks(2, script, place)


def on_ranks(size: int, script: str, place: Path) -> None:
    """Runs a script on some ranks of this machine, without a network; fails with what they printed."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _BEGIN + script + _END, str(rank), str(size), place],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        output = [process.communicate(timeout=180)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0] * size, "\n".join(output)
