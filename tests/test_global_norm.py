"""`max_grad_norm` and `skip_nonfinite`: the norm of all gradients, what clips by it, and the steps that it skips."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    LOOKAHEAD_CLASSES,
    BackendCase,
    assert_unchanged,
    make_params,
    seeded,
    snapshot,
    to_numpy,
    tune,
)
from torch import Tensor

from lookahead_fused import EMA, GPA, Lion, Lookahead, LookaheadAdamW, LookaheadSGD, ScheduleFree

# Beside and at the borders of lanes and blocks, and more rows than lanes.
SIZES = (1, 63, 64, 65, 0, 4095, 4096, 4097, 5 * 4096 + 70, *([3] * 70))


def in_written_order(values: np.ndarray) -> np.float64:
    """Lane l of 64 adds the values l, l + 64, ... one after the other; then the lanes are added by halves."""
    lanes = np.zeros(64)
    for start in range(0, len(values), 64):
        own = values[start : start + 64]
        lanes[: len(own)] += own
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return lanes[0]


def norm_of(gradients: list[Tensor | None]) -> float:
    """In fp64, in the order of csrc/table/norm.h, for contiguous gradients."""
    sums = []
    for gradient in gradients:
        squares = np.zeros(0) if gradient is None else to_numpy(gradient).astype(np.float64).ravel() ** 2
        blocks = [in_written_order(squares[start : start + 4096]) for start in range(0, len(squares), 4096)]
        sums.append(in_written_order(np.array(blocks)))
    return math.sqrt(in_written_order(np.array(sums)))


def give_gradients(params: list[Any], seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = seeded(seed)
    for p in params:
        # Of many magnitudes, so that another order of additions is another sum.
        wide = torch.randn(p.shape, generator=generator).exp() * torch.randn(p.shape, generator=generator)
        p.grad = (wide * scale).to(p.dtype).to(p.device)
    return [p.grad for p in params]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_norm_is_added_in_its_written_order(backend: BackendCase, dtype: torch.dtype) -> None:
    params = make_params([(size,) for size in SIZES], dtype, device=backend.device)
    optimizer = LookaheadSGD(params, lr=0.1, backend=backend.name, max_grad_norm=1.0)
    assert optimizer.grad_norm.isnan()
    for step in range(2):
        gradients = give_gradients(params, step)
        optimizer.step()
        assert optimizer.grad_norm.item() == norm_of(gradients)
    assert (optimizer.grad_norm.dtype, optimizer.grad_norm.shape) == (torch.float64, ())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_instruction_sets_are_no_matter(threads: int) -> None:
    module = pytest.importorskip("lookahead_fused._cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for instruction_set in module.instruction_sets():
            params = make_params([(size,) for size in SIZES])
            optimizer = LookaheadSGD(params, lr=0.1, backend="cpu", max_grad_norm=1.0)
            tune(optimizer, instruction_set=instruction_set, own_threads=threads == 3)
            gradients = give_gradients(params, 0)
            optimizer.step()
            assert optimizer.grad_norm.item() == norm_of(gradients), instruction_set
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_clipped_step_is_one_on_clipped_gradients(backend: BackendCase, rule: str, dtype: torch.dtype) -> None:
    """Above the largest norm and below it. The gradients stay as they are."""
    shapes = [(5,), (70, 3), (0,)]
    params, others = (make_params(shapes, dtype, device=backend.device) for _ in range(2))
    clipped = LOOKAHEAD_CLASSES[rule](params, lr=0.1, k=2, backend=backend.name, max_grad_norm=0.5)
    plain = LOOKAHEAD_CLASSES[rule](others, lr=0.1, k=2, backend=backend.name)
    for step, scale in enumerate((1.0, 1e-4, 1e3)):
        gradients = give_gradients(params, step, scale)
        kept = [g.clone() for g in gradients]
        norm = norm_of(gradients)
        coefficient = torch.tensor(min(0.5 / (norm + 1e-6), 1.0), dtype=torch.float64).to(dtype)
        for other, g in zip(others, gradients, strict=True):
            other.grad = g * coefficient
        assert (coefficient == 1) == (step == 1)
        clipped.step()
        plain.step()
        for p, other, g, before in zip(params, others, gradients, kept, strict=True):
            if backend.ulps == 0:
                assert torch.equal(p, other)
            torch.testing.assert_close(p, other)
            assert torch.equal(g, before)
            assert p.grad is g


def test_it_clips_as_torch_does(backend: BackendCase) -> None:
    params, others = (make_params(device=backend.device) for _ in range(2))
    ours = LookaheadSGD(params, lr=0.1, momentum=0.9, backend=backend.name, max_grad_norm=0.3)
    plain = LookaheadSGD(others, lr=0.1, momentum=0.9, backend=backend.name)
    for step in range(3):
        give_gradients(params, step)
        give_gradients(others, step)
        norm = torch.nn.utils.clip_grad_norm_(others, 0.3)
        ours.step()
        plain.step()
        torch.testing.assert_close(ours.grad_norm.float(), norm, rtol=1e-6, atol=0)
    for p, other in zip(params, others, strict=True):
        torch.testing.assert_close(p, other, rtol=1e-6, atol=1e-6)


def test_groups_and_dtypes_have_one_norm(backend: BackendCase) -> None:
    """Each pattern of dtypes is a part of its own, and the order is that of the parameters, not of the parts."""
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float64]
    params = [make_params([(40 + i,)], dtype, device=backend.device)[0] for i, dtype in enumerate(dtypes)]
    groups = [{"params": params[:1], "lr": 0.5}, {"params": params[1:], "weight_decay": 0.1}]
    optimizer = LookaheadAdamW(groups, lr=0.1, backend=backend.name, max_grad_norm=1.0)
    for step in range(2):
        gradients = give_gradients(params, step)
        optimizer.step()
        assert optimizer.grad_norm.item() == norm_of(gradients)


def test_what_has_no_gradient_adds_nothing(backend: BackendCase) -> None:
    """Not even what it added in the step before; and what comes later is in."""
    params = make_params([(70,), (5,), (4100,)], device=backend.device)
    optimizer = LookaheadAdamW(params, lr=0.1, backend=backend.name, max_grad_norm=1.0)
    for step, without in enumerate(([1], [], [0, 2], [0, 1, 2], [2])):
        gradients: list[Tensor | None] = [*give_gradients(params, step)]
        for index in without:
            gradients[index] = params[index].grad = None
        optimizer.step()
        assert optimizer.grad_norm.item() == norm_of(gradients)
    late = make_params([(3,)], device=backend.device)[0]
    optimizer.add_param_group({"params": [late]})
    params.append(late)
    gradients = [*give_gradients(params, 9)]
    optimizer.step()
    assert optimizer.grad_norm.item() == norm_of(gradients)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_step_that_is_not_finite_changes_nothing(backend: BackendCase, bad: float) -> None:
    params = make_params([(70,), (5,)], device=backend.device)
    optimizer = LookaheadAdamW(params, lr=0.1, k=2, backend=backend.name, skip_nonfinite=True)
    assert optimizer.skipped_steps.item() == 0
    for step in range(5):
        give_gradients(params, step)
        skips = step in (1, 3)
        if skips:
            params[1].grad[2] = bad
        before = snapshot(optimizer)
        optimizer.step()
        assert optimizer.grad_norm.isfinite().item() != skips
        if skips:
            assert_unchanged(before, snapshot(optimizer))
        else:
            assert not torch.equal(params[0], before["params"][0])
    assert optimizer.skipped_steps.item() == 2
    assert all(optimizer.state[p]["step"].item() == 3 for p in params)
    assert optimizer.skipped_steps.dtype == torch.int64


def test_without_it_what_is_not_finite_goes_through(backend: BackendCase) -> None:
    """As it does where torch clips: inf makes NaN of what is clipped, and 0 of nothing."""
    params = make_params([(4,)], device=backend.device)
    optimizer = LookaheadSGD(params, lr=0.1, backend=backend.name, max_grad_norm=1.0)
    params[0].grad = torch.tensor([math.inf, 1.0, 1.0, 1.0], device=backend.device)
    optimizer.step()
    assert optimizer.grad_norm.item() == math.inf
    assert optimizer.skipped_steps.item() == 0
    assert params[0].isnan().tolist() == [True, False, False, False]


def test_a_norm_of_zero_steps(backend: BackendCase) -> None:
    params = make_params([(4,)], device=backend.device)
    optimizer = LookaheadSGD(params, lr=0.1, weight_decay=0.5, backend=backend.name, max_grad_norm=1.0)
    before = params[0].detach().clone()
    params[0].grad = torch.zeros(4, device=backend.device)
    optimizer.step()
    assert optimizer.grad_norm.item() == 0
    torch.testing.assert_close(params[0].detach(), before * (1 - 0.1 * 0.5))


def test_a_scaler_has_the_unscaled_gradients_clipped(backend: BackendCase) -> None:
    """The step unscales: the norm is of what it would be without a scaler, and an overflow still skips."""
    ends, norms = [], []
    for scale in (1.0, 2.0**10):
        params = make_params([(70,), (5,)], device=backend.device)
        optimizer = LookaheadAdamW(params, lr=0.1, backend=backend.name, max_grad_norm=0.5)
        for step in range(3):
            give_gradients(params, step, scale)
            overflow = step == 1
            optimizer.grad_scale = torch.tensor(scale, device=backend.device)
            optimizer.found_inf = torch.tensor(float(overflow), device=backend.device)
            optimizer.step()
            norms.append(optimizer.grad_norm.item())
        assert optimizer.state[params[0]]["step"].item() == 2
        ends.append([p.detach().clone() for p in params])
    assert norms[:3] == norms[3:]
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------------------------------------------------------
# what it is to its user


@pytest.mark.parametrize(
    ("given", "error"), [(0, ValueError), (-1.0, ValueError), (math.nan, ValueError), ("1", TypeError)]
)
def test_a_norm_that_is_none_is_refused(given: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"max_grad_norm must be a number > 0, or None, got"):
        LookaheadAdamW(make_params(), max_grad_norm=given)
    with pytest.raises(error, match=r"max_grad_norm must be"):
        Lookahead(torch.optim.AdamW(make_params()), max_grad_norm=given)
    with pytest.raises(TypeError, match="skip_nonfinite must be True or False"):
        LookaheadAdamW(make_params(), skip_nonfinite="yes")


WRAPPERS = (Lookahead, EMA, GPA, ScheduleFree)


@pytest.mark.parametrize("name", ["max_grad_norm", "skip_nonfinite"])
def test_it_is_the_whole_optimizers(name: str) -> None:
    for make in (LookaheadAdamW, Lion):
        with pytest.raises(ValueError, match=f"{name} must not stand in a parameter group"):
            make([{"params": make_params(), name: 1.0}])
    for wrapper in WRAPPERS:
        optimizer = wrapper(torch.optim.AdamW(make_params()))
        for key in (name, optimizer.policy.prefix + name):
            with pytest.raises(ValueError, match=f"{key} must not stand in a parameter group"):
                optimizer.add_param_group({"params": make_params(), key: 1.0})


def every_optimizer(params: Any, **asked: Any) -> list[torch.optim.Optimizer]:
    made = [cls([params()[0]], lr=0.01, **asked) for cls in (*LOOKAHEAD_CLASSES.values(), Lion)]
    made += [wrapper(torch.optim.AdamW([params()[0]], lr=0.01), **asked) for wrapper in WRAPPERS]
    return [*made, *(wrapper(torch.optim.NAdam([params()[0]], lr=0.01), **asked) for wrapper in WRAPPERS)]


def test_every_class_and_wrapper_has_it() -> None:
    for optimizer in every_optimizer(lambda: make_params([(40,)]), max_grad_norm=1e-3, skip_nonfinite=True):
        (param,) = optimizer.param_groups[0]["params"]
        gradients = give_gradients([param], 0)
        optimizer.step()
        assert optimizer.grad_norm.item() == norm_of(gradients), optimizer
        assert param.grad is gradients[0]
        before = param.detach().clone()
        param.grad = torch.full_like(param, math.nan)
        optimizer.step()
        assert torch.equal(param, before), optimizer
        assert optimizer.skipped_steps.item() == 1
        saved = optimizer.state_dict()
        assert not any("norm" in str(key) or "skip" in str(key) for key in saved["param_groups"][0])
        assert not any("norm" in key or "skip" in key for key in next(iter(saved["state"].values())))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_a_copy_clips_too(copied: Any) -> None:
    optimizer = LookaheadSGD(make_params([(40,)]), lr=0.1, max_grad_norm=0.25, skip_nonfinite=True)
    other = copied(optimizer)
    params = [group["params"][0] for o in (optimizer, other) for group in o.param_groups]
    for p in params:
        give_gradients([p], 0)
    optimizer.step()
    other.step()
    assert torch.equal(*params)
    assert optimizer.grad_norm.item() == other.grad_norm.item() > 0.25
    params[1].grad[0] = math.nan
    other.step()
    assert (optimizer.skipped_steps.item(), other.skipped_steps.item()) == (0, 1)


def test_what_is_read_is_the_readers() -> None:
    """A later step does not change a norm that was read before, nor does its reader change the optimizer's."""
    params = make_params([(40,)])
    optimizer = LookaheadSGD(params, lr=0.1, max_grad_norm=0.25)
    give_gradients(params, 0)
    optimizer.step()
    read, value = optimizer.grad_norm, optimizer.grad_norm.item()
    give_gradients(params, 1)
    optimizer.step()
    assert read.item() == value != optimizer.grad_norm.item()
    read.fill_(0)
    assert optimizer.grad_norm.item() > 0


# ------------------------------------------------------------------------------------------------------------
# around an optimizer whose step is its own


class Recorder(torch.optim.SGD):
    """A base that is not fused and keeps the gradients that it saw."""

    def step(self, closure: Any = None) -> Any:
        self.given = [p.grad for group in self.param_groups for p in group["params"]]
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None]
        if getattr(self, "fails", False):
            raise FloatingPointError("the base's own")
        return super().step(closure)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_base_sees_clipped_copies(backend: BackendCase, wrapper: Any) -> None:
    params, others = (make_params([(40,), (3, 5)], device=backend.device) for _ in range(2))
    ours = wrapper(Recorder(params, lr=0.1), backend=backend.name, max_grad_norm=0.5)
    plain = wrapper(Recorder(others, lr=0.1), backend=backend.name)
    for step in range(3):
        gradients = give_gradients(params, step)
        kept = [g.clone() for g in gradients]
        give_gradients(others, step)
        torch.nn.utils.clip_grad_norm_(others, 0.5)
        ours.step()
        plain.step()
        assert ours.grad_norm.item() == norm_of(kept)
        for p, g, before, seen, clipped in zip(
            params, gradients, kept, ours.base_optimizer.seen, plain.base_optimizer.seen, strict=True
        ):
            assert p.grad is g
            assert torch.equal(g, before)
            torch.testing.assert_close(seen, clipped, rtol=1e-6, atol=1e-7)
    for p, other in zip(params, others, strict=True):
        torch.testing.assert_close(p, other, rtol=1e-5, atol=1e-6)


def test_a_base_that_fails_gives_the_gradients_back() -> None:
    params = make_params([(40,)])
    optimizer = Lookahead(Recorder(params, lr=0.1), max_grad_norm=0.5)
    gradients = give_gradients(params, 0)
    optimizer.base_optimizer.fails = True
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert params[0].grad is gradients[0]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_closure_around_a_base_is_evaluated_once(wrapper: Any) -> None:
    params = make_params([(40,)])
    optimizer = wrapper(Recorder(params, lr=0.1), max_grad_norm=0.5)
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (params[0] ** 2).sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    assert optimizer.step(closure).item() == calls[0]
    assert len(calls) == 1
    assert optimizer.base_optimizer.seen[0].norm().item() == pytest.approx(0.5, rel=1e-4)


def test_a_base_that_skips_makes_no_step() -> None:
    params = make_params([(40,)])
    optimizer = Lookahead(Recorder(params, lr=0.1, momentum=0.9), k=1, skip_nonfinite=True)
    gradients = give_gradients(params, 0)
    optimizer.step()
    assert optimizer.base_optimizer.given[0] is gradients[0], "nothing is clipped, and yet it was copied"
    params[0].grad[3] = math.nan
    before = snapshot(optimizer)
    optimizer.step()
    assert_unchanged(before, snapshot(optimizer))
    assert len(optimizer.base_optimizer.seen) == 1
    assert optimizer.skipped_steps.item() == 1


def test_gradients_that_have_no_norm_here_are_refused() -> None:
    param = torch.nn.Parameter(torch.zeros(3, 2))
    optimizer = Lookahead(torch.optim.SparseAdam([param]), max_grad_norm=1.0)
    param.grad = torch.eye(3)[:, :2].to_sparse()
    with pytest.raises(TypeError, match="sparse"):
        optimizer.step()
    assert not optimizer.state


def test_groups_that_are_replaced_are_seen() -> None:
    """Loading a state dict makes new groups: the norm is of the parameters that are in them now."""
    params = make_params([(40,), (5,)])
    optimizer = Lookahead(torch.optim.NAdam(params, lr=0.01), max_grad_norm=0.5)
    gradients = give_gradients(params, 0)
    optimizer.step()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    optimizer.load_state_dict(torch.load(buffer, weights_only=True))
    optimizer.add_param_group({"params": make_params([(7,)], seed=3)})
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = give_gradients(everything, 1)
    optimizer.step()
    assert optimizer.grad_norm.item() == norm_of(gradients)
