"""lookahead_fused's own optimizers on quadratics, many runs at once as the elements of one tensor.

What cycles.py computes of a method is measured here: its cycle's map, the answer of φ to one gradient's noise, its
steady state and its mean under noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.evidence.cycles import CACHED, MOMENT, OUTER, SLOW, STATES, THETA, Array, Method, cycle, radius
from lookahead_fused import EMA, LookaheadSGD

# A period that no run reaches: with workers the syncs are called, after their weights were averaged.
NEVER = 1 << 30
# The mean starts so many standard deviations of the steady state away, and is followed for a few of its time constants.
FAR = 30.0


def optimizer_of(method: Method, param: Tensor, lr: float) -> torch.optim.Optimizer:
    """The package's optimizer for a method, torch's own SGD where that has no slow weights."""
    if method.is_plain or method.decay is not None:
        plain = torch.optim.SGD([param], lr=lr, momentum=method.momentum)
        return plain if method.decay is None else EMA(plain, decay=method.decay)
    return LookaheadSGD(
        [param],
        lr=lr,
        momentum=method.momentum,
        k=method.k if method.workers == 1 else NEVER,
        alpha=method.alpha,
        pullback_momentum=method.pullback,
        outer_momentum=method.outer_momentum,
        outer_nesterov=method.outer_nesterov,
    )


class Run:
    """Runs of a method on quadratics a θ² / 2.

    Args:
        method: SGD and its slow weights. Workers are the first dimension of all tensors.
        lr: Learning rate.
        start: θ₀, also of the slow weights [workers, ...] or [...].
        curvature: a, broadcast to `start`.
    """

    def __init__(self, method: Method, lr: float, start: Tensor, curvature: Tensor) -> None:
        self.method, self.curvature = method, curvature
        self.param = start.clone().requires_grad_()
        self.param.grad = torch.zeros_like(start)
        self.optimizer: Any = optimizer_of(method, self.param, lr)

    @torch.no_grad()
    def cycle(self, noise: Callable[[int], Tensor | None]) -> None:
        """One cycle; `noise(j)` is added to its j-th gradient."""
        gradient = self.param.grad
        assert gradient is not None
        for inner in range(self.method.k):
            torch.mul(self.param.detach(), self.curvature, out=gradient)
            added = noise(inner)
            if added is not None:
                gradient.add_(added)
            self.optimizer.step()
        if self.method.workers > 1:
            self.param.copy_(self.param.mean(0, keepdim=True).expand_as(self.param))
            self.optimizer.sync()

    @torch.no_grad()
    def slow(self) -> Tensor:
        """φ as it stands after a cycle, of the first worker."""
        if self.method.decay is None:
            found = self.param.detach()
        else:
            with self.optimizer.slow_weights():
                found = self.param.detach().clone()
        return found[0] if self.method.workers > 1 else found


def measured_map(method: Method, curvatures: Array, lr: float, cycles: int) -> Array:
    """The map of so many cycles, read off the package: it starts in each direction of the state after a sync.

    Returns:
        [curvatures, 5, 5]; what starts as θ starts as φ too, and φ's own column is 0 (EMA: each has its own).
    """
    a = torch.from_numpy(curvatures)[:, None]
    run = Run(method, lr, torch.zeros(len(curvatures), STATES, dtype=torch.float64), a)
    run.cycle(_silence)  # makes the state, all zeros
    own = run.optimizer.state[run.param]
    tensors = {
        THETA: run.param.detach(),
        MOMENT: own.get("momentum_buffer"),
        SLOW: own.get("slow_param"),
        CACHED: own.get("cached_momentum"),
        OUTER: own.get("outer_momentum_buffer"),
    }
    averages = method.decay is not None
    for index, tensor in tensors.items():
        if tensor is not None and (index != SLOW or averages):
            tensor[:, index] = 1
    if not averages and tensors[SLOW] is not None:
        tensors[SLOW][:, THETA] = 1
    for _ in range(cycles):
        run.cycle(_silence)
    found = np.zeros((len(curvatures), STATES, STATES))
    for index, tensor in tensors.items():
        if tensor is not None:
            found[:, index] = tensor.numpy()
    return found


def measured_radius(method: Method, curvatures: Array, lr: float, cycles: int = 8) -> Array:
    """Growth of a cycle [curvatures], from the package's own map of several cycles."""
    return np.asarray(radius(measured_map(method, curvatures, lr, cycles)) ** (1.0 / cycles))


def impulse_variance(method: Method, curvatures: Array, lr: float) -> Array:
    """Steady-state variances [curvatures] of φ under noise of variance 1, from the package's answer to single kicks.

    φ is a sum over all past noise of that noise times its answer, so that its variance is the sum of squares of the
    answers to a kick at each place of a cycle. Nothing is sampled.
    """
    a = torch.from_numpy(curvatures)
    places = method.k
    shape: tuple[int, ...] = (places, len(curvatures))
    if method.workers > 1:
        shape = (method.workers, *shape)
    run = Run(method, lr, torch.zeros(shape, dtype=torch.float64), a)
    kicks = torch.zeros(places, *shape, dtype=torch.float64)
    for place in range(places):
        kicks[(place, 0, place) if method.workers > 1 else (place, place)] = 1
    total = torch.zeros(len(curvatures), dtype=torch.float64)
    slowest = float(radius(cycle(method, curvatures, lr)[0]).max())
    for number in range(math.ceil(14 / -math.log(slowest))):
        run.cycle((lambda inner: kicks[inner]) if number == 0 else _silence)
        total += run.slow().square().sum(0)
    # Each worker's kicks get the same answer.
    return np.asarray(total.numpy() * method.workers)


@dataclass(frozen=True)
class Sampled:
    """What a run under noise found.

    variance, standard_error  of φ in the steady state; the error from the spread between independent replicas
    mean_error                largest distance of the replicas' mean from T^n's, as a part of the start
    contraction               of a cycle, from the mean after those that were followed; NaN where it has crossed 0
    """

    variance: float
    standard_error: float
    mean_error: float
    contraction: float
    replicas: int
    cycles: int


def sample(
    method: Method, curvature: float, lr: float, *, variance: float, error: float, replicas: int, seed: int
) -> Sampled:
    """Steps independent replicas from far away into the steady state, and measures its variance there.

    Args:
        method: SGD and its slow weights.
        curvature: a.
        lr: γ.
        variance: The exact one: the start lies a multiple of its root away.
        error: Relative standard error of the variance to run for; what was reached is in the result.
        replicas: How many run at once.
        seed: Of the noise.
    """
    total, _ = cycle(method, curvature, lr)
    slowest = float(radius(total))
    start = FAR * math.sqrt(variance)
    shape = (method.workers, replicas) if method.workers > 1 else (replicas,)
    run = Run(method, lr, torch.full(shape, start), torch.tensor(curvature))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty(shape)

    def noise(_: int) -> Tensor:
        return drawn.normal_(generator=generator)

    means, exact = [start], [start]
    state = np.array([1.0, 0, 1.0, 0, 0]) * start
    followed = max(1, math.ceil(1 / -math.log(slowest)))
    # Until the start is below a hundredth of the steady state's standard deviation.
    for number in range(max(followed, math.ceil(math.log(100 * FAR) / -math.log(slowest)))):
        run.cycle(noise)
        if number < followed:
            state = total @ state
            means.append(float(run.slow().double().mean()))
            exact.append(float(state[SLOW]))
    # The squares of a chain that keeps ρ of itself have the correlation ρ²; the real parts of a complex pair less.
    correlation = slowest**2
    cycles = math.ceil(2 / error**2 / replicas * (1 + correlation) / (1 - correlation))
    squares = torch.zeros(replicas, dtype=torch.float64)
    for _ in range(cycles):
        run.cycle(noise)
        squares += run.slow().double().square()
    squares /= cycles
    return Sampled(
        variance=float(squares.mean()),
        standard_error=float(squares.std()) / math.sqrt(replicas),
        mean_error=max(abs(m - e) for m, e in zip(means, exact, strict=True)) / start,
        contraction=(means[-1] / start) ** (1 / followed) if means[-1] > 0 else math.nan,
        replicas=replicas,
        cycles=cycles,
    )


def _silence(_: int) -> None:
    return None
