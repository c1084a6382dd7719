"""Whether the fused and the unfused run did the same: the demo's tolerances, where they come from, the check.

Ours and torch's fused AdamW evaluate one formula in different orders, torch's with fused multiply-adds, so
each step leaves the weights apart by some units in the last place, and training may amplify that. The demo's
networks are smooth and without directions that only rounding decides (models.py): it hardly does.
That was measured, with torch's fused against torch's foreach AdamW as the yardstick of "the same but for
rounding", and with optimizers made wrong on purpose by very little. Largest deviations, in both tasks:

                                            loss                      weights
                                        25 steps     all          25 steps     all
    torch fused against torch foreach   <= 4.8e-7    <= 3.6e-6    <= 9e-7      <= 1.4e-5
    beta2 0.9989 instead of 0.999       >= 4.7e-5    >= 1.3e-3    >= 1.2e-4    >= 3e-4
    alpha 0.501 instead of 0.5          >= 3.4e-4    >= 4.2e-3    >= 2.0e-3    >= 9e-4

Every tolerance stands between the two, several times away from either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.demo.runs import FUSED, UNFUSED, K
from bench.demo.train import Deviations

EARLY_STEPS = 25


@dataclass(frozen=True)
class Tolerance:
    """The largest deviation allowed in the first ``EARLY_STEPS`` steps, and in the whole run."""

    early: float
    whole: float


# Absolute, in nats.
LOSS = Tolerance(1e-5, 1e-4)
# Relative to the way from the start.
WEIGHTS = Tolerance(2e-5, 2e-4)


def departures(deviations: Deviations) -> list[str]:
    """What says that the two runs differ by more than rounding, a line each; empty where they coincide."""
    return [
        *_beyond("training loss", deviations.loss, 1, LOSS),
        *_beyond("weights, relative to their way from the start", deviations.weights, K, WEIGHTS),
    ]


def _beyond(what: str, values: Sequence[float], stride: int, tolerance: Tolerance) -> list[str]:
    """``values`` are of the steps ``stride``, ``2 * stride`` and so on."""
    if not values:
        return [f"{what}: nothing was compared"]
    for at, value in enumerate(values, start=1):
        step = at * stride
        limit = tolerance.early if step <= EARLY_STEPS else tolerance.whole
        # Written so that a NaN is beyond it.
        if not value <= limit:
            return [f"{what}: '{FUSED}' and '{UNFUSED}' are {value:.1e} apart at step {step}, allowed are {limit:.0e}"]
    return []
