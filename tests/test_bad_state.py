"""State that cannot be its parameter's, put there by hand or by a checkpoint of another model: every door refuses it by
name, and nothing has changed then."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import (
    BackendCase,
    assert_unchanged,
    can_set_grad_dtype,
    make_optimizer,
    make_params,
    same_tensor_bits,
    set_grad,
    snapshot,
)
from runs import advance, gradients_of

from lookahead_fused import Lookahead, LookaheadAdamW
from lookahead_fused._tensors import local_tensor


def step(optimizer: Any) -> None:
    optimizer.step()


def sync(optimizer: Any) -> None:
    optimizer.sync()


def slow_weights(optimizer: Any) -> None:
    with optimizer.slow_weights():
        pass


DOORS = [step, sync, slow_weights]

RULES = ["adamw", "sgd", "wrapped-adamw", "nadam"]
STEP = {"nadam": "lookahead_step"}
MOMENT = {"sgd": "momentum_buffer"}


def make(rule: str, params: list[torch.nn.Parameter], backend: BackendCase) -> Any:
    ours: dict[str, Any] = {"k": 2, "pullback_momentum": "pullback"}
    if rule == "nadam":
        return Lookahead(torch.optim.NAdam(params, lr=0.1), **ours, backend=backend.name)
    more = {"momentum": 0.9} if rule == "sgd" else {}
    return make_optimizer(rule, params, backend, lr=0.1, **ours, **more)


def number(value: Any) -> Callable[[torch.Tensor], Any]:
    return lambda count: torch.full_like(count, value)


# Of each kind of entry, what it may be by mistake, and the error.
TENSORS: dict[str, tuple[Callable[[torch.Tensor], Any], type[Exception], str]] = {
    "of one output": (lambda t: t[:1].clone(), ValueError, r"shape \(4, 3\), got \(1, 3\)"),
    "of one column": (lambda t: t[:, :1].clone(), ValueError, r"shape \(4, 3\), got \(4, 1\)"),
    "one number": (lambda t: t.sum(), ValueError, r"shape \(4, 3\), got \(\)"),
    "turned": (lambda t: t.t().contiguous(), ValueError, r"shape \(4, 3\), got \(3, 4\)"),
    "flat": (lambda t: t.flatten(), ValueError, r"shape \(4, 3\), got \(12,\)"),
    "integers": (lambda t: t.to(torch.int32), TypeError, "floating-point.*int32"),
    "truth": (lambda t: t > 0, TypeError, "floating-point.*bool"),
    "no tensor": (lambda t: t.tolist(), TypeError, "be a Tensor, got list"),
}
COUNTS: dict[str, tuple[Callable[[torch.Tensor], Any], type[Exception], str]] = {
    "two numbers": (lambda t: torch.stack([t, t]), ValueError, r"one number >= 0, got .*\(2,\)"),
    "none": (lambda t: t[None][:0], ValueError, r"one number >= 0, got .*\(0,\)"),
    "complex": (lambda t: t.to(torch.complex64), ValueError, "one number >= 0, got .*complex64"),
    "text": (lambda t: "7", TypeError, "one number >= 0, got '7' of type str"),
    "negative": (number(-1.0), ValueError, "one number >= 0, got -1.0"),
    "not a number": (number(float("nan")), ValueError, "one number >= 0, got nan"),
    "infinite": (number(float("inf")), ValueError, "one number >= 0, got inf"),
    "negative, in fp32": (lambda t: torch.tensor(-2.0), ValueError, "one number >= 0, got -2.0"),
    "negative, no tensor": (lambda t: -1, ValueError, "one number >= 0, got -1"),
}
# What is seen only by looking at a number, which on a GPU would wait for it.
LOOKED_AT = ("negative", "not a number", "infinite", "negative, in fp32")


@pytest.mark.parametrize("by", ["hand", "load"])
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("rule", RULES)
def test_state_that_does_not_fit_is_refused(backend: BackendCase, rule: str, door: Callable, by: str) -> None:
    """In the last parameter, so that the ones before it would have been changed."""
    params = make_params([(5,), (4, 3)], device=backend.device)
    optimizer = make(rule, params, backend)
    advance(optimizer, params, range(3))
    good = copy.deepcopy(optimizer.state_dict())
    count, moment = STEP.get(rule, "step"), MOMENT.get(rule, "exp_avg")
    # Moments may be elsewhere while somebody works with the slow weights.
    names = ["slow_param", *(() if door is slow_weights else (moment, "cached_momentum"))]
    cases = [(name, how, *case) for name in names for how, case in TENSORS.items()]
    cases += [(count, how, *case) for how, case in COUNTS.items()]
    for name, how, spoil, error, message in cases:
        if how in LOOKED_AT and backend.name not in ("cpu", "reference"):
            continue
        own = optimizer.state[params[1]]
        kept = own[name]
        if by == "hand":
            own[name] = spoil(kept)
        elif how in ("no tensor", "negative, no tensor", "text") or (
            rule == "nadam" and how in ("integers", "truth", "complex")
        ):
            continue  # torch's own loading gives its moments the parameter's dtype
        else:
            bad = copy.deepcopy(good)
            bad["state"][1][name] = spoil(kept)
            optimizer.load_state_dict(bad)
        before = snapshot(optimizer)
        with pytest.raises(error, match=f"state '{name}' of parameter 1 of group 0 must .*{message}"):
            door(optimizer)
        assert_unchanged(before, snapshot(optimizer), f"{name}: {how}")
        if by == "hand":
            own[name] = kept
        else:
            optimizer.load_state_dict(good)
        door(optimizer)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_parameter_with_gaps_is_cast_to_fp32(backend: BackendCase, rule: str, dtype: torch.dtype) -> None:
    """It goes on in fp32: the run of one without gaps."""
    wide = torch.linspace(-1, 1, 24, device=backend.device).reshape(4, 6).to(dtype)
    params = [torch.nn.Parameter(wide[:, ::2]), torch.nn.Parameter(wide[:, ::2].contiguous())]
    optimizers = [make(rule, [p], backend) for p in params]
    for optimizer, p in zip(optimizers, params, strict=True):
        for t in range(6):
            if t in (2, 5):
                p.grad = None
                gaps = p.detach().new_empty(4, 6, dtype=torch.float32)[:, ::2]
                p.data = gaps.copy_(p) if p is params[0] else p.detach().float()
                own = optimizer.state[p]
                own.update({name: value.float() for name, value in own.items() if value.dtype == dtype})
            # Where this torch can have it, in fp32 all along: then nothing but the parameter changes.
            keeps = rule == "nadam" or not can_set_grad_dtype()
            set_grad(p, gradients_of(t, [p])[0].to(p.dtype if keeps else torch.float32))
            optimizer.step()
    assert params[0].dtype == torch.float32
    assert not params[0].is_contiguous()
    assert not torch.equal(params[0], params[0].to(dtype))
    assert same_tensor_bits(params[0], params[1])
    states = [dict(optimizer.state[p]) for optimizer, p in zip(optimizers, params, strict=True)]
    assert_unchanged(*states)


# What may not be missing beside the rest of a state. Of RMSprop and Lion the count may: it corrects nothing there.
WHOLE = {
    "adamw": ("exp_avg", "exp_avg_sq", "step"),
    "radam": ("exp_avg", "exp_avg_sq", "step"),
    "rmsprop": ("square_avg",),
    "lion": ("exp_avg",),
    "wrapped-adamw": ("exp_avg", "exp_avg_sq", "step"),
}


@pytest.mark.parametrize("by", ["hand", "load"])
@pytest.mark.parametrize("rule", WHOLE)
def test_a_state_that_was_cut_is_refused(backend: BackendCase, rule: str, by: str) -> None:
    """A moment would begin anew at zeros amid a run, or count as a first step's. Nothing has changed then; slow weights
    that are missing begin at the weights, as beside a checkpoint of torch's."""
    params = make_params([(5,), (4, 3)], device=backend.device)
    optimizer = make_optimizer(rule, params, backend, lr=0.01, k=2)
    advance(optimizer, params, range(3))
    good = copy.deepcopy(optimizer.state_dict())
    for missing in [(name,) for name in WHOLE[rule]] + [tuple(n for n in WHOLE[rule] if n != "step")]:
        bad = copy.deepcopy(good)
        cut = optimizer.state[params[1]] if by == "hand" else bad["state"][1]
        for name in missing:
            del cut[name]
        before = snapshot(optimizer)
        where = "parameter 1 of group 0" if by == "hand" else "parameter 1"
        with pytest.raises(ValueError, match=rf"^state '{missing[0]}' of {where} must stand beside its '"):
            optimizer.step() if by == "hand" else optimizer.load_state_dict(bad)
        assert_unchanged(before, snapshot(optimizer), str(missing))
        optimizer.load_state_dict(good)
        advance(optimizer, params, [3])
    bad = copy.deepcopy(good)
    del bad["state"][1]["slow_param"]
    optimizer.load_state_dict(bad)
    advance(optimizer, params, [3])


@pytest.fixture
def mesh() -> Iterator[Any]:
    """Of this process alone, without threads or sockets."""
    if not torch.distributed.is_available():
        pytest.skip("this torch was built without torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_low_half_of_more_than_16_bits_is_refused(mesh: Any, is_sharded: bool, is_wrapped: bool) -> None:
    """It comes in int32 of shards, and would lie in int16 as another number. Both ends are numbers of 16 bits."""
    from torch.distributed.tensor import DTensor

    def placed(tensor: torch.Tensor) -> torch.Tensor:
        return DTensor.from_local(tensor, mesh, run_check=False) if is_sharded else tensor

    params = [torch.nn.Parameter(placed(p.detach())) for p in make_params([(5,), (4, 3), (0,)], torch.bfloat16)]
    optimizer: Any = LookaheadAdamW(params, master_weights=True)
    if is_wrapped:
        optimizer = Lookahead(torch.optim.AdamW(params), master_weights=True)
    for p in params:
        p.grad = placed(torch.ones(p.shape, dtype=torch.bfloat16))
    optimizer.step()

    def now() -> Any:
        # Copied by hand: some torch cannot copy a DTensor's state deeply.
        tensors = [*params, *(value for p in params for value in optimizer.state[p].values())]
        return [local_tensor(tensor.detach()).clone() for tensor in tensors]

    def told(second: torch.Tensor) -> dict[str, Any]:
        saved = optimizer.state_dict()
        state = {i: {**own, "master_low": own["master_low"].to(torch.int32)} for i, own in saved["state"].items()}
        state[1]["master_low"] = placed(second)
        return {**saved, "state": state}

    before = now()
    for wrong in (2**15, -(2**15) - 1, 2**16, 2**31 - 1):
        low = torch.zeros(4, 3, dtype=torch.int32)
        low[2, 1] = wrong
        found = f"from {min(wrong, 0)} to {max(wrong, 0)}"
        for door in (optimizer, getattr(optimizer, "base_optimizer", optimizer)):
            with pytest.raises(
                ValueError,
                match=f"^state 'master_low' of parameter 1 must be .* from -32768 to 32767, got numbers {found}$",
            ):
                door.load_state_dict(told(low))
            assert_unchanged(before, now())
    ends = torch.tensor([-(2**15), 2**15 - 1, 0], dtype=torch.int32).expand(4, 3).contiguous()
    optimizer.load_state_dict(told(ends))
    loaded = local_tensor(optimizer.state[params[1]]["master_low"])
    assert loaded.dtype == torch.int16
    assert torch.equal(loaded.to(torch.int32), ends)


@pytest.mark.parametrize("rule", RULES)
def test_what_is_no_state_dict_is_refused(rule: str) -> None:
    params = make_params([(5,), (4, 3)])
    optimizer = make(rule, params, BackendCase("auto", "cpu", 0.0))
    advance(optimizer, params, range(3))
    good = optimizer.state_dict()
    before = snapshot(optimizer)
    cases: list[tuple[Any, str]] = [
        ({}, r"state_dict must have a mapping of 'state', .* got NoneType among \[\]"),
        ({"state": {}}, r"state_dict must have a list of 'param_groups', .* got NoneType among \['state'\]"),
        ({"model": {}, "optimizer": good}, r"got NoneType among \['model', 'optimizer'\]"),
        ({**good, "state": [1]}, "must have a mapping of 'state', .* got list"),
        ({**good, "param_groups": [{"lr": 0.1}]}, r"param_groups\[0\] of a state_dict must be a dict with 'params'"),
        ({**good, "param_groups": []}, "different number of parameter groups"),
        ({**good, "param_groups": [{**good["param_groups"][0], "params": [0]}]}, "doesn't match the size"),
    ]
    for bad, message in cases:
        for door in (optimizer, getattr(optimizer, "base_optimizer", optimizer)):
            with pytest.raises(ValueError, match=message):
                door.load_state_dict(bad)
            assert_unchanged(before, snapshot(optimizer), message)
    advance(optimizer, params, [3])
