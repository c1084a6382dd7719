"""The experiments of the report, in its order."""

from __future__ import annotations

from bench.evidence import adaptive, control, convex, noisy_quadratic, protocol, quadratics, robustness, workers
from bench.evidence.experiment import Experiment

EXPERIMENTS: tuple[Experiment, ...] = (
    noisy_quadratic.EXPERIMENT,
    quadratics.EXPERIMENT,
    convex.EXPERIMENT,
    adaptive.EXPERIMENT,
    *protocol.EXPERIMENTS,
    robustness.EXPERIMENT,
    control.EXPERIMENT,
    *workers.EXPERIMENTS,
)
