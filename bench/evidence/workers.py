"""Local SGD and DiLoCo on simulated workers, against synchronous SGD of the same total batch.

Workers are a dimension of the weights, [R seeds, W workers, ...], in one process. A worker trains on its own weights
with its own moments; every k steps the mean over the workers takes each one's place and the package's own `sync()`
makes the outer step from it. That is what `process_group=` does with an all_reduce between processes.

All sides see the same samples: a total batch of B is B / n from each of n shards of scikit-learn's digits, whose
classes are spread over the shards by a Dirichlet distribution (no shard looks like the whole) or evenly. Controls: an
average of the synchronous weights (EMA), and synchronous SGD that talks as seldom as the workers do, with k times the
batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bench.evidence import svg
from bench.evidence.contest import Contest, Grid, Outcome, Point
from bench.evidence.experiment import Job, Scale
from bench.evidence.figures import Figure, Picture
from bench.evidence.records import Records
from bench.evidence.statistics import paired
from lookahead_fused import EMA, LookaheadAdamW, LookaheadSGD

NEVER = 2**53
CLASSES, PIXELS, HIDDEN, HELD_OUT = 10, 64, 32, 360
# Where a run has diverged its loss counts as that of a guess, so that every score is finite.
GUESS = math.log(CLASSES)
FEWEST = 8  # samples of a shard


@dataclass(frozen=True)
class Side:
    """One way to train.

    Attributes:
        local: workers train apart between two syncs.
        alpha, outer_momentum: of the outer step.
        every: synchronous steps are taken once in k batches, with the gradient of all of them.
        averaged: evaluated on an exponential average.
    """

    local: bool = False
    alpha: float = 1.0
    outer_momentum: float = 0.0
    every: bool = False
    averaged: bool = False


SIDES = {
    "base": Side(),
    "ema": Side(averaged=True),
    "large-batch": Side(every=True),
    "average": Side(local=True),
    "lookahead": Side(local=True, alpha=0.5),
    "outer-momentum": Side(local=True, alpha=0.7, outer_momentum=0.5),
    "diloco": Side(local=True, alpha=0.7, outer_momentum=0.9),
}
# With one worker a mean is what it was: the same as the baseline.
ALONE = tuple(name for name in SIDES if name != "average")


@dataclass(frozen=True)
class Plan:
    """How long and on how many workers.

    Attributes:
        k: steps between two syncs; `steps` is a multiple of it, so that every side ends agreed.
        batch: of all workers together, a multiple of each count.
    """

    counts: tuple[int, ...]
    steps: int
    grid: Grid
    tuning: int
    fresh: int
    k: int = 8
    batch: int = 64


@dataclass(frozen=True)
class Workers:
    """An experiment: one inner rule, schedule and way to spread the classes.

    Attributes:
        name: what its figures' names begin with.
        rule: "sgd" (momentum is tuned) or "adamw" (beta1 is).
        concentration: of the Dirichlet distribution; None: samples are spread evenly.
    """

    name: str
    rule: str
    concentration: float | None
    cosine: bool
    plans: Mapping[Scale, Plan]
    revision: int = 1

    def names(self) -> tuple[str, ...]:
        """Figures: "<name>.<workers>.<side>-<what it is compared with>.<final, progress or accuracy>"."""
        return tuple(f"{self.name}.*-{against}.*" for against in ("base", "large-batch", "average", "one"))

    def jobs(self, scale: Scale, records: Records) -> Iterator[Job]:
        for count in self.plans[scale].counts:
            yield from self._contest(scale, count).jobs(partial(records.get, self.name, self.revision))

    def figures(self, records: Records) -> list[Figure]:
        """Of the largest scale at which a comparison is recorded."""
        found: dict[str, Figure] = {}
        for scale in (Scale.SMOKE, Scale.QUICK, Scale.FULL):
            outcomes = {count: self._outcomes(scale, count, records) for count in self.plans[scale].counts}
            for count, by_arm in outcomes.items():
                pairs = [(arm, "base", by_arm.get("base")) for arm in by_arm]
                for against in ("large-batch", "average"):
                    pairs += [(arm, against, by_arm.get(against)) for arm in by_arm if SIDES[arm].local]
                pairs += [(arm, "one", outcomes.get(1, {}).get(arm)) for arm in by_arm if count > 1]
                for arm, against, other in pairs:
                    if other is not None and arm != against:
                        name = f"{self.name}.{count}.{arm}-{against}"
                        note = self._note(scale, count, (arm,) if against == "one" else (arm, against), records)
                        found |= {figure.name: figure for figure in _compared(name, by_arm[arm], other, note)}
        return list(found.values())

    def pictures(self, records: Records) -> list[Picture]:
        """Held-out loss over the number of workers, of the largest scale that has recorded any."""
        for scale in (Scale.FULL, Scale.QUICK, Scale.SMOKE):
            outcomes = {count: self._outcomes(scale, count, records) for count in self.plans[scale].counts}
            if any(outcomes.values()):
                return [_picture(self, scale, outcomes)]
        return []

    def _contest(self, scale: Scale, count: int) -> Contest:
        plan = self.plans[scale]
        return Contest(
            key={"scale": scale.value, "workers": count, "steps": plan.steps, "k": plan.k, "batch": plan.batch},
            arms=ALONE if count == 1 else tuple(SIDES),
            grid=plan.grid,
            tuning=tuple(range(1000, 1000 + plan.tuning)),
            fresh=tuple(range(plan.fresh)),
            run=partial(self.run, plan, count),
            score=lambda outcome: -float(np.mean(outcome["final"])),
            cost=plan.steps * 2.5e-4,
        )

    def run(self, plan: Plan, count: int, arm: str, point: Point, seeds: Sequence[int]) -> Outcome:
        """Trains and evaluates one side for some seeds: held-out loss at the end and on average, accuracy in points."""
        torch.set_num_threads(1)
        task = Task(seeds, count, plan, self.concentration)
        losses, accuracy = train(task, plan, SIDES[arm], self.rule, point, self.cosine)
        return {
            "final": losses[-1].tolist(),
            "progress": torch.stack(losses).mean(0).tolist(),
            "accuracy": accuracy.tolist(),
        }

    def _outcomes(self, scale: Scale, count: int, records: Records) -> dict[str, Outcome]:
        get = partial(records.get, self.name, self.revision)
        contest = self._contest(scale, count)
        found = {}
        for arm in contest.arms:
            best = contest.best(arm, get)
            outcome = None if best is None else contest.outcome(arm, best, contest.fresh, get)
            if outcome is not None:
                found[arm] = outcome
        return found

    def _note(self, scale: Scale, count: int, arms: tuple[str, ...], records: Records) -> str:
        get = partial(records.get, self.name, self.revision)
        contest = self._contest(scale, count)
        told = []
        for arm in arms:
            best = contest.best(arm, get)
            if best is not None:
                edge = ", at the edge of its grid" if contest.at_edge(arm, get) else ""
                told.append(f"{arm}: lr {best.lr:g}, momentum {best.beta:g}{edge}")
        return f"{scale.value}; " + "; ".join(told) + "."


def _picture(experiment: Workers, scale: Scale, outcomes: Mapping[int, Mapping[str, Outcome]]) -> Picture:
    figure, axes = svg.axes()
    for arm in SIDES:
        means = {count: float(np.mean(by_arm[arm]["final"])) for count, by_arm in outcomes.items() if arm in by_arm}
        axes.plot(list(means), list(means.values()), "o-" if SIDES[arm].local else "s--", label=arm)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("workers")
    axes.set_ylabel("held-out loss at the end, nats; each side tuned")
    axes.legend()
    spread = "evenly spread" if experiment.concentration is None else f"Dirichlet({experiment.concentration:g}) shards"
    schedule = "cosine" if experiment.cosine else "constant"
    title = f"Simulated workers: {experiment.rule}, {schedule} learning rate, {spread} ({scale.value})"
    return Picture(f"{experiment.name}-loss", title, svg.text(figure))


def _compared(name: str, arm: Outcome, other: Outcome, note: str) -> Iterator[Figure]:
    for metric, unit, better in (("final", "nats", -1), ("progress", "nats", -1), ("accuracy", "points", 1)):
        yield paired(f"{name}.{metric}", arm[metric], other[metric], unit=unit, better=better, note=note)


def train(task: Task, plan: Plan, side: Side, rule: str, point: Point, cosine: bool) -> tuple[list[Tensor], Tensor]:
    """Held-out losses every k batches, each [R], and the accuracy at the end, [R], in points; on the slow weights."""
    net = task.network(task.count if side.local else 1)
    optimizer = inner(net, rule, point, side, plan.steps)
    losses = []
    for step in range(plan.steps):
        last = (step + 1) % plan.k == 0
        if side.every and not last:
            continue
        for group in optimizer.param_groups:
            group["lr"] = point.lr * (0.5 * (1 + math.cos(math.pi * step / plan.steps)) if cosine else 1.0)
        for p in net:
            p.grad = None
        inputs, labels = task.batch(step - plan.k + 1 if side.every else step, step + 1, together=not side.local)
        loss(net, inputs, labels).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if last:
            if side.local:
                agree(net)
                optimizer.sync()
            with optimizer.slow_weights() if hasattr(optimizer, "slow_weights") else nullcontext():
                held_out, accuracy = task.evaluate(net)
            losses.append(held_out)
    return losses, accuracy


def inner(net: list[Tensor], rule: str, point: Point, side: Side, steps: int) -> Any:
    """The optimizer of all workers, and the one that makes the outer step; its own rhythm of k never comes."""
    outer: dict[str, Any] = {"k": NEVER, "alpha": side.alpha, "outer_momentum": side.outer_momentum}
    if rule == "sgd":
        if side.local:
            return LookaheadSGD(net, lr=point.lr, momentum=point.beta, **outer)
        base: torch.optim.Optimizer = torch.optim.SGD(net, lr=point.lr, momentum=point.beta)
    else:
        betas = (point.beta, 0.99)
        if side.local:
            return LookaheadAdamW(net, lr=point.lr, betas=betas, **outer)
        base = torch.optim.AdamW(net, lr=point.lr, betas=betas)
    # An average over about the last tenth of a run.
    return EMA(base, decay=1 - 10 / steps) if side.averaged else base


@torch.no_grad()
def agree(net: list[Tensor]) -> None:
    """The mean over the workers in each one's place: what all_reduce does."""
    for p in net:
        p.copy_(p.mean(1, keepdim=True))


def loss(net: list[Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each worker's batch: [R, W, b, 64] and [R, W, b] to [R, W]."""
    logits = predict(net, inputs)
    return F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none").view(labels.shape).mean(-1)


def predict(net: list[Tensor], inputs: Tensor) -> Tensor:
    first, first_bias, second, second_bias = net
    return torch.tanh(inputs @ first + first_bias) @ second + second_bias


class Task:
    """Digits of each seed: a split of its own into shards and held-out samples, a start, and every batch.

    Args:
        count: shards.
        concentration: see `Workers`.
    """

    def __init__(self, seeds: Sequence[int], count: int, plan: Plan, concentration: float | None) -> None:
        images, labels = digits()
        self.seeds, self.count = seeds, count
        orders = np.stack([np.random.default_rng([seed, 1]).permutation(len(labels)) for seed in seeds])
        held_out, train_set = torch.from_numpy(orders[:, :HELD_OUT]), orders[:, HELD_OUT:]
        self._images, self._labels = torch.from_numpy(images), torch.from_numpy(labels)
        self._held_out = self._images[held_out].unsqueeze(1), self._labels[held_out].unsqueeze(1)
        batches = []
        for seed, own in zip(seeds, train_set, strict=True):
            rng = np.random.default_rng([seed, 2, count])
            parts = shards(labels[own], count, concentration, rng)
            uniform = rng.random((plan.steps, count, plan.batch // count))
            batches.append(
                np.stack([own[part[(uniform[:, w] * len(part)).astype(int)]] for w, part in enumerate(parts)], 1)
            )
        # [R, steps, W, b]
        self._batches = torch.from_numpy(np.stack(batches))

    def network(self, workers: int) -> list[Tensor]:
        """Weights [R, W, in, out] and biases [R, W, 1, out]; the workers of a seed start alike."""
        net = []
        for layer, (inputs, outputs) in enumerate(((PIXELS, HIDDEN), (HIDDEN, CLASSES))):
            bound = 1 / math.sqrt(inputs)
            drawn = [
                np.random.default_rng([seed, 3, layer]).uniform(-bound, bound, (inputs + 1, outputs))
                for seed in self.seeds
            ]
            whole = torch.from_numpy(np.stack(drawn).astype(np.float32)).unsqueeze(1).repeat(1, workers, 1, 1)
            net += [whole[:, :, :-1].clone().requires_grad_(), whole[:, :, -1:].clone().requires_grad_()]
        return net

    def batch(self, begin: int, end: int, together: bool) -> tuple[Tensor, Tensor]:
        """Images and labels of some steps, [R, W, b, 64] and [R, W, b]; those of all workers together with W = 1."""
        places = self._batches[:, begin:end].transpose(1, 2).flatten(2)
        if together:
            places = places.flatten(1).unsqueeze(1)
        return self._images[places], self._labels[places]

    @torch.no_grad()
    def evaluate(self, net: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Held-out loss and accuracy in points of the weights that all workers of a seed agree on, each [R]."""
        inputs, labels = self._held_out
        agreed = [p[:, :1] for p in net]
        lost = loss(agreed, inputs, labels).squeeze(1).nan_to_num(GUESS, GUESS).clamp(max=GUESS)
        right = predict(agreed, inputs).argmax(-1) == labels
        return lost, 100 * right.double().mean((1, 2))


def shards(
    labels: NDArray[np.int64], count: int, concentration: float | None, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Every sample in one shard. Each class is spread by its own draw of a Dirichlet distribution, or all evenly."""
    if concentration is None or count == 1:
        return [np.sort(part) for part in np.array_split(rng.permutation(len(labels)), count)]
    for _ in range(1000):
        parts: list[list[NDArray[np.int64]]] = [[] for _ in range(count)]
        for label in range(CLASSES):
            own = rng.permutation(np.flatnonzero(labels == label))
            ends = np.cumsum(rng.dirichlet([concentration] * count))[:-1] * len(own)
            for part, piece in zip(parts, np.split(own, ends.astype(int)), strict=True):
                part.append(piece)
        whole = [np.sort(np.concatenate(part)) for part in parts]
        if min(map(len, whole)) >= FEWEST:
            return whole
    raise ValueError(f"no split into {count} shards of {FEWEST} samples or more with concentration {concentration}")


@lru_cache(maxsize=1)
def digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """scikit-learn's 1797 digits: standardised images [1797, 64] and labels."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    found = load_digits()
    images = (found.data - found.data.mean()) / found.data.std()
    return images.astype(np.float32), found.target.astype(np.int64)


SGD_LRS = (0.05, 0.1, 0.2, 0.4, 0.8)
ADAMW_LRS = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)


def plans(lrs: tuple[float, ...], betas: tuple[float, ...], main: bool = False) -> dict[Scale, Plan]:
    few, all_ = ((1, 4, 16), (1, 2, 4, 8, 16)) if main else ((1, 4), (1, 4, 16))
    return {
        Scale.SMOKE: Plan((1, 4) if main else (4,), steps=16, grid=Grid(lrs[2:4], betas[-1:], 0), tuning=2, fresh=6),
        Scale.QUICK: Plan(few, steps=120, grid=Grid(lrs, betas[-1:], 2), tuning=3, fresh=20),
        Scale.FULL: Plan(all_, steps=256, grid=Grid(lrs, betas, 3), tuning=6, fresh=24),
    }


EXPERIMENTS = (
    Workers("workers", "sgd", 0.3, False, plans(SGD_LRS, (0.0, 0.9), main=True)),
    Workers("workers-cosine", "sgd", 0.3, True, plans(SGD_LRS, (0.0, 0.9))),
    Workers("workers-iid", "sgd", None, False, plans(SGD_LRS, (0.0, 0.9))),
    Workers("workers-adamw", "adamw", 0.3, False, plans(ADAMW_LRS, (0.5, 0.9))),
)
