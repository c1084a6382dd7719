"""A training process is killed and resumed: every step of it has the bits of the run that nobody killed.

`--kills N` kills N times, each at another moment: by SIGKILL after any step or while it saves, or by the kernel at some
byte of a checkpoint's file.
"""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import training
import triton_on_host
from processes import PATIENCE, needs_fork

WAYS = list(training.WAYS)
RULES = list(training.RULES)
# The names of two backends are not equally long, nor are their checkpoints.
SLACK = 512


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kill" in metafunc.fixturenames:
        metafunc.parametrize("kill", range(metafunc.config.getoption("kills")))


def process(act: Callable[[Any], None], killed_after: tuple[int, float] | None = None) -> tuple[dict[int, str], int]:
    """Runs `act` in a fork of this process, and kills it so many seconds after it reported a step.

    Returns:
        What it reported, step by step, and its exit status, negative for a signal.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        # Whatever happens, this process must never return into the test runner that it is a copy of.
        status = 1
        try:
            os.close(reading)
            faulthandler.disable()
            with os.fdopen(writing, "w", buffering=1) as report:
                try:
                    act(report)
                    status = 0
                    if killed_after is not None:
                        # It has done all, as its parent had no core in time: the kill comes late, and comes.
                        signal.alarm(PATIENCE)
                        signal.pause()
                except BaseException:
                    print(-1, repr(traceback.format_exc()), file=report)
        finally:
            os._exit(status)
    os.close(writing)
    reported: dict[int, str] = {}
    with os.fdopen(reading) as report:
        for line in report:
            step, _, digest = line.rstrip("\n").partition(" ")
            reported[int(step)] = digest
            if killed_after is not None and int(step) == killed_after[0]:
                time.sleep(killed_after[1])
                os.kill(child, signal.SIGKILL)
    return reported, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def largest_file(directory: Path) -> int:
    return max(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@needs_fork
def test_kills(kill: int, host_backends: list[str], tmp_path: Path) -> None:
    # torch imports for a second with the first optimizer; no child has to do so again.
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    draw = random.Random(kill)
    way, rule = WAYS[kill % len(WAYS)], RULES[kill // len(WAYS) % len(RULES)]
    served = [name for name in host_backends if name != triton_on_host.NAME]
    backends = [draw.choice(served) for _ in range(3)]

    unbroken = tmp_path / "unbroken"
    unbroken.mkdir()
    expected, status = process(lambda report: training.train(unbroken, rule, backends[0], way, report))
    assert status == 0, expected[-1]
    assert list(expected) == list(range(training.STEPS + 1))

    directory = tmp_path / "killed"
    directory.mkdir()
    after = torn = None
    step, byte = draw.randint(training.EVERY, training.STEPS - 1), draw.randrange(largest_file(unbroken) - SLACK)
    delay = draw.choice((0.0, draw.uniform(0, 0.03)))
    if draw.random() < 0.5:
        torn, moment = training.Torn(step, byte), f"at byte {byte} of a file, not before step {step}"
    else:
        after, moment = (step, delay), f"{delay:.4f} s after step {step}"
    told = f"{rule}, {way}, by {', '.join(backends)}, killed {moment}"
    reported, status = process(lambda report: training.train(directory, rule, backends[1], way, report, torn), after)
    assert status in (-signal.SIGKILL, -signal.SIGXFSZ), f"{told}: ended with {status}: {reported.get(-1, '')}"

    resumed, status = process(lambda report: training.train(directory, rule, backends[2], way, report))
    assert status == 0, f"{told}: {resumed.get(-1)}"
    assert max(resumed) == training.STEPS
    for name, run in (("killed", reported), ("resumed", resumed)):
        different = [step for step, digest in run.items() if digest and digest != expected[step]]
        assert not different, f"{told}: the {name} run, resumed after step {min(run)}, differs in steps {different}"


@needs_fork
def test_a_file_that_is_written_in_place_is_refused_when_it_was_cut(host_backends: list[str], tmp_path: Path) -> None:
    """CLIENTS.md tells to write under another name. Without that a kill leaves no checkpoint at all: reading what there
    is raises, before anything was loaded."""
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    backend = next(name for name in host_backends if name != triton_on_host.NAME)

    def run(torn: training.Torn | None = None) -> tuple[dict[int, str], int]:
        return process(lambda report: training.train(tmp_path, RULES[0], backend, "in place", report, torn))

    path = tmp_path / "checkpoint.pt"
    _, status = run()
    assert status == 0
    whole = path.stat().st_size
    for byte in (1, whole - SLACK):
        path.unlink()
        _, status = run(training.Torn(2 * training.EVERY, byte))
        assert status == -signal.SIGXFSZ
        assert path.stat().st_size < whole
        reported, status = run()
        assert status == 1
        assert list(reported) == [-1]
        assert "in load_file" in reported[-1]
        assert "torch.load" in reported[-1]
        assert "load_state_dict" not in reported[-1]
