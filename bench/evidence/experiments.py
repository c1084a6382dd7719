"""The experiments of the report, in its order."""

from __future__ import annotations

from bench.evidence import adaptive, control, convex, noisy_quadratic, quadratics, workers
from bench.evidence.experiment import Experiment

EXPERIMENTS: tuple[Experiment, ...] = (
    noisy_quadratic.EXPERIMENT,
    quadratics.EXPERIMENT,
    convex.EXPERIMENT,
    adaptive.EXPERIMENT,
    control.EXPERIMENT,
    *workers.EXPERIMENTS,
)
