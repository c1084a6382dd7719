"""The experiments of the report, in its order."""

from __future__ import annotations

from bench.evidence import noisy_quadratic
from bench.evidence.experiment import Experiment

EXPERIMENTS: tuple[Experiment, ...] = (noisy_quadratic.EXPERIMENT,)
