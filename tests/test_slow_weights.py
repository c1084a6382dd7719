"""slow_weights(): the slow weights stand in the parameters for a block, and are saved as what they are."""

from __future__ import annotations

import contextlib
import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import (
    BackendCase,
    UnfusedRMSprop,
    assert_unchanged,
    make_optimizer,
    make_params,
    same_tensor_bits,
    snapshot,
)
from runs import advance, assert_same_run, copies, fresh, gradients_of, tensors_of, through_a_file

import lookahead_fused
from lookahead_fused import _swap as swap

RUNS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 0.1, "pullback_momentum": "pullback"},
    "sgd": {"lr": 0.1, "momentum": 0.9},
    "wrapped-adamw": {"lr": 0.1},
    "external": {"lr": 0.1, "momentum": 0.9},
}
ALL = [(rule, torch.float32, False) for rule in RUNS]
ALL += [("adamw", torch.float64, False), ("external", torch.float64, False), ("sgd", torch.bfloat16, False)]
ALL += [("adamw", torch.bfloat16, True), ("sgd", torch.float16, True), ("external", torch.bfloat16, False)]


def make(
    rule: str, params: Any, backend: BackendCase, *, master: bool = False, k: int = 5
) -> lookahead_fused.Lookahead | torch.optim.Optimizer:
    if rule == "external":
        base = UnfusedRMSprop(params, **RUNS[rule])
        return lookahead_fused.Lookahead(base, k, 0.3, backend=backend.name)
    more = {"master_weights": True} if master else {}
    return make_optimizer(rule, params, backend, k=k, alpha=0.3, **RUNS[rule], **more)


def started(
    rule: str, backend: BackendCase, dtype: torch.dtype = torch.float32, master: bool = False, steps: int = 7
) -> tuple[Any, list[torch.nn.Parameter], list[torch.Tensor]]:
    """An optimizer between two syncs, its parameters (the last never had a gradient), and phi for each."""
    params = fresh(backend, dtype, ((7,), (3, 5), (0,), (), (4,)))
    optimizer = make(rule, params, backend, master=master)
    advance(optimizer, params[:-1], range(steps))
    phi = [optimizer.state[p]["slow_param"].to(dtype, copy=True) for p in params[:-1]]
    assert not any(torch.equal(p, s) for p, s in zip(params, phi, strict=False) if p.numel())
    return optimizer, params, [*phi, params[-1].detach().clone()]


@pytest.mark.parametrize(("rule", "dtype", "master"), ALL)
def test_the_block(backend: BackendCase, rule: str, dtype: torch.dtype, master: bool) -> None:
    """phi inside, theta after, to the bit and at the same addresses; nothing of the run notices."""
    optimizer, params, phi = started(rule, backend, dtype, master)
    theta = [p.detach().clone() for p in params]
    places = [t.data_ptr() for t in (*params, *tensors_of(optimizer.state_dict()))]
    before = snapshot(optimizer, params)
    with optimizer.slow_weights() as nothing:
        assert nothing is None
        assert [t.data_ptr() for t in params] == places[: len(params)]
        for p, s in zip(params, phi, strict=True):
            assert same_tensor_bits(p, s)
    for p, t in zip(params, theta, strict=True):
        assert same_tensor_bits(p, t)
    assert_unchanged(before, snapshot(optimizer, params))
    assert [t.data_ptr() for t in (*params, *tensors_of(optimizer.state_dict()))] == places

    twin, twin_params, _ = started(rule, backend, dtype, master)
    for o, ps in ((optimizer, params), (twin, twin_params)):
        advance(o, ps[:-1], range(7, 12))
    assert_same_run(optimizer, twin)


@pytest.mark.parametrize("rule", RUNS)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_exceptions(backend: BackendCase, rule: str, error: type[BaseException]) -> None:
    optimizer, params, phi = started(rule, backend)
    before = snapshot(optimizer, params)

    def evaluate() -> None:
        with optimizer.slow_weights():
            assert same_tensor_bits(params[0], phi[0])
            raise error

    with pytest.raises(error):
        evaluate()
    assert_unchanged(before, snapshot(optimizer, params))
    with optimizer.slow_weights():
        assert same_tensor_bits(params[0], phi[0])
    assert_unchanged(before, snapshot(optimizer, params))
    advance(optimizer, params[:-1], [7])


@pytest.mark.parametrize("rule", RUNS)
def test_nested(backend: BackendCase, rule: str) -> None:
    """The outermost block decides, however the inner ones end."""
    optimizer, params, phi = started(rule, backend)
    before = snapshot(optimizer, params)
    with optimizer.slow_weights():
        with optimizer.slow_weights():
            assert same_tensor_bits(params[0], phi[0])
        assert same_tensor_bits(params[0], phi[0])
        with pytest.raises(ValueError, match="inner"), optimizer.slow_weights():
            raise ValueError("inner")
        assert same_tensor_bits(params[0], phi[0])
        with pytest.raises(RuntimeError, match="slow_weights"):
            optimizer.step()
    assert_unchanged(before, snapshot(optimizer, params))


@pytest.mark.parametrize("rule", RUNS)
def test_what_is_refused_inside(backend: BackendCase, rule: str) -> None:
    """What reads or writes the fast weights: it raises, and nothing has changed. A copy of the optimizer made
    inside would hold the two weights the wrong way round."""
    optimizer, params, _ = started(rule, backend)
    saved = copy.deepcopy(optimizer.state_dict())
    before = snapshot(optimizer, params)
    calls = []

    def closure() -> None:
        calls.append(1)

    with optimizer.slow_weights():
        inside = snapshot(optimizer, params)
        for call, name in (
            (optimizer.step, "step"),
            (lambda: optimizer.step(closure), "step"),
            (optimizer.sync, "sync"),
            (lambda: optimizer.load_state_dict(saved), "load_state_dict"),
            (lambda: copy.deepcopy(optimizer), "copying"),
            (lambda: pickle.dumps(optimizer), "pickling"),
        ):
            with pytest.raises(RuntimeError, match=rf"{name}.* slow_weights"):
                call()
        assert_unchanged(inside, snapshot(optimizer, params))
    assert not calls
    assert_unchanged(before, snapshot(optimizer, params))
    copy.deepcopy(optimizer)
    optimizer.load_state_dict(saved)
    optimizer.sync()


@pytest.mark.parametrize(("rule", "dtype", "master"), ALL)
def test_state_dict_inside(backend: BackendCase, rule: str, dtype: torch.dtype, master: bool) -> None:
    """With the model's weights of the block it is a whole checkpoint: who resumes starts as if just synced,
    and phi is phi. The same dict in both kinds of swapping."""
    optimizer, params, phi = started(rule, backend, dtype, master)
    outside = copy.deepcopy(optimizer.state_dict())
    with optimizer.slow_weights():
        weights, inside = through_a_file((params, optimizer.state_dict()))
        held = optimizer.state_dict()
    assert_unchanged(outside, inside)
    # Nor does what was asked for inside change when the block is left.
    assert_unchanged(outside, held)
    assert_unchanged(outside, optimizer.state_dict())
    for w, s in zip(weights, phi, strict=True):
        assert same_tensor_bits(w, s)


@pytest.mark.parametrize("rule", RUNS)
def test_state_dict_inside_by_way_of_others(backend: BackendCase, rule: str) -> None:
    """A hook that copies the tensors, as those do that save to another device, sees phi as phi; so does who
    asks the base of a wrapper. Afterwards no hook is left of what a block has registered."""
    optimizer, _, _ = started(rule, backend)
    outside = copy.deepcopy(optimizer.state_dict())
    asked = {optimizer, getattr(optimizer, "base_optimizer", optimizer)}
    for one in asked:
        hooks = len(one._optimizer_state_dict_post_hooks)
        handle = one.register_state_dict_post_hook(lambda _, saved: copy.deepcopy(saved))
        with optimizer.slow_weights():
            assert_unchanged(outside, one.state_dict())
            with optimizer.slow_weights():
                assert_unchanged(outside, one.state_dict())
            assert_unchanged(outside, one.state_dict())
        assert_unchanged(outside, one.state_dict())
        assert len(one._optimizer_state_dict_post_hooks) == hooks + 1
        handle.remove()


def test_what_the_model_computes(backend: BackendCase) -> None:
    """Evaluation inside, in inference mode too, is of phi; a gradient that is there stays."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).to(backend.device)
    optimizer = lookahead_fused.LookaheadSGD(model.parameters(), lr=0.1, k=10, backend=backend.name)
    x = torch.ones(2, 4, device=backend.device)
    start = copy.deepcopy(model)
    for _ in range(3):
        model.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    grads = [p.grad.clone() for p in model.parameters()]
    for mode in (contextlib.nullcontext, torch.no_grad, torch.inference_mode):
        with mode(), optimizer.slow_weights():
            assert torch.equal(model(x), start(x))
        assert not torch.equal(model(x), start(x))
    for p, g in zip(model.parameters(), grads, strict=True):
        assert torch.equal(p.grad, g)
    optimizer.step()


def test_autograd_sees_the_swap(backend: BackendCase) -> None:
    """A graph of before the block is of other weights inside it, and autograd has to say so."""
    (p,) = make_params([(4,)], device=backend.device)
    optimizer = lookahead_fused.LookaheadSGD([p], lr=0.1, backend=backend.name)
    advance(optimizer, [p], range(2))
    loss = p.square().sum()
    with (
        optimizer.slow_weights(),
        pytest.raises(RuntimeError, match="modified by an inplace operation"),
    ):
        loss.backward()


def test_before_the_first_step(backend: BackendCase) -> None:
    """Without a step there are no slow weights: the block, a sync and a state dict inside change nothing."""
    for rule in RUNS:
        params = fresh(backend)
        optimizer = make(rule, params, backend)
        before = snapshot(optimizer)
        with optimizer.slow_weights():
            assert_unchanged(before, snapshot(optimizer))
            assert optimizer.state_dict()["state"] == {}
        optimizer.sync()
        assert_unchanged(before, snapshot(optimizer))
        assert not optimizer.state


def test_views_and_other_layouts(backend: BackendCase) -> None:
    """Parameters whose memory is strided, and which share it with others."""
    memory = torch.arange(24.0, device=backend.device).reshape(4, 6)
    params = [torch.nn.Parameter(memory[:, ::2]), torch.nn.Parameter(memory[:, 1::2].t())]
    optimizer = make("adamw", params, backend)
    advance(optimizer, params, range(3))
    theta = memory.clone()
    with optimizer.slow_weights():
        expected = torch.arange(24.0, device=backend.device).reshape(4, 6)
        assert torch.equal(memory, expected)
    assert torch.equal(memory, theta)


@pytest.mark.parametrize("blocks", [1 << 20, 5])
@pytest.mark.parametrize("first", [torch.channels_last, torch.contiguous_format])
def test_a_model_laid_out_otherwise_inside(
    backend: BackendCase, first: torch.memory_format, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a quicker evaluation. The slow weights lie as before, and each element is traded back for its own."""
    monkeypatch.setattr(swap, "_BLOCK", blocks)
    second = torch.contiguous_format if first is torch.channels_last else torch.channels_last
    model = torch.nn.Conv2d(3, 4, 2).to(backend.device, memory_format=first)
    params = list(model.parameters())
    optimizer = make("adamw", params, backend)
    advance(optimizer, params, range(3))
    before = snapshot(optimizer)
    with optimizer.slow_weights():
        phi = model.weight.detach().clone()
        model.to(memory_format=second)
        assert model.weight.stride() != phi.stride()
        assert torch.equal(model.weight, phi)
    assert_unchanged(before, snapshot(optimizer))
    with optimizer.slow_weights():
        assert torch.equal(model.weight, phi)
        model.to(memory_format=first)
    assert_unchanged(before, snapshot(optimizer))


def test_a_group_added_inside(backend: BackendCase) -> None:
    """Who adds parameters while phi is in place adds ones without slow weights; leaving is as ever."""
    optimizer, params, _ = started("adamw", backend)
    theta = [p.detach().clone() for p in params]
    late = copies(params[:1])
    with optimizer.slow_weights():
        optimizer.add_param_group({"params": late})
        late[0].grad = gradients_of(0, late)[0]
    for p, t in zip(params, theta, strict=True):
        assert same_tensor_bits(p, t)
    optimizer.step()
    assert optimizer.state[late[0]]["step"].item() == 1
