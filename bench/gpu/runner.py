"""Runs commands one by one under limits of time, and writes down what each says and what became of it, as it goes.

A rented machine is there by the minute: what hangs is killed with all that it started, and the next begins.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# The exit status of a command that has nothing to do here; its last line says why.
SKIPPED = 77
# From the request to end to the end without asking, and from there to the word that it does not end.
GRACE, GONE = 5.0, 5.0


@dataclass(frozen=True)
class Piece:
    """A command, run in the root of the source tree.

    Attributes:
        name: unique in its stage.
        command: the program and its arguments.
        limit: seconds after which it is killed.
        needs: the backend that has to serve a GPU here: "cuda", "triton" or "" (none).
        environment: variables beside this process's.
    """

    name: str
    command: Sequence[str]
    limit: float
    needs: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a piece: "passed", "FAILED", "KILLED" or "skipped", and why."""

    piece: str
    verdict: str
    why: str = ""
    seconds: float = 0.0

    @property
    def is_failure(self) -> bool:
        return self.verdict in ("FAILED", "KILLED")

    def __str__(self) -> str:
        return f"{self.verdict}{f': {self.why}' if self.why else ''} ({self.seconds:.1f} s)"


def run_stage(name: str, pieces: Sequence[Piece], out: Path, refusal: Callable[[str], Outcome | None]) -> list[Outcome]:
    """Runs a stage's pieces; leaves `out`/`name`.txt and .json and appends to `out`/report.txt.

    Args:
        refusal: tells for what a piece needs why it is not run, or None.
    """
    outcomes: list[Outcome] = []
    with (
        (out / f"{name}.txt").open("w", encoding="utf-8") as own,
        (out / "report.txt").open("a", encoding="utf-8") as all_,
    ):

        def tell(text: str) -> None:
            for stream in (sys.stdout, own, all_):
                stream.write(text)
                stream.flush()

        for piece in pieces:
            tell(f"\n== {name}: {piece.name}: {shlex.join(piece.command)}\n")
            refused = refusal(piece.needs) if piece.needs else None
            outcome = run(piece, tell) if refused is None else replace(refused, piece=piece.name)
            tell(f"== {name}: {piece.name}: {outcome}\n")
            outcomes.append(outcome)
            (out / f"{name}.json").write_text(json.dumps(record(name, pieces, outcomes), indent=1) + "\n")
    return outcomes


def record(name: str, pieces: Sequence[Piece], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """A stage for programs; pieces that have not been run yet have no outcome."""
    found = {outcome.piece: outcome for outcome in outcomes}
    return {
        "stage": name,
        "pieces": [
            {"name": piece.name, "command": list(piece.command), "limit_seconds": piece.limit}
            | ({} if piece.name not in found else {
                "verdict": found[piece.name].verdict,
                "why": found[piece.name].why,
                "seconds": round(found[piece.name].seconds, 2),
            })
            for piece in pieces
        ],
    }  # fmt: skip


def run(piece: Piece, tell: Callable[[str], object]) -> Outcome:
    """Runs a command to its end or its limit."""
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            piece.command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1", **piece.environment}, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace",
            start_new_session=True,
        )  # fmt: skip
    except FileNotFoundError as error:
        return Outcome(piece.name, "skipped", f"{error.filename} is not there")
    last = [""]

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            last[0] = line.strip() or last[0]
            tell(line)

    # Not in this thread: a line may never come, and what a killed command has started may keep its output open.
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        status: int | None = process.wait(piece.limit)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        # What it left running behind would disturb the next, and hold this one's output open.
        ended = end(process)
    reader.join(GRACE)
    seconds = time.monotonic() - start
    if status is None:
        why = f"it was not done in {piece.limit:.0f} s" + ("" if ended else ", and does not end when it is killed")
        return Outcome(piece.name, "KILLED", why, seconds)
    if status == SKIPPED:
        return Outcome(piece.name, "skipped", last[0], seconds)
    if status != 0:
        return Outcome(piece.name, "FAILED", f"exit status {status}; it said last: {last[0]}", seconds)
    return Outcome(piece.name, "passed", "", seconds)


def end(process: subprocess.Popen[str]) -> bool:
    """Ends a process and all of its group; False where it does not go, as one that waits for a driver."""
    for request, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GONE)):
        try:
            os.killpg(process.pid, request)
        except ProcessLookupError:
            break
        until = time.monotonic() + patience
        while time.monotonic() < until and _is_running(process):
            time.sleep(0.02)
    return not _is_running(process)


def _is_running(process: subprocess.Popen[str]) -> bool:
    """Whether the process or another of its group runs; what has ended and nobody has asked for does not."""
    if process.poll() is None:
        return True
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = status.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it has ended meanwhile
        if int(group) == process.pid and state != "Z":
            return True
    return False
