"""Parameters and gradients of classes around other tensors, which hold no memory of their own: they are stepped by
torch's operators, as their class has them, or refused by its name before anything changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import BackendCase, assert_unchanged, make_optimizer, same_tensor_bits, seeded, snapshot
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

RULES: dict[str, dict[str, Any]] = {
    "adamw": {"weight_decay": 0.1, "pullback_momentum": "pullback"},
    "sgd": {"momentum": 0.9, "pullback_momentum": "reset"},
    "wrapped-adamw": {},
    "wrapped-external": {"momentum": 0.9, "pullback_momentum": "pullback"},
}
of_each_rule = pytest.mark.parametrize("rule", RULES)
aten = torch.ops.aten


class Around(Tensor):
    """A tensor of one more level, as those of 8-bit floating point are: operators give plain tensors, but for the few
    that the weights of a module need, and those that write."""

    inner: Tensor
    KEEP = (aten.detach.default, aten.clone.default, aten.view.default, aten._to_copy.default)

    @staticmethod
    def __new__(cls, inner: Tensor) -> Around:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments, named = tree_map_only(cls, lambda tensor: tensor.inner, (args, kwargs or {}))
        result = func(*arguments, **named)
        if func._schema.is_mutable:
            return args[0]
        return cls(result) if func in cls.KEEP else result


class AroundState(Around):
    """As `Around`, and what is made like it is of this class too."""

    KEEP = (*Around.KEEP, aten.zeros_like.default, aten.empty_like.default)


class WithoutState(Around):
    """Nothing can be made like it."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in cls.KEEP:
            raise NotImplementedError(f"no {func}")
        return super().__torch_dispatch__(func, types, args, kwargs)


class WithoutDivision(Around):
    """State can be made like it, and a part of a step be computed."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.div.Tensor, aten.sub.Tensor, aten.sub_.Tensor, aten.addcdiv_.default, aten.add_.Tensor):
            raise NotImplementedError(f"no {func}")
        return super().__torch_dispatch__(func, types, args, kwargs)


class ReadOnly(Around):
    """All can be computed, and not be written."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable and isinstance(args[0], cls):
            raise NotImplementedError(f"no {func}")
        return super().__torch_dispatch__(func, types, args, kwargs)


@of_each_rule
@pytest.mark.parametrize("cls", [Around, AroundState])
@pytest.mark.parametrize("around", ["parameter", "gradient", "both", "in turn"])
def test_they_are_stepped_by_operators(backend: BackendCase, rule: str, cls: type[Around], around: str) -> None:
    """To the bits of plain ones, beside which they stand; and they trade places with their slow weights."""
    generator = seeded(3)
    values = [torch.randn(5, generator=generator).to(backend.device) for _ in range(2)]
    plain = [torch.nn.Parameter(value.clone()) for value in values]
    wraps = around in ("parameter", "both")
    params = [torch.nn.Parameter(v.clone()) for v in values[:1]]
    params += [torch.nn.Parameter(cls(values[1].clone()) if wraps else values[1].clone())]
    ours, twin = (make_optimizer(rule, ps, backend, lr=0.1, k=2, **RULES[rule]) for ps in (params, plain))

    def same() -> None:
        for p, q in zip(params, plain, strict=True):
            assert same_tensor_bits(bare(p), q)
            for name, value in twin.state[q].items():
                assert same_tensor_bits(bare(ours.state[p][name]), value), name

    for step in range(7):
        for p, q in zip(params, plain, strict=True):
            q.grad = torch.randn(5, generator=generator).to(backend.device)
            p.grad = q.grad.clone()
        if around in ("gradient", "both") or (around == "in turn" and step % 3 == 1):
            params[1].grad = cls(plain[1].grad.clone())  # type: ignore[union-attr]
        ours.step()
        twin.step()
        same()
    with ours.slow_weights(), twin.slow_weights():
        same()
    same()
    ours.sync()
    twin.sync()
    same()


def bare(tensor: Tensor) -> Tensor:
    return tensor.inner if isinstance(tensor, Around) else tensor


# A base of its own comes to the gradient first.
REFUSED = [(rule, cls, "parameter", 0) for rule in RULES for cls in (WithoutState, WithoutDivision, ReadOnly)]
REFUSED += [(rule, WithoutState, "gradient", steps) for rule in RULES if rule != "wrapped-external" for steps in (0, 3)]


@pytest.mark.parametrize(("rule", "cls", "around", "steps_before"), REFUSED)
def test_what_operators_do_not_serve_is_refused(
    backend: BackendCase, rule: str, cls: type[Around], around: str, steps_before: int
) -> None:
    """By the class's name, with the parameters before it unmoved and no state made; mended, the run goes on."""
    params = [torch.nn.Parameter(torch.ones(5, device=backend.device)) for _ in range(2)]
    spoilt = torch.nn.Parameter(cls(params[1].detach().clone()) if around == "parameter" else params[1].detach())
    optimizer = make_optimizer(rule, [params[0], spoilt], backend, lr=0.1, k=2, **RULES[rule])
    for p in (params[0], spoilt):
        p.grad = torch.ones_like(params[0])
    for _ in range(steps_before):
        optimizer.step()
    before = snapshot(optimizer, params[:1])
    if around == "gradient":
        spoilt.grad = cls(torch.ones(5, device=backend.device))
    spoilt_before = bare(spoilt).detach().clone()
    state_before = {name: value.clone() for name, value in optimizer.state.get(spoilt, {}).items()}
    for _ in range(2):
        with pytest.raises(TypeError, match=f"^parameter 1 of group 0 must be .* got a {cls.__name__}: NotImplemented"):
            optimizer.step()
        assert_unchanged(before, snapshot(optimizer, params[:1]))
        assert same_tensor_bits(bare(spoilt).detach(), spoilt_before)
        assert_unchanged(state_before, dict(optimizer.state.get(spoilt, {})))
    spoilt.grad = torch.ones(5, device=backend.device) if around == "gradient" else None
    optimizer.step()
    assert not torch.equal(params[0], before["params"][0])


@of_each_rule
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_fake_parameters(backend: BackendCase, rule: str, inside: bool) -> None:
    """As programs have them that plan memory: a step computes nothing, and makes the state that a real one makes."""
    if backend.device != "cpu":
        pytest.skip("a fake tensor of a GPU asks for one")
    mode = FakeTensorMode()
    with mode:
        p = torch.nn.Parameter(torch.ones(5))
        p.grad = torch.ones(5)
    q = torch.nn.Parameter(torch.ones(5))
    q.grad = torch.ones(5)
    ours, twin = (make_optimizer(rule, [t], backend, lr=0.1, k=2, **RULES[rule]) for t in (p, q))
    for _ in range(3):
        twin.step()
        if inside:
            with mode:
                ours.step()
        else:
            ours.step()
    assert ours.state[p].keys() == twin.state[q].keys()
    for name, value in twin.state[q].items():
        found = ours.state[p][name]
        assert isinstance(found, FakeTensor) or (name.endswith("step") and not inside), name
        assert (found.shape, found.dtype) == (value.shape, value.dtype), name


@of_each_rule
def test_a_newcomer_is_stepped_once_where_one_beside_it_was_refused(backend: BackendCase, rule: str) -> None:
    def started() -> tuple[Any, list[torch.nn.Parameter]]:
        params = [torch.nn.Parameter(torch.full((5,), 1.0 + i, device=backend.device)) for i in range(2)]
        spoilt = torch.nn.Parameter(WithoutDivision(torch.ones(5, device=backend.device)))
        optimizer = make_optimizer(rule, [*params, spoilt], backend, lr=0.1, k=2, **RULES[rule])
        params[0].grad = torch.ones(5, device=backend.device)
        optimizer.step()
        params[1].grad = torch.ones(5, device=backend.device)
        return optimizer, [*params, spoilt]

    optimizer, params = started()
    params[2].grad = torch.ones(5, device=backend.device)
    for _ in range(2):
        with pytest.raises(TypeError, match=r"^parameter 2 of group 0"):
            optimizer.step()
    params[2].grad = None
    twin, twin_params = started()
    for _ in range(3):
        optimizer.step()
        twin.step()
    for p, q in zip(params[:2], twin_params[:2], strict=True):
        assert same_tensor_bits(p, q)
        for name, value in twin.state[q].items():
            assert same_tensor_bits(optimizer.state[p][name], value), name
