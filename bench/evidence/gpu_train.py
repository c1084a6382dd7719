"""One run of the GPU measurement: a network, an optimizer, and epochs that can be resumed at each one's end.

What is random in an epoch comes from its number and the seed, so that a run which was cut off goes on as if it had not
been: from its checkpoint, which holds tensors and numbers alone and is read with `weights_only`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from bench.evidence.gpu_data import Cifar, Images, Tokens, augment, normalise, windows
from bench.evidence.gpu_models import GPT, ResNet
from lookahead_fused import EMA, GPA, Lookahead, LookaheadAdamW, LookaheadSGD


@dataclass(frozen=True)
class Point:
    """What is tuned of an arm."""

    lr: float
    weight_decay: float


Make = Callable[[list[nn.Parameter], Point], Any]


@dataclass(frozen=True)
class Arm:
    """How an optimizer is made, the points it is tuned over, and the arm it is compared with, over the same ones."""

    make: Make
    points: tuple[Point, ...]
    against: str


class Task(Protocol):
    """What is trained.

    Attributes:
        epochs: of a run.
        metric: of `evaluate`, by which points and arms are compared; `better` is +1 where larger is better, else -1.
    """

    @property
    def name(self) -> str: ...
    @property
    def arms(self) -> Mapping[str, Arm]: ...
    @property
    def epochs(self) -> int: ...
    @property
    def metric(self) -> str: ...
    @property
    def better(self) -> int: ...
    def model(self) -> nn.Module: ...
    def train(self, model: nn.Module, optimizer: Any, lr: float, epoch: int, seed: int, final: bool) -> float:
        """One epoch; its mean loss. `final`: on all there is to train on; else a part is left to validate on."""
        ...

    def evaluate(self, model: nn.Module, optimizer: Any, final: bool) -> dict[str, float]:
        """On the slow weights; `final`: on the test set."""
        ...


@dataclass(frozen=True)
class Size:
    """The plan of a task: sizes of its network, lengths, batch, and learning rates of the grid."""

    epochs: int
    batch: int
    width: int
    steps: int = 0
    layers: int = 12
    heads: int = 12
    context: int = 1024
    parts: int = 1  # a batch is differentiated in
    held_out: int = 64  # windows of a text that are evaluated on


class Classify:
    """The Lookahead paper's CIFAR: ResNet-18, crops and mirrors, lr / 5 at 30, 60 and 80 % of the epochs."""

    metric, better = "accuracy", 1

    def __init__(self, name: str, data: Cifar, size: Size, device: torch.device, lrs: tuple[float, ...]) -> None:
        self.name, self.size, self.device = name, size, device
        self.epochs = size.epochs
        self._classes = data.classes
        self._train, self._test = data.train.to(device), data.test.to(device)
        self.arms = cifar_arms(lrs)

    def model(self) -> nn.Module:
        model = ResNet(self._classes, self.size.width)
        return model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def train(self, model: nn.Module, optimizer: Any, lr: float, epoch: int, seed: int, final: bool) -> float:
        set_lr(optimizer, lr * 0.2 ** sum(epoch >= round(part * self.epochs) for part in (0.3, 0.6, 0.8)))
        data = self._seen(final)
        random = torch.Generator(self.device).manual_seed(seed * 100_003 + epoch)
        order = torch.randperm(len(data.labels), generator=random, device=self.device)
        total = torch.zeros((), device=self.device)
        model.train()
        # The last, smaller batch is trained on too.
        for places in parts(order, self.size.batch):
            inputs = normalise(augment(data.images[places], random))
            lost = self._loss(model, inputs, data.labels[places])
            optimizer.zero_grad()
            lost.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += lost.detach() * len(places)
        return float(total) / len(order)

    def evaluate(self, model: nn.Module, optimizer: Any, final: bool) -> dict[str, float]:
        data = self._test if final else self._train[-self._validating() :]
        with slow_weights(optimizer), torch.no_grad(), self._statistics(model, optimizer, final):
            model.eval()
            lost = right = 0.0
            for images, labels in zip(parts(data.images, 1000), parts(data.labels, 1000), strict=True):
                with autocast(self.device):
                    logits = model(_laid_out(normalise(images)))
                lost += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
                right += float((logits.argmax(1) == labels).sum())
        return {"accuracy": 100 * right / len(data.labels), "loss": lost / len(data.labels)}

    def _loss(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        with autocast(self.device):
            logits = model(_laid_out(inputs))
        return F.cross_entropy(logits.float(), labels)

    def _seen(self, final: bool) -> Images:
        return self._train if final else self._train[: -self._validating()]

    def _validating(self) -> int:
        """A tenth of the training images: the last 5000."""
        return len(self._train.labels) // 10

    def _statistics(self, model: nn.Module, optimizer: Any, final: bool) -> AbstractContextManager[None]:
        """Batch normalisation's running statistics are the trained weights'; others need their own for a while."""
        if not hasattr(optimizer, "slow_weights"):
            return nullcontext()
        return _OwnStatistics(model, self._seen(final).images, self.size.batch, self.device)


class _OwnStatistics(AbstractContextManager[None]):
    """Statistics of the present weights over the first images; those from before come back at the end."""

    BATCHES = 50

    def __init__(self, model: nn.Module, images: Tensor, batch: int, device: torch.device) -> None:
        self._norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        self._model, self._device = model, device
        self._batches = list(parts(images[: self.BATCHES * batch], batch))

    def __enter__(self) -> None:
        self._kept = [{name: value.clone() for name, value in norm.named_buffers()} for norm in self._norms]
        self._momenta = [norm.momentum for norm in self._norms]
        for norm in self._norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over the batches
        self._model.train()
        random = torch.Generator(self._device).manual_seed(0)
        for images in self._batches:
            with autocast(self._device):
                self._model(_laid_out(normalise(augment(images, random))))

    def __exit__(self, *_: object) -> None:
        for norm, kept, momentum in zip(self._norms, self._kept, self._momenta, strict=True):
            norm.momentum = momentum
            for name, value in norm.named_buffers():
                value.copy_(kept[name])


class Write:
    """A GPT over tokens: AdamW with warm-up and cosine to a tenth, clipped at norm 1. An epoch is `steps` steps."""

    metric, better = "loss", -1

    def __init__(self, name: str, data: Tokens, size: Size, device: torch.device, lrs: tuple[float, ...]) -> None:
        self.name, self.size, self.device, self._data = name, size, device, data
        self.epochs = size.epochs
        self.arms = gpt_arms(lrs)
        shorter = min(len(data.train), len(data.held_out) // 2)
        if shorter <= size.context:
            raise ValueError(f"{data.source}: {shorter} tokens are too few for a context of {size.context}")

    def model(self) -> nn.Module:
        size = self.size
        return GPT(self._data.vocabulary, size.context, size.layers, size.heads, size.width).to(self.device)

    def train(self, model: nn.Module, optimizer: Any, lr: float, epoch: int, seed: int, final: bool) -> float:
        size, whole = self.size, self.epochs * self.size.steps
        warm_up = max(1, whole // 20)
        random = np.random.default_rng([seed, epoch])
        total = 0.0
        model.train()
        for step in range(epoch * size.steps, (epoch + 1) * size.steps):
            cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * step / whole))
            set_lr(optimizer, lr * min(cosine, (step + 1) / warm_up))
            batch = windows(self._data.train, size.batch, size.context + 1, random).to(self.device)
            optimizer.zero_grad()
            for part in batch.chunk(size.parts):
                lost = self._loss(model, part) * (len(part) / size.batch)
                lost.backward()  # type: ignore[no-untyped-call]
                total += float(lost.detach())
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return total / size.steps

    def evaluate(self, model: nn.Module, optimizer: Any, final: bool) -> dict[str, float]:
        # The first half of what is held out is for tuning, the second for the comparison.
        half = len(self._data.held_out) // 2
        text = self._data.held_out[half:] if final else self._data.held_out[:half]
        batch = windows(text, self.size.held_out, self.size.context + 1, np.random.default_rng(0)).to(self.device)
        model.eval()
        with slow_weights(optimizer), torch.no_grad():
            lost = [float(self._loss(model, part)) * len(part) for part in parts(batch, 8)]
        return {"loss": sum(lost) / len(batch)}

    def _loss(self, model: nn.Module, tokens: Tensor) -> Tensor:
        with autocast(self.device):
            logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def cifar_arms(lrs: tuple[float, ...]) -> dict[str, Arm]:
    """The paper's SGD and Lookahead (k 5, alpha .8), their controls, and AdamW with and without."""
    sgd = tuple(Point(lr, decay) for lr in lrs for decay in (3e-4, 1e-3, 3e-3))
    # AdamW's decay is times the learning rate, and its learning rates are of another size.
    adamw = tuple(Point(lr / 100, decay) for lr in lrs for decay in (0.1, 0.3, 1.0))

    def plain(params: list[nn.Parameter], point: Point, factor: float = 1.0) -> Optimizer:
        return SGD(params, point.lr * factor, momentum=0.9, weight_decay=point.weight_decay)

    def lookahead(params: list[nn.Parameter], p: Point) -> Any:
        return LookaheadSGD(params, p.lr, momentum=0.9, weight_decay=p.weight_decay, k=5, alpha=0.8)

    def lookahead_adamw(params: list[nn.Parameter], p: Point) -> Any:
        return LookaheadAdamW(params, p.lr, weight_decay=p.weight_decay, k=5, alpha=0.8)

    return {
        "sgd": Arm(plain, sgd, "sgd"),
        "sgd-small-lr": Arm(lambda params, p: plain(params, p, 0.8), sgd, "sgd"),
        "lookahead-sgd": Arm(lookahead, sgd, "sgd"),
        "ema-sgd": Arm(lambda params, p: EMA(plain(params, p), 0.999, warmup=True), sgd, "sgd"),
        "adamw": Arm(lambda params, p: AdamW(params, p.lr, weight_decay=p.weight_decay), adamw, "adamw"),
        "lookahead-adamw": Arm(lookahead_adamw, adamw, "adamw"),
    }


def gpt_arms(lrs: tuple[float, ...]) -> dict[str, Arm]:
    """AdamW with betas .9 and .95, and over it SNOO, GPA, an average, and Lookahead."""
    points = tuple(Point(lr, 0.1) for lr in lrs)

    def base(params: list[nn.Parameter], point: Point) -> Optimizer:
        decayed, others = [p for p in params if p.ndim > 1], [p for p in params if p.ndim < 2]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        return AdamW(groups, point.lr, (0.9, 0.95), weight_decay=point.weight_decay)

    return {
        "adamw": Arm(base, points, "adamw"),
        "snoo": Arm(lambda params, p: Lookahead(base(params, p), 30, 0.7, outer_momentum=0.5), points, "adamw"),
        "gpa": Arm(lambda params, p: GPA(base(params, p), 0.7, 0.9967), points, "adamw"),
        "ema": Arm(lambda params, p: EMA(base(params, p), 0.999, warmup=True), points, "adamw"),
        "lookahead": Arm(lambda params, p: Lookahead(base(params, p), 5, 0.5), points, "adamw"),
    }


def train(
    task: Task, arm: str, point: Point, seed: int, final: bool, checkpoint: Path, told: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Trains to the end, from the checkpoint where there is one; the last epoch's line.

    Args:
        told: is given a line of each epoch: its number, losses, metric.
    """
    torch.manual_seed(seed)
    model = task.model()
    optimizer = task.arms[arm].make(list(model.parameters()), point)
    # Where learning rates are set by a schedule: of "small-lr" it begins lower.
    peak = optimizer.param_groups[0]["lr"]
    begin = 0
    line: dict[str, Any] | None = None
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        begin, line = saved["epochs"], saved["line"]
    for epoch in range(begin, task.epochs):
        loss = task.train(model, optimizer, peak, epoch, seed, final)
        line = {"epoch": epoch + 1, "train_loss": loss, **task.evaluate(model, optimizer, final)}
        save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epochs": epoch + 1, "line": line},
            checkpoint,
        )
        told(line)
    if line is None:
        raise ValueError(f"{task.name} has no epochs")
    return line


def save(state: dict[str, Any], path: Path) -> None:
    """Whole or not at all: a run that is cut off while it saves has the checkpoint from before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def set_lr(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def slow_weights(optimizer: Any) -> AbstractContextManager[None]:
    block: Callable[[], AbstractContextManager[None]] = getattr(optimizer, "slow_weights", nullcontext)
    return block()


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bf16 on a GPU; on a CPU, where dry runs are, fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def parts(whole: Tensor, size: int) -> Iterator[Tensor]:
    for begin in range(0, len(whole), size):
        yield whole[begin : begin + size]


def _laid_out(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)
