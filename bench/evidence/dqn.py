"""Double DQN on CartPole, many independent seeds trained at once as one stack of networks.

Every tensor has a leading dimension R, one entry a seed: networks [R, in, out], environments [R, E, 4], replay
[R, capacity, ...]. The loss is the sum over R of each seed's own mean, so that an elementwise optimizer trains each
seed as it would train it alone; whatever is random comes from the seed's own generator, in an order that no other seed
and no optimizer changes. Two optimizers are thus compared from the same starts with the same exploration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Actions = NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """What a run does, apart from its optimizer.

    Attributes:
        steps: steps of the E environments, and with them (after `warm_up`) updates of the network.
        environments: E, of each seed.
        evaluations: greedy evaluations, equally far apart; the last one at the end.
        episodes: in each evaluation, from starts of their own.
        explore: part of the run over which epsilon falls linearly from 1 to `least_epsilon`.
        target_every: updates between two copies of the trained network into the target network.
    """

    steps: int
    environments: int = 4
    hidden: int = 64
    batch: int = 64
    capacity: int = 20_000
    warm_up: int = 100
    gamma: float = 0.99
    explore: float = 0.2
    least_epsilon: float = 0.05
    target_every: int = 100
    evaluations: int = 10
    episodes: int = 8

    @property
    def updates(self) -> int:
        return self.steps - self.warm_up


MakeOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


def train(
    plan: Plan, seeds: Sequence[int], make_optimizer: MakeOptimizer, schedule: Callable[[float], float]
) -> Floats:
    """Trains a network for each seed; returns greedy returns on the slow weights, shape [R, evaluations].

    Args:
        make_optimizer: of the parameters, each of shape [R, ...]. Evaluation is within its `slow_weights()`, where it
            has them; the agent acts, and the target network is copied, from the weights that it trains.
        schedule: of the part of the updates that is done, from 0 to 1, to a factor of the learning rate.
    """
    streams = Streams(plan, seeds)
    net = streams.network()
    target = [p.detach().clone() for p in net]
    optimizer = make_optimizer(net)
    peaks = [group["lr"] for group in optimizer.param_groups]
    replay = Replay(len(seeds), plan.capacity)
    carts = CartPoles(streams.starts(0))
    marks = {round(plan.steps * (i + 1) / plan.evaluations) for i in range(plan.evaluations)}
    returns = []
    for step in range(plan.steps):
        epsilon = max(plan.least_epsilon, 1 - (1 - plan.least_epsilon) * step / (plan.explore * plan.steps))
        before = carts.observations()
        actions = streams.explore(step, epsilon, greedy(net, before))
        terminated, truncated = carts.step(actions)
        replay.add(before, actions, carts.observations(), terminated)
        carts.restart(terminated | truncated, streams.starts(step + 1))
        done = step - plan.warm_up
        if done >= 0:
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * schedule(done / plan.updates)
            for p in net:
                p.grad = None
            loss(net, target, replay.sample(streams.batch(step)), plan.gamma).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if (done + 1) % plan.target_every == 0:
                torch._foreach_copy_(target, [p.detach() for p in net])
        if step + 1 in marks:
            with slow_weights(optimizer):
                returns.append(evaluate(net, streams.evaluation))
    return np.stack(returns, 1)


def loss(net: list[Tensor], target: list[Tensor], batch: tuple[Tensor, ...], gamma: float) -> Tensor:
    """Double DQN's Huber loss: mean over each seed's batch, summed over seeds.

    Args:
        batch: observations [R, B, 4], actions [R, B], next observations [R, B, 4], terminated [R, B].
    """
    before, actions, after, terminated = batch
    with torch.no_grad():
        chosen = values(net, after).argmax(-1, keepdim=True)
        future = values(target, after).gather(-1, chosen).squeeze(-1)
        # The reward is 1 a step. An episode that its time limit ended would have gone on, and bootstraps.
        wanted = 1.0 + gamma * future * (1.0 - terminated)
    predicted = values(net, before).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    return F.smooth_l1_loss(predicted, wanted, reduction="none").mean(-1).sum()


def values(net: list[Tensor], observations: Tensor) -> Tensor:
    """Values of the two actions: [R, B, 4] to [R, B, 2]."""
    x = observations
    for i in range(0, len(net), 2):
        x = torch.baddbmm(net[i + 1], x, net[i])
        if i + 2 < len(net):
            x = torch.relu(x)
    return x


@torch.no_grad()
def greedy(net: list[Tensor], observations: Tensor) -> Actions:
    actions: Actions = values(net, observations).argmax(-1).numpy()
    return actions


def slow_weights(optimizer: torch.optim.Optimizer) -> AbstractContextManager[Any]:
    block: Callable[[], AbstractContextManager[Any]] = getattr(optimizer, "slow_weights", nullcontext)
    return block()


def evaluate(net: list[Tensor], starts: Floats) -> Floats:
    """Mean length of greedy episodes, [R], from starts [R, episodes, 4]."""
    carts = CartPoles(starts.copy())
    alive = np.ones(starts.shape[:2], dtype=np.bool_)
    lengths = np.zeros(starts.shape[:2])
    while alive.any():
        lengths += alive
        terminated, truncated = carts.step(greedy(net, carts.observations()))
        alive &= ~(terminated | truncated)
    means: Floats = lengths.mean(1)
    return means


class CartPoles:
    """CartPole-v1 of gymnasium, in the same order of operations, for any number of carts; it does not reset itself.

    Args:
        states: position, velocity, angle, angular velocity of each cart, [..., 4], float64.
    """

    GRAVITY, POLE, TOTAL, LENGTH, FORCE, TAU = 9.8, 0.1, 1.1, 0.5, 10.0, 0.02
    FARTHEST, STEEPEST, LONGEST = 2.4, 12 * 2 * math.pi / 360, 500

    def __init__(self, states: Floats) -> None:
        self.states = states
        self.ages = np.zeros(states.shape[:-1], dtype=np.int64)

    def observations(self) -> Tensor:
        return torch.from_numpy(self.states.astype(np.float32))

    def step(self, actions: Actions) -> tuple[Bools, Bools]:
        """One step of each cart, pushed left by 0 and right by 1; which have fallen, and whose time is over."""
        x, x_dot, theta, theta_dot = np.moveaxis(self.states, -1, 0)
        force = np.where(actions == 1, self.FORCE, -self.FORCE)
        cos, sin = np.cos(theta), np.sin(theta)
        moment = self.POLE * self.LENGTH
        temp = (force + moment * np.square(theta_dot) * sin) / self.TOTAL
        theta_acc = (self.GRAVITY * sin - cos * temp) / (
            self.LENGTH * (4.0 / 3.0 - self.POLE * np.square(cos) / self.TOTAL)
        )
        x_acc = temp - moment * theta_acc * cos / self.TOTAL
        self.states = np.stack(
            (
                x + self.TAU * x_dot,
                x_dot + self.TAU * x_acc,
                theta + self.TAU * theta_dot,
                theta_dot + self.TAU * theta_acc,
            ),
            -1,
        )
        self.ages += 1
        terminated: Bools = (np.abs(self.states[..., 0]) > self.FARTHEST) | (
            np.abs(self.states[..., 2]) > self.STEEPEST
        )
        return terminated, self.ages >= self.LONGEST

    def restart(self, ended: Bools, starts: Floats) -> None:
        self.states = np.where(ended[..., None], starts, self.states)
        self.ages[ended] = 0


class Replay:
    """The last transitions of every seed."""

    def __init__(self, seeds: int, capacity: int) -> None:
        self.capacity, self.size, self.next = capacity, 0, 0
        self.before = torch.zeros(seeds, capacity, 4)
        self.after = torch.zeros(seeds, capacity, 4)
        self.actions = torch.zeros(seeds, capacity, dtype=torch.int64)
        self.terminated = torch.zeros(seeds, capacity)

    def add(self, before: Tensor, actions: Actions, after: Tensor, terminated: Bools) -> None:
        """E transitions of each seed, over the oldest ones: [R, E, 4], [R, E], [R, E, 4], [R, E]."""
        count = actions.shape[1]
        places = torch.arange(self.next, self.next + count) % self.capacity
        self.before[:, places] = before
        self.after[:, places] = after
        self.actions[:, places] = torch.from_numpy(actions)
        self.terminated[:, places] = torch.from_numpy(terminated.astype(np.float32))
        self.next = (self.next + count) % self.capacity
        self.size = min(self.size + count, self.capacity)

    def sample(self, uniform: Floats) -> tuple[Tensor, ...]:
        """Transitions at places given as numbers from 0 to 1, [R, B]."""
        places = torch.from_numpy((uniform * self.size).astype(np.int64))
        rows = torch.arange(len(places)).unsqueeze(1)
        return (
            self.before[rows, places],
            self.actions[rows, places],
            self.after[rows, places],
            self.terminated[rows, places],
        )


class Streams:
    """All that is random in a run, of each seed from generators of its own; drawn some hundred steps at a time."""

    CHUNK = 256

    def __init__(self, plan: Plan, seeds: Sequence[int]) -> None:
        self._plan = plan
        self._seeds = seeds
        self._generators = [np.random.default_rng([seed, 1]) for seed in seeds]
        self._chunks: list[tuple[Floats, ...]] = []
        # The same in every evaluation: what differs between two of them is the network.
        self.evaluation = self._stacked(lambda rng: rng.uniform(-0.05, 0.05, (plan.episodes, 4)), 2)

    def network(self) -> list[Tensor]:
        """torch.nn.Linear's start of a network 4 - hidden - hidden - 2: weights [R, in, out], biases [R, 1, out]."""
        sizes = (4, self._plan.hidden, self._plan.hidden, 2)
        net = []
        for layer, (inputs, outputs) in enumerate(pairwise(sizes)):
            bound, shape = 1 / math.sqrt(inputs), (inputs + 1, outputs)
            drawn = self._stacked(partial(_uniform, bound=bound, shape=shape), 3, layer)
            whole = torch.from_numpy(drawn.astype(np.float32))
            net += [whole[:, :-1].clone().requires_grad_(), whole[:, -1:].clone().requires_grad_()]
        return net

    def starts(self, step: int) -> Floats:
        """Where a cart that begins at this step does so, [R, E, 4]."""
        return self._at(step)[0]

    def explore(self, step: int, epsilon: float, actions: Actions) -> Actions:
        """Actions [R, E], each replaced by a random one with probability epsilon."""
        _, coins, sides, _ = self._at(step)
        return np.where(coins < epsilon, (sides < 0.5).astype(np.int64), actions)

    def batch(self, step: int) -> Floats:
        """Numbers from 0 to 1, [R, B]."""
        return self._at(step)[3]

    def _at(self, step: int) -> tuple[Floats, ...]:
        plan = self._plan
        while step >= len(self._chunks) * self.CHUNK:
            shapes = ((plan.environments, 4), (plan.environments,), (plan.environments,), (plan.batch,))
            kinds = [[rng.random((self.CHUNK, *shape)) for rng in self._generators] for shape in shapes]
            starts, coins, sides, batches = (np.stack(kind, 1) for kind in kinds)
            # A step asks for the next one's starts before its own batch, and never for what is older.
            self._chunks[:-1] = [()] * len(self._chunks[:-1])
            self._chunks.append((starts * 0.1 - 0.05, coins, sides, batches))
        return tuple(kind[step % self.CHUNK] for kind in self._chunks[step // self.CHUNK])

    def _stacked(self, draw: Callable[[np.random.Generator], Floats], *path: int) -> Floats:
        return np.stack([draw(np.random.default_rng([seed, *path])) for seed in self._seeds])


def _uniform(rng: np.random.Generator, bound: float, shape: tuple[int, ...]) -> Floats:
    return rng.uniform(-bound, bound, shape)
