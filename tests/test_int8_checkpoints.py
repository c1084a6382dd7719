"""`state_dtype="int8"` in checkpoints: state dicts say in bf16 what codes stand for, and runs resume exactly."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import coded
import numpy as np
import pytest
import torch
from helpers import BackendCase, assert_unchanged, make_params, same_tensor_bits, snapshot
from narrow import (
    BF16,
    FP32,
    MOMENTS,
    OPTIMIZERS,
    REFERENCE,
    SHAPES,
    assert_same,
    assert_same_numbers,
    made,
    of_class,
    run,
    wide,
)
from releases import is_torch
from runs import through_a_file
from torch import Tensor

import lookahead_fused
from lookahead_fused import EMA, Lion, Lookahead

INT8 = "int8"


def saved_states(optimizer: Any) -> list[tuple[str, dict[str, Any]]]:
    """Of every route to a state dict its states, and what it is called."""
    found = [("its own", optimizer.state_dict())]
    base = getattr(optimizer, "base_optimizer", None)
    if base is not None:
        found.append(("the base's", base.state_dict()))
    if hasattr(optimizer, "slow_weights"):
        with optimizer.slow_weights():
            found.append(("inside slow_weights()", optimizer.state_dict()))
        optimizer.eval()
        found.append(("after eval()", optimizer.state_dict()))
        if base is not None:
            found.append(("the base's after eval()", base.state_dict()))
        optimizer.train()
    return [(told, state_dict["state"]) for told, state_dict in found]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_dict_says_what_codes_stand_for(backend: BackendCase, name: str) -> None:
    optimizer, params = made(OPTIMIZERS[name], backend, state_dtype=INT8)
    run(optimizer, params, range(1, 3))
    before = copy.deepcopy(optimizer.state)
    for told, state in saved_states(optimizer):
        for i, p in enumerate(params):
            own = optimizer.state[p]
            expected = {n for n in own if not n.endswith("_scale")}
            assert state[i].keys() - {"train_param"} == expected, told
            for moment in expected & set(MOMENTS):
                value = state[i][moment]
                assert value.dtype == BF16
                assert value.stride() == p.stride()
                assert torch.equal(value.float().cpu(), wide(own, moment)), (told, moment)
    for p, kept in zip(params, before.values(), strict=True):
        assert all(same_tensor_bits(value, kept[n]) for n, value in optimizer.state[p].items())


def test_hooks_see_no_codes() -> None:
    """Nor do those that came before any code was there."""
    seen: list[Any] = []
    for make in (of_class("adamw"), OPTIMIZERS["ema"]):
        optimizer, params = made(make, REFERENCE, state_dtype=INT8)
        base = getattr(optimizer, "base_optimizer", optimizer)
        for one in {optimizer, base}:
            one.register_state_dict_post_hook(lambda _, state_dict: seen.append(state_dict["state"]))
        run(optimizer, params, range(1, 3))
        again = copy.deepcopy(optimizer)
        base.state_dict()
        optimizer.state_dict()
        seen.append(again.state_dict()["state"])
    values = [(n, v) for state in seen for own in state.values() for n, v in own.items()]
    assert len(seen) >= 5
    assert all(v.dtype != torch.uint8 and not n.endswith("_scale") for n, v in values)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "sgd without state"])
def test_a_run_resumes_exactly(backend: BackendCase, name: str) -> None:
    optimizer, params = made(OPTIMIZERS[name], backend, state_dtype=INT8)
    run(optimizer, params, range(1, 6))
    again, others = made(OPTIMIZERS[name], backend, state_dtype=INT8)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_same_numbers(again, others, optimizer, params)
    run(optimizer, params, range(6, 7))
    run(again, others, range(6, 7))
    # Whatever codes were before it: a step goes by the numbers.
    assert_same_numbers(again, others, optimizer, params)
    run(optimizer, params, range(7, 11))
    run(again, others, range(7, 11))
    assert_same(again, others, optimizer, params)


def zero_gradients(params: Sequence[Tensor]) -> None:
    for p in params:
        p.grad = torch.zeros_like(p)


@pytest.mark.parametrize("held", ["float32", "bfloat16"])
def test_loading_encodes_to_the_nearest(backend: BackendCase, held: str) -> None:
    """And back exactly; the choice is not the checkpoint's. A parameter that is not stepped keeps what was loaded."""

    def make(state_dtype: Any) -> tuple[Any, list[Any]]:
        params = make_params(SHAPES, device=backend.device)
        own: dict[str, Any] = {"lr": 0.0, "k": 2, "pullback_momentum": "pullback", "backend": backend.name}
        return lookahead_fused.LookaheadAdamW(params, **own, state_dtype=state_dtype), params

    def through(saved: dict[str, Any], state_dtype: str) -> tuple[Any, list[Any]]:
        optimizer, params = make(state_dtype)
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["state_dtype"] == state_dtype
        zero_gradients(params)
        # All but the first moment only come into their dtype.
        optimizer.sync()
        return optimizer, params

    first, params = make(held)
    run(first, params, range(1, 4))
    saved = through_a_file(first.state_dict())
    optimizer, others = through(saved, INT8)
    for i, q in enumerate(others):
        own = optimizer.state[q]
        numbers = saved["state"][i]["exp_avg_sq"].float().cpu()
        flat = numbers.as_strided((numbers.numel(),), (1,)).numpy()
        codes, tops = coded.encode(flat, coded.SQUARES)
        assert own["exp_avg_sq"].as_strided((numbers.numel(),), (1,)).cpu().numpy().tobytes() == codes.tobytes()
        assert own["exp_avg_sq_scale"].cpu().numpy().tobytes() == coded.scales(tops).tobytes()
    back, again = through(through_a_file(optimizer.state_dict()), held)
    for p, q in zip(others, again, strict=True):
        assert torch.equal(back.state[q]["exp_avg_sq"].float().cpu(), wide(optimizer.state[p], "exp_avg_sq"))
    kept, unstepped = make(INT8)
    kept.load_state_dict(saved)
    for p, q in zip(unstepped, params, strict=True):
        assert all(same_tensor_bits(kept.state[p][name], value) for name, value in first.state[q].items())


def test_a_torch_checkpoint_becomes_codes_and_ours_torch_s() -> None:
    params = make_params(SHAPES)
    theirs = torch.optim.AdamW(params, lr=0.05)
    run(theirs, params, range(1, 4))
    ours, others = made(of_class("adamw"), REFERENCE, state_dtype=INT8)
    ours.load_state_dict(lookahead_fused.convert(theirs.state_dict(), "torch"))
    run(ours, others, range(4, 6))
    assert all(ours.state[p]["exp_avg"].dtype == torch.uint8 for p in others)
    again = make_params(SHAPES)
    back = torch.optim.AdamW(again, lr=0.05)
    back.load_state_dict(lookahead_fused.convert(ours.state_dict(), "torch"))
    for p, q in zip(others, again, strict=True):
        assert back.state[q]["exp_avg"].dtype == FP32
        assert torch.equal(back.state[q]["exp_avg"], wide(ours.state[p], "exp_avg"))
    run(back, again, range(6, 7))


@pytest.mark.parametrize("base_class", [torch.optim.AdamW, Lion])
def test_a_base_that_is_stepped_alone_finds_its_own_dtypes(base_class: Any) -> None:
    params = make_params(SHAPES)
    options = {"foreach": True} if base_class is torch.optim.AdamW else {}
    base = base_class(params, lr=0.05, **options)
    optimizer = Lookahead(base, k=2, pullback_momentum="pullback", state_dtype="int8")
    run(optimizer, params, range(1, 3))
    before = [wide(base.state[p], "exp_avg") for p in params]
    params[0].grad = torch.zeros_like(params[0])
    run(base, params, range(3, 4))
    for p, was in zip(params, before, strict=True):
        own = base.state[p]
        assert own["exp_avg"].dtype == FP32
        assert sorted(n for n in own if n.endswith("_scale")) == ["cached_momentum_scale"]
        if base_class is torch.optim.AdamW:
            assert torch.allclose(own["exp_avg"], was * 0.9 + p.grad * 0.1, rtol=1e-5, atol=1e-7)
    run(optimizer, params, range(4, 5))
    assert all(base.state[p]["exp_avg"].dtype == torch.uint8 for p in params)


def test_state_that_was_copied_by_hand_goes_on(backend: BackendCase) -> None:
    """Codes with their scales, as they lie in memory, are a checkpoint too."""
    make = of_class("adam", amsgrad=True, pullback_momentum="pullback")
    optimizer, params = made(make, backend, state_dtype=INT8)
    run(optimizer, params, range(1, 5))
    again, others = made(make, backend, state_dtype=INT8)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    raw = copy.deepcopy({i: optimizer.state[p] for i, p in enumerate(params)})
    again.load_state_dict({**optimizer.state_dict(), "state": raw})
    assert_same(again, others, optimizer, params)
    run(optimizer, params, range(5, 8))
    run(again, others, range(5, 8))
    assert_same(again, others, optimizer, params)


def test_codes_are_decoded_where_another_dtype_is_asked_for(backend: BackendCase) -> None:
    """A restart at other settings, of slow weights too."""
    optimizer, params = made(of_class("adamw", pullback_momentum="pullback"), backend, state_dtype=INT8)
    run(optimizer, params, range(1, 5))
    before = {(i, m): wide(optimizer.state[p], m) for i, p in enumerate(params) for m in ("exp_avg_sq", "exp_avg")}
    optimizer.param_groups[0]["state_dtype"] = "float32"
    optimizer.param_groups[0]["pullback_momentum"] = "none"
    for p in params:
        del optimizer.state[p]["slow_param"]
        p.grad = None
    params[3].grad = torch.zeros_like(params[3])
    optimizer.step()
    own = optimizer.state[params[3]]
    assert torch.equal(own["exp_avg"].cpu(), before[3, "exp_avg"] + torch.tensor(0.1) * (0.0 - before[3, "exp_avg"]))
    # What nothing uses any more stays as it is, with its scale.
    assert {n for n in own if n.endswith("_scale")} == {"cached_momentum_scale"}
    assert torch.equal(wide(optimizer.state[params[1]], "exp_avg_sq"), before[1, "exp_avg_sq"])


def test_distributed_checkpoints_hold_no_codes(backend: BackendCase) -> None:
    """A template that it makes by a step of zero gradients is one to load into."""
    if not torch.distributed.is_available():
        pytest.skip("this torch was built without torch.distributed")
    from torch.distributed.checkpoint import state_dict as dcp

    # Before, what is flat has to have all that is in the optimizer's state, scales too.
    for flat in (False, True) if is_torch("2.13") else (False,):
        options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
        models = [torch.nn.Linear(40, 10).to(backend.device) for _ in range(2)]
        make = of_class("adamw", pullback_momentum="pullback")
        ours, again = (make(model.parameters(), backend.name, INT8) for model in models)
        run(ours, list(models[0].parameters()), range(1, 6))
        saved = copy.deepcopy(dcp.get_state_dict(models[0], ours, options=options))
        dcp.get_optimizer_state_dict(models[1], again, options=options)
        assert all(again.state[p]["exp_avg"].dtype == torch.uint8 for p in models[1].parameters())
        models[1].load_state_dict(saved[0])
        dcp.set_optimizer_state_dict(models[1], again, saved[1], options=options)
        for t in range(6, 12):
            run(ours, list(models[0].parameters()), range(t, t + 1))
            run(again, list(models[1].parameters()), range(t, t + 1))
        assert_same(again, list(models[1].parameters()), ours, list(models[0].parameters()))


# ------------------------------------------------------------------------------------------------------------
# state that is none


def without_scale(own: dict[str, Any]) -> None:
    del own["exp_avg_sq_scale"]


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "none": (without_scale, ValueError, "must stand beside 'exp_avg_sq', which is in torch.uint8, got none"),
    "no tensor": (lambda s: [1.0, 1.0, 1.0], TypeError, "must be a plain Tensor, got list"),
    "another dtype": (lambda s: s.double(), TypeError, "must be a dense tensor in torch.float32, got torch.float64"),
    "sparse": (lambda s: s.to_sparse(), TypeError, "must be a dense tensor in torch.float32"),
    "too few": (lambda s: s[:2].clone(), ValueError, r"must have the shape \(3,\), .* got \(2,\)"),
    "too many": (lambda s: torch.cat([s, s]), ValueError, r"must have the shape \(3,\), .* got \(6,\)"),
    "of two dimensions": (lambda s: s[:, None], ValueError, r"must have the shape \(3,\), .* got \(3, 1\)"),
    "with gaps": (
        lambda s: s.repeat_interleave(2)[::2],
        ValueError,
        "must have the shape .* and be contiguous, got .* with strides",
    ),
    "elsewhere": (lambda s: s.to("meta"), ValueError, "must be on the device of 'exp_avg_sq', cpu, got meta"),
}


@pytest.mark.parametrize("how", BAD)
def test_codes_without_their_scales_are_refused(backend: BackendCase, how: str) -> None:
    """In the last parameter, so that the ones before it would have been changed; whatever its group says."""
    if backend.device != "cpu":
        pytest.skip("names the host")
    spoil, error, said = BAD[how]
    for asked in (INT8, "float32"):
        params = make_params(((5,), (3, 100)))
        optimizer = of_class("adamw", pullback_momentum="pullback")(params, backend.name, INT8)
        run(optimizer, params, range(1, 3))
        optimizer.param_groups[0]["state_dtype"] = asked
        own = optimizer.state[params[1]]
        kept = dict(own)
        if how == "none":
            spoil(own)
        else:
            own["exp_avg_sq_scale"] = spoil(own["exp_avg_sq_scale"])
        state = {p: dict(optimizer.state[p]) for p in params}
        weights = copy.deepcopy(params)
        for p in params:
            p.grad = torch.ones_like(p)
        with pytest.raises(error, match=f"^state 'exp_avg_sq_scale' of parameter 1 of group 0 {said}"):
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(params, weights, strict=True))
        for p in params:
            assert all(optimizer.state[p][n] is value for n, value in state[p].items())
        own.clear()
        own.update(kept)
        run(optimizer, params, range(3, 4))


def test_codes_of_what_is_no_moment_are_refused(backend: BackendCase) -> None:
    optimizer, params = made(of_class("adamw"), backend, state_dtype=INT8)
    run(optimizer, params, range(1, 3))
    optimizer.state[params[1]]["slow_param"] = torch.zeros_like(params[1], dtype=torch.uint8)
    before = snapshot(optimizer)
    with pytest.raises(TypeError, match=r"^state 'slow_param' of parameter 1 of group 0 must be floating-point"):
        run(optimizer, params, range(3, 4))
    after = snapshot(optimizer)
    assert_unchanged(before["state"], after["state"])


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFFFFFFF, 0x7F800000, 0, 1, 0x80000000])
def test_a_scale_that_is_none_harms_no_memory(bits: int) -> None:
    """What it makes of its block means nothing, and is the same on every backend; the next step has a scale again."""
    found = []
    for name in ("cpu", "reference"):
        if reason := lookahead_fused.backends()[name].reason:
            pytest.skip(reason)
        params = make_params(((300,),))
        optimizer = EMA(torch.optim.RMSprop(params, lr=0.01), state_dtype="int8", backend=name)
        run(optimizer, params, range(1, 3))
        scale = optimizer.state[params[0]]["square_avg_scale"]
        scale.copy_(torch.from_numpy(np.array([bits] * 3, dtype=np.uint32).view(np.float32)))
        run(optimizer, params, range(3, 5))
        found.append((optimizer, params))
    assert_same(*found[0], *found[1])


class Keeper(torch.optim.SGD):
    """A base whose step is its own, and which calls entries of its state as codes and scales are called here."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                own = {"exp_avg": torch.full_like(p, 7, dtype=torch.uint8), "exp_avg_scale": torch.ones(1)}
                self.state[p].update(own)
        return super().step(closure)


def test_what_another_optimizer_calls_so_is_its_own() -> None:
    params = make_params(SHAPES)
    optimizer = EMA(Keeper(params, lr=0.1))
    run(optimizer, params, range(1, 3))
    for state_dict in (optimizer.state_dict(), optimizer.base_optimizer.state_dict()):
        for own in state_dict["state"].values():
            assert own["exp_avg"].dtype == torch.uint8
            assert torch.equal(own["exp_avg_scale"], torch.ones(1))
