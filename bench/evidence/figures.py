"""What experiments hand to claims and pages: measured quantities with their intervals, and pictures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One measured quantity that claims are judged by.

    name    dotted, unique over the whole report: "digits-cnn-adamw.cosine.lookahead-base.accuracy"
    value   point estimate; for a paired comparison the mean of arm minus baseline, its better sign not normalised
    low, high  95 % interval; equal to value for exact quantities
    p       two-sided p-value of "no difference"; 1.0 where nothing is known of it, 0.0 for exact quantities
    n       paired seeds; 0 for exact quantities
    unit    "nats", "points", "dB", "ratio", ...
    better  +1 where larger is better, -1 where smaller is, 0 where neither
    note    one sentence, or ""
    """

    name: str
    value: float
    low: float
    high: float
    p: float
    n: int
    unit: str
    better: int
    note: str = ""

    def __post_init__(self) -> None:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"{self.name}: {self.value} is not within its interval [{self.low}, {self.high}]")
        if not 0 <= self.p <= 1:
            raise ValueError(f"{self.name}: p-value {self.p} is not within [0, 1]")
        if self.better not in (-1, 0, 1):
            raise ValueError(f"{self.name}: better is {self.better}, which is none of -1, 0 and 1")


def exact(name: str, value: float, *, unit: str, better: int, note: str = "") -> Figure:
    """A figure that is computed, not sampled: its interval is a point."""
    return Figure(name, value, value, value, 0.0, 0, unit, better, note)


@dataclass(frozen=True)
class Picture:
    """A picture of the report: its file-safe and unique name, its title, and the whole of it as SVG text."""

    name: str
    title: str
    svg: str
