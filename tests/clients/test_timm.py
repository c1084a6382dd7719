"""timm: the names that `register()` gives it, by its factory, its training script's arguments and its checkpoints."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import same_weights, weights
from torch import Tensor, nn
from torchvision_apart import torchvision_apart

import lookahead_fused
from lookahead_fused._fused import FusedLookahead
from lookahead_fused.integrations.timm import register

if importlib.util.find_spec("timm") is None:
    pytest.skip("timm is not installed", allow_module_level=True)
# One that is, and lacks what it imports, is a failure.
with torchvision_apart():
    import timm
    import timm.scheduler
    import timm.utils
    from timm import optim

PREFIX = "lookaheadfused"
CLASSES = {
    cls.__name__.removeprefix("Lookahead").lower(): cls
    for cls in vars(lookahead_fused).values()
    if inspect.isclass(cls) and issubclass(cls, FusedLookahead)
}
# What timm's own entries of the inner optimizers set besides.
PRESET: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "nesterov": True},
    "rmsprop": {"momentum": 0.9, "alpha": 0.9},
}
LR, DECAY, K = 1e-2, 0.1, 2


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.models.VisionTransformer(**sizes)


def backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(4, 3, 8, 8, generator=generator)
    labels = torch.randint(3, (4,), generator=generator)
    model.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Sequence[int], schedule: Any = None) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()
        if schedule is not None:
            schedule.step_update(step + 1)


def undecayed(name: str, p: Tensor) -> bool:
    return p.dim() <= 1 or name in ("pos_embed", "cls_token")


def slow_weights(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [optimizer.state[p]["slow_param"] for p in model.parameters()]


def test_every_class_has_a_name_and_the_traits_of_timms_own() -> None:
    """What timm takes out of the arguments, and presets, is the inner optimizer's."""

    def traits(name: str) -> tuple[Any, ...]:
        info = optim.get_optimizer_info(name)
        return info.has_eps, info.has_momentum, info.has_betas, info.num_betas, info.second_order, info.defaults or {}

    assert optim.list_optimizers(f"{PREFIX}*") == sorted(PREFIX + inner for inner in CLASSES)
    for inner, cls in CLASSES.items():
        assert optim.get_optimizer_class(PREFIX + inner, bind_defaults=False) is cls
        assert traits(PREFIX + inner) == traits(inner)


def test_twice_is_once_and_another_makers_entry_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    listed = optim.list_optimizers(with_description=True)
    register()
    assert optim.list_optimizers(with_description=True) == listed
    assert caplog.messages == []
    registry = timm.optim._optim_factory.default_registry
    registry.register(optim.OptimInfo(f"{PREFIX}adamw", torch.optim.AdamW))
    caplog.clear()
    register()
    assert optim.get_optimizer_class(f"{PREFIX}adamw", bind_defaults=False) is CLASSES["adamw"]
    assert [f"{PREFIX}adamw already registered" in message for message in caplog.messages] == [True]


@pytest.mark.parametrize("inner", CLASSES)
def test_its_factory_makes_what_is_made_by_hand(inner: str) -> None:
    """Weight decay spares biases, norms, the class token and the positions."""
    model, twin = make_model(), make_model()
    optimizer = optim.create_optimizer_v2(model, opt=PREFIX + inner, lr=LR, weight_decay=DECAY, k=K)
    assert type(optimizer) is CLASSES[inner]
    named = {p: name for name, p in model.named_parameters()}
    by_decay = {g["weight_decay"]: {named[p] for p in g["params"]} for g in optimizer.param_groups}
    spared = {name for name, p in model.named_parameters() if undecayed(name, p)}
    assert by_decay == {0.0: spared, DECAY: set(named.values()) - spared}

    groups = [
        {"params": [p for name, p in twin.named_parameters() if undecayed(name, p)], "weight_decay": 0.0},
        {"params": [p for name, p in twin.named_parameters() if not undecayed(name, p)], "weight_decay": DECAY},
    ]
    by_hand: Any = CLASSES[inner](groups, lr=LR, k=K, **PRESET.get(inner, {}))
    for one, its in ((model, optimizer), (twin, by_hand)):
        train(one, its, range(5))
    assert same_weights(weights(model), weights(twin))
    assert same_weights(slow_weights(model, optimizer), slow_weights(twin, by_hand))
    assert not same_weights(weights(model), slow_weights(model, optimizer))


@pytest.mark.parametrize("inner", CLASSES)
def test_its_scripts_arguments_arrive(inner: str) -> None:
    """As its train.py hands them on; what an inner optimizer does not have, timm leaves out."""
    parser = argparse.ArgumentParser()
    for name, kind in (("opt", str), ("lr", float), ("weight-decay", float), ("momentum", float), ("opt-eps", float)):
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--opt-betas", type=float, nargs="+")
    parser.add_argument("--opt-kwargs", nargs="*", default={}, action=timm.utils.ParseKwargs)
    args = parser.parse_args(
        f"--opt {PREFIX}{inner} --lr 0.2 --weight-decay 0.3 --momentum 0.7 --opt-eps 1e-6 --opt-betas 0.8 0.95 "
        "--opt-kwargs k=3 pullback_momentum=reset backend=reference max_grad_norm=1.5".split()
    )
    model = make_model()
    optimizer: Any = optim.create_optimizer_v2(model, **optim.optimizer_kwargs(cfg=args), **args.opt_kwargs)
    given = {"lr": 0.2, "momentum": 0.7, "eps": 1e-6, "betas": (0.8, 0.95), "k": 3, "backend": "reference"}
    given["pullback_momentum"] = "reset"
    accepted = inspect.signature(CLASSES[inner]).parameters
    for group in optimizer.param_groups:
        arrived = {name: group[name] for name in given if name in group}
        arrived["betas"] = tuple(arrived.get("betas", ()))
        assert arrived == {"betas": (), **{name: value for name, value in given.items() if name in accepted}}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.3}
    train(model, optimizer, [0])
    # Told where gradients are clipped, else NaN.
    assert optimizer.grad_norm > 0


def layered(seed: int, inner: str) -> tuple[nn.Module, Any, Any]:
    model = make_model(seed)
    optimizer = optim.create_optimizer_v2(
        model, opt=PREFIX + inner, lr=LR, weight_decay=DECAY, layer_decay=0.5, k=K, pullback_momentum="pullback"
    )
    cosine = timm.scheduler.CosineLRScheduler(
        optimizer, t_initial=8, warmup_t=2, warmup_lr_init=1e-3, t_in_epochs=False
    )
    return model, optimizer, cosine


def test_layers_have_their_own_rates_under_its_scheduler() -> None:
    """By hand: a group for each parameter, whose rate is set before each step."""
    model, optimizer, cosine = layered(0, "adamw")
    named = {p: name for name, p in model.named_parameters()}
    scale = {named[p]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert [scale[name] for name in ("cls_token", "pos_embed", "patch_embed.proj.weight")] == [0.5**3] * 3
    assert [scale[f"blocks.{i}.mlp.fc1.weight"] for i in range(2)] == [0.5**2, 0.5]
    assert scale["head.weight"] == 1.0

    twin = make_model()
    groups: list[dict[str, Any]] = [
        {"params": [p], "weight_decay": 0.0 if undecayed(name, p) else DECAY} for name, p in twin.named_parameters()
    ]
    by_hand = lookahead_fused.LookaheadAdamW(groups, k=K, pullback_momentum="pullback")
    names = [name for name, _ in twin.named_parameters()]
    for step in range(6):
        rate = 1e-3 + step * (LR - 1e-3) / 2 if step < 2 else 0.5 * LR * (1 + math.cos(math.pi * step / 8))
        for group, name in zip(by_hand.param_groups, names, strict=True):
            group["lr"] = rate * scale[name]
        train(twin, by_hand, [step])
    train(model, optimizer, range(6), cosine)
    assert same_weights(weights(model), weights(twin))
    assert same_weights(slow_weights(model, optimizer), slow_weights(twin, by_hand))


@pytest.mark.parametrize("inner", ["adamw", "sgd"])
def test_its_checkpoint_resumes_between_two_syncs(inner: str, tmp_path: Path) -> None:
    """With its layer-wise rates and its schedule, in its files, read back with weights_only."""
    model, optimizer, cosine = layered(0, inner)
    train(model, optimizer, range(3), cosine)
    timm.utils.CheckpointSaver(model, optimizer, checkpoint_dir=tmp_path, recovery_dir=tmp_path).save_checkpoint(
        epoch=3
    )
    train(model, optimizer, range(3, 6), cosine)

    resumed, its_optimizer, its_cosine = layered(1, inner)
    assert timm.models.resume_checkpoint(resumed, tmp_path / "last.pth.tar", its_optimizer, log_info=False) == 4
    its_cosine.step_update(3)
    train(resumed, its_optimizer, range(3, 6), its_cosine)
    assert same_weights(weights(resumed), weights(model))
    assert same_weights(slow_weights(resumed, its_optimizer), slow_weights(model, optimizer))


def test_its_own_names_stay_its_own() -> None:
    optimizer: Any = optim.create_optimizer_v2(make_model(), opt="lookahead_adamw", lr=LR)
    assert type(optimizer) is optim.Lookahead
    assert type(optimizer._base_optimizer) is torch.optim.AdamW
