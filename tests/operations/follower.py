"""The oracle as an optimizer: what Lookahead computes, asked of its tensors anew in every step.

It keeps nothing but what stands in `param_groups` and `state`, so whatever an operation does to them it follows.
Where `oracle.Exact` knows the rule it gives the bits. Elsewhere the inner step is torch's own, made in fp64, and right
to rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from helpers import DTYPE_NAMES, assert_unchanged, oracle_settings, to_numpy, with_whole_master
from oracle import Exact, Settings, lerp
from torch import Tensor

from .worlds import BASES, SETTINGS, World, base_of, has_bits, spelled

FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
CACHED_MOMENT = "cached_momentum"
# The count of an inner step that is not fused.
OWN_COUNT = "lookahead_step"
# What torch keeps as one number, in fp32 beside a parameter of any dtype.
SCALARS = ("step", "mu_product")
# How far an inner step in the parameter's own precision may be from one in fp64, in units in the last place of the
# largest number that went into the tensor: a dozen operations.
TOLERANCE = 64


class Follower(torch.optim.Optimizer):
    """Lookahead over one of torch's rules, in NumPy and fp64.

    Args:
        rule: one of `worlds.RULES`.
        groups: as for the optimizer that it follows.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, rule: str, groups: list[dict[str, Any]]) -> None:
        self.rule = rule
        of_torch = BASES[base_of(rule)]([torch.nn.Parameter(torch.empty(0))]).defaults
        ours = {spelled(rule, "k"): 5, spelled(rule, "alpha"): 0.5, spelled(rule, "pullback_momentum"): "none"}
        super().__init__(groups, {**of_torch, **ours})
        # How large were the numbers that a step over torch's own rule took a parameter's entries from.
        self.magnitudes: dict[Tensor, dict[str, float]] = {}
        if not has_bits(rule):
            # Adagrad makes its state before the first step.
            base = self._base([p for group in self.param_groups for p in group["params"]], self.param_groups[0])
            self.state.update({p: dict(state) for p, state in base.state.items()})

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {**state, "rule": self.rule, "magnitudes": {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Every entry as it was saved."""
        for own, group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            own.update({name: value for name, value in group.items() if name != "params"})
        params = [p for group in self.param_groups for p in group["params"]]
        self.state.clear()
        for index, entries in state_dict["state"].items():
            self.state[params[index]] = {
                name: v.detach().clone() if isinstance(v, Tensor) else v for name, v in entries.items()
            }

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        if self.found_inf is not None and self.found_inf.item() != 0:
            return
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if has_bits(self.rule):
                    exact = self._exact(p, group)
                    exact.step(to_numpy(p.grad), None if self.grad_scale is None else self.grad_scale.item())
                    self._store(p, exact)
                else:
                    self._step_base(p, group)

    @torch.no_grad()
    def sync(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if "slow_param" not in self.state.get(p, {}):
                    continue
                if has_bits(self.rule):
                    exact = self._exact(p, group)
                    exact.begin()
                    exact.sync()
                    self._store(p, exact)
                else:
                    self._sync_base(p, group)

    @contextmanager
    def slow_weights(self) -> Iterator[None]:
        held = [(p, p.detach().clone(), own["slow_param"]) for p, own in self.state.items() if "slow_param" in own]
        with torch.no_grad():
            for p, _, slow in held:
                p.copy_(slow)
        try:
            yield
        finally:
            with torch.no_grad():
                for p, fast, _ in held:
                    p.copy_(fast)

    # ---- where the bits are known ------------------------------------------------------------------------------

    def _exact(self, p: Tensor, group: dict[str, Any]) -> Follow:
        names = [field.name for field in dataclasses.fields(Settings)]
        hyper = {name: group[spelled(self.rule, name)] for name in names if spelled(self.rule, name) in group}
        hyper.pop("decoupled_weight_decay", None)
        exact = Follow(to_numpy(p), DTYPE_NAMES[p.dtype], oracle_settings(base_of(self.rule), **hyper))
        own = dict(self.state.get(p, {}))
        exact.step_count = int(own.pop("step", torch.zeros(())).item())
        used = exact.names_in_use()
        exact.state = {name: to_numpy(value).astype(exact.T) for name, value in own.items() if name in used}
        return exact

    def _store(self, p: Tensor, exact: Exact) -> None:
        p.copy_(torch.from_numpy(np.array(exact.param)))
        # What a setting has put out of use stays as it is.
        self.state[p].update({name: torch.from_numpy(np.array(value)) for name, value in exact.state.items()})
        self.state[p]["step"] = torch.tensor(float(exact.step_count), dtype=torch.float64)

    # ---- where they are torch's --------------------------------------------------------------------------------

    def _base(self, params: list[Any], group: dict[str, Any]) -> torch.optim.Optimizer:
        foreign = ["params", *(spelled(self.rule, name) for name in SETTINGS)]
        hyper = {name: value for name, value in group.items() if name not in foreign}
        made = BASES[base_of(self.rule)](params)
        made.param_groups[0].update(hyper)
        return made

    def _step_base(self, p: Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        own = self.state[p]
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        moment = next((own[name] for name in FIRST_MOMENTS if name in own), None)
        slow = own.get("slow_param", p.detach().to(dtype, copy=True))
        cached = own.get(CACHED_MOMENT)
        if cached is None and group[spelled(self.rule, "pullback_momentum")] == "pullback":
            cached = torch.zeros_like(slow) if moment is None else moment.to(dtype, copy=True)
        count = own.get(OWN_COUNT, torch.zeros((), dtype=torch.float64)).double() + 1

        into = max(largest(p), largest(p.grad))
        magnitudes = self.magnitudes[p] = {name: max(largest(value), into) for name, value in own.items()}
        mirror = torch.nn.Parameter(p.double())
        mirror.grad = p.grad.double()
        base = self._base([mirror], group)
        ours = ("slow_param", CACHED_MOMENT, OWN_COUNT)
        theirs = {n: v.clone() if n in SCALARS else v.double() for n, v in own.items() if n not in ours}
        if theirs:
            base.state[mirror] = theirs
        base.step()
        magnitudes["param"] = max(largest(p), largest(mirror))
        p.copy_(mirror)
        self.state[p] = {**base.state[mirror], "slow_param": slow, OWN_COUNT: count}
        if cached is not None:
            self.state[p][CACHED_MOMENT] = cached
        if count.item() % group[spelled(self.rule, "k")] == 0:
            self._sync_base(p, group)

    def _sync_base(self, p: Tensor, group: dict[str, Any]) -> None:
        own, alpha = self.state[p], float(group[spelled(self.rule, "alpha")])
        mode = group[spelled(self.rule, "pullback_momentum")]
        own["slow_param"] = between(own["slow_param"], p, alpha)
        p.copy_(own["slow_param"])
        name = next((name for name in FIRST_MOMENTS if name in own), None)
        if name is None or mode == "none":
            return
        if mode == "reset":
            own[name] = torch.zeros_like(own[name])
            return
        own[CACHED_MOMENT] = between(own.get(CACHED_MOMENT, own[name]), own[name], alpha)
        own[name] = own[CACHED_MOMENT].clone()


class Follow(Exact):
    """`Exact`, also for state that was found and not made by it."""

    def begin(self) -> None:
        """Makes what the settings of now ask for and the state lacks."""
        self._create_state()

    def names_in_use(self) -> set[str]:
        made = Follow(self.param, self.dtype, self.settings)
        made.begin()
        return set(made.state)

    def _create_state(self) -> None:
        # A mode that is switched on in the run takes the parameter for just synced.
        name = self.momentum_name
        if self.settings.pullback_momentum == "pullback" and name in self.state:
            self.state.setdefault(CACHED_MOMENT, self.state[name].copy())
        super()._create_state()


def largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def between(slow: Tensor, fast: Tensor, alpha: float) -> Tensor:
    dtype = torch.float64 if fast.dtype == torch.float64 and slow.dtype == torch.float64 else torch.float32
    return torch.from_numpy(np.array(lerp(to_numpy(slow.to(dtype)), to_numpy(fast.to(dtype)), alpha)))


def assert_follows(oracle: World, other: World, made: str) -> None:
    """Weights and state as the oracle has them: to the bit, or to rounding and then taken over, since a tolerance is
    for one step and does not add up. What the bits are the oracle does not know where torch `made` them."""
    ours_alone = ("param", "slow_param", CACHED_MOMENT, OWN_COUNT)
    assert_unchanged(oracle.seen, [s for s in other.seen if not isinstance(s, str)], "oracle's view")
    for index, (ours, theirs) in enumerate(zip(oracle.params, other.params, strict=True)):
        expected = {"param": ours.detach(), **oracle.state_of(ours)}
        actual = {"param": theirs.detach(), **with_whole_master(theirs.detach(), other.state_of(theirs))}
        where = f"oracle: parameter {index}"
        if OWN_COUNT in actual and actual[OWN_COUNT].item() == 0:
            # Beside a state that a base made early; not begun, and so nothing yet.
            for name in (OWN_COUNT, "slow_param"):
                del actual[name]
        assert expected.keys() == actual.keys(), f"{where}: {set(expected)} is due, not {set(actual)}"
        for name, value in expected.items():
            if not made or (made == "loaded" and name in ours_alone):
                assert_unchanged(value, actual[name], f"{where}.{name}")
            else:
                magnitude = oracle.optimizer.magnitudes.get(ours, {}).get(name, 0.0)
                _assert_close(value, actual[name], theirs.dtype, magnitude, f"{where}.{name}")
        if made:
            with torch.no_grad():
                ours.copy_(theirs)
            oracle.optimizer.state[ours] = {name: actual[name].detach().clone() for name in expected if name != "param"}


def _assert_close(expected: Tensor, actual: Tensor, dtype: torch.dtype, magnitude: float, where: str) -> None:
    """Slow weights are as coarse as the weights of `dtype` that they were made of."""
    assert expected.shape == actual.shape, where
    a, b = expected.double(), actual.double()
    if a.numel() == 0:
        return
    unit = max(torch.finfo(actual.dtype).eps, torch.finfo(dtype).eps)
    allowed = TOLERANCE * unit * max(largest(a), magnitude)
    distance = (a - b).abs().max().item()
    assert distance <= allowed, f"{where} is {distance:.3g} from the oracle's, {allowed:.3g} is allowed:\n{a}\n{b}"
