"""What the test modules share: seeded tensors, optimizers in lockstep with the oracle, snapshots."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from oracle import Exact, Settings, join_master, same_bits, ulps
from torch import Tensor

import lookahead_fused
from lookahead_fused._parts import Tuning
from lookahead_fused._table import Table

DTYPE_NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
# A unit in the last place of the storage dtype, in units in the last place of fp32.
STORAGE_ULP = {"float32": 1, "float64": 1, "bfloat16": 2**16, "float16": 2**13}
SHAPES = ((7,), (3, 5), (), (33,), (1,), (0,), (2, 3, 4))
LOOKAHEAD_CLASSES = {
    "adamw": lookahead_fused.LookaheadAdamW,
    "adam": lookahead_fused.LookaheadAdam,
    "sgd": lookahead_fused.LookaheadSGD,
    "rmsprop": lookahead_fused.LookaheadRMSprop,
    "radam": lookahead_fused.LookaheadRAdam,
    "lion": lookahead_fused.LookaheadLion,
}
LOOKAHEAD_ARGUMENTS = ("k", "alpha", "pullback_momentum", "outer_momentum", "outer_nesterov")
TORCH_CLASSES = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "radam": torch.optim.RAdam,
}


class UnfusedRMSprop(torch.optim.RMSprop):
    """A base whose step is its own: a subclass may step differently."""


EXTERNAL_CLASSES = {"external": UnfusedRMSprop, "nadam": torch.optim.NAdam}


@dataclasses.dataclass(frozen=True)
class BackendCase:
    """A backend and where to try it. `ulps`: how far one step may be from the exact bits."""

    name: str
    device: str
    ulps: float


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_tensor(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    generator: torch.Generator,
    device: str = "cpu",
    scale: float = 1.0,
) -> Tensor:
    return (torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * scale).to(dtype).to(device)


def make_params(
    shapes: Iterable[Sequence[int]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    device: str = "cpu",
) -> list[torch.nn.Parameter]:
    generator = seeded(seed)
    return [torch.nn.Parameter(make_tensor(shape, dtype, generator=generator, device=device)) for shape in shapes]


def make_grads(
    params: Iterable[Tensor],
    *,
    generator: torch.Generator,
    dtype: torch.dtype | None = None,
    scale: float = 1.0,
) -> list[Tensor]:
    return [
        make_tensor(p.shape, dtype or p.dtype, generator=generator, device=p.device.type, scale=scale) for p in params
    ]


def set_grad(param: Tensor, grad: Tensor | None) -> None:
    """Sets `param.grad`, also to one of another dtype (torch >= 2.10 wants `grad_dtype` told so first)."""
    if grad is not None and grad.dtype != param.dtype:
        param.grad = None
        param.grad_dtype = None
    param.grad = grad


def can_set_grad_dtype() -> bool:
    return hasattr(torch.Tensor, "grad_dtype")


def to_numpy(tensor: Tensor) -> np.ndarray:
    """The values; 16-bit ones in fp32, where they are exact."""
    tensor = tensor.detach().resolve_neg().cpu()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    # A copy of torch's making: NumPy's, of zeros without memory, was noise before torch 2.13.
    copied: np.ndarray = tensor.clone(memory_format=torch.contiguous_format).numpy(force=True)
    return copied


def same_tensor_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and same_bits(to_numpy(a), to_numpy(b))


def with_whole_master(param: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state with the master in fp32, as the oracle has it, where it is kept in two halves."""
    if "master_low" not in state:
        return dict(state)
    low = state["master_low"]
    assert (param.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    whole = torch.from_numpy(join_master(to_numpy(param), to_numpy(low)))
    return {"master_param" if name == "master_low" else name: v for name, v in state.items()} | {"master_param": whole}


# ------------------------------------------------------------------------------------------------------------
# optimizers and their oracles


def tune(optimizer: Any, **tuning: Any) -> None:
    """Has a fresh optimizer work as it is told, whatever its own choice would be; see `_parts.Tuning`."""
    table = optimizer._table
    optimizer._table = Table(table.rule, table.policy, Tuning(**tuning))


def take_lookahead(rule: str, hyper: dict[str, Any]) -> dict[str, Any]:
    """Takes Lookahead's arguments out of a class's, as a wrapper calls them: RMSprop's `alpha` is its own."""
    alpha = "lookahead_alpha" if rule == "rmsprop" else "alpha"
    names = {name: alpha if name == "alpha" else name for name in LOOKAHEAD_ARGUMENTS}
    return {name: hyper.pop(ours) for name, ours in names.items() if ours in hyper}


def wrap(rule: str, groups: Any, backend: BackendCase, **hyper: Any) -> lookahead_fused.Lookahead:
    """`Lookahead` over torch's own class of this rule."""
    ours = take_lookahead(rule, hyper)
    base = (TORCH_CLASSES | EXTERNAL_CLASSES)[rule](groups, **hyper)
    return lookahead_fused.Lookahead(base, **ours, backend=backend.name)


def make_optimizer(rule: str, groups: Any, backend: BackendCase, **hyper: Any) -> torch.optim.Optimizer:
    """An optimizer of `rule`; "wrapped-" before its name means `Lookahead` over torch's class."""
    if rule.startswith("wrapped-"):
        return wrap(rule.removeprefix("wrapped-"), groups, backend, **hyper)
    return LOOKAHEAD_CLASSES[rule](groups, **hyper, backend=backend.name)


def oracle_settings(rule: str, **hyper: Any) -> Settings:
    values = {name: as_python_number(value) for name, value in hyper.items()}
    if "betas" in values:
        values["betas"] = tuple(as_python_number(beta) for beta in values["betas"])
    rule = rule.removeprefix("wrapped-")
    ours = take_lookahead(rule, values)
    if "alpha" in values:
        values["square_decay"] = values.pop("alpha")
    return Settings(rule=rule, **values, **ours)


def as_python_number(value: Any) -> Any:
    """What a tensor or a NumPy scalar holds, exactly; anything else as it is."""
    return value.item() if isinstance(value, Tensor | np.generic) else value


class Lockstep:
    """An optimizer and an exact oracle for each of its parameters, stepped together and compared.

    Args:
        rule: one of `LOOKAHEAD_CLASSES`, or one of torch's after "wrapped-" for `Lookahead` over torch's class.
        groups: per parameter group its shapes (or parameters) and its own hyperparameters.
        dtype: of the parameters; `grad_dtype` of the gradients (default: the same).
        hyper: hyperparameters for all groups.
    """

    def __init__(
        self,
        backend: BackendCase,
        rule: str,
        *groups: tuple[Sequence[Any], dict[str, Any]],
        dtype: torch.dtype = torch.float32,
        grad_dtype: torch.dtype | None = None,
        seed: int = 0,
        **hyper: Any,
    ) -> None:
        groups = groups or ((SHAPES, {}),)
        self.backend, self.rule, self.grad_dtype = backend, rule, grad_dtype
        self.generator = seeded(seed + 1)
        self.params: list[torch.nn.Parameter] = []
        self.oracles: list[Exact] = []
        torch_groups = []
        for index, (members, own) in enumerate(groups):
            params = [m for m in members if isinstance(m, Tensor)] or make_params(
                members, dtype, seed=seed + 100 * index, device=backend.device
            )
            settings = oracle_settings(rule, **{**hyper, **own})
            self.params += params
            self.oracles += [Exact(to_numpy(p), DTYPE_NAMES[p.dtype], settings) for p in params]
            torch_groups.append({"params": params, **own})
        self.optimizer = make_optimizer(rule, torch_groups, backend, **hyper)

    def step(self, grads: Sequence[Tensor | None] | None = None, **oracle_kwargs: Any) -> None:
        """Sets the gradients (seeded ones by default), steps both, compares."""
        if grads is None:
            grads = make_grads(self.params, generator=self.generator, dtype=self.grad_dtype)
        for p, g in zip(self.params, grads, strict=True):
            set_grad(p, g)
        self.follow(grads, **oracle_kwargs)

    def follow(self, grads: Sequence[Tensor | None], **oracle_kwargs: Any) -> None:
        """Steps both on gradients that are already set, and compares."""
        if self.backend.ulps:
            self.adopt()
        before = [o.param.copy() for o in self.oracles]
        self.optimizer.step()
        for o, g in zip(self.oracles, grads, strict=True):
            if g is not None:
                o.step(to_numpy(g), **oracle_kwargs)
        self.check(before)

    def set_settings(self, **changes: Any) -> None:
        """Changes hyperparameters of all groups from now on, as a scheduler does: in the groups."""
        for group in self.optimizer.param_groups:
            group.update(changes)
        for o in self.oracles:
            o.settings = dataclasses.replace(o.settings, **changes)

    def adopt(self) -> None:
        """Takes the optimizer's state into the oracle: a tolerance is for one step and does not add up."""
        for p, o in zip(self.params, self.oracles, strict=True):
            o.param = to_numpy(p)
            state = with_whole_master(p, self.optimizer.state[p]) if o.state else {}
            for name in o.state:
                o.state[name] = to_numpy(state[name])

    def check(self, before: Sequence[np.ndarray] | None = None) -> None:
        """Parameters, and the whole of the state: names, dtypes, shapes, values."""
        for i, (p, o) in enumerate(zip(self.params, self.oracles, strict=True)):
            where = f"parameter {i} of shape {tuple(p.shape)} after step {o.step_count}"
            state = with_whole_master(p, self.optimizer.state.get(p, {}))
            if o.step_count == 0:
                assert not state, f"{where}: state without a step: {set(state)}"
                continue
            step_name = "step"
            assert set(state) == {step_name, *o.state}, where
            assert state[step_name].item() == o.step_count, where
            magnitude = before[i] if before is not None else None
            self._check_tensor(f"{where}: param", p, o.param, o.dtype, magnitude)
            for name, expected in o.state.items():
                storage = "float64" if o.dtype == "float64" else "float32"
                assert DTYPE_NAMES[state[name].dtype] == storage, f"{where}: {name} is {state[name].dtype}"
                self._check_tensor(f"{where}: {name}", state[name], expected, storage, magnitude)

    def _check_tensor(
        self, where: str, actual: Tensor, expected: np.ndarray, storage: str, magnitude: np.ndarray | None
    ) -> None:
        values = to_numpy(actual)
        expected = np.asarray(expected)
        assert values.shape == expected.shape, where
        if self.backend.ulps == 0:
            assert same_bits(values, expected), (
                f"{where} differs by {ulps(values, expected)} ulp:\n{values}\n{expected}"
            )
        else:
            distance = ulps(values, expected, magnitude) / STORAGE_ULP[storage]
            assert distance <= self.backend.ulps, f"{where} differs by {distance} ulp:\n{values}\n{expected}"


class Composed:
    """torch.optim's optimizer and Lookahead written beside it with whole-tensor operations, per parameter.

    Args:
        optimizer: an optimizer of torch.optim.
        momentum_name: the state that pullback and reset act on.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        k: int = 5,
        alpha: float = 0.5,
        pullback_momentum: str = "none",
        outer_momentum: float = 0.0,
        outer_nesterov: bool = True,
        momentum_name: str = "exp_avg",
    ) -> None:
        self.optimizer, self.k, self.alpha = optimizer, k, alpha
        self.pullback_momentum, self.momentum_name = pullback_momentum, momentum_name
        # The outer step is one of SGD along phi - theta.
        self.outer = dict(lr=alpha, momentum=outer_momentum, nesterov=outer_nesterov and outer_momentum > 0)
        self.outers: dict[Tensor, torch.optim.SGD] = {}
        self.slow: dict[Tensor, Tensor] = {}
        self.steps: dict[Tensor, int] = {}
        self.cached: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self) -> None:
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        with_grad = [p for p in params if p.grad is not None]
        for p in with_grad:
            self.slow.setdefault(p, p.detach().clone())
        self.optimizer.step()
        for p in with_grad:
            self.steps[p] = self.steps.get(p, 0) + 1
            if self.steps[p] % self.k == 0:
                slow = self.slow[p]
                slow.grad = slow - p
                self.outers.setdefault(p, torch.optim.SGD([slow], **self.outer)).step()
                p.copy_(slow)
                self._momentum(p)

    def _momentum(self, p: Tensor) -> None:
        momentum = self.optimizer.state[p].get(self.momentum_name)
        if momentum is None or self.pullback_momentum == "none":
            return
        if self.pullback_momentum == "reset":
            momentum.zero_()
            return
        cached = self.cached.get(p, torch.zeros_like(momentum))
        alpha = min(self.alpha, 1.0)
        momentum.mul_(alpha).add_((1 - alpha) * cached)
        self.cached[p] = momentum.clone()


def composed(rule: str, groups: Any, **hyper: Any) -> Composed:
    """`Composed` over torch's class of `rule`, with our keywords among `hyper`."""
    ours = take_lookahead(rule, hyper)
    name = "momentum_buffer" if rule in ("sgd", "rmsprop") else "exp_avg"
    return Composed(TORCH_CLASSES[rule](groups, **hyper), **ours, momentum_name=name)


# ------------------------------------------------------------------------------------------------------------
# nothing changed


def snapshot(optimizer: torch.optim.Optimizer, params: Iterable[Tensor] = ()) -> dict[str, Any]:
    """A deep copy of all that a step could change: parameters, gradients, state, hyperparameters."""
    groups = optimizer.param_groups
    params = [*params] or [p for group in groups for p in group["params"]]
    return {
        "params": [p.detach().clone() for p in params],
        "grads": [None if p.grad is None else p.grad.detach().clone() for p in params],
        "state": [{name: copy.deepcopy(value) for name, value in optimizer.state.get(p, {}).items()} for p in params],
        "states": len(optimizer.state),
        "groups": [
            {name: copy.deepcopy(value) for name, value in group.items() if name != "params"} for group in groups
        ],
        "members": [[id(p) for p in group["params"]] for group in groups],
    }


def assert_unchanged(before: Any, after: Any, where: str = "snapshot") -> None:
    """Deep comparison of two snapshots, tensors by their bits."""
    assert type(before) is type(after), f"{where}: {before!r} became {after!r}"
    if isinstance(before, dict):
        assert before.keys() == after.keys(), f"{where}: {set(before)} became {set(after)}"
        for name in before:
            assert_unchanged(before[name], after[name], f"{where}.{name}")
    elif isinstance(before, list):
        assert len(before) == len(after), f"{where}: {len(before)} entries became {len(after)}"
        for i, (b, a) in enumerate(zip(before, after, strict=True)):
            assert_unchanged(b, a, f"{where}[{i}]")
    elif isinstance(before, Tensor):
        assert (before.dtype, before.shape) == (after.dtype, after.shape), where
        if before.layout == torch.strided and before.dtype in DTYPE_NAMES:
            assert same_tensor_bits(before, after), f"{where}: {before} became {after}"
        else:
            assert torch.equal(torch.as_tensor(before.to_dense()), torch.as_tensor(after.to_dense())), where
    else:
        assert before == after or before != before, f"{where}: {before!r} became {after!r}"


def check_message(error: BaseException, argument: str, came: str) -> None:
    message = str(error)
    assert argument in message, f"does not name {argument!r}: {message!r}"
    assert re.search(came, message), f"does not tell what came ({came!r}): {message!r}"
    # What was expected: there is more in the message than the name and the value.
    assert len(message) > len(argument) + 15, f"does not tell what was expected: {message!r}"
