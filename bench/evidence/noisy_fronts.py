"""The noisy quadratic model, all of it exact: Lookahead at equal lr, at equal speed, and over many curvatures.

`comparisons` takes one curvature. `front` takes the paper's many, 1/i, with the noise Σ = A⁻¹ of the optimum: a
gradient's noise has the variance a. Losses are expectations from θ₀ = 1 in each direction; there the noise of the
gradients, and with it the steady state, is fixed by the model, so that a lower loss is a better optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.optimize  # type: ignore[import-untyped]

from bench.evidence.cycles import SLOW, THETA, Array, Method, covariance, cycle, rate, steady_variance, steady_variances
from bench.evidence.experiment import JSON

LOOKAHEAD = Method(k=5, alpha=0.5)
MOMENTUM = 0.9
# Curvature times learning rate: all that counts on one curvature.
CURVATURES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
SPECTRUM = 1.0 / np.arange(1, 101)
HORIZONS = (100, 1000, 10_000)
HIGHEST_LR, LOWEST_LR = 3.9, 1e-4
# The logarithm of a variance that no search takes for the least.
UNREACHED = 1e3


def comparisons() -> dict[str, JSON]:
    """Ratios of steady-state variances on one curvature, with noise of variance 1 and γ in a's place.

    Returns:
        Lists over CURVATURES (or of those where there is something to compare with), and single numbers.
    """
    over_momentum = replace(LOOKAHEAD, momentum=MOMENTUM)
    found: dict[str, JSON] = {"curvatures": list(CURVATURES)}
    for k in (5, 10, 20):
        for alpha in (0.2, 0.5, 0.8):
            found[f"small_lr_k{k}_alpha{alpha}"] = [
                _variance(Method(k=k, alpha=alpha), a) / _variance(Method(), alpha * a) for a in CURVATURES
            ]
    found["equal_lr_sgd"] = [_variance(LOOKAHEAD, a) / _variance(Method(), a) for a in CURVATURES]
    found["equal_lr_momentum"] = [
        _variance(over_momentum, a) / _variance(Method(momentum=MOMENTUM), a) for a in CURVATURES
    ]
    found["equal_speed_sgd"] = _at_equal_speed(LOOKAHEAD, Method())
    found["equal_speed_momentum"] = _at_equal_speed(over_momentum, Method(momentum=MOMENTUM))
    rates = (0.9, 0.95, 0.98)
    found["tuned_rates"] = list(rates)
    momentum, lookahead = _least(Method(), rates), _least(LOOKAHEAD, rates)
    found["equal_speed_tuned"] = [float(x / y) for x, y in zip(lookahead, momentum, strict=True)]
    found["workers"] = [
        workers * _variance(replace(LOOKAHEAD, workers=workers), a) / _variance(LOOKAHEAD, a)
        for a in CURVATURES
        for workers in (2, 4, 16)
    ]
    return found


@dataclass(frozen=True)
class Curve:
    """Of one setting over its learning rates, the quietest first: steady, lrs [cells], horizons [len(HORIZONS), cells].

    steady    the loss in the steady state
    horizons  the losses after HORIZONS
    """

    steady: Array
    lrs: Array
    horizons: Array

    def at(self, steady: Array, horizon: int) -> Array:
        """As Front.at."""
        after = self.horizons[HORIZONS.index(horizon)]
        # Between two learning rates by their logarithms: a curve of fewer cells than another must not look the worse.
        found = np.exp(np.interp(np.log(steady), np.log(self.steady), np.log(after), left=np.inf))
        least = np.concatenate([[np.inf], np.minimum.accumulate(after)])
        return np.asarray(np.minimum(found, least[np.searchsorted(self.steady, steady, side="right")]))


@dataclass(frozen=True)
class Front:
    """The curves of an arm's settings, and the best of them."""

    curves: Sequence[Curve]

    def best(self, horizon: int) -> tuple[float, float]:
        """The least loss after so many gradients, and its learning rate."""
        place = HORIZONS.index(horizon)
        cells = [(float(one.horizons[place].min()), one.lrs[one.horizons[place].argmin()]) for one in self.curves]
        return min(cells)

    def quietest(self) -> float:
        """The least loss in a steady state that is to be had."""
        return float(min(one.steady[0] for one in self.curves))

    def at(self, steady: Array, horizon: int) -> Array:
        """The least losses after so many gradients where the steady state is no worse; inf if there is none."""
        return np.asarray(np.min([one.at(steady, horizon) for one in self.curves], axis=0))


def front(method: Method, factor: float) -> dict[str, JSON]:
    """A Front's lists for one setting, over learning rates that are a factor apart.

    Raises:
        ValueError: A horizon is no multiple of k.
    """
    steps = math.ceil(math.log(HIGHEST_LR / LOWEST_LR) / math.log(factor))
    a, lr = SPECTRUM[None, :], HIGHEST_LR / factor ** np.arange(steps)[:, None]
    final = 0.5 * (a * a * steady_variances(method, a, lr)).sum(1)
    stable = np.isfinite(final)
    total, added = cycle(method, a, lr[stable])
    result: dict[str, JSON] = {"steady": final[stable].tolist(), "lrs": lr[stable, 0].tolist()}
    for horizon in HORIZONS:
        if horizon % method.k:
            raise ValueError(f"after {horizon} gradients there is no sync of {method}")
        power, spread = covariance(total, added, horizon // method.k)
        # θ and φ start at 1, all else at 0.
        mean = power[..., SLOW, THETA] + power[..., SLOW, SLOW]
        losses = 0.5 * (a * mean**2 + a * a * spread[..., SLOW, SLOW]).sum(1)
        result[f"after_{horizon}"] = losses.tolist()
    return result


def read_front(results: Sequence[Mapping[str, JSON]]) -> Front:
    """The Front of an arm, from what `front` returned for each of its settings."""
    curves = []
    for one in results:
        lists = [np.asarray(one[word], dtype=np.float64) for word in ("steady", "lrs")]
        after = np.stack([np.asarray(one[f"after_{horizon}"], dtype=np.float64) for horizon in HORIZONS])
        order = np.argsort(lists[0])
        curves.append(Curve(lists[0][order], lists[1][order], after[:, order]))
    return Front(curves)


def ratio_along(one: Front, other: Front, horizon: int) -> float:
    """Geometric mean over equal steady-state losses of one's loss after so many gradients, over the other's.

    The losses are those that both reach, from the least to where the other does not gain from a worse one any more.
    """
    least = max(one.quietest(), other.quietest())
    grid = np.geomspace(least, max(max(curve.steady[-1] for curve in other.curves), least), 400)
    gains = grid[other.at(grid, horizon) > other.at(grid[-1:], horizon) * (1 + 1e-9)]
    grid = np.geomspace(least, gains.max(initial=least), 40)
    return float(np.exp(np.log(one.at(grid, horizon) / other.at(grid, horizon)).mean()))


def _variance(method: Method, curvature: float) -> float:
    """Times γ², which is what noise of variance 1 in a's place makes of a learning rate; see `comparisons`."""
    return steady_variance(method, 1.0, curvature)


def _at_equal_speed(lookahead: Method, plain: Method) -> list[JSON]:
    """Lookahead's variance over that of the plain method at the lr at which a gradient contracts the mean as much.

    With momentum β a heavy ball does not contract faster than √β: curvatures where Lookahead does are left out.
    """
    ratios: list[JSON] = []
    # Up to critical damping the rate falls with the learning rate.
    critical = (1 - math.sqrt(plain.momentum)) ** 2
    for a in CURVATURES:
        wanted = float(rate(lookahead, 1.0, a))
        low, high = 0.0, critical
        if not float(rate(plain, 1.0, high)) <= wanted < 1:
            continue
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if float(rate(plain, 1.0, middle)) > wanted else (low, middle)
        ratios.append(_variance(lookahead, a) / _variance(plain, high))
    return ratios


def _least(method: Method, rates: Sequence[float]) -> Array:
    """The least variance [rates] over learning rate and momentum of those that contract at least so fast."""
    lr, betas = np.geomspace(1e-4, 3.9, 50), np.linspace(0, 0.98, 21)
    cells = [replace(method, momentum=float(beta)) for beta in betas]
    speeds = np.stack([rate(one, 1.0, lr) for one in cells])
    variances = np.stack([steady_variances(one, 1.0, lr) for one in cells])
    least = np.empty(len(rates))
    for place, wanted in enumerate(rates):

        def cost(point: Array, wanted: float = wanted) -> float:
            beta, one_lr = float(point[0]), math.exp(float(point[1]))
            if not 0 <= beta < 1:
                return UNREACHED
            one = replace(method, momentum=beta)
            if not float(rate(one, 1.0, one_lr)) <= wanted:
                return UNREACHED
            return math.log(steady_variance(one, 1.0, one_lr))

        best = np.unravel_index(np.where(speeds <= wanted, variances, np.inf).argmin(), variances.shape)
        start = np.array([betas[best[0]], math.log(lr[best[1]])])
        simplex = start + np.array([[0.0, 0.0], [0.02, 0.0], [0.0, 0.05]])
        options = {"initial_simplex": simplex, "xatol": 1e-6, "fatol": 1e-7}
        least[place] = math.exp(scipy.optimize.minimize(cost, start, method="Nelder-Mead", options=options).fun)
    return least
