"""The fp32 master of a bf16 parameter, which is kept in two halves: what is computed is that of a whole one."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    BackendCase,
    assert_unchanged,
    make_params,
    same_tensor_bits,
    snapshot,
    to_numpy,
    tune,
)
from oracle import join_master, round_away, round_bfloat16, same_bits
from runs import advance, gradients_of
from test_pairs import PAIRS, POLICIES, RULES
from test_tensor_classes import Around, AroundState
from test_workspace import CXX, ROOT
from torch import Tensor

from lookahead_fused import EMA, Lookahead, LookaheadSGD
from lookahead_fused import _build as build
from lookahead_fused import _masters as masters

SHAPES = ((4, 3), (5,), (), (0,), (300,))
BF16, FP16 = torch.bfloat16, torch.float16
of_each_class = pytest.mark.parametrize("cls", [Around, AroundState])


def masters_of(optimizer: Any, params: Sequence[Tensor]) -> list[np.ndarray]:
    return [join_master(to_numpy(p), to_numpy(optimizer.state[p]["master_low"])) for p in params]


def assert_shows(params: Sequence[Tensor], whole: Sequence[np.ndarray]) -> None:
    for p, master in zip(params, whole, strict=True):
        assert same_bits(to_numpy(p), round_away(master))


# ------------------------------------------------------------------------------------------------------------
# the bits


def every_high_half() -> tuple[np.ndarray, np.ndarray]:
    """Each bf16 number beside low halves from one end to the other."""
    lows = np.array([-(2**15), -(2**15) + 1, -12345, -2, -1, 0, 1, 2, 12345, 2**15 - 1], dtype=np.int16)
    highs = (np.arange(2**16, dtype=np.uint32) << np.uint32(16)).view(np.float32)
    return np.repeat(highs, lows.size), np.tile(lows, highs.size)


def test_halves(backend: BackendCase) -> None:
    """A step that changes nothing takes every pair of halves apart and puts it together again.

    What no master becomes is left of a parameter that was changed by others: such a low half, beside a zero or an
    infinity, counts as 0. NaN stays NaN.
    """
    highs, lows = every_high_half()
    p = torch.nn.Parameter(torch.zeros(highs.size, dtype=BF16, device=backend.device))
    optimizer = LookaheadSGD([p], lr=0.0, k=2**50, master_weights=True, backend=backend.name)
    for step in range(2):
        p.grad = torch.zeros_like(p)
        if step == 1:
            with torch.no_grad():
                p.copy_(torch.from_numpy(highs.view(np.uint32) >> np.uint32(16)).to(torch.int16).view(BF16))
                optimizer.state[p]["master_low"].copy_(torch.from_numpy(lows))
        optimizer.step()
    param, low = to_numpy(p), to_numpy(optimizer.state[p]["master_low"])
    assert same_bits(param, highs)
    counts = ~np.isnan(join_master(highs, lows))
    assert np.array_equal(low[counts], lows[counts])
    assert not low[~counts].any()
    finite_or_not = highs[~counts]
    assert set(finite_or_not[~np.isnan(finite_or_not)]) == {0.0, np.inf, -np.inf}


def test_every_kind_of_number() -> None:
    """Of a whole master: its rounding, and its bits again. Ties, zeros, subnormal numbers, what rounds to infinity."""
    bits = np.arange(0, 2**32, 10007, dtype=np.uint64).astype(np.uint32)
    halves = np.arange(0, 2**16, dtype=np.uint32) << np.uint32(16)
    edges = np.concatenate([halves | np.uint32(low) for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    values = np.concatenate([bits, edges]).view(np.float32)
    param, low = masters.halve(torch.from_numpy(values))
    assert same_bits(to_numpy(param), round_away(values))
    assert same_bits(join_master(to_numpy(param), to_numpy(low)), values)
    assert same_bits(to_numpy(masters.join(param, low)), values)
    largest = torch.tensor([3.4028234e38, -3.4028234e38])
    param, low = masters.halve(largest)
    assert param.isinf().all()
    assert torch.equal(masters.join(param, low), largest)


@pytest.mark.skipif(shutil.which(CXX[0]) is None, reason=f"no C++ compiler ({CXX[0]}) was found")
def test_every_number_and_every_pair_of_halves(tmp_path: Path) -> None:
    """All 2^32 of both, by the compiled code: see `master_bits.cpp`."""
    program = tmp_path / "master_bits"
    options = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}"]
    command = [*CXX, *options, str(Path(__file__).with_name("master_bits.cpp")), "-o", str(program)]
    for ran in (command, [str(program)]):
        done = subprocess.run(ran, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------------------
# the bits of a whole one


def whole_run(rule: str, policy: str, params: Sequence[Tensor], backend: BackendCase, **settings: Any) -> Any:
    """The same in fp32 parameters: they are what a whole master would be."""
    twins = [torch.nn.Parameter(p.detach().float()) for p in params]
    return POLICIES[policy](RULES[rule](twins), backend=backend.name, **settings), twins


def step_both(optimizer: Any, params: Sequence[Tensor], whole: Any, twins: Sequence[Tensor], step: int) -> None:
    for p, twin, g in zip(params, twins, gradients_of(step, params), strict=True):
        p.grad, twin.grad = g, g.float()
    optimizer.step()
    whole.step()


def assert_same_numbers(optimizer: Any, params: Sequence[Tensor], whole: Any, twins: Sequence[Tensor]) -> None:
    for master, twin in zip(masters_of(optimizer, params), twins, strict=True):
        assert same_bits(master, to_numpy(twin))
    assert_shows(params, [to_numpy(twin) for twin in twins])
    for p, twin in zip(params, twins, strict=True):
        own, theirs = optimizer.state[p], whole.state[twin]
        assert own.keys() - {"master_low"} == theirs.keys()
        for name, value in theirs.items():
            assert same_tensor_bits(own[name], value), name


@pytest.mark.parametrize(("rule", "policy"), PAIRS)
def test_a_pair_has_the_bits_of_a_whole_master(backend: BackendCase, rule: str, policy: str) -> None:
    """Every rule with every policy, its swaps and syncs included, beside the same run in fp32 parameters."""
    if backend.ulps:
        pytest.skip("this backend does not owe the same bits in both dtypes")
    params = make_params(SHAPES, BF16, device=backend.device)
    optimizer = POLICIES[policy](RULES[rule](params), master_weights=True, backend=backend.name)
    whole, twins = whole_run(rule, policy, params, backend)
    for step in range(5):
        step_both(optimizer, params, whole, twins, step)
        assert_same_numbers(optimizer, params, whole, twins)
        with optimizer.slow_weights(), whole.slow_weights():
            for p, twin in zip(params, twins, strict=True):
                assert same_bits(to_numpy(p), round_bfloat16(to_numpy(twin)))
        if hasattr(optimizer, "sync") and step == 2:
            optimizer.sync()
            whole.sync()
    assert_same_numbers(optimizer, params, whole, twins)


def test_slow_weights_that_start_beside_a_master_start_at_it(backend: BackendCase) -> None:
    """As those of a checkpoint that came without: the rounded parameter would be another start."""
    if backend.ulps:
        pytest.skip("this backend does not owe the same bits in both dtypes")
    params = make_params(SHAPES, BF16, device=backend.device)
    optimizer = Lookahead(RULES["sgd"](params), 2, 0.3, master_weights=True, backend=backend.name)
    twins = whole_run("sgd", "lookahead", params, backend)[1]
    whole = Lookahead(RULES["sgd"](twins), 2, 0.3, backend=backend.name)
    for step in range(6):
        if step == 3:
            for p, twin in zip(params, twins, strict=True):
                del optimizer.state[p]["slow_param"], whole.state[twin]["slow_param"]
        step_both(optimizer, params, whole, twins, step)
    assert_same_numbers(optimizer, params, whole, twins)


def test_of_a_clipped_step_and_of_one_that_is_skipped(backend: BackendCase) -> None:
    if backend.ulps:
        pytest.skip("this backend does not owe the same bits in both dtypes")
    params = make_params(SHAPES, BF16, device=backend.device)
    optimizer = EMA(RULES["adamw"](params), master_weights=True, max_grad_norm=0.1, backend=backend.name)
    twins = whole_run("adamw", "ema", params, backend)[1]
    whole = EMA(RULES["adamw"](twins), max_grad_norm=0.1, backend=backend.name)
    for step in range(3):
        step_both(optimizer, params, whole, twins, step)
    assert_same_numbers(optimizer, params, whole, twins)
    before = snapshot(optimizer)
    optimizer.found_inf = torch.ones(1, device=backend.device)
    optimizer.step()
    del optimizer.found_inf
    assert_unchanged(before, snapshot(optimizer))


@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("numel", [1, 15, 16, 17, 1000, 16_387])
def test_of_every_tail_on_every_instruction_set(instruction_set: str, numel: int) -> None:
    native = build.module("_cpu")
    if native is None or instruction_set not in native.instruction_sets():
        pytest.skip(f"no {instruction_set} here")
    params = make_params(((numel,),), BF16)
    optimizer = Lookahead(RULES["adam"](params), 2, 0.3, "pullback", master_weights=True, backend="cpu")
    tune(optimizer, instruction_set=instruction_set)
    whole, twins = whole_run("adam", "lookahead", params, BackendCase("cpu", "cpu", 0.0))
    for step in range(4):
        step_both(optimizer, params, whole, twins, step)
    assert_same_numbers(optimizer, params, whole, twins)


@pytest.mark.parametrize("layout", ["transposed", "strided", "misaligned"])
def test_of_every_layout(backend: BackendCase, layout: str) -> None:
    """A low half lies as its parameter does; beside one with gaps, as the copy that is stepped in its place."""
    if backend.ulps:
        pytest.skip("this backend does not owe the same bits in both dtypes")
    values = make_params(((30, 50),), BF16, device=backend.device)[0].detach()
    if layout == "transposed":
        values = values.t().contiguous().t()
    elif layout == "strided":
        values = torch.stack((values, values), -1)[..., 1]
    else:
        values = torch.cat((values.flatten()[:1], values.flatten()))[1:].view(30, 50)
    p = torch.nn.Parameter(values)
    assert p.stride() == values.stride()
    optimizer = LookaheadSGD([p], lr=0.1, momentum=0.9, k=2, master_weights=True, backend=backend.name)
    twin = torch.nn.Parameter(p.detach().float().contiguous())
    whole = LookaheadSGD([twin], lr=0.1, momentum=0.9, k=2, backend=backend.name)
    for step in range(3):
        step_both(optimizer, [p], whole, [twin], step)
    assert_same_numbers(optimizer, [p], whole, [twin])
    if layout == "transposed":
        assert optimizer.state[p]["master_low"].stride() == p.stride()


# ------------------------------------------------------------------------------------------------------------
# a parameter that was changed by others


def new_values(params: Sequence[Tensor], kind: str) -> list[Tensor]:
    values = [p.detach().clone() for p in make_params([p.shape for p in params], BF16, seed=9)]
    if kind == "weights":
        return values
    constant = {"zeros": 0.0, "negative zeros": -0.0, "infinities": torch.inf, "no numbers": torch.nan}[kind]
    return [torch.full_like(v, constant) for v in values]


@pytest.mark.parametrize("kind", ["weights", "zeros", "negative zeros", "infinities", "no numbers"])
@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_a_changed_parameter_is_taken_as_changed(backend: BackendCase, kind: str, how: str) -> None:
    """A low half that is left of another number moves it by half a unit of bf16 at most. Pruned weights in particular
    are not NaN: from +0 down there is none but their bits."""
    params = make_params(SHAPES, BF16, device=backend.device)
    optimizer = LookaheadSGD(params, lr=0.01, k=100, master_weights=True, backend=backend.name)
    advance(optimizer, params, range(3))
    lows = torch.cat([optimizer.state[p]["master_low"].flatten() for p in params])
    assert (lows < 0).any()
    assert (lows > 0).any()
    values = [v.to(backend.device) for v in new_values(params, kind)]
    for p, v in zip(params, values, strict=True):
        if how == "in place":
            with torch.no_grad():
                p.copy_(v)
        else:
            p.data = v
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, v, master in zip(params, values, masters_of(optimizer, params), strict=True):
        assert same_bits(to_numpy(p), to_numpy(v))
        assert same_bits(round_away(master), to_numpy(v))


# ------------------------------------------------------------------------------------------------------------
# state


@of_each_class
def test_of_a_class_around_other_tensors_it_is_whole(cls: Any) -> None:
    """Operators on it compute with its numbers, and know nothing of their bits."""
    values = make_params(((5,),), BF16)[0].detach()
    p, twin = cls(values.clone()), torch.nn.Parameter(values.float())
    optimizer = LookaheadSGD([p], lr=0.1, momentum=0.9, k=2, master_weights=True)
    whole = LookaheadSGD([twin], lr=0.1, momentum=0.9, k=2)
    for step in range(3):
        (g,) = gradients_of(step, [values])
        p.grad, twin.grad = cls(g), g.float()
        optimizer.step()
        whole.step()
    master = optimizer.state[p]["master_param"]
    assert same_tensor_bits(master.inner if isinstance(master, Around) else master, twin.detach())
    assert same_tensor_bits(p.inner, twin.detach().to(BF16))


def test_two_bytes_a_parameter(backend: BackendCase) -> None:
    params = make_params(((1000,),), BF16, device=backend.device)
    optimizer = LookaheadSGD(params, lr=0.1, master_weights=True, backend=backend.name)
    advance(optimizer, params, range(2))
    own = {name: value.nbytes for name, value in optimizer.state[params[0]].items() if value.dim()}
    assert own == {"master_low": 2000, "slow_param": 4000}


@pytest.mark.parametrize(
    ("value", "error", "told"),
    [
        (torch.zeros(5), TypeError, "state 'master_low' of parameter 0 of group 0 must be torch.int16, got torch.f"),
        (torch.zeros(4, dtype=torch.int16), ValueError, "must have the parameter's shape"),
        (7, TypeError, "must be a Tensor, got int"),
        (torch.zeros(5, dtype=torch.int16, device="meta"), TypeError, "hold numbers, got torch.int16 on meta"),
    ],
    ids=["dtype", "shape", "type", "meta"],
)  # fmt: skip
def test_what_cannot_be_a_low_half_is_refused(value: Any, error: type[Exception], told: str) -> None:
    params = make_params(((5,),), BF16)
    optimizer = LookaheadSGD(params, lr=0.1, master_weights=True)
    advance(optimizer, params, range(1))
    optimizer.state[params[0]]["master_low"] = value
    before = params[0].detach().clone()
    with pytest.raises(error, match=re.escape(told)):
        advance(optimizer, params, range(1))
    assert torch.equal(params[0], before)
