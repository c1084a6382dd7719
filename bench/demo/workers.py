"""Loss against bytes sent, for 1 to 64 workers: data-parallel training, local SGD and DiLoCo.

    python -m bench.demo.workers [--quick]

All workers live in this process. Each has weights and an optimizer of its own, the real one, with a k that is never
reached; every k steps the mean of the weights over the workers is put into each of them, and `sync()` makes the outer
step from it. That is what `process_group=` does in processes of their own, where one all_reduce makes the mean.

Two problems: the noisy quadratic model (Zhang et al. 2019, arXiv 1907.04164), whose loss is known exactly, and a small
GPT over the bytes of Python's standard library. (A quadratic's gradient is linear, and so local SGD reaches there just
what data-parallel training does.) A worker's bytes are those that it gives to all_reduce, of gradients in
every step or of weights at a sync; alone it sends none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.demo import data
from bench.demo.models import BYTES, GPT
from lookahead_fused import LookaheadAdamW, LookaheadSGD

NEVER = 2**53
SEED = 0
# Of a run how far it was when its loss is told.
MARKS = (0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Method:
    """How workers learn of each other; k None: by the mean of their gradients, in every step."""

    name: str
    k: int | None
    alpha: float = 1.0
    outer_momentum: float = 0.0


METHODS = (
    Method("data-parallel", None),
    Method("local SGD", 8),
    Method("DiLoCo", 8, alpha=0.7, outer_momentum=0.5),
    Method("DiLoCo", 32, alpha=0.7, outer_momentum=0.5),
)


class Replica(Protocol):
    """One worker's copy of what is trained; all of them start alike."""

    params: list[nn.Parameter]

    def differentiate(self) -> None:
        """Sets the gradients of a batch that no other worker sees."""

    def loss(self) -> float: ...


class Problem(Protocol):
    title: str

    def replicas(self, count: int) -> list[Replica]: ...
    def optimizer(self, params: list[nn.Parameter], **outer: Any) -> Any: ...


class Quadratic:
    """The noisy quadratic model: loss sum(h theta^2) / 2 with h = 1, 1/2, 1/3, ..., and gradients with variance h."""

    def __init__(self, dimension: int = 1000, lr: float = 0.05) -> None:
        self.title = f"Noisy quadratic of {dimension} dimensions, SGD with momentum"
        self.curvature = 1.0 / torch.arange(1, dimension + 1)
        self.lr = lr

    def replicas(self, count: int) -> list[Replica]:
        return [_QuadraticReplica(self.curvature, seed) for seed in range(count)]

    def optimizer(self, params: list[nn.Parameter], **outer: Any) -> Any:
        return LookaheadSGD(params, lr=self.lr, momentum=0.9, **outer)


class _QuadraticReplica:
    def __init__(self, curvature: Tensor, seed: int) -> None:
        self.curvature = curvature
        self.params = [nn.Parameter(torch.ones_like(curvature))]
        self.noise = torch.Generator().manual_seed(SEED + seed)

    def differentiate(self) -> None:
        noise = torch.randn(self.curvature.shape, generator=self.noise) * self.curvature.sqrt()
        self.params[0].grad = self.curvature * self.params[0].detach() + noise

    def loss(self) -> float:
        return float((self.curvature * self.params[0].detach().square()).sum()) / 2


class Text:
    """A small GPT, the demo's, over bytes."""

    def __init__(self, width: int = 32, layers: int = 2, context: int = 32, batch: int = 4, max_bytes: int = 2 << 20):
        self.width, self.layers, self.context = width, layers, context
        self.title = f"GPT of width {width} and {layers} layers over the standard library's source, AdamW"
        self.batch, self.max_bytes = batch, max_bytes

    def replicas(self, count: int) -> list[Replica]:
        # One stream of random windows, from its beginning in every run: whoever asks next gets others.
        sizes = {"context": self.context, "batch": self.batch, "max_bytes": self.max_bytes}
        text = data.stdlib_text(**sizes, seed=SEED, held_out_batches=16)
        replicas: list[Replica] = []
        for _ in range(count):
            torch.manual_seed(SEED)
            model = GPT(self.width, self.layers, heads=4, context=self.context)
            replicas.append(_TextReplica(model, text.train, text.held_out))
        return replicas

    def optimizer(self, params: list[nn.Parameter], **outer: Any) -> Any:
        return LookaheadAdamW(params, lr=3e-3, weight_decay=0.1, **outer)


class _TextReplica:
    def __init__(self, model: GPT, train: Iterator[data.Batch], held_out: list[data.Batch]) -> None:
        self.model, self.train, self.held_out = model, train, held_out
        self.params = list(model.parameters())

    def differentiate(self) -> None:
        self.model.zero_grad()
        self._loss(next(self.train)).backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def loss(self) -> float:
        return sum(float(self._loss(batch)) for batch in self.held_out) / len(self.held_out)

    def _loss(self, batch: data.Batch) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(self.model(inputs).view(-1, BYTES), targets.reshape(-1))


@dataclass(frozen=True)
class Run:
    """What some workers reached: their loss at each mark, and the bytes that one of them had sent by then."""

    method: Method
    workers: int
    losses: list[float]
    sent: list[int]


def run(problem: Problem, method: Method, workers: int, steps: int) -> Run:
    """Trains for so many steps of every worker; the loss is that of the weights on which they agree.

    Raises:
        ValueError: There are steps to a mark that no sync ends.
    """
    marks = [round(mark * steps) for mark in MARKS]
    if method.k is not None and any(mark % method.k for mark in marks):
        raise ValueError(f"steps must make every mark of {marks} a multiple of k={method.k}, got {steps}")
    replicas = problem.replicas(workers)
    weights = sum(p.numel() * p.element_size() for p in replicas[0].params) if workers > 1 else 0
    outer = {"k": NEVER, "alpha": method.alpha, "outer_momentum": method.outer_momentum}
    optimizers = [problem.optimizer(replica.params, **outer) for replica in replicas]
    losses, sent, total = [], [], 0
    for step in range(1, steps + 1):
        for replica in replicas:
            replica.differentiate()
        if method.k is None:
            put_mean([[p.grad for p in replica.params] for replica in replicas])
            total += weights
        for optimizer in optimizers:
            optimizer.step()
        if method.k is not None and step % method.k == 0:
            put_mean([[p.detach() for p in replica.params] for replica in replicas])
            total += weights
            for optimizer in optimizers:
                optimizer.sync()
        if step in marks:
            losses.append(replicas[0].loss())
            sent.append(total)
    return Run(method, workers, losses, sent)


@torch.no_grad()
def put_mean(of_workers: Sequence[Sequence[Tensor | None]]) -> None:
    """What all_reduce does to each worker's tensors."""
    for tensors in zip(*of_workers, strict=True):
        present = [tensor for tensor in tensors if tensor is not None]
        mean = torch.stack(present).sum(0) / len(present)
        for tensor in present:
            tensor.copy_(mean)


def show(problem: Problem, runs: Sequence[Run], steps: int) -> str:
    """A table: a line for each run, and for each mark the loss and the bytes that a worker had sent."""
    marks = [round(mark * steps) for mark in MARKS]
    lines = [problem.title, f"{'workers':>7}  {'method':<18}" + "".join(f"{f'after {m} steps':>28}" for m in marks)]
    lines.append(" " * 27 + f"{'loss':>14}{'sent, MB':>14}" * len(marks))
    for one in runs:
        name = one.method.name + ("" if one.method.k is None else f", k={one.method.k}")
        cells = "".join(f"{loss:>14.4f}{sent / 1e6:>14.3f}" for loss, sent in zip(one.losses, one.sent, strict=True))
        lines.append(f"{one.workers:>7}  {name:<18}{cells}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs both problems, and prints a table of each; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer workers and steps, some seconds")
    quick = parser.parse_args(arguments).quick
    plan: list[tuple[Problem, tuple[int, ...], int]] = [
        (Quadratic(), (1, 4) if quick else (1, 2, 4, 8, 16, 32, 64), 128 if quick else 512),
        (Text(max_bytes=(1 if quick else 4) << 19), (1, 2) if quick else (1, 4, 16, 64), 128),
    ]
    for problem, counts, steps in plan:
        runs = []
        for count in counts:
            runs += [run(problem, method, count, steps) for method in METHODS]
        print(show(problem, runs, steps), end="\n\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
