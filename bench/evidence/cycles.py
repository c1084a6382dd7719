"""What SGD with slow weights does to a quadratic, as a linear map: the map of one cycle, its speed, its steady state.

A quadratic splits into its curvatures, and on each of them SGD, its momentum, Lookahead, outer momentum and EMA are
linear: with the state x = (θ, m, φ, c, b), which is the fast weight, the inner momentum, the slow weight (EMA: the
average), the momentum at the last sync and the outer momentum, a cycle of k gradients and the event that follows them
makes x ← T x + noise. The spectral radius of T is the contraction of a cycle, and P = T P Tᵀ + Q the steady state.

The maps follow what lookahead_fused computes (lookahead_fused/README.md, "What is computed"; the momentum is
torch.optim.SGD's, m ← β m + g, θ ← θ − γ m); stepping.py steps the package beside them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import scipy.linalg  # type: ignore[import-untyped]

Array = npt.NDArray[np.float64]
Pullback = Literal["none", "pullback", "reset"]

THETA, MOMENT, SLOW, CACHED, OUTER = range(5)
STATES = 5


@dataclass(frozen=True)
class Method:
    """SGD and what becomes of its slow weights; as it stands, plain SGD.

    momentum        β of the inner SGD
    k, alpha        gradients of a cycle, and the step size of its sync
    pullback        what becomes of the inner momentum at a sync
    outer_momentum  μ of the slow weights, in Nesterov's form unless outer_nesterov is False
    decay           of an EMA of the iterates, which then takes Lookahead's place, with k = 1
    workers         that train apart and average at each sync
    """

    momentum: float = 0.0
    k: int = 1
    alpha: float = 1.0
    pullback: Pullback = "none"
    outer_momentum: float = 0.0
    outer_nesterov: bool = True
    decay: float | None = None
    workers: int = 1

    def __post_init__(self) -> None:
        if self.decay is not None and (self.k, self.alpha, self.outer_momentum, self.workers) != (1, 1.0, 0.0, 1):
            raise ValueError(f"an average is taken of SGD's iterates, not of another's slow weights, got {self}")

    @property
    def is_plain(self) -> bool:
        """Whether there are no slow weights beside the fast ones."""
        return self.decay is None and (self.k, self.alpha, self.outer_momentum, self.workers) == (1, 1.0, 0.0, 1)


def cycle(method: Method, curvature: npt.ArrayLike, lr: npt.ArrayLike) -> tuple[Array, Array]:
    """The map of a cycle.

    Args:
        method: SGD and its slow weights.
        curvature: a of the loss a θ² / 2; any shape that broadcasts with that of `lr`.
        lr: Learning rate γ.

    Returns:
        T [..., 5, 5], and Q [..., 5, 5], the covariance that a cycle adds if each gradient has noise of variance 1.
        With workers, θ and m are their means.
    """
    a, gamma = np.broadcast_arrays(np.asarray(curvature, dtype=np.float64), np.asarray(lr, dtype=np.float64))
    inner, kick = _inner_step(method.momentum, a, gamma)
    event = _average(method.decay) if method.decay is not None else _sync(method)
    total, noise = np.broadcast_to(np.eye(STATES), inner.shape), np.zeros(inner.shape)
    for _ in range(method.k):
        total = inner @ total
        noise = inner @ noise @ _transposed(inner) + kick[..., :, None] * kick[..., None, :]
    return event @ total, event @ noise @ event.T / method.workers


def radius(total: Array) -> Array:
    """Spectral radius [...] of maps [..., n, n]: what a cycle's contraction tends to, in every norm."""
    if total.shape[-1] == 2:
        half = (total[..., 0, 0] + total[..., 1, 1]) / 2
        # Of a conjugate pair the product is the square of their size.
        product = total[..., 0, 0] * total[..., 1, 1] - total[..., 0, 1] * total[..., 1, 0]
        root = half**2 - product
        return np.where(root < 0, np.sqrt(np.maximum(product, 0)), np.abs(half) + np.sqrt(np.maximum(root, 0)))
    return np.asarray(np.abs(np.linalg.eigvals(total)).max(axis=-1))


def rate(method: Method, curvature: npt.ArrayLike, lr: npt.ArrayLike) -> Array:
    """Contraction of a gradient: the spectral radius of a cycle's map to the power 1/k."""
    total, _ = cycle(method, curvature, lr)
    return np.asarray(radius(_after_syncs(method, total)) ** (1.0 / method.k))


def steady_variance(method: Method, curvature: float, lr: float, noise: float = 1.0) -> float:
    """Variance of φ after a sync in the steady state, by SciPy's solution of the Lyapunov equation.

    Args:
        method: SGD and its slow weights.
        curvature: a.
        lr: γ.
        noise: Standard deviation of a gradient's noise; in the paper's model a times that of the optimum.

    Raises:
        ValueError: There is no steady state.
    """
    total, added = cycle(method, curvature, lr)
    if not float(radius(total)) < 1:
        raise ValueError(f"there is no steady state: {method} diverges at curvature {curvature} and lr {lr}")
    return float(scipy.linalg.solve_discrete_lyapunov(total, added)[SLOW, SLOW]) * noise**2


def covariance(total: Array, added: Array, cycles: int) -> tuple[Array, Array]:
    """T^n and the covariance of the state after n cycles from a start without any, for many maps at once.

    Two runs of cycles (T₁, Q₁) and then (T₂, Q₂) make (T₂ T₁, T₂ Q₁ T₂ᵀ + Q₂), so that n are made by squaring.
    """
    power, spread = np.broadcast_to(np.eye(STATES), total.shape), np.zeros(total.shape)
    while cycles:
        if cycles % 2:
            power, spread = total @ power, total @ spread @ _transposed(total) + added
        total, added = total @ total, total @ added @ _transposed(total) + added
        cycles //= 2
    return power, spread


def steady_variances(method: Method, curvature: npt.ArrayLike, lr: npt.ArrayLike) -> Array:
    """As steady_variance for many cells at once, by doubling; infinite where there is no steady state."""
    total, added = cycle(method, curvature, lr)
    radii = radius(total)
    stable = radii < 1 - 1e-9
    slowest = radii[stable].max(initial=0.0)
    # Until what is left of the start is below rounding, with room for maps that are far from normal.
    doublings = 6 if slowest == 0 else max(6, math.ceil(math.log2(80 / -math.log(slowest))))
    variances = np.full(radii.shape, np.inf)
    _, spread = covariance(total[stable], added[stable], 1 << doublings)
    variances[stable] = spread[..., SLOW, SLOW]
    return variances


def sgd_variance(curvature: float, lr: float, noise: float = 1.0) -> float:
    """Proposition 2 of the Lookahead paper (arXiv 1907.08610) for SGD, γ²s² / (1 − (1−γa)²)."""
    return (lr * noise) ** 2 / (1 - (1 - lr * curvature) ** 2)


def lookahead_variance(curvature: float, lr: float, k: int, alpha: float, noise: float = 1.0) -> float:
    """Proposition 2 for Lookahead over SGD."""
    kept = (1 - lr * curvature) ** k
    own = alpha**2 * (1 - kept**2)
    return own / (own + 2 * alpha * (1 - alpha) * (1 - kept)) * sgd_variance(curvature, lr, noise)


def lookahead_contraction(curvature: float, lr: float, k: int, alpha: float) -> float:
    """Contraction of the mean from sync to sync, for Lookahead over SGD."""
    return 1 - alpha + alpha * (1 - lr * curvature) ** k


def _inner_step(beta: float, a: Array, gamma: Array) -> tuple[Array, Array]:
    """The map of one gradient, and where its noise goes."""
    step = np.zeros((*a.shape, STATES, STATES))
    step[..., MOMENT, MOMENT], step[..., MOMENT, THETA] = beta, a
    step[..., THETA, MOMENT], step[..., THETA, THETA] = -gamma * beta, 1 - gamma * a
    step[..., SLOW, SLOW] = step[..., CACHED, CACHED] = step[..., OUTER, OUTER] = 1
    kick = np.zeros((*a.shape, STATES))
    kick[..., MOMENT], kick[..., THETA] = 1, -gamma
    return step, kick


def _average(decay: float) -> Array:
    """EMA's event: φ ← d φ + (1 − d) θ."""
    event = np.eye(STATES)
    event[SLOW, SLOW], event[SLOW, THETA] = decay, 1 - decay
    event[CACHED] = event[OUTER] = 0
    return event


def _sync(method: Method) -> Array:
    """Lookahead's event."""
    alpha, mu = method.alpha, method.outer_momentum
    event = np.eye(STATES)
    difference = np.zeros(STATES)
    difference[SLOW], difference[THETA] = 1, -1
    # b ← μ b + s, φ ← φ − α (s + μ b) with s = φ − θ; with μ = 0 that is φ + α (θ − φ), and nobody reads b.
    event[OUTER] *= mu
    event[OUTER] += difference
    direction = difference + mu * event[OUTER] if method.outer_nesterov else event[OUTER]
    event[SLOW] = event[SLOW] - alpha * direction
    event[THETA] = event[SLOW]
    if method.pullback == "pullback":
        event[CACHED, CACHED], event[CACHED, MOMENT] = 1 - min(alpha, 1.0), min(alpha, 1.0)
        event[MOMENT] = event[CACHED]
    else:
        event[CACHED] = 0  # not kept
    if method.pullback == "reset":
        event[MOMENT] = 0
    return event


def _after_syncs(method: Method, total: Array) -> Array:
    """The map [..., n, n] on what a state has after a sync, where θ is φ, and nothing that is always 0."""
    if method.decay is not None:
        return total
    kept = [SLOW, MOMENT]
    kept += [CACHED] if method.pullback == "pullback" else []
    kept += [OUTER] if method.outer_momentum else []
    small = total[..., kept, :][..., kept].copy()
    small[..., 0] += total[..., kept, THETA]
    return small


def _transposed(matrices: Array) -> Array:
    return np.swapaxes(matrices, -1, -2)
