"""What ``--json`` writes: two kinds of document, `Run` and `Comparison`. bench/README.md is the page about them.

The dataclasses are the schema. A field that is added keeps the version, and programs must pass over fields that they do
not know; one that is renamed, removed, or means something else raises it.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

SCHEMA_VERSION = 1

Document = TypeVar("Document")


class Malformed(ValueError):
    """A file that is not what it was taken for; the message names file, field, what was expected and what came."""


@dataclass(frozen=True)
class Figure:
    """A median of rounds.

    Attributes:
        median, q1, q3: the median and the quartiles.
        rounds: how many.
    """

    median: float
    q1: float
    q3: float
    rounds: int


@dataclass(frozen=True)
class Package:
    """An install that was measured: its version, the folder it lay in, and what it ran under."""

    version: str
    folder: str
    python: str
    torch: str


@dataclass(frozen=True)
class Machine:
    """Where a run was made.

    Attributes:
        processor: as the system names it.
        cores: that the process may use.
        threads: torch's.
        gpu: its name, or "" where steps ran on the CPU.
        system: kernel and release.
        huge_pages: the setting of transparent huge pages.
        load_before: the load average before the run.
        utc: the time of the run.
    """

    processor: str
    cores: int
    threads: int
    gpu: str
    system: str
    huge_pages: str
    load_before: float
    utc: str

    # What ratios of times depend on.
    SAME = ("processor", "cores", "threads", "gpu")


@dataclass(frozen=True)
class Work:
    """What is stepped.

    Attributes:
        case: the list of parameters, by name.
        optimizer, dtype, k, device: see `opponents.Setting`.
    """

    case: str
    optimizer: str
    dtype: str
    k: int
    device: str

    def __str__(self) -> str:
        on = "" if self.device == "cpu" else f", {self.device}"
        return f"{self.case}, {self.optimizer}, {self.dtype}, k={self.k}{on}"


@dataclass(frozen=True)
class Result:
    """One list of parameters, stepped by ours and by torch's optimizers in turns.

    Attributes:
        work: what is stepped.
        tensors, elements: of the list.
        waited: the share of the time in which this process's threads were ready and had no core; null if not known.
        seconds: a step, by side.
        ratios: by opponent how many times as fast ours is.
        skipped: by opponent why it was not run.
    """

    work: Work
    tensors: int
    elements: int
    waited: float | None
    seconds: dict[str, Figure]
    ratios: dict[str, Figure]
    skipped: dict[str, str]


@dataclass(frozen=True)
class Run:
    """What `run` found: this package against torch's optimizers."""

    package: Package
    machine: Machine
    results: list[Result]
    kind: Literal["run"] = "run"
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Ratio:
    """B's speed by A's on one clock.

    Its interval is below 1 as a whole wherever the clock calls B slower. The intervals of all clocks together hold the
    truth with 98 %, whenever the comparison stopped.

    Attributes:
        median: the ratio; it is a trimmed mean of logarithms, whose center is the median's.
        low, high: the interval.
        between: the standard deviation of the ratio between pairs of processes.
    """

    median: float
    low: float
    high: float
    between: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: two installs against each other.

    Attributes:
        a, b: the installs.
        machine: where.
        work: what both stepped.
        fail_below: the ratio below which B is too slow.
        verdict: "slower", "holds" or "undecided".
        pairs: pairs of processes.
        elapsed: seconds.
        ratios: by clock; "cores" is the cores' time, "wall" the wall clock's.
        seconds: by clock and side ("A", "B") the median seconds a step.
        log_ratios: by clock, for each pair of processes, log(time of A / time of B) of each block.
    """

    a: Package
    b: Package
    machine: Machine
    work: Work
    fail_below: float
    verdict: Literal["slower", "holds", "undecided"]
    pairs: int
    elapsed: float
    ratios: dict[str, Ratio]
    seconds: dict[str, dict[str, float]]
    log_ratios: dict[str, list[list[float]]] = field(default_factory=dict)
    kind: Literal["comparison"] = "comparison"
    schema_version: int = SCHEMA_VERSION


def write(document: Run | Comparison, file: Path) -> None:
    """Write a document, and the folder it goes into."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(document), indent=1, ensure_ascii=False, allow_nan=False)
    file.write_text(text + "\n", encoding="utf-8")


def read(file: Path, kind: type[Document]) -> Document:
    """Read a document of a kind, every field checked.

    Raises:
        Malformed: the file cannot be read, is of another kind or a later version, or a field is missing or wrong.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Malformed(f"{file} cannot be read: {error}") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise Malformed(f"{file}: schema_version must be {SCHEMA_VERSION}, got {version!r}: write it anew")
    made: Document = _checked(kind, content, str(file))
    return made


def _checked(wanted: Any, value: Any, where: str) -> Any:
    """A value as a type of the schema."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if dataclasses.is_dataclass(wanted):
        if not isinstance(value, dict):
            raise Malformed(f"{where}: expected an object, got {value!r:.60}")
        hints = typing.get_type_hints(wanted)
        missing = [entry.name for entry in dataclasses.fields(wanted) if entry.name not in value]
        if missing:
            raise Malformed(f"{where}: has no {', '.join(missing)}")
        names = [entry.name for entry in dataclasses.fields(wanted)]
        return wanted(**{name: _checked(hints[name], value[name], f"{where}: {name}") for name in names})  # type: ignore[operator]
    if origin is dict and isinstance(value, dict):
        return {key: _checked(arguments[1], item, f"{where}: {key}") for key, item in value.items()}
    if origin is list and isinstance(value, list):
        return [_checked(arguments[0], item, f"{where}: {i}") for i, item in enumerate(value)]
    if origin is Literal and value in arguments:
        return value
    if origin is types.UnionType and any(isinstance(value, kind) for kind in arguments):
        return value
    if wanted is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if wanted in (int, str) and type(value) is wanted:
        return value
    expected = getattr(wanted, "__name__", str(wanted)) if origin is None else str(wanted)
    raise Malformed(f"{where}: expected {expected}, got {value!r:.60}")
