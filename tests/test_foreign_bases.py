"""Bases with ways of their own: what they keep under a first moment's name, what is refused around them, and when."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BackendCase, UnfusedRMSprop, assert_unchanged, make_params, same_tensor_bits, seeded, snapshot
from runs import through_a_file
from torch import Tensor

from lookahead_fused import Lookahead


class NoClone(Tensor):
    """A tensor of a class that knows no operator but detach: a moment that only its own optimizer can read."""

    @staticmethod
    def __new__(cls, like: Tensor) -> NoClone:
        return Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"NoClone has no {function}")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return "NoClone"

    def __deepcopy__(self, memo: Any) -> NoClone:
        return self


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "projected": lambda g: g[:1].clone(),
    "flat": lambda g: g.flatten().clone(),
    "empty": lambda g: torch.empty(0, device=g.device),
    "int8": lambda g: torch.zeros(g.shape, dtype=torch.int8, device=g.device),
    "sparse": lambda g: g.to_sparse(),
    "number": lambda g: 0.5,
    "list": lambda g: [g.clone()],
    "dict": lambda g: {"codes": g.clone(), "scale": 2.0},
    "nothing": lambda g: None,
    "no clone": NoClone,
}
# Tensors that pullback could be asked to act on.
NOT_THE_PARAMETERS = {
    "projected": "'exp_avg'.*shape",
    "flat": "'exp_avg'.*shape",
    "empty": "'exp_avg'.*shape",
    "int8": "'exp_avg'.*floating-point.*int8",
    "sparse": "'exp_avg'.*dense.*sparse",
    "number": "pullback_momentum must be 'none'",
    "list": "pullback_momentum must be 'none'",
    "nothing": "pullback_momentum must be 'none'",
}


class Keeps(torch.optim.Optimizer):
    """Plain gradient descent that keeps something under a first moment's name."""

    def __init__(self, params: Any, form: str, name: str = "exp_avg") -> None:
        super().__init__(params, {"lr": 0.1, "form": form, "name": name})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p][group["name"]] = FORMS[group["form"]](p.grad)
                    p.sub_(group["lr"] * p.grad)


def set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    for i, p in enumerate(params):
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=seeded(100 * step + i)).to(p.device)


def train(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


class Like(torch.optim.Optimizer):
    """The same descent, and no state at all."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad)


# ------------------------------------------------------------------------------------------------------------
# what a base keeps is its own


@pytest.mark.parametrize("name", ["exp_avg", "momentum_buffer"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("by", ["wrapper", "base"])
def test_state_of_a_form_of_its_own(backend: BackendCase, form: str, name: str, by: str) -> None:
    """With pullback_momentum="none" nothing looks at it: not a step, a sync, slow_weights(), a copy or a load; the run
    is the run over a base without state, and goes on from a checkpoint, in which its entries are what they were."""

    def make() -> tuple[list[torch.nn.Parameter], Lookahead]:
        params = make_params([(4, 3), (6,)], device=backend.device)
        return params, Lookahead(Keeps(params, form, name), k=2, backend=backend.name)

    params, optimizer = make()
    twins = make_params([(4, 3), (6,)], device=backend.device)
    twin = Lookahead(Like(twins), k=2, backend=backend.name)
    for o, ps in ((optimizer, params), (twin, twins)):
        train(o, ps, range(5))
        with o.slow_weights():
            saved_inside = o.state_dict()
        o.sync()
    saved = optimizer.state_dict()
    assert len(saved_inside["state"]) == 2
    copied, (resumed_params, resumed) = copy.deepcopy(optimizer), make()
    with torch.no_grad():
        for p, q in zip(params, resumed_params, strict=True):
            q.copy_(p)
    (resumed if by == "wrapper" else resumed.base_optimizer).load_state_dict(saved)
    for p, q in zip(params, resumed_params, strict=True):
        theirs, ours = (o.state[x][name] for o, x in ((resumed, q), (optimizer, p)))
        assert type(theirs) is type(ours)
    for o, ps in ((optimizer, params), (twin, twins), (resumed, resumed_params)):
        train(o, ps, range(5, 8))
    train(copied, copied.param_groups[0]["params"], range(5, 8))
    for p, q, r, s in zip(params, twins, resumed_params, copied.param_groups[0]["params"], strict=True):
        assert same_tensor_bits(p, q)
        assert same_tensor_bits(p, r)
        assert same_tensor_bits(p, s)


@pytest.mark.parametrize("form", NOT_THE_PARAMETERS)
@pytest.mark.parametrize("mode", ["pullback", "reset"])
@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("closure", [False, True])
def test_a_moment_that_is_not_the_parameters(
    backend: BackendCase, form: str, mode: str, steps_before: int, closure: bool
) -> None:
    """A policy that would act on it refuses before the base has stepped. In a first step only the base's own shows it:
    that step is taken back whole, and the run that goes on without is the run that never asked."""
    runs = []
    for asks in (True, False):
        params = make_params([(4, 3), (6,)], device=backend.device)
        optimizer = Lookahead(Keeps(params, form), k=2, backend=backend.name)
        train(optimizer, params, range(steps_before))
        if asks:
            set_gradients(params, steps_before)
            taken = [(p.detach().clone(), dict(optimizer.state.get(p, {}))) for p in params]
            counts = [own["lookahead_step"].item() for _, own in taken if own]
            optimizer.param_groups[0]["lookahead_pullback_momentum"] = mode
            with pytest.raises((TypeError, ValueError), match=NOT_THE_PARAMETERS[form]):
                optimizer.step((lambda: None) if closure else None)
            for p, (weights, own) in zip(params, taken, strict=True):
                assert same_tensor_bits(p, weights)
                now = optimizer.state.get(p, {})
                assert now.keys() == own.keys()
                assert all(now[key] is value for key, value in own.items())
            assert counts == [own["lookahead_step"].item() for _, own in taken if own]
            optimizer.param_groups[0]["lookahead_pullback_momentum"] = "none"
        train(optimizer, params, range(steps_before, 7))
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        assert same_tensor_bits(p, q)


# ------------------------------------------------------------------------------------------------------------
# refused before the base has stepped

BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "NAdam": lambda params: torch.optim.NAdam(params, lr=0.1),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
    "Adadelta": lambda params: torch.optim.Adadelta(params, lr=0.1),
    "none of torch's": Like,
}
BAD: list[tuple[str, Any, str]] = [
    ("k", 0, "k must be"),
    ("k", 2.5, "k must be"),
    ("alpha", 1.5, "alpha must be"),
    ("alpha", float("nan"), "alpha must be"),
    ("alpha", "0.5", "alpha must be"),
    ("pullback_momentum", "pulback", "pullback_momentum must be"),
    ("backend", "cud", "backend must be"),
    ("backend", "no such device", "backend"),
]


@pytest.mark.parametrize("base", ["NAdam", "Adagrad", "none of torch's"])
@pytest.mark.parametrize(("argument", "value", "message"), BAD)
@pytest.mark.parametrize(("steps_before", "closure"), [(0, False), (0, True), (3, False)])
def test_a_bad_setting_is_refused_in_time(
    backend: BackendCase, base: str, argument: str, value: Any, message: str, steps_before: int, closure: bool
) -> None:
    """The bad one is the last group's: neither its parameters nor those before are stepped, or get state."""
    params = make_params([(5,), (6,)], device=backend.device)
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    optimizer = Lookahead(BASES[base](groups), k=2, backend=backend.name)
    train(optimizer, params, range(steps_before))
    if value == "no such device":
        # A backend that there is, and that does not serve where the parameter lies.
        value = "cuda" if backend.device == "cpu" else "cpu"
        error: Any = RuntimeError
    else:
        error = (TypeError, ValueError)
    optimizer.param_groups[1][f"lookahead_{argument}"] = value
    set_gradients(params, steps_before)
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.step((lambda: None) if closure else None)
    assert_unchanged(before, snapshot(optimizer))


@pytest.mark.parametrize("base", ["Adagrad", "Adadelta", "none of torch's"])
@pytest.mark.parametrize("mode", ["pullback", "reset"])
@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("closure", [False, True])
def test_a_moment_that_is_nowhere(backend: BackendCase, base: str, mode: str, steps_before: int, closure: bool) -> None:
    params = make_params([(5,), (6,)], device=backend.device)
    optimizer = Lookahead(BASES[base](params), k=2, backend=backend.name)
    train(optimizer, params, range(steps_before))
    optimizer.param_groups[0]["lookahead_pullback_momentum"] = mode
    set_gradients(params, steps_before)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"pullback_momentum must be 'none' over .*, got '{mode}'"):
        optimizer.step((lambda: None) if closure else None)
    after = snapshot(optimizer)
    # Of a state that is there and empty torch makes the same.
    assert_unchanged({**before, "states": 0}, {**after, "states": 0})


def test_what_gets_no_gradient_is_not_asked_for(backend: BackendCase) -> None:
    """A closure may bring gradients, but none to what needs none: a frozen table of integers may be listed."""
    (p,) = make_params([(5,)], device=backend.device)
    table = torch.nn.Parameter(torch.arange(4, device=backend.device), requires_grad=False)
    optimizer = Lookahead(UnfusedRMSprop([p, table], lr=0.1), k=2, backend=backend.name)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    before = p.detach().clone()
    for _ in range(3):
        optimizer.step(closure)
    assert not torch.equal(p, before)
    assert table.tolist() == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------------------
# complex parameters

TAKES_COMPLEX: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "RMSprop": lambda params: UnfusedRMSprop(params, lr=0.1, momentum=0.9),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=0.1),
    "Adamax": lambda params: torch.optim.Adamax(params, lr=0.1),
}


@pytest.mark.parametrize("base", TAKES_COMPLEX)
@pytest.mark.parametrize("mode", ["none", "pullback", "reset"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters(backend: BackendCase, base: str, mode: str, dtype: torch.dtype) -> None:
    """Around a base that takes them: the run of their real and imaginary parts, through slow_weights(), a sync and a
    checkpoint too; state is complex as the parameter."""

    def make(values: list[Tensor]) -> tuple[list[torch.nn.Parameter], Lookahead]:
        params = [torch.nn.Parameter(value.clone()) for value in values]
        return params, Lookahead(TAKES_COMPLEX[base](params), 2, 0.3, mode, backend=backend.name)

    values = [torch.randn(shape, dtype=dtype, generator=seeded(9)).to(backend.device) for shape in ((4, 3), (), (0,))]
    params, optimizer = make(values)
    reals, twin = make([torch.view_as_real(value) for value in values])

    def train_both(params: list[torch.nn.Parameter], optimizer: Lookahead, steps: range) -> None:
        for step in steps:
            for i, (p, r) in enumerate(zip(params, reals, strict=True)):
                p.grad = torch.randn(p.shape, dtype=dtype, generator=seeded(100 * step + i)).to(p.device)
                r.grad = torch.view_as_real(p.grad).clone()
            optimizer.step()
            twin.step()

    def assert_same(params: list[torch.nn.Parameter]) -> None:
        for p, r in zip(params, reals, strict=True):
            assert same_tensor_bits(torch.view_as_real(p.detach()), r)

    train_both(params, optimizer, range(3))
    assert_same(params)
    with optimizer.slow_weights(), twin.slow_weights():
        assert_same(params)
    optimizer.sync()
    twin.sync()
    assert_same(params)
    for p in params:
        assert optimizer.state[p]["slow_param"].dtype == dtype
    saved = through_a_file(optimizer.state_dict())
    resumed_params, resumed = make([p.detach() for p in params])
    resumed.load_state_dict(saved)
    train_both(resumed_params, resumed, range(3, 8))
    assert_same(resumed_params)


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
def test_complex_parameters_of_a_base_that_cannot(backend: BackendCase) -> None:
    """torch's Adafactor raises for them itself; a fused base, and a dtype without slow weights, are refused by name."""
    for base, dtype, error in (
        (torch.optim.Adafactor, torch.complex64, RuntimeError),
        (torch.optim.AdamW, torch.complex64, TypeError),
        (UnfusedRMSprop, torch.complex32, TypeError),
    ):
        (p,) = make_params([(5,)], device=backend.device)
        z = torch.nn.Parameter(torch.zeros(4, dtype=dtype, device=backend.device))
        optimizer = Lookahead(base([p, z]), k=2, backend=backend.name)
        weights = p.detach().clone()
        p.grad, z.grad = torch.ones_like(p), torch.zeros_like(z)
        with pytest.raises(error, match="complex"):
            optimizer.step()
        assert same_tensor_bits(p, weights)
        assert not any("slow_param" in own for own in optimizer.state.values())
        z.grad = None
        for _ in range(2):
            optimizer.step()
        assert not same_tensor_bits(p, weights)
        assert set(optimizer.state[p]) >= {"slow_param"}
