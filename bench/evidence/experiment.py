"""What an experiment is: independent jobs whose results are recorded, and figures and pictures made from the record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from bench.evidence.figures import Figure, Picture
    from bench.evidence.records import Records

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"


class Scale(Enum):
    """How much is run, in seconds, minutes or hours; never what is computed."""

    SMOKE = "smoke"
    QUICK = "quick"
    FULL = "full"


@dataclass(frozen=True)
class Job:
    """One independent piece of work.

    setting  names the job within its experiment; the record keeps its result under it
    run      gives a flat dictionary of numbers, strings and lists of numbers; the same one for the same setting
    cost     seconds on one quiet core, roughly: what the progress bar counts
    """

    setting: Mapping[str, JSON]
    run: Callable[[], Mapping[str, JSON]]
    cost: float


class Experiment(Protocol):
    """A module-level object of an experiment's module, listed in experiments.py.

    name      "noisy-quadratic": the key of its lines in the record
    revision  raised when the results of older code no longer count
    """

    @property
    def name(self) -> str: ...

    @property
    def revision(self) -> int: ...

    def names(self) -> tuple[str, ...]:
        """Every figure that it can make at any scale, by name or glob ("digits-cnn-sgd.cosine.*-base.accuracy")."""
        ...

    def jobs(self, scale: Scale, records: Records) -> Iterator[Job]:
        """In order, those that are recorded too; it is asked again when all that it named have been run.

        A job that depends on a result which is not in the records yet is left out, and named when asked again.
        """
        ...

    def figures(self, records: Records) -> list[Figure]:
        """From what is recorded alone; a result that is missing is a figure that is missing."""
        ...

    def pictures(self, records: Records) -> list[Picture]:
        """As figures()."""
        ...
