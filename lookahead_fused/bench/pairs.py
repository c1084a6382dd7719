"""Two installs of this package, stepped in turns by processes of their own.

A pair of processes measures for about as long as it took to start, and then a new one takes its place, begun in the
other order: where a process has its memory stays as it is for as long as it lives, and can make one install look slower
than itself. In a block A and B take turns of as many steps, A B B A ..., so that a drift of the machine cancels.

Two clocks run. The cores' time of a process leaves out what other work takes of the machine, and is a tenth as noisy
where there is such work; but it does not see that cores are idle. So both decide, each with its own part of the bound
on false alarms (`CLOCKS`): B is slower if it is slower by either, and holds if it holds by the cores' time.
"""

from __future__ import annotations

import json
import math
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from . import parameters, schema
from .measure import LARGE, Unavailable
from .memory import available_bytes
from .sequential import FALSE_ALARM, FEWEST, FIRST_LOOK, MISS, Answer, Estimate, answer, estimate, share

# By clock, its part of the bound on false alarms.
CLOCKS = {"cores": 0.8, "wall": 0.2}
# Blocks of a pair of processes, at least and at most; between them it measures for as long as it took to start.
BLOCKS = 8, 100
# What a turn of short steps lasts at least: less, and the switching would be what is measured.
TURN = 0.02
# Seconds without an answer after which a worker is taken for hung.
PATIENCE = 600.0
HARNESS = Path(__file__).parent
# Runs the harness of this process, whatever `lookahead_fused` is in the worker's interpreter.
BOOT = """
import importlib.util, sys
folder = sys.argv[1]
spec = importlib.util.spec_from_file_location("_harness", folder + "/__init__.py", submodule_search_locations=[folder])
sys.modules["_harness"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from _harness.worker import main
main()
"""


class WorkerFailed(Exception):
    """A worker ended, hung, or measured another package than it was to; the message says which and why."""


@dataclass(frozen=True)
class Install:
    """Where a side of a comparison finds the package.

    Attributes:
        name: "A" or "B".
        given: as the user wrote it: a Python interpreter, or a directory with `lookahead_fused` in it.
    """

    name: str
    given: Path

    @property
    def fault(self) -> str:
        """Why it cannot be measured, or ""."""
        if self.given.is_dir():
            package = self.given / "lookahead_fused" / "__init__.py"
            return "" if package.is_file() else f"{self.name}: {self.given} has no lookahead_fused/__init__.py in it"
        if not self.given.is_file():
            return f"{self.name}: there is no file or directory {self.given}"
        if not os.access(self.given, os.X_OK):
            return f"{self.name}: {self.given} is neither a directory nor a Python interpreter that can be run"
        return ""

    def command(self) -> tuple[list[str], dict[str, str]]:
        """What starts its worker, and in which environment."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        # Threads that spin while they wait would take the other side's cores, and count as work.
        environment |= {"OMP_WAIT_POLICY": "passive", "PYTHONSAFEPATH": "1"}
        python = self.given.absolute()
        if self.given.is_dir():
            environment["PYTHONPATH"] = str(python)
            python = Path(sys.executable)
        return [str(python), "-c", BOOT, str(HARNESS)], environment


@dataclass(frozen=True)
class Work:
    """What both sides do.

    Attributes:
        case: a key of ``parameters.CASES``.
        optimizer, dtype, k: see ``opponents.Setting``.
        backend: of both sides; named, so that a missing module is an error and not another thing's time.
        threads: torch's number of threads.
    """

    case: str = "gpt2-small"
    optimizer: str = "adamw"
    dtype: str = "fp32"
    k: int = 5
    backend: str = "cpu"
    threads: int = field(default_factory=torch.get_num_threads)


class Worker:
    """A process that steps one install's optimizer."""

    def __init__(self, install: Install) -> None:
        self.install = install
        self.complaints = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        self.folder = tempfile.TemporaryDirectory()
        command, environment = install.command()
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.complaints, text=True,
            # Python before 3.11 knows no PYTHONSAFEPATH and looks for modules where it is started.
            cwd=self.folder.name,
        )  # fmt: skip

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.complaints.close()
        self.folder.cleanup()

    def send(self, **request: Any) -> None:
        """Ask for something; `answer` waits for it."""
        assert self.process.stdin is not None
        self.asked = request["do"]
        # If it has ended, `answer` tells how.
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The answer to what was last asked.

        Raises:
            WorkerFailed: the process has ended, or says nothing for `PATIENCE` seconds.
        """
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
            raise WorkerFailed(f"{self._title} said nothing for {PATIENCE:.0f} s, asked to {self.asked}")
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            self.complaints.seek(0)
            told = self.complaints.read().decode(errors="replace").strip()[-2000:]
            raise WorkerFailed(f"{self._title} ended with status {status}, asked to {self.asked}:\n{told}")
        answered: dict[str, Any] = json.loads(line)
        return answered

    def made(self) -> dict[str, str]:
        """The package and versions that the worker has, once it has made its optimizer."""
        told: dict[str, str] = self.answer()
        if self.install.given.is_dir() and Path(told["folder"]).parent.resolve() != self.install.given.resolve():
            raise WorkerFailed(f"{self._title} imported lookahead_fused from {told['folder']}")
        return told

    def turn(self, steps: int) -> dict[str, float]:
        """The seconds of so many steps, by clock."""
        self.send(do="turn", steps=steps)
        return self.answer()

    @property
    def _title(self) -> str:
        return f"the worker of {self.install.name} ({self.install.given})"


Blocks = dict[str, list[list[float]]]


@dataclass
class Progress:
    """A comparison after one more pair of processes.

    Attributes:
        look: pairs of processes so far, less those before the first look.
        groups: by clock, for each pair the log ratios of speed of its blocks.
        seconds: by clock and side, the seconds a step of every block.
        estimates, answers: by clock; empty before the first look.
        installs: by side what its worker said of itself.
        elapsed: seconds since the start.
    """

    groups: Blocks = field(default_factory=lambda: {clock: [] for clock in CLOCKS})
    seconds: dict[str, dict[str, list[float]]] = field(
        default_factory=lambda: {clock: {"A": [], "B": []} for clock in CLOCKS}
    )
    look: int = 0
    estimates: dict[str, Estimate] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    installs: dict[str, dict[str, str]] = field(default_factory=dict)
    elapsed: float = 0.0

    @property
    def verdict(self) -> Literal["slower", "holds", "undecided"]:
        if any(told.fails for told in self.answers.values()):
            return "slower"
        return "holds" if "cores" in self.answers and self.answers["cores"].holds else "undecided"

    def interval(self, clock: str) -> tuple[float, float]:
        """Between which log ratios the truth is: below 0 as a whole exactly where the clock says "slower".

        Either side has the clock's part of the bound on false alarms, so that the intervals of all clocks together hold
        the truth with 98 %, at whichever look the comparison stopped.
        """
        return self.estimates[clock].bounds(FALSE_ALARM * CLOCKS[clock] * share(self.look))

    def judge(self, limit: float, last: bool = False) -> None:
        """Look at what there is, if it is time for a look; `last`: there is no more."""
        self.look = max(len(self.groups["cores"]) - FIRST_LOOK + 1, int(last))
        if self.look < 1:
            return
        for clock, part in CLOCKS.items():
            self.estimates[clock] = estimate(self.groups[clock])
            self.answers[clock] = answer(self.estimates[clock], self.look, limit, FALSE_ALARM * part, MISS)


def compare(
    a: Install,
    b: Install,
    work: Work,
    *,
    limit: float,
    seconds: float,
    log: Callable[[str], object] = lambda line: None,
) -> Progress:
    """Step both installs until it is known whether B is slower, or the time is over.

    Args:
        a, b: the installs.
        work: what they do.
        limit: the ratio of speeds below which B is too slow, less than 1.
        seconds: after which no further pair of processes is begun, once there are three.
        log: told of every pair.

    Raises:
        WorkerFailed: a worker could not go on.
        Unavailable: there is not the memory for both.
    """
    elements = parameters.CASES[work.case].elements
    # Parameter, gradient, two moments, slow weights, perhaps a master; two processes with torch in each.
    need, have = 2 * elements * 24 + (1 << 30), available_bytes()
    if need > have:
        raise Unavailable(f"{work.case}: two workers need {need / 2**30:.1f} GiB, {have / 2**30:.1f} are available")
    start = time.perf_counter()
    progress = Progress()
    while True:
        pair = len(progress.groups["cores"])
        for clock in CLOCKS:
            progress.groups[clock].append([])
        for block in _blocks(a, b, work, pair, progress.installs):
            for clock in CLOCKS:
                for side in ("A", "B"):
                    progress.seconds[clock][side].append(block[side][clock])
                progress.groups[clock][-1].append(math.log(block["A"][clock] / block["B"][clock]))
        progress.elapsed = time.perf_counter() - start
        # Half a pair more would be over the time, half less under it.
        next_ends = progress.elapsed * (1 + 0.5 / (pair + 1))
        over = pair + 1 >= FEWEST and next_ends > seconds
        progress.judge(limit, last=over)
        log(_line(progress))
        if over or progress.verdict != "undecided":
            return progress


def record(progress: Progress, work: Work, machine: schema.Machine, limit: float) -> schema.Comparison:
    """A comparison as `schema` has it."""
    packages = {name: schema.Package(**told) for name, told in progress.installs.items()}
    ratios = {}
    for clock, found in progress.estimates.items():
        low, high = progress.interval(clock)
        ratios[clock] = schema.Ratio(math.exp(found.value), math.exp(low), math.exp(high), found.between)
    return schema.Comparison(
        packages["A"],
        packages["B"],
        machine,
        schema.Work(work.case, work.optimizer, work.dtype, work.k, "cpu"),
        limit,
        progress.verdict,
        len(progress.groups["cores"]),
        round(progress.elapsed, 1),
        ratios,
        {
            clock: {side: statistics.median(seconds) for side, seconds in of.items()}
            for clock, of in progress.seconds.items()
        },
        progress.groups,
    )


def _line(progress: Progress) -> str:
    pairs = len(progress.groups["cores"])
    told = [f"{pairs} pairs of processes, {progress.elapsed:.0f} s"]
    for clock, found in progress.estimates.items():
        told.append(f"{clock} {math.exp(found.value):.4f} ± {found.error:.4f}")
    return ", ".join(told)


def _blocks(
    a: Install, b: Install, work: Work, pair: int, installs: dict[str, dict[str, str]]
) -> Iterator[dict[str, dict[str, float]]]:
    """The blocks of one pair of processes: for each side and clock the seconds a step."""
    order = (a, b) if pair % 2 == 0 else (b, a)
    begun = time.perf_counter()
    with ExitStack() as stack:
        workers = {side.name: stack.enter_context(Worker(side)) for side in order}
        for worker in workers.values():
            worker.send(do="make", **vars(work))
        for name, worker in workers.items():
            installs[name] = worker.made()
        steps = _steps([worker.turn(work.k)["wall"] / work.k for worker in workers.values()], work)
        least, most = BLOCKS
        started = time.perf_counter() - begun
        done = 0
        while done < least or (done < most and time.perf_counter() - begun < 2 * started):
            yield _block(workers, work.k if steps == 1 else 2, steps, pair + done)
            done += 1


def _block(workers: dict[str, Worker], turns: int, steps: int, number: int) -> dict[str, dict[str, float]]:
    """For each side and clock the seconds a step, over so many turns of each side."""
    seconds = {name: dict.fromkeys(CLOCKS, 0.0) for name in workers}
    for turn in range(turns):
        # A B, B A, A B, ...: each side is the first of as many turns as the other, over two blocks.
        for name in ("A", "B") if (turn + number) % 2 == 0 else ("B", "A"):
            for clock, told in workers[name].turn(steps).items():
                seconds[name][clock] += told
    return {name: {clock: s / (turns * steps) for clock, s in of.items()} for name, of in seconds.items()}


def _steps(seconds: Sequence[float], work: Work) -> int:
    """Steps of a turn: long ones alternate one by one, short ones in whole periods that last a while."""
    if parameters.CASES[work.case].elements >= LARGE:
        return 1
    return max(1, math.ceil(TURN / min(seconds) / work.k)) * work.k
