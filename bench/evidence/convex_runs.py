"""SGD and Lookahead on convex problems by the package's optimizers, all arms and replicas side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.evidence.convex_problems import DTYPE, Problem, first_below
from lookahead_fused import LookaheadSGD

K, ALPHA = 5, 0.5
MARGIN = 0.8


@dataclass(frozen=True)
class Runner:
    """SGD, or Lookahead around it, at a learning rate."""

    lookahead: bool
    lr: float


class Runs:
    """Several runners on the same batches.

    Args:
        problem: Gives the loss.
        runners: Each with weights [rows, features] that start at 0.
        rows: Independent linear models: replicas, and their twins.
        ridge: Weight of half the squared norm in the loss.
    """

    def __init__(self, problem: Problem, runners: Sequence[Runner], rows: int, ridge: float = 0.0) -> None:
        self.problem, self.ridge = problem, ridge
        self.params = [torch.zeros(rows, problem.features, dtype=DTYPE, requires_grad=True) for _ in runners]
        # One optimizer for all: a step of it costs as much as one of torch's SGD over a single group. With k = 1 and
        # alpha = 1 it is SGD, θ − γ g bit for bit.
        groups = [
            {
                "params": [param],
                "lr": runner.lr,
                "k": K if runner.lookahead else 1,
                "alpha": ALPHA if runner.lookahead else 1.0,
            }
            for runner, param in zip(runners, self.params, strict=True)
        ]
        self.optimizer = LookaheadSGD(groups)

    @torch.no_grad()
    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """One step on batches [rows, batch, features] and [rows, batch]."""
        weights = torch.stack([param.detach() for param in self.params], dim=-1)
        slopes = self.problem.slope(inputs @ weights, targets[..., None])
        gradients = inputs.transpose(1, 2) @ slopes / targets.shape[1] + self.ridge * weights
        for param, gradient in zip(self.params, gradients.permute(2, 0, 1).contiguous(), strict=True):
            param.grad = gradient
        self.optimizer.step()

    @torch.no_grad()
    def slow(self) -> Tensor:
        """[runners, rows, features]: the slow weights, where there are any."""
        with self.optimizer.slow_weights():
            return torch.stack([param.detach() for param in self.params])


def generalisation(
    problem: Problem, lr: float, *, replicas: int, examples: int, steps: int, batch: int, seed: int
) -> Mapping[str, list[float]]:
    """Risks and stability of Lookahead-SGD, of SGD at the same and at α times the learning rate, and of a shorter SGD.

    Args:
        problem: Gives data and loss.
        lr: Learning rate, in parts of 1 / smoothness.
        replicas: Training sets.
        examples: In each.
        steps: Gradients, a multiple of k. The shorter SGD stops after α of them.
        batch: Examples a gradient, drawn with replacement.
        seed: Of sets and batches.

    Returns:
        For each arm lists over the replicas: arm.train, arm.test, arm.distance (of the weights of twins, after the last
        gradient) and arm.loss-distance (on the example that was replaced: its loss without it minus with it).
    """
    if steps % K:
        raise ValueError(f"{steps} gradients do not end with a sync of k={K}")
    generator = torch.Generator().manual_seed(seed)
    sets = problem.sets(replicas, examples, generator)
    inputs, targets = sets.twins()
    eta = lr / problem.smoothness
    arms = {"lookahead": Runner(True, eta), "sgd": Runner(False, eta), "small-lr": Runner(False, ALPHA * eta)}
    runs = Runs(problem, list(arms.values()), 2 * replicas)
    rows = torch.arange(replicas)[:, None]
    found: dict[str, list[float]] = {}

    def note(arm: str, weights: Tensor) -> None:
        """Weights [2, replicas, features]."""
        outputs = (inputs[0] @ weights[0][..., None])[..., 0]
        found[f"{arm}.train"] = problem.loss(outputs, targets[0]).mean(1).tolist()
        found[f"{arm}.test"] = problem.test_risk(weights[0]).tolist()
        found[f"{arm}.distance"] = (weights[0] - weights[1]).norm(dim=-1).tolist()
        losses = problem.loss((weights * inputs[0, :, 0]).sum(-1), targets[0, :, 0])
        found[f"{arm}.loss-distance"] = (losses[1] - losses[0]).tolist()

    for step in range(1, steps + 1):
        drawn = torch.randint(examples, (replicas, batch), generator=generator)
        runs.step(inputs[:, rows, drawn].flatten(0, 1), targets[:, rows, drawn].flatten(0, 1))
        if step == round(ALPHA * steps):
            note("short", runs.slow()[1].view(2, replicas, -1))
    for arm, weights in zip(arms, runs.slow(), strict=True):
        note(arm, weights.view(2, replicas, -1))
    return found


@dataclass(frozen=True)
class Race:
    """How a race to a target is run.

    target    excess objective, the mean over a block's replicas
    lrs       learning rates in parts of 1 / smoothness
    tuning    replicas on whose mean the learning rate is chosen, for a target that is lower by MARGIN: one whose steady
              state only just reaches the target does so in some blocks and not in others
    blocks, block  further replicas on which the chosen one is measured
    most      gradients at which a run gives up; a block that has not reached the target then counts as so many
    """

    target: float
    lrs: Sequence[float]
    tuning: int
    blocks: int
    block: int
    most: int


def race(problem: Problem, race: Race, *, batch: int, seed: int) -> Mapping[str, list[float]]:
    """Gradients to the target for Lookahead-SGD and SGD at a batch size, each at its best learning rate.

    Returns:
        For each arm its iterations [blocks]; in lists of one "arm.late" (blocks that never came there), "arm.lr" and
        "arm.edge" (1 where the best learning rate is the first or last that was tried).
    """
    rows = race.tuning + race.blocks * race.block
    names = ("lookahead", "sgd")
    runners = [Runner(name == "lookahead", lr / problem.smoothness) for name in names for lr in race.lrs]
    runs = Runs(problem, runners, rows, problem.ridge)
    generator = torch.Generator().manual_seed(seed)
    steps: list[int] = []
    means: list[Tensor] = []  # [runners, 1 + blocks] each: of the tuning replicas, and of each block
    due = K
    for step in range(1, race.most + 1):
        runs.step(*problem.fresh((rows, batch), generator))
        if step == due or step == race.most:
            excess = problem.excess(runs.slow()).nan_to_num(nan=math.inf)
            tuned = excess[:, : race.tuning].mean(1, keepdim=True)
            measured = excess[:, race.tuning :].reshape(-1, race.blocks, race.block).mean(2)
            means.append(torch.cat([tuned, measured], 1))
            steps.append(step)
            due = max(due + K, math.ceil(due * 1.08 / K) * K)
            chosen = _best(means, steps, race)
            if all(_has_arrived(means, runner, race.target) for runner in chosen):
                break
    paths = torch.stack(means, -1)
    found: dict[str, list[float]] = {}
    for name, runner, first in zip(names, chosen, (0, len(race.lrs)), strict=True):
        reached = [first_below(steps, path.tolist(), race.target) for path in paths[runner][1:]]
        best = runner - first
        found[name] = [min(one, float(race.most)) for one in reached]
        found[f"{name}.late"] = [float(sum(not math.isfinite(one) for one in reached))]
        found[f"{name}.lr"] = [race.lrs[best]]
        found[f"{name}.edge"] = [float(best in (0, len(race.lrs) - 1))]
    return found


def _best(means: list[Tensor], steps: list[int], race: Race) -> list[int]:
    """For each arm the runner that is first at the tuning target, or nearest to it where none is there yet."""
    paths = torch.stack(means, -1)[:, 0]
    order = []
    for path in paths.tolist():
        order.append((first_below(steps, path, MARGIN * race.target), min(path)))
    half = len(race.lrs)
    return [min(range(first, first + half), key=order.__getitem__) for first in (0, half)]


def _has_arrived(means: list[Tensor], runner: int, target: float) -> bool:
    """Whether a runner's tuning replicas are at their target and all its blocks at theirs."""
    least = torch.stack([each[runner] for each in means]).amin(0)
    return bool(least[0] <= MARGIN * target and (least[1:] <= target).all())
