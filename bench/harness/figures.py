"""What a benchmark found, for people and for JSON: figures with spread, target and whether they meet it."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lookahead_fused.bench.samples import Samples, Spread, spread

LABEL_WIDTH = 72
# Others' share of the cores up to which a run is believed. Beyond it ratios do not merely scatter, they shift: sides
# that share work statically wait for their slowest thread, and were seen to fall behind eightfold.
QUIET = 0.05
# ratio: how many times faster than `of`; share: of a bandwidth ceiling; the rest name themselves.
KINDS = ("ratio", "share", "rate", "host", "memory", "state", "growth", "first step", "count", "other")


@dataclass(frozen=True)
class Figure:
    """One line of a report.

    Attributes:
        label: what is measured.
        value: in ``unit``.
        unit: "x", "%", "µs" and the like.
        target: what it must reach; None for a figure that only informs.
        at_least: whether more is better.
        kind: what sort of figure it is, one of ``KINDS``; pictures and the gate pick by it.
        of: what it is about among its kind: the opponent of a ratio, the side whose memory it is.
    """

    label: str
    value: Spread
    unit: str
    target: float | None = None
    at_least: bool = True
    kind: str = "other"
    of: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.target is None:
            return None
        return self.value.median >= self.target if self.at_least else self.value.median <= self.target

    def __str__(self) -> str:
        value = f"{_number(self.value.median)} {self.unit}"
        quartiles = f"[{_number(self.value.q1)} .. {_number(self.value.q3)}]" if self.value.samples > 1 else ""
        medians = "" if self.value.of_medians is None else f"of medians {_number(self.value.of_medians)}"
        line = f"  {self.label:<{LABEL_WIDTH}}{value:>12}  {quartiles:<20}{medians:<18}"
        if self.target is not None:
            bound = f"{'>=' if self.at_least else '<='} {self.target:g} {self.unit}"
            line += f"target {bound:<11} {'pass' if self.met else 'MISS'}"
        return line.rstrip()


@dataclass
class Report:
    """What one benchmark found.

    Attributes:
        title: what was measured.
        how: the schedule and other conditions of its own.
        figures: the results.
        samples: the seconds a step behind them, per side and round.
        others: the part of the machine's cores that other processes had meanwhile; nan where it is not known.
        skipped: the sides that were not run, and why.
        about: what else a program that reads the report wants to know, as JSON holds it.
    """

    title: str
    how: str
    figures: list[Figure]
    samples: Samples = field(default_factory=dict)
    others: float = float("nan")
    skipped: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        busy = ": TOO BUSY to be believed" if self.busy else ""
        lines = [self.title, f"  {self.how}", f"  other processes had {self.others:.1%} of the cores{busy}"]
        for name, seconds in self.samples.items():
            step = scaled(spread(seconds), 1e3)
            lines.append(f"  {name:<{LABEL_WIDTH}}{step.median:>9.3f} ms  [{step.q1:.3f} .. {step.q3:.3f}]")
        lines += [f"  without {name}: {reason}" for name, reason in self.skipped.items()]
        doubt = "?" if self.busy else ""
        return "\n".join(lines + [f"{figure}{doubt if figure.target is not None else ''}" for figure in self.figures])

    @property
    def busy(self) -> bool:
        """Whether others had too much of the machine; False where it is not known."""
        return self.others > QUIET

    def record(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return {
            **self.about,
            "title": self.title,
            "skipped": self.skipped,
            "how": self.how,
            "others": None if math.isnan(self.others) else round(self.others, 4),
            "figures": [{**asdict(figure), "met": figure.met} for figure in self.figures],
            "median_seconds": {name: statistics.median(seconds) for name, seconds in self.samples.items()},
            "seconds": {name: [float(f"{s:.6g}") for s in all_] for name, all_ in self.samples.items()},
        }


def scaled(value: Spread, factor: float) -> Spread:
    """The same spread in another unit."""
    of_medians = None if value.of_medians is None else value.of_medians * factor
    return replace(
        value,
        median=value.median * factor,
        q1=value.q1 * factor,
        q3=value.q3 * factor,
        of_medians=of_medians,
    )


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
