"""Lookahead whose α is chosen at each sync, by Proposition 1 of the paper, beside a fixed α.

For a quadratic of curvatures A with its optimum at 0, fast weights θ and d = φ - θ, the α with the least loss after the
sync is 1 + gᵀd / dᵀAd, where g = Aθ is the gradient at θ; it is clipped to [LEAST, 1]. "oracle" has the exact gradient
and A, which nobody has; "curvature" has A and the gradient of a batch; "fisher" takes for A an average of squared
gradients, as Adam keeps it and the paper proposes. The gradient that a choice takes is not counted, in its favour.

The problem has curvatures from 1/κ to 1 and, where it is noisy, gradients with noise of the covariance σ²A. Every side
has its learning rate and momentum tuned over one grid, "fixed" its α too, on other seeds than those compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.evidence.experiment import JSON, Job, Scale
from bench.evidence.figures import Figure, Picture
from bench.evidence.records import Records
from bench.evidence.statistics import ratio

CONDITION, DIMENSIONS = 100.0, 40
K, LEAST, DECAY = 5, 0.2, 0.99
ALPHAS = {"momentum": (1.0,), "fixed": (0.1, 0.2, 0.35, 0.5, 0.7, 1.0)}
STEPS = 200
NOISES = {"noiseless": 0.0, "noisy": 0.3}
ARMS = ("momentum", "fixed", "oracle", "curvature", "fisher")
PAIRS = (*((arm, "fixed") for arm in ("oracle", "curvature", "fisher")), ("fixed", "momentum"), ("oracle", "momentum"))
FRESH, TUNING = 0, 1000
# Seeds to tune on, fresh seeds, factor between learning rates, momenta.
SIZES: Mapping[Scale, tuple[int, int, float, tuple[float, ...]]] = {
    Scale.SMOKE: (4, 8, 2.0, (0.5, 0.9)),
    Scale.QUICK: (16, 24, 2**0.5, (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)),
    Scale.FULL: (48, 48, 2**0.25, (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)),
}
LOWEST, HIGHEST = 0.03, 5.0

Array = NDArray[np.float64]


class Adaptive:
    """The experiment; see the module."""

    name = "adaptive"
    revision = 1

    def names(self) -> tuple[str, ...]:
        """A ratio of final losses for each pair, with and without noise."""
        return tuple(f"{self.name}.{noise}.{arm}-{base}.final" for noise in NOISES for arm, base in PAIRS)

    def jobs(self, scale: Scale, records: Records) -> Iterator[Job]:
        """Of each arm its tuning and confirmation, in one job."""
        for noise in NOISES:
            for arm in ARMS:
                setting: dict[str, JSON] = {"noise": noise, "arm": arm, "scale": scale.value}
                tuning, fresh, factor, betas = SIZES[scale]
                runs = tuning * len(_lrs(factor)) * len(betas) * len(ALPHAS.get(arm, (1,))) + fresh
                cost = 3e-8 * DIMENSIONS * STEPS * runs
                yield Job(setting, lambda n=noise, a=arm: contest(n, a, *SIZES[scale]), cost)  # type: ignore[misc]

    def figures(self, records: Records) -> list[Figure]:
        """Of the largest scale at which both sides are recorded."""
        found: dict[str, Figure] = {}
        results = {(s["noise"], s["arm"], s["scale"]): r for s, r in records.of(self.name, self.revision)}
        for scale in Scale:
            for noise in NOISES:
                for arm, base in PAIRS:
                    own, other = (results.get((noise, word, scale.value)) for word in (arm, base))
                    if own is not None and other is not None:
                        name = f"{self.name}.{noise}.{arm}-{base}.final"
                        found[name] = _compared(name, own, other, f"{arm}: {_said(own)}; {base}: {_said(other)}.")
        return list(found.values())

    def pictures(self, records: Records) -> list[Picture]:
        return []


EXPERIMENT = Adaptive()


def contest(noise: str, arm: str, tuning: int, fresh: int, factor: float, betas: Sequence[float]) -> dict[str, JSON]:
    """The best of the grid on the tuning seeds, by the mean of log losses, and its final losses on the fresh seeds."""
    lrs = _lrs(factor)
    scores = {}
    for beta in betas:
        for alpha in ALPHAS.get(arm, (0.0,)):
            losses, _ = train(arm, lrs, beta, alpha, NOISES[noise], range(TUNING, TUNING + tuning))
            for lr, score in zip(lrs, np.log(losses).mean(axis=1), strict=True):
                scores[lr, beta, alpha] = float(score)
    lr, beta, alpha = min(scores, key=lambda point: scores[point])
    losses, alphas = train(arm, [lr], beta, alpha, NOISES[noise], range(FRESH, FRESH + fresh))
    return {
        "lr": lr,
        "beta": beta,
        "alpha": float(np.mean(alphas)),
        "edge": lr in (lrs[0], lrs[-1]) or beta == betas[-1],
        "final": losses[0].tolist(),
        "clipped": float(np.mean((alphas <= LEAST) | (alphas >= 1))),
    }


def train(
    arm: str, lrs: Sequence[float], beta: float, fixed: float, sigma: float, seeds: Sequence[int]
) -> tuple[Array, Array]:
    """Final losses [lrs, seeds] of the slow weights after STEPS gradients, and every α that was taken.

    `fixed` is α for the arms that do not choose it.

    A run that overflows has the largest double for its loss, so that its logarithm is finite.
    """
    a = np.geomspace(1 / CONDITION, 1, DIMENSIONS)
    streams = [np.random.default_rng(seed) for seed in seeds]
    slow = np.stack([rng.standard_normal(DIMENSIONS) / np.sqrt(a) for rng in streams])[None].repeat(len(lrs), 0)
    fast, moment, squares = slow.copy(), np.zeros_like(slow), np.zeros_like(slow)
    rate = np.array(lrs)[:, None, None]
    alphas = []
    with np.errstate(over="ignore", invalid="ignore"):
        for step in range(1, STEPS + 1):
            gradient = a * fast + _noise(streams, sigma, a)
            squares = DECAY * squares + (1 - DECAY) * gradient**2
            moment = beta * moment + gradient
            fast = fast - rate * moment
            if step % K == 0:
                seen = a * fast + (0.0 if arm == "oracle" else _noise(streams, sigma, a))
                if arm in ALPHAS:
                    alpha = np.full(slow.shape[:-1], fixed)
                else:
                    curvature = squares / (1 - DECAY**step) if arm == "fisher" else a
                    alpha = chosen(slow - fast, seen, curvature)
                alphas.append(alpha)
                slow = slow + alpha[..., None] * (fast - slow)
                fast = slow.copy()
        losses = 0.5 * (a * slow**2).sum(axis=-1)
    return np.nan_to_num(losses, nan=np.finfo(float).max, posinf=np.finfo(float).max), np.stack(alphas)


def chosen(way: Array, gradient: Array, curvature: Array) -> Array:
    """α [...] of a sync by Proposition 1, clipped: from the way back to the slow weights, the gradient at the fast ones
    and curvatures, each [..., dimensions]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        best = 1 + (gradient * way).sum(axis=-1) / (curvature * way**2).sum(axis=-1)
    # Where the fast weights are where the slow ones are, no α does anything.
    return np.clip(np.where(np.isfinite(best), best, 1.0), LEAST, 1.0)


def _noise(streams: Sequence[np.random.Generator], sigma: float, a: Array) -> Array:
    """[1, seeds, dimensions], the same for every learning rate; drawn without noise too, so that seeds stay paired."""
    drawn: Array = np.stack([rng.standard_normal(DIMENSIONS) for rng in streams])[None] * (sigma * np.sqrt(a))
    return drawn


def _lrs(factor: float) -> list[float]:
    count = math.floor(math.log(HIGHEST / LOWEST) / math.log(factor))
    return [LOWEST * factor**place for place in range(count + 1)]


def _compared(name: str, own: Mapping[str, Any], other: Mapping[str, Any], note: str) -> Figure:
    return ratio(name, own["final"], other["final"], better=-1, note=note)


def _said(result: Mapping[str, Any]) -> str:
    edge = ", at the edge of its grid" if result["edge"] else ""
    clipped = f", {result['clipped']:.0%} of its α clipped" if 0 < result["clipped"] < 1 else ""
    return f"lr {result['lr']:.3g}, β {result['beta']:g}, mean α {result['alpha']:.2f}{edge}{clipped}"
