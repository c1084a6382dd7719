"""`state_dtype`: the moments in a half or a quarter of their memory, with the same bits on every backend.

What is true of codes alone is tested in `test_int8_moments.py` and `test_int8_checkpoints.py`.
"""

from __future__ import annotations

import copy
import functools
import math
import pickle
import re
from typing import Any

import pytest
import torch
from helpers import (
    EXTERNAL_CLASSES,
    BackendCase,
    can_set_grad_dtype,
    make_params,
    same_tensor_bits,
    seeded,
    tune,
)
from narrow import (
    BF16,
    FP16,
    FP32,
    FP64,
    MOMENTS,
    OPTIMIZERS,
    REFERENCE,
    SHAPES,
    assert_same,
    made,
    narrow_ones,
    of_class,
    run,
    wide,
)
from runs import through_a_file

import lookahead_fused
from lookahead_fused import EMA, GPA, Lion, Lookahead, ScheduleFree
from lookahead_fused._codes import BLOCK
from lookahead_fused._parts import CHUNK_ELEMENTS

# ------------------------------------------------------------------------------------------------------------
# what is computed


# How far what is kept may be from a moment, for its part: one of the two numbers beside it is drawn.
WITHIN = {"bfloat16": 2.0**-7, "int8": 2.0**-3}


def assert_narrow(own: dict[str, Any], p: torch.Tensor, narrow: str) -> None:
    """The moments and nothing else are, and codes have their scales."""
    for moment in MOMENTS:
        assert (f"{moment}_scale" in own) == (narrow == "int8" and moment in own)
        if moment in own:
            assert own[moment].dtype == (torch.uint8 if narrow == "int8" else BF16)
            assert own[moment].stride() == p.stride()
        if f"{moment}_scale" in own:
            assert own[f"{moment}_scale"].shape == (-(-p.numel() // BLOCK),)
    assert all(value.dtype in (FP32, FP64, torch.int16) for n, value in own.items() if n not in MOMENTS)


def stepped(backend: BackendCase, name: str, dtype: torch.dtype, narrow: str) -> tuple[Any, list[Any]]:
    optimizer, params = made(OPTIMIZERS[name], backend, dtype, narrow)
    run(optimizer, params, range(1, 3))
    if isinstance(optimizer, lookahead_fused.LookaheadAdam | lookahead_fused.LookaheadSGD):
        # A pass of its own.
        optimizer.sync()
    run(optimizer, params, range(3, 5))
    return optimizer, params


# Once for every backend that is compared with it.
by_the_reference = functools.cache(functools.partial(stepped, REFERENCE))


@narrow_ones
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_every_backend_gives_the_reference_s_bits(
    backend: BackendCase, name: str, dtype: torch.dtype, narrow: str
) -> None:
    expected = by_the_reference(name, dtype, narrow)
    optimizer, params = expected if backend == REFERENCE else stepped(backend, name, dtype, narrow)
    if backend.ulps == 0:
        assert_same(optimizer, params, *expected)
    for p in params:
        assert_narrow(optimizer.state[p], p, narrow)


@narrow_ones
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_gradients_may_be_fp32(backend: BackendCase, dtype: torch.dtype, narrow: str) -> None:
    if not can_set_grad_dtype():
        pytest.skip("this torch keeps no gradient of another dtype")
    make = of_class("adam", master_weights=True, pullback_momentum="pullback")
    optimizer, params = made(make, backend, dtype, narrow)
    reference, others = made(make, REFERENCE, dtype, narrow)
    run(optimizer, params, range(1, 5), FP32)
    run(reference, others, range(1, 5), FP32)
    if backend.ulps == 0:
        assert_same(optimizer, params, reference, others)


@pytest.mark.parametrize(
    ("narrow", "chunk_elements"),
    [
        ("bfloat16", 1),
        ("bfloat16", 7),
        ("bfloat16", 4096),
        ("int8", BLOCK),
        ("int8", 3 * BLOCK),
        ("int8", CHUNK_ELEMENTS),
    ],
)
def test_chunks_threads_and_instruction_sets_change_no_bit(narrow: str, chunk_elements: int) -> None:
    native = lookahead_fused._build.module("_cpu")
    if native is None:
        pytest.skip(lookahead_fused._build.reason("_cpu"))
    numel = 300 if chunk_elements < 100 else 2 * CHUNK_ELEMENTS + 1003

    def chunked(threads: int, **tuning: Any) -> tuple[torch.optim.Optimizer, list[Any]]:
        params = make_params(((numel,), (33,)))
        optimizer = of_class("adam", amsgrad=True, pullback_momentum="pullback")(params, "cpu", narrow)
        tune(optimizer, **tuning)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            run(optimizer, params, range(1, 5))
        finally:
            torch.set_num_threads(before)
        return optimizer, params

    expected = chunked(1)
    for instruction_set in native.instruction_sets():
        found = chunked(3, chunk_elements=chunk_elements, instruction_set=instruction_set)
        assert_same(*found, *expected)


@narrow_ones
def test_moments_are_rounded_in_a_step_and_used_before_that(backend: BackendCase, narrow: str) -> None:
    """A first step's update is that of fp32 moments; what is kept is beside each."""
    optimizer, params = made(of_class("adamw"), backend, state_dtype=narrow)
    exact, others = made(of_class("adamw"), backend, state_dtype="float32")
    run(optimizer, params, range(1, 2))
    run(exact, others, range(1, 2))
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        for name in ("exp_avg", "exp_avg_sq"):
            kept, number = wide(optimizer.state[p], name), exact.state[q][name].cpu()
            assert ((kept - number).abs() <= number.abs() * WITHIN[narrow]).all()
    kept, number = wide(optimizer.state[params[3]], "exp_avg"), exact.state[others[3]]["exp_avg"].cpu()
    assert not torch.equal(kept, number.to(BF16).float())


@narrow_ones
@pytest.mark.parametrize(("name", "steps"), [("cpu", 2000), ("reference", 300)])
def test_a_second_moment_does_not_stall(name: str, steps: int, narrow: str) -> None:
    """Rounded to the nearest it stays where it was at beta2 = 0.999; here beside a largest that stays in its block.
    All backends round alike, and the reference takes long."""
    if reason := lookahead_fused.backends()[name].reason:
        pytest.skip(reason)
    p = torch.nn.Parameter(torch.zeros(4096))
    optimizer = lookahead_fused.LookaheadAdamW([p], lr=0.0, state_dtype=narrow, backend=name)
    p.grad = torch.rand(4096, generator=seeded(0)) + 0.5
    optimizer.step()
    start = wide(optimizer.state[p], "exp_avg_sq").double()
    p.grad = torch.zeros(4096)
    p.grad[::BLOCK] = 1.0
    for _ in range(steps):
        optimizer.step()
    end = wide(optimizer.state[p], "exp_avg_sq").double()
    rest = torch.arange(4096) % BLOCK != 0
    assert math.isclose((end[rest].mean() / start[rest].mean()).item(), 0.999**steps, rel_tol=0.02)


@narrow_ones
def test_nothing_changes_where_a_step_is_skipped(backend: BackendCase, narrow: str) -> None:
    make = of_class("adam", amsgrad=True, pullback_momentum="pullback")
    optimizer, params = made(make, backend, state_dtype=narrow)
    run(optimizer, params, range(1, 3))
    kept = dict(zip(params, copy.deepcopy(optimizer.state).values(), strict=True))
    optimizer.found_inf = torch.ones((), device=backend.device)  # type: ignore[attr-defined]
    run(optimizer, params, range(3, 4))
    assert all(same_tensor_bits(kept[p][n], value) for p in params for n, value in optimizer.state[p].items())


@narrow_ones
def test_a_step_moves_no_state(backend: BackendCase, narrow: str) -> None:
    """What a first step made is written in place by all others: two bytes each, or one and 4 for a block."""
    make = of_class("adam", amsgrad=True, pullback_momentum="pullback")
    optimizer, params = made(make, backend, state_dtype=narrow)
    run(optimizer, params, range(1, 2))
    kept = {(p, name): value for p in params for name, value in optimizer.state[p].items()}
    run(optimizer, params, range(2, 8))
    assert all(optimizer.state[p][name] is value for (p, name), value in kept.items())
    sizes = {n: value.nbytes for (p, n), value in kept.items() if p is params[3]}
    of_moments = sum(size for n, size in sizes.items() if n.removesuffix("_scale") in MOMENTS)
    assert of_moments == 4 * {"bfloat16": 2 * 260, "int8": 260 + 3 * 4}[narrow]


def test_groups_choose_for_themselves(backend: BackendCase) -> None:
    params = make_params(((40,), (400,), (40,)), device=backend.device)
    groups = [{"params": params[:1], "state_dtype": "int8"}, {"params": params[1:2]}]
    optimizer = lookahead_fused.LookaheadAdamW(groups, lr=0.05, backend=backend.name)
    optimizer.add_param_group({"params": params[2:], "state_dtype": "bfloat16"})
    run(optimizer, params, range(1, 3))
    assert [optimizer.state[p]["exp_avg"].dtype for p in params] == [torch.uint8, FP32, BF16]
    # A choice that changes takes the moments along.
    for group, chosen in zip(optimizer.param_groups, ("bfloat16", "int8", "float32"), strict=True):
        group["state_dtype"] = chosen
    before = wide(optimizer.state[params[0]], "exp_avg_sq")
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.sync()
    assert torch.equal(wide(optimizer.state[params[0]], "exp_avg_sq"), before)
    run(optimizer, params, range(3, 5))
    assert [optimizer.state[p]["exp_avg"].dtype for p in params] == [BF16, torch.uint8, FP32]
    assert [sorted(n for n in optimizer.state[p] if n.endswith("_scale")) for p in params] == [
        [],
        ["exp_avg_scale", "exp_avg_sq_scale"],
        [],
    ]


# ------------------------------------------------------------------------------------------------------------
# checkpoints


@pytest.mark.parametrize("name", ["adam amsgrad pullback", "rmsprop pullback", "lookahead", "gpa"])
def test_a_run_resumes_exactly(backend: BackendCase, name: str) -> None:
    optimizer, params = made(OPTIMIZERS[name], backend)
    run(optimizer, params, range(1, 5))
    again, others = made(OPTIMIZERS[name], backend)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    run(optimizer, params, range(5, 9))
    run(again, others, range(5, 9))
    assert_same(again, others, optimizer, params)


@narrow_ones
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["adam amsgrad pullback", "lookahead", "gpa"])
def test_a_copy_goes_on_with_the_same_bits(backend: BackendCase, name: str, way: str, narrow: str) -> None:
    optimizer, params = made(OPTIMIZERS[name], backend, state_dtype=narrow)
    run(optimizer, params, range(1, 5))
    again: Any = copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    others = [q for group in again.param_groups for q in group["params"]]
    assert_same(again, others, optimizer, params)
    run(optimizer, params, range(5, 9))
    run(again, others, range(5, 9))
    assert_same(again, others, optimizer, params)


def test_loading_brings_moments_into_the_dtype_that_was_chosen(backend: BackendCase) -> None:
    """Rounded to the nearest, and back exactly; the choice is not the checkpoint's."""

    def make(state_dtype: str) -> tuple[Any, list[Any]]:
        chosen: Any = {"state_dtype": state_dtype, "pullback_momentum": "pullback", "k": 2}
        params = make_params(SHAPES, device=backend.device)
        return lookahead_fused.LookaheadAdamW(params, lr=0.0, betas=(0.0, 0.0), **chosen, backend=backend.name), params

    def through(saved: dict[str, Any], state_dtype: str) -> tuple[Any, list[Any]]:
        optimizer, params = make(state_dtype)
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["state_dtype"] == state_dtype
        # A parameter without a gradient keeps what was loaded; of the others all but the moments' dtype is a step's.
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.sync()
        return optimizer, params

    wide, params = make("float32")
    run(wide, params, range(1, 2))
    narrow, others = through(through_a_file(wide.state_dict()), "bfloat16")
    for p, q in zip(params, others, strict=True):
        assert same_tensor_bits(narrow.state[q]["exp_avg_sq"], wide.state[p]["exp_avg_sq"].to(BF16))
    back, again = through(through_a_file(narrow.state_dict()), "float32")
    for p, q in zip(others, again, strict=True):
        assert same_tensor_bits(back.state[q]["exp_avg_sq"], narrow.state[p]["exp_avg_sq"].float())


def test_a_torch_checkpoint_becomes_narrow_and_ours_torch_s() -> None:
    params = make_params(SHAPES)
    theirs = torch.optim.AdamW(params, lr=0.05)
    run(theirs, params, range(1, 4))
    ours, others = made(of_class("adamw"), REFERENCE)
    ours.load_state_dict(lookahead_fused.convert(theirs.state_dict(), "torch"))
    run(ours, others, range(4, 6))
    assert all(ours.state[p]["exp_avg"].dtype == BF16 for p in others)
    back = torch.optim.AdamW(make_params(SHAPES), lr=0.05)
    back.load_state_dict(ours.state_dict())
    (own, *_) = back.state.values()
    assert own["exp_avg"].dtype == FP32
    assert torch.equal(own["exp_avg"], ours.state[others[0]]["exp_avg"].float())


def test_a_base_that_is_stepped_alone_finds_its_own_dtypes() -> None:
    params = make_params(SHAPES)
    base = torch.optim.AdamW(params, lr=0.05, foreach=True)
    optimizer = Lookahead(base, state_dtype="bfloat16")
    run(optimizer, params, range(1, 3))
    run(base, params, range(3, 4))
    assert all(base.state[p]["exp_avg"].dtype == FP32 for p in params)
    run(optimizer, params, range(4, 5))
    assert all(base.state[p]["exp_avg"].dtype == BF16 for p in params)


# ------------------------------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize("value", ["int4", "float16", torch.bfloat16, None])
def test_another_dtype_is_refused(value: Any) -> None:
    said = re.escape(f"state_dtype must be one of 'float32', 'bfloat16', 'int8', got {value!r}")
    with pytest.raises(ValueError, match=f"^{said}"):
        lookahead_fused.LookaheadAdamW(make_params(), state_dtype=value)
    with pytest.raises(ValueError, match=f"^{said}"):
        Lookahead(torch.optim.AdamW(make_params()), state_dtype=value)
    with pytest.raises(ValueError, match=f"^lookahead_{said}"):
        Lookahead(torch.optim.AdamW([{"params": make_params(), "lookahead_state_dtype": value}]))


@narrow_ones
def test_fp64_parameters_are_refused(backend: BackendCase, narrow: Any) -> None:
    with pytest.raises(TypeError, match=rf"^a parameter must not be float64 with state_dtype='{narrow}'"):
        lookahead_fused.LookaheadAdamW(make_params(dtype=FP64), state_dtype=narrow)
    with pytest.raises(TypeError, match=rf"^a parameter must not be float64 with ema_state_dtype='{narrow}'"):
        EMA(torch.optim.AdamW(make_params(dtype=FP64)), state_dtype=narrow)
    optimizer, params = made(of_class("adamw"), backend, state_dtype=narrow)
    run(optimizer, params, range(1, 2))
    params[1].data = params[1].data.double()
    params[1].grad = None
    before = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(TypeError, match=rf"^parameter 1 of group 0 must not be float64 with state_dtype='{narrow}'"):
        run(optimizer, params, range(2, 3))
    after = optimizer.state_dict()["state"]
    assert all(same_tensor_bits(before[i][name], after[i][name]) for i in before for name in before[i])


@narrow_ones
@pytest.mark.parametrize("wrapper", [Lookahead, EMA, GPA, ScheduleFree])
@pytest.mark.parametrize("base", EXTERNAL_CLASSES)
def test_a_base_that_is_not_fused_is_refused(wrapper: Any, base: str, narrow: str) -> None:
    said = f"state_dtype must be 'float32' around an optimizer whose step is its own, got '{narrow}'"
    with pytest.raises(ValueError, match=f"^{said}"):
        wrapper(EXTERNAL_CLASSES[base](make_params()), state_dtype=narrow)
    optimizer = wrapper(EXTERNAL_CLASSES[base](make_params()))
    prefix = optimizer.policy.prefix
    with pytest.raises(ValueError, match=f"^{prefix}{said}"):
        optimizer.add_param_group({"params": make_params(), prefix + "state_dtype": narrow})


@narrow_ones
def test_centered_rmsprop_is_refused(backend: BackendCase, narrow: Any) -> None:
    """The variance is a difference of two moments: rounded, it may fall below 0, and its root is NaN."""
    said = rf"state_dtype must be 'float32' with centered=True, got '{narrow}'"
    with pytest.raises(ValueError, match=f"^{said}"):
        lookahead_fused.LookaheadRMSprop(make_params(), centered=True, state_dtype=narrow)
    with pytest.raises(ValueError, match=f"^(gpa_)?{said}"):
        GPA(torch.optim.RMSprop(make_params(), centered=True), state_dtype=narrow)
    optimizer, params = made(of_class("rmsprop"), backend, state_dtype=narrow)
    run(optimizer, params, range(1, 2))
    optimizer.param_groups[0]["centered"] = True
    with pytest.raises(ValueError, match=f"^{said}"):
        run(optimizer, params, range(2, 3))


@narrow_ones
def test_a_lion_that_is_wrapped_leaves_it_to_the_wrapper(narrow: Any) -> None:
    said = re.escape(f"base_optimizer must have state_dtype='float32', got '{narrow}': give state_dtype='{narrow}' to")
    with pytest.raises(ValueError, match=f"^{said}"):
        EMA(Lion(make_params(), state_dtype=narrow))
