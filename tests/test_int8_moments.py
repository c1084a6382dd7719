"""`state_dtype="int8"`: what codes have and other narrow moments have not; for the rest see `test_state_dtype.py`.

What codes are is tested in `test_codes.py`, and what becomes of them in checkpoints in `test_int8_checkpoints.py`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Any

import coded
import numpy as np
import pytest
import torch
from helpers import BackendCase, make_grads, make_params, same_tensor_bits, seeded, tune
from narrow import OPTIMIZERS, REFERENCE, assert_same, made, of_class, run, wide
from test_tensor_classes import Around, AroundState

import lookahead_fused
from lookahead_fused._norm import GlobalNorm


def test_codes_are_the_oracle_s(backend: BackendCase) -> None:
    """SGD with momentum by hand, in NumPy: what a step reads is what codes stand for, what it leaves is drawn anew."""
    p = torch.nn.Parameter(torch.zeros(300, device=backend.device))
    optimizer = of_class("sgd", momentum=0.5, lr=1.0, k=100)([p], backend.name, "int8")
    buffer = np.zeros(300, dtype=np.float32)
    for t in range(1, 6):
        gradient = torch.randn(300, generator=seeded(t)) * 10.0 ** torch.randint(-6, 7, (300,), generator=seeded(t))
        p.grad = gradient.to(p.device)
        optimizer.step()
        g = gradient.numpy()
        buffer = g if t == 1 else np.float32(0.5) * buffer + g
        codes, tops = coded.encode(buffer, coded.SIGNED, coded.draws(300, t, False, 0))
        own = optimizer.state[p]
        if backend.ulps == 0:
            assert own["momentum_buffer"].cpu().numpy().tobytes() == codes.tobytes()
            assert own["momentum_buffer_scale"].cpu().numpy().tobytes() == coded.scales(tops).tobytes()
        buffer = wide(own, "momentum_buffer").numpy()


@pytest.mark.parametrize("numel", [*range(1, 18), 31, 33, 63, 64, 65, 127, 128, 129, 130, 255, 256, 257, 300])
def test_tails_of_every_length_are_the_reference_s(numel: int) -> None:
    native = lookahead_fused._build.module("_cpu")
    if native is None:
        pytest.skip(lookahead_fused._build.reason("_cpu"))
    make = of_class("adam", amsgrad=True, pullback_momentum="pullback", k=2)
    # At an address of its own, too.
    params = [torch.nn.Parameter(t) for t in (torch.randn(numel, generator=seeded(1)), torch.randn(numel + 1)[1:])]

    def stepped(backend: str, **tuning: Any) -> tuple[torch.optim.Optimizer, list[Any]]:
        own = copy.deepcopy(params)
        own[1].data = torch.cat([own[1].data.new_zeros(1), own[1].data])[1:]
        optimizer = make(own, backend, "int8")
        tune(optimizer, **tuning)
        run(optimizer, own, range(1, 4))
        return optimizer, own

    expected = stepped("reference")
    for instruction_set in native.instruction_sets():
        assert_same(*stepped("cpu", instruction_set=instruction_set), *expected)


def test_codes_take_a_few_times_the_arithmetic() -> None:
    """What a compiler makes of the loops over lanes: 2 times or little more, in cache. One that left a loop took 5."""
    native = lookahead_fused._build.module("_cpu")
    if native is None:
        pytest.skip(lookahead_fused._build.reason("_cpu"))

    def stepping(state_dtype: str, instruction_set: str) -> Callable[[], float]:
        p = torch.nn.Parameter(torch.randn(32768, generator=seeded(1)))
        p.grad = torch.randn(32768, generator=seeded(2))
        optimizer = of_class("adamw", k=10**6)([p], "cpu", state_dtype)
        tune(optimizer, instruction_set=instruction_set)

        def seconds() -> float:
            start = time.perf_counter()
            for _ in range(5):
                optimizer.step()
            return time.perf_counter() - start

        return seconds

    for instruction_set in native.instruction_sets():
        whole, codes = stepping("float32", instruction_set), stepping("int8", instruction_set)
        pairs = [(whole(), codes()) for _ in range(60)]
        # The shortest of each: what else runs makes none shorter.
        shortest = [min(times) for times in zip(*pairs, strict=True)]
        assert shortest[1] < 3.5 * shortest[0], (instruction_set, shortest)


@pytest.mark.parametrize("chunk_elements", [1, 7, 64, 4097])
def test_chunks_that_cut_blocks_are_refused(chunk_elements: int) -> None:
    if reason := lookahead_fused._build.reason("_cpu"):
        pytest.skip(reason)
    params = make_params()
    optimizer = of_class("adamw")(params, "cpu", "int8")
    tune(optimizer, chunk_elements=chunk_elements)
    with pytest.raises(ValueError, match=r"^chunk_elements must be a multiple of 128 where moments lie in codes$"):
        run(optimizer, params, range(1, 2))


def test_what_is_infinite_or_no_number_harms_itself_alone(backend: BackendCase) -> None:
    """Neither the scale of its block nor a neighbour: it becomes NaN, as it would in a few steps of fp32."""
    params = make_params(((256,), (256,)), device=backend.device)
    optimizer = of_class("adamw")(params, backend.name, "int8")
    for t in range(1, 4):
        for p, g in zip(params, make_grads([params[0]] * 2, generator=seeded(t)), strict=True):
            p.grad = g
        params[1].grad = params[0].grad.clone()
        params[1].grad[[3, 7]] = torch.tensor([math.inf, math.nan], device=backend.device)
        optimizer.step()
    apart = [i for i in range(256) if i not in (3, 7)]
    clean, other = (optimizer.state[p] for p in params)
    for moment in ("exp_avg", "exp_avg_sq"):
        found = wide(other, moment)
        assert found[[3, 7]].isnan().all()
        assert torch.isfinite(found[apart]).all()
        assert (found[apart] - wide(clean, moment)[apart]).abs().max() <= wide(clean, moment).max()
    assert torch.isfinite(params[1][apart]).all()


def test_a_parameter_with_gaps_is_stepped_through_a_copy(backend: BackendCase) -> None:
    numbers = torch.randn(20, 40, generator=seeded(0)).to(backend.device)
    params = [torch.nn.Parameter(numbers.clone()[:, ::2]), torch.nn.Parameter(numbers[:, ::2].contiguous())]
    assert not params[0].is_contiguous()
    optimizer = of_class("adamw", k=2)(params, backend.name, "int8")
    for t in range(1, 6):
        for p in params:
            p.grad = torch.randn(20, 20, generator=seeded(t)).to(backend.device)
        optimizer.step()
    assert torch.equal(*params)
    gaps, dense = (optimizer.state[p] for p in params)
    assert all(same_tensor_bits(gaps[name], dense[name]) for name in dense)


def test_a_parameter_that_is_laid_out_anew_takes_its_moments_along(backend: BackendCase) -> None:
    """Encoded to the nearest in its new order, in blocks of other elements."""
    p = torch.nn.Parameter(torch.randn(2, 8, 5, 6, generator=seeded(0)).to(backend.device))
    optimizer = of_class("adamw", lr=0.0)([p], backend.name, "int8")
    run(optimizer, [p], range(1, 3))
    before = wide(optimizer.state[p], "exp_avg_sq")
    p.data = p.data.contiguous(memory_format=torch.channels_last)
    p.grad = torch.zeros_like(p)
    optimizer.sync()
    own = optimizer.state[p]
    assert own["exp_avg_sq"].stride() == p.stride()
    assert torch.equal(wide(own, "exp_avg_sq"), before)


@pytest.mark.parametrize("name", ["adamw", "lion alone", "gpa"])
def test_clipped_and_skipped_steps_are_the_reference_s(backend: BackendCase, name: str) -> None:
    found = []
    for case in (backend, REFERENCE):
        optimizer, params = made(OPTIMIZERS[name], case, state_dtype="int8")
        optimizer._norm = GlobalNorm(0.5, True)  # type: ignore[attr-defined]
        run(optimizer, params, range(1, 4))
        kept = copy.deepcopy(dict(optimizer.state[params[3]]))
        params[3].grad[7] = math.nan  # type: ignore[index]
        optimizer.step()
        assert all(same_tensor_bits(value, kept[n]) for n, value in optimizer.state[params[3]].items())
        run(optimizer, params, range(4, 6))
        assert optimizer.skipped_steps.item() == 1  # type: ignore[attr-defined]
        found.append((optimizer, params))
    if backend.ulps == 0:
        assert_same(*found[0], *found[1])


def test_parameters_that_share_memory_are_stepped_in_turn(backend: BackendCase) -> None:
    whole = torch.randn(400, generator=seeded(0)).to(backend.device)
    found = []
    for name in (backend.name, "reference"):
        memory = whole.clone()
        params = [torch.nn.Parameter(memory[:300]), torch.nn.Parameter(memory[200:])]
        optimizer = of_class("adamw")(params, name, "int8")
        run(optimizer, params, range(1, 5))
        found.append((optimizer, params))
    if backend.ulps == 0:
        assert_same(*found[0], *found[1])


@pytest.mark.parametrize("cls", [Around, AroundState])
def test_a_gradient_of_a_class_around_others_is_stepped_by_operators(cls: type[Around]) -> None:
    found = []
    for wraps in (True, False):
        params = make_params(((300,), (5,)))
        optimizer = of_class("adamw", pullback_momentum="pullback", k=2)(params, "auto", "int8")
        for t in range(1, 6):
            for p, g in zip(params, make_grads(params, generator=seeded(t)), strict=True):
                p.grad = cls(g) if wraps else g
            optimizer.step()
        optimizer.sync()
        found.append((optimizer, params))
    assert_same(*found[0], *found[1])


def test_parameters_of_classes_around_others_are_refused() -> None:
    """Only their class knows in which order their memory lies, and blocks are cut in that."""
    param = torch.nn.Parameter(Around(torch.ones(5)))
    said = "must be a Tensor with memory of its own with state_dtype='int8', got a Around: "
    with pytest.raises(TypeError, match=f"^a parameter {said}"):
        lookahead_fused.LookaheadAdamW([param], state_dtype="int8")
    params = [*make_params(((4,),)), param]
    optimizer = lookahead_fused.LookaheadAdamW(params, state_dtype="bfloat16")
    for p in params:
        p.grad = torch.ones_like(p.detach())
    optimizer.param_groups[0]["state_dtype"] = "int8"
    before = params[0].detach().clone()
    with pytest.raises(TypeError, match=f"^parameter 1 of group 0 {said}"):
        optimizer.step()
    assert torch.equal(params[0], before)
    assert not optimizer.state
