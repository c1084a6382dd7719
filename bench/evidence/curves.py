"""What the losses along runs tell: how fast, how steadily, and drawn, an arm a line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np

from bench.evidence import svg
from bench.evidence.figures import Picture
from bench.evidence.training import Trained

# Okabe and Ito's colours, which stay apart for colour-blind readers; the base is black.
COLOURS = ("#000000", "#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#999999")
LAST = 3  # evaluations whose mean is where a run ends


def steps_ratio(arm: Sequence[float], other: Sequence[float], steps: Sequence[int]) -> float:
    """Steps that an arm needs over those that the other does, to the loss at which the worse of the two ends.

    Either's steps are those to its first evaluation at that loss or below, interpolated between two evaluations: a run
    compared with itself gives 1, however it fluctuates, and two runs the inverse of what they give the other way. One
    that diverged is as if it had taken the whole run to where the other is at its first evaluation.
    """
    ends = _end(arm), _end(other)
    if not all(map(math.isfinite, ends)):
        longest = steps[-1] / steps[0]
        return 1.0 if ends[0] == ends[1] else longest if ends[0] > ends[1] else 1 / longest
    target = max(ends)
    return _reached(arm, steps, target) / _reached(other, steps, target)


def fluctuation(curve: Sequence[float]) -> float:
    """Variance around a straight line of the last quarter of a curve's evaluations, infinite where it diverged."""
    last = np.asarray(curve[-max(4, len(curve) // 4) :])
    if not np.isfinite(last).all() or len(last) < 4:
        return math.inf
    places = np.arange(len(last))
    rest = last - np.polyval(np.polyfit(places, last, 1), places)
    return float(np.square(rest).sum() / (len(last) - 2))


def picture(name: str, title: str, runs: Mapping[str, Trained]) -> Picture:
    """The median over seeds of each arm, with the quartiles around it, from the first fifth of the run on.

    Args:
        name, title: of the picture.
        runs: by arm.
    """
    figure, axes = svg.axes()
    for (arm, trained), colour in zip(runs.items(), cycle(COLOURS), strict=False):
        # Before that all arms fall so far that nothing else could be seen.
        begin = len(trained.steps) // 5
        steps = trained.steps[begin:]
        quarter, half, three = (_quantile(trained.curve, share)[begin:] for share in (0.25, 0.5, 0.75))
        axes.fill_between(steps, quarter, three, color=colour, alpha=0.12, linewidth=0)
        axes.plot(steps, half, color=colour, linewidth=1.3, label=arm)
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss of the slow weights")
    axes.legend(frameon=False, fontsize="small")
    return Picture(name, title, svg.text(figure))


def _end(curve: Sequence[float]) -> float:
    return sum(curve[-LAST:]) / len(curve[-LAST:])


def _reached(curve: Sequence[float], steps: Sequence[int], target: float) -> float:
    for i, loss in enumerate(curve):
        if loss <= target:
            if i == 0:
                return float(steps[i])
            part = (curve[i - 1] - target) / (curve[i - 1] - loss)
            return steps[i - 1] + part * (steps[i] - steps[i - 1])
    return float(steps[-1])


def _quantile(curves: Sequence[Sequence[float]], share: float) -> list[float]:
    """Of all seeds at each evaluation; a gap where that is no number."""
    # Not interpolated: between two that diverged that would be no number.
    values = np.quantile(np.asarray(curves, dtype=float), share, axis=0, method="nearest")
    return [float(value) if math.isfinite(value) else math.nan for value in values]
