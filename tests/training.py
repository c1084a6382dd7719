"""A training process that saves as it goes, can be killed at any moment, and goes on from its last whole checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import torch
from helpers import BackendCase, UnfusedRMSprop, make_optimizer
from torch import Tensor

import lookahead_fused

STEPS, EVERY = 12, 2
RULES: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 0.02, "weight_decay": 0.1, "amsgrad": True, "pullback_momentum": "pullback", "k": 3, "alpha": 0.4},
    "adam": {"lr": 0.02, "k": 5, "master_weights": True},
    "sgd": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "pullback_momentum": "reset", "k": 4},
    "wrapped-adamw": {"lr": 0.02, "pullback_momentum": "reset", "k": 3, "alpha": 0.8},
    "wrapped-sgd": {"lr": 0.1, "momentum": 0.9, "pullback_momentum": "pullback", "k": 5},
    "external": {"lr": 0.02, "momentum": 0.5},
}


@dataclasses.dataclass(frozen=True)
class Torn:
    """The process ends in the middle of a checkpoint: as `step` is saved, at this byte of a file."""

    step: int
    byte: int


class Model(torch.nn.Module):
    """A small GPT, whose head is in bf16."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(17, 16)
        self.block = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.head = torch.nn.Linear(16, 17, dtype=torch.bfloat16)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = torch.nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        hidden: Tensor = self.block(self.embedding(tokens), mask, is_causal=True)
        logits: Tensor = self.head(hidden.bfloat16())
        return logits.float()


def make(rule: str, backend: str) -> tuple[Model, torch.optim.Optimizer]:
    model = Model()
    # A model that is trained wholly has no state without a step, which torch.distributed.checkpoint could not save.
    if rule == "external":
        base = UnfusedRMSprop(model.parameters(), **RULES[rule])
        return model, lookahead_fused.Lookahead(base, 3, 0.4, "pullback", backend=backend)
    return model, make_optimizer(rule, model.parameters(), BackendCase(backend, "cpu", 0.0), **RULES[rule])


def train(directory: Path, rule: str, backend: str, way: str, report: Any, torn: Torn | None = None) -> None:
    """Trains up to STEPS from wherever the directory's checkpoints are, and reports a digest of all after each step."""
    torch.set_num_threads(1)
    model, optimizer = make(rule, backend)
    save, load = (WAYS | IN_PLACE)[way]
    begin = load(directory, model, optimizer)
    print(begin, digest(model, optimizer) if begin else "", file=report)
    for step in range(begin + 1, STEPS + 1):
        # The batch, the dropout and the learning rate of a step depend on its number alone.
        torch.manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = RULES[rule]["lr"] * min(1.0, step / 4)
        tokens = torch.randint(17, (4, 9))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        print(step, digest(model, optimizer), file=report)
        if step % EVERY == 0:
            if torn is not None and step >= torn.step:
                end_at_byte(torn.byte)
            save(directory, step, model, optimizer)


def end_at_byte(byte: int) -> None:
    """The kernel ends this process as a file grows beyond so many bytes: as by SIGKILL, nothing is run any more."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (byte, byte))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


def digest(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Of every bit that the run goes on from: weights, state, settings."""
    found = hashlib.sha256()
    for p in model.parameters():
        own = optimizer.state[p]
        for name, value in [("", p), *sorted(own.items())]:
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for group in optimizer.param_groups:
        settings = {name: value for name, value in group.items() if name != "params" and "backend" not in name}
        found.update(repr(sorted(settings.items())).encode())
    return found.hexdigest()


# ------------------------------------------------------------------------------------------------------------
# by torch.save: a file under another name, then renamed


def save_file(directory: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    whole, writing = directory / "checkpoint.pt", directory / "checkpoint.writing"
    torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, writing)
    os.replace(writing, whole)


def load_file(directory: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    path = directory / "checkpoint.pt"
    if not path.exists():
        return 0
    checkpoint = torch.load(path, weights_only=True)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    step: int = checkpoint["step"]
    return step


# ------------------------------------------------------------------------------------------------------------
# by torch.distributed.checkpoint: a folder for each, whole once its metadata is there, which is written last


def save_distributed(directory: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, state = get_state_dict(model, optimizer)
    shutil.rmtree(directory / str(step), ignore_errors=True)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=directory / str(step))


def load_distributed(directory: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    whole = [int(path.parent.name) for path in directory.glob("*/.metadata")]
    if not whole:
        return 0
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=directory / str(max(whole)))
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    return max(whole)


WAYS = {"torch.save": (save_file, load_file), "distributed": (save_distributed, load_distributed)}


# ------------------------------------------------------------------------------------------------------------
# as it must not be done: a kill leaves a part of a file under the name of the whole one


def overwrite_file(directory: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    content = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(content, directory / "checkpoint.pt")


IN_PLACE = {"in place": (overwrite_file, load_file)}
