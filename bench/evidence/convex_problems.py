"""Two convex problems with many replicas in one tensor: least squares with a known covariance, logistic regression.

A replica is a training set of its own with its own batches. Its twin has one training example replaced by a fresh one,
and the same batches: how far the two end apart is the on-average stability of an algorithm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPE = torch.float64


@dataclass(frozen=True)
class Sets:
    """Training sets of some replicas, and one fresh example for each.

    inputs [replicas, examples, features], targets [replicas, examples]; spare [replicas, features], [replicas].
    """

    inputs: Tensor
    targets: Tensor
    spare_input: Tensor
    spare_target: Tensor

    def twins(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets [2, replicas, ...] of the replicas, and of those with their first example replaced.

        The examples come in random order, so that the first is any of them.
        """
        inputs, targets = (torch.stack([each, each]) for each in (self.inputs, self.targets))
        inputs[1, :, 0], targets[1, :, 0] = self.spare_input, self.spare_target
        return inputs, targets


class Problem(Protocol):
    """A linear model with a convex loss."""

    name: str
    features: int
    smoothness: float  # of an example's loss, on average

    def sets(self, replicas: int, examples: int, generator: torch.Generator) -> Sets:
        """Training sets drawn at random."""
        ...

    def slope(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Derivative of the loss by the output, elementwise."""
        ...

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss, elementwise."""
        ...

    def test_risk(self, weights: Tensor) -> Tensor:
        """Risk [...] of weights [..., replicas, features] on what is not in the replicas' training sets.

        It belongs to the sets that were drawn last.
        """
        ...

    def excess(self, weights: Tensor) -> Tensor:
        """How far the objective of `fresh` at weights [..., features] is above its least value."""
        ...

    def fresh(self, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Examples [*shape, features] and [*shape] of the distribution that `excess` is about."""
        ...

    @property
    def ridge(self) -> float:
        """Weight of half the squared norm in the objective of `excess`; 0 where the training does not have it."""
        ...


class LeastSquares:
    """Half squared errors of y = xᵀw* + noise, x normal with the covariance diag(1/i): risks are exact."""

    name = "least-squares"
    ridge = 0.0

    def __init__(self, features: int = 20, noise: float = 1.0) -> None:
        self.features, self.noise = features, noise
        self.spectrum = 1.0 / torch.arange(1, features + 1, dtype=DTYPE)
        self.best = torch.ones(features, dtype=DTYPE)
        self.smoothness = float(self.spectrum.sum())

    def fresh(self, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(*shape, self.features, dtype=DTYPE, generator=generator) * self.spectrum.sqrt()
        noise = torch.randn(*shape, dtype=DTYPE, generator=generator) * self.noise
        return inputs, inputs @ self.best + noise

    def sets(self, replicas: int, examples: int, generator: torch.Generator) -> Sets:
        inputs, targets = self.fresh((replicas, examples + 1), generator)
        return Sets(inputs[:, 1:], targets[:, 1:], inputs[:, 0], targets[:, 0])

    def slope(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs - targets

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (outputs - targets) ** 2

    def excess(self, weights: Tensor) -> Tensor:
        return 0.5 * ((weights - self.best) ** 2 * self.spectrum).sum(-1)

    def test_risk(self, weights: Tensor) -> Tensor:
        return self.excess(weights) + 0.5 * self.noise**2


class BreastCancer:
    """Logistic losses on scikit-learn's breast cancer data: 569 examples of 30 standardised features and a constant.

    `fresh` draws from all 569, and `excess` is of their mean loss with a ridge: without one the least loss lies at
    infinity, since the classes can be separated.
    """

    name = "logistic"
    ridge = 0.01

    def __init__(self) -> None:
        from sklearn.datasets import load_breast_cancer  # type: ignore[import-untyped]

        data = load_breast_cancer()
        inputs = torch.tensor(data.data, dtype=DTYPE)
        inputs = (inputs - inputs.mean(0)) / inputs.std(0)
        self.inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=DTYPE)], dim=1)
        self.targets = torch.tensor(data.target, dtype=DTYPE) * 2 - 1
        self.features = self.inputs.shape[1]
        self.smoothness = float((self.inputs**2).sum(1).mean()) / 4
        self._held_out: Tensor | None = None
        self._least = float(self._objective(self._minimum()[None])[0])

    def fresh(self, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        drawn = torch.randint(len(self.targets), shape, generator=generator)
        return self.inputs[drawn], self.targets[drawn]

    def sets(self, replicas: int, examples: int, generator: torch.Generator) -> Sets:
        order = torch.stack([torch.randperm(len(self.targets), generator=generator) for _ in range(replicas)])
        train, spare, self._held_out = order[:, :examples], order[:, examples], order[:, examples + 1 :]
        return Sets(self.inputs[train], self.targets[train], self.inputs[spare], self.targets[spare])

    def slope(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -targets * torch.sigmoid(-targets * outputs)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.softplus(-targets * outputs)

    def test_risk(self, weights: Tensor) -> Tensor:
        assert self._held_out is not None
        outputs = weights @ self.inputs.T
        places = self._held_out.expand(*outputs.shape[:-1], -1)
        return self.loss(outputs.gather(-1, places), self.targets[self._held_out]).mean(-1)

    def excess(self, weights: Tensor) -> Tensor:
        return self._objective(weights) - self._least

    def _objective(self, weights: Tensor) -> Tensor:
        mean = self.loss(weights @ self.inputs.T, self.targets).mean(-1)
        return mean + 0.5 * self.ridge * (weights**2).sum(-1)

    def _minimum(self) -> Tensor:
        """By Newton's method, to rounding."""
        weights = torch.zeros(self.features, dtype=DTYPE)
        for _ in range(100):
            outputs = self.inputs @ weights
            gradient = self.inputs.T @ self.slope(outputs, self.targets) / len(outputs) + self.ridge * weights
            if float(gradient.norm()) < 1e-13:
                return weights
            curved = torch.sigmoid(outputs) * torch.sigmoid(-outputs) / len(outputs)
            hessian = self.inputs.T @ (curved[:, None] * self.inputs)
            hessian += self.ridge * torch.eye(self.features, dtype=DTYPE)
            weights = weights - torch.linalg.solve(hessian, gradient)
        raise ArithmeticError(f"Newton's method has not converged: gradient {float(gradient.norm()):.1e}")


PROBLEMS = {"least-squares": LeastSquares, "logistic": BreastCancer}


def first_below(steps: list[int], values: list[float], target: float) -> float:
    """The step at which a path of positive values is first below a target, interpolated in logarithms; inf if never."""
    for place, value in enumerate(values):
        if value <= target:
            if place == 0:
                return float(steps[0])
            before = values[place - 1]
            share = math.log(before / target) / math.log(before / value)
            return steps[place - 1] + share * (steps[place] - steps[place - 1])
    return math.inf
