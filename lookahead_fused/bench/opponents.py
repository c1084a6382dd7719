"""The optimizers that are compared: ours, what torch alone can do, and what its users install.

A `Setting` says what is computed; an `Opponent` makes an optimizer for it or says why it cannot. Hyperparameters are
the same for all, and none of them is one that would let a side skip work. Where a side does other work than the rest,
its name or its note says so.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from lookahead_fused import LookaheadAdam, LookaheadAdamW, LookaheadSGD
from lookahead_fused.backends import BACKENDS

from .measure import Unavailable

K = 5
ALPHA = 0.5
HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1},
    "adam": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4},
    "sgd": {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4},
}
RULE_TITLES = {"adamw": "AdamW", "adam": "Adam", "sgd": "SGD momentum 0.9"}
OURS_CLASSES = {"adamw": LookaheadAdamW, "adam": LookaheadAdam, "sgd": LookaheadSGD}
TORCH_CLASSES: dict[str, Any] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}

DTYPE_TITLES = {
    "fp32": "fp32",
    "bf16": "bf16 parameters and gradients",
    "bf16-master": "bf16 parameters and gradients, fp32 masters",
}

Params = Iterable[Tensor] | Iterable[dict[str, Any]]


class Steps(Protocol):
    """What a comparison needs of an optimizer."""

    def step(self) -> object: ...


@dataclass(frozen=True)
class Setting:
    """What is computed.

    Attributes:
        rule: a key of ``RULE_TITLES``.
        dtype: a key of ``DTYPE_TITLES``.
        k: steps from one sync to the next.
        device: "cpu" or "cuda".
    """

    rule: str = "adamw"
    dtype: str = "fp32"
    k: int = K
    device: str = "cpu"

    @property
    def param_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "fp32" else torch.bfloat16


# ------------------------------------------------------------------------------------------------------------
# Lookahead as it is written without us


class _Sync:
    """A base optimizer, and after every k-th of its steps an interpolation; a subclass says how."""

    def __init__(self, base: Steps, fast: Iterable[Tensor], k: int = K, alpha: float = ALPHA) -> None:
        self.base = base
        self.k = k
        self.alpha = alpha
        self.steps = 0
        # Detached views: in-place operations on them need no grad mode, which would cost this side time.
        self.fast: list[Tensor] = [p.detach() for p in fast]
        self.slow: list[Tensor] = [p.clone() for p in self.fast]

    def step(self) -> None:
        self.base.step()
        self.steps += 1
        if self.steps % self.k == 0:
            self.sync()

    def sync(self) -> None:
        raise NotImplementedError


def _all(groups: Iterable[Mapping[str, Any]]) -> list[Tensor]:
    return [p for group in groups for p in group["params"]]


class ForeachSync(_Sync):
    """Lookahead as a careful user of torch writes it: every k-th step with a foreach sync.

    Two calls for all tensors, no Python loop over them, nothing allocated: what is left only fusing can save.

    Args:
        base: the inner optimizer; all its parameters are interpolated.
        k: steps between syncs.
        alpha: the share of the way that the slow weights go.
    """

    def __init__(self, base: Optimizer, k: int = K, alpha: float = ALPHA) -> None:
        super().__init__(base, _all(base.param_groups), k, alpha)

    def sync(self) -> None:
        torch._foreach_lerp_(self.slow, self.fast, self.alpha)
        torch._foreach_copy_(self.fast, self.slow)


class PythonSync(_Sync):
    """Lookahead as most of its implementations write it: three operations for each tensor, and a temporary."""

    def __init__(self, base: Optimizer, k: int = K, alpha: float = ALPHA) -> None:
        super().__init__(base, _all(base.param_groups), k, alpha)

    def sync(self) -> None:
        for fast, slow in zip(self.fast, self.slow, strict=True):
            slow.add_(fast - slow, alpha=self.alpha)
            fast.copy_(slow)


class MasterWeights:
    """fp32 masters of 16-bit parameters, as training loops keep them: gradients in, a fused step, parameters out.

    Args:
        make: makes the optimizer of the masters, from groups.
        groups: the parameters' groups.
    """

    def __init__(self, make: Callable[[Params], Steps], groups: Iterable[dict[str, Any]]) -> None:
        groups = list(groups)
        self.params = _all(groups)
        self.fast = [p.detach() for p in self.params]
        self.masters = [p.float() for p in self.fast]
        self.gradients = [torch.zeros_like(p) for p in self.masters]
        masters = iter(self.masters)
        own = [{**group, "params": [next(masters) for _ in group["params"]]} for group in groups]
        for master, gradient in zip(self.masters, self.gradients, strict=True):
            master.grad = gradient
        self.base = make(own)

    def step(self) -> None:
        torch._foreach_copy_(self.gradients, [p.grad for p in self.params if p.grad is not None])
        self.base.step()
        torch._foreach_copy_(self.fast, self.masters)


# ------------------------------------------------------------------------------------------------------------
# who is compared


@dataclass(frozen=True)
class Opponent:
    """One side of a comparison.

    Attributes:
        name: what reports call it.
        make: the optimizer for a setting's groups.
        refusal: why it cannot serve a setting here, or "".
        note: what else a reader must know, or "".
    """

    name: str
    make: Callable[[Setting, list[dict[str, Any]]], Steps]
    refusal: Callable[[Setting], str] = lambda setting: ""
    note: str = ""


OURS = "lookahead_fused"
SYNC = "torch fused + foreach sync"
PLAIN = "torch fused, no Lookahead"
MASTERS = "torch fused on fp32 masters + foreach sync"
SWITCHES = {"fused": {"fused": True}, "foreach": {"foreach": True}, "per-tensor": {"foreach": False, "fused": False}}
SYNCS = {"foreach": ForeachSync, "Python": PythonSync}


def make_ours(backend: str, setting: Setting, groups: list[dict[str, Any]]) -> Steps:
    # Named, not "auto": without the native module this raises and does not time something else.
    made: Steps = OURS_CLASSES[setting.rule](
        groups, **HYPERPARAMETERS[setting.rule], k=setting.k, alpha=ALPHA, backend=backend,
        master_weights=setting.dtype == "bf16-master",
    )  # fmt: skip
    return made


def _torch(implementation: str, sync: str, setting: Setting, groups: list[dict[str, Any]]) -> Steps:
    base: Optimizer = TORCH_CLASSES[setting.rule](groups, **HYPERPARAMETERS[setting.rule], **SWITCHES[implementation])
    return SYNCS[sync](base, setting.k) if sync else base


def _no_masters(setting: Setting) -> str:
    return "torch keeps no masters: see the opponent that adds them" if setting.dtype == "bf16-master" else ""


def _masters(setting: Setting, groups: list[dict[str, Any]]) -> Steps:
    return MasterWeights(lambda own: _torch("fused", "foreach", setting, list(own)), groups)  # type: ignore[arg-type]


def _needs_masters(setting: Setting) -> str:
    return "" if setting.dtype == "bf16-master" else "for bf16 parameters with fp32 masters"


def installed_reason(*names: str) -> str:
    """Why a package cannot be imported, or ""."""
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            # An installed package that its own requirements keep from importing is no opponent, and no failure of ours.
            package = name.partition(".")[0]
            missing = isinstance(error, ModuleNotFoundError) and error.name == package
            return f"{package} is not installed" if missing else f"{package} cannot be imported: {error}"
    return ""


def _installed(names: tuple[str, ...], rules: tuple[str, ...], setting: Setting) -> str:
    if setting.rule not in rules:
        return f"has no {RULE_TITLES[setting.rule]} to compare with"
    return _no_masters(setting) or installed_reason(*names)


def _wrapper(module: str, setting: Setting, groups: list[dict[str, Any]]) -> Steps:
    base = _torch("fused", "", setting, groups)
    lookahead = importlib.import_module(module).Lookahead
    wrapped: Steps = lookahead(base, alpha=ALPHA, k=setting.k)
    return wrapped


def _ranger(setting: Setting, groups: list[dict[str, Any]]) -> Steps:
    own = HYPERPARAMETERS["adamw"]
    made: Steps = importlib.import_module("optimi").Ranger(groups, **own, k=setting.k, alpha=ALPHA)
    return made


def _on_gpu(module: str, setting: Setting, groups: list[dict[str, Any]]) -> Steps:
    package = importlib.import_module(module)
    own = HYPERPARAMETERS[setting.rule]
    if setting.rule == "sgd":
        return ForeachSync(package.FusedSGD(groups, **own), setting.k)
    return ForeachSync(package.FusedAdam(groups, **own, adam_w_mode=setting.rule == "adamw"), setting.k)


def _on_gpu_refusal(module: str, setting: Setting) -> str:
    return "needs a GPU" if setting.device == "cpu" else _no_masters(setting) or installed_reason(module)


def _opponents() -> Iterable[Opponent]:
    for implementation in SWITCHES:
        for sync in SYNCS:
            make = partial(_torch, implementation, sync)
            yield Opponent(f"torch {implementation} + {sync} sync", make, _no_masters)
    yield Opponent(PLAIN, partial(_torch, "fused", ""), _no_masters)
    yield Opponent(MASTERS, _masters, _needs_masters)
    late = "takes its slow weights only at its first sync"
    for name, module, note in (("timm", "timm.optim", late), ("pytorch_optimizer", "pytorch_optimizer", "")):
        refusal = partial(_installed, (module,), tuple(RULE_TITLES))
        yield Opponent(f"{name}'s Lookahead over torch fused", partial(_wrapper, module), refusal, note)
    yield Opponent(
        "torch-optimi's Ranger", _ranger, partial(_installed, ("optimi",), ("adamw",)),
        "its inner step is RAdam, not AdamW",
    )  # fmt: skip
    for name, module in (("apex", "apex.optimizers"), ("TransformerEngine", "transformer_engine.pytorch.optimizers")):
        yield Opponent(f"{name} fused + foreach sync", partial(_on_gpu, module), partial(_on_gpu_refusal, module))


OPPONENTS = {opponent.name: opponent for opponent in _opponents()}
BF16_NOTE = "torch keeps bf16 moments: fewer bytes than ours, whose moments and slow weights are fp32"


def ours(device: str) -> list[Opponent]:
    """This package, once for each backend that serves a device type; the one that "auto" prefers comes first.

    Raises:
        Unavailable: no backend serves; the message says why.
    """
    reasons: list[str] = []
    made: list[Opponent] = []
    for name, module in BACKENDS.items():
        if module.DEVICES is None or device not in module.DEVICES:
            continue
        reason = module.unavailable()
        if reason:
            reasons.append(f"{name}: {reason}")
            continue
        title = f"{OURS}, backend {name}" if made else OURS
        made.append(Opponent(title, partial(make_ours, name)))
    if not made:
        raise Unavailable(f"no backend serves a {device}: {'; '.join(reasons)}")
    return made
