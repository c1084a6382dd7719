"""Tensors move: replaced data, state, lists and dtypes; nothing is read or written where they were."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import (
    DTYPE_NAMES,
    BackendCase,
    Lockstep,
    make_grads,
    make_optimizer,
    make_params,
    make_tensor,
    same_tensor_bits,
    seeded,
    to_numpy,
    tune,
)
from torch import Tensor

import lookahead_fused

LIVELY = {
    "adamw": {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True, "pullback_momentum": "pullback", "k": 2},
    "sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "pullback_momentum": "pullback", "k": 2},
    "wrapped-adamw": {"lr": 0.1, "weight_decay": 0.1, "pullback_momentum": "reset", "k": 2},
}
GUARD = 77.0


def replace_param_data(p: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    p.data = p.data.clone()


def replace_param_layout(p: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    dims = tuple(reversed(range(p.dim())))
    p.data = p.data.permute(dims).contiguous().permute(dims)


def replace_state_data(p: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    """The snippet that everybody copies to move an optimizer to a device."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.data = value.data.clone()


def replace_state_tensors(p: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    for name, value in optimizer.state[p].items():
        optimizer.state[p][name] = value.clone()


def replace_step_dtype(p: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    """A load through somebody's hands leaves the counter in fp32, or as an integer."""
    state = optimizer.state[p]
    state["step"] = state["step"].to(torch.int64 if state["step"].item() % 2 else torch.float32)


def replace_state_dtype_in_place(p: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    """The same tensor objects, other memory and another dtype: fp32 in fp64 is the same numbers."""
    for value in optimizer.state[p].values():
        value.data = value.data.to(torch.float32 if value.dim() == 0 else torch.float64)


def replace_state_layout(p: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    for name, value in optimizer.state[p].items():
        dims = tuple(reversed(range(value.dim())))
        optimizer.state[p][name] = value.permute(dims).contiguous().permute(dims)


def replace_state_by_views(p: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    for name, value in optimizer.state[p].items():
        wide = torch.full((*value.shape, 2), GUARD, dtype=value.dtype, device=value.device)
        wide[..., 1] = value
        optimizer.state[p][name] = wide[..., 1]


def replace_state_dicts(p: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    for key in list(optimizer.state):
        optimizer.state[key] = {name: value.clone() for name, value in optimizer.state[key].items()}


MOVES = [
    replace_param_data,
    replace_param_layout,
    replace_state_data,
    replace_state_tensors,
    replace_step_dtype,
    replace_state_dtype_in_place,
    replace_state_layout,
    replace_state_by_views,
    replace_state_dicts,
]


@pytest.mark.parametrize("rule", LIVELY)
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("shape", [(33,), (4, 6)])
@pytest.mark.parametrize("way", ["SHIM", "EXCHANGE_API"])
def test_tensors_move(backend: BackendCase, rule: str, move: Callable, shape: tuple[int, ...], way: str) -> None:
    """New addresses, old values: nothing may still be read or written at the old ones."""
    params = make_params([shape, (3, 5), shape], device=backend.device)
    pair = Lockstep(backend, rule, (params, {}), **LIVELY[rule])
    tune(pair.optimizer, way=way)
    for _ in range(5):
        pair.step()
        old = [params[0].data, *[v.data for v in pair.optimizer.state[params[0]].values()]]
        move(params[0], pair.optimizer)
        before = [t.clone() for t in old]
        grads = make_grads(params, generator=pair.generator)
        pair.step(grads)
        now = {t.data_ptr() for t in (params[0], *pair.optimizer.state[params[0]].values())}
        for tensor, copy in zip(old, before, strict=True):
            assert tensor.data_ptr() in now or same_tensor_bits(tensor, copy), "written at an old address"


@pytest.mark.parametrize("rule", LIVELY)
@pytest.mark.parametrize("held", ["tensors", "one state", "state", "state_dict"])
@pytest.mark.parametrize("pause", [0, 3])
def test_state_moves_by_what_was_held(backend: BackendCase, rule: str, held: str, pause: int) -> None:
    """Who once asked for a part of the state may come back to it steps later, without asking again."""
    pair = Lockstep(backend, rule, ([(33,), (4, 6)], {}), **LIVELY[rule])
    optimizer, (p, _) = pair.optimizer, pair.params

    def step_unseen() -> None:
        for q, oracle in zip(pair.params, pair.oracles, strict=True):
            (q.grad,) = make_grads([q], generator=pair.generator)
            oracle.step(to_numpy(q.grad))
        optimizer.step()

    step_unseen()
    tensors = own = state = state_dict = None
    if held == "tensors":
        tensors = list(optimizer.state[p].values())
    elif held == "one state":
        own = optimizer.state[p]
    elif held == "state":
        state = optimizer.state
    else:
        state_dict = optimizer.state_dict()
    for _ in range(2):
        for _ in range(pause):
            step_unseen()
        if own is None and state is not None:
            own = state[p]
        if own is not None:
            own.update({name: value.clone() for name, value in own.items()})
            if state is not None:
                own = None
        for value in tensors or (state_dict["state"][0].values() if state_dict else ()):
            value.data = value.data.clone()
        step_unseen()
    pair.check()


@pytest.mark.parametrize("rule", LIVELY)
def test_new_weights_are_the_weights(backend: BackendCase, rule: str) -> None:
    """`p.data = other` and `p.copy_(other)` between steps, with other values: the next step starts there,
    phi stays."""
    pair = Lockstep(backend, rule, **LIVELY[rule])
    generator = seeded(9)
    for t in range(6):
        pair.step()
        for p, oracle in zip(pair.params, pair.oracles, strict=True):
            values = make_tensor(p.shape, generator=generator, device=backend.device)
            if t % 2:
                p.data = values
            else:
                with torch.no_grad():
                    p.copy_(values)
            oracle.param = to_numpy(values)


@pytest.mark.parametrize("rule", LIVELY)
def test_memory_is_reused(backend: BackendCase, rule: str) -> None:
    """Parameters are dropped; others, of other sizes and dtypes, come to lie at their addresses."""
    memory = torch.zeros(1024, dtype=torch.uint8, device=backend.device)
    optimizer = make_optimizer(rule, make_params([(1,)], device=backend.device), backend, **LIVELY[rule])
    for n, dtype in ((64, torch.float32), (32, torch.float64), (48, torch.float32), (64, torch.float32)):
        params = []
        for i in range(2):
            place = memory[512 * i : 512 * i + n * dtype.itemsize].view(dtype)
            place.copy_(make_tensor((n,), dtype, generator=seeded(i)))
            params.append(torch.nn.Parameter(place))
        optimizer.state.clear()
        optimizer.param_groups[0]["params"] = params
        pair = Lockstep(backend, rule, (params, {}), seed=n, dtype=dtype, **LIVELY[rule])
        pair.optimizer = optimizer
        for _ in range(3):
            pair.step()


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_is_cast_in_the_run(backend: BackendCase, rule: str, dtype: torch.dtype) -> None:
    """`model.bfloat16()` after some steps replaces the data of the same parameters; fp32 state goes on."""
    pair = Lockstep(backend, rule, **LIVELY[rule])
    for target in (torch.float32, dtype, torch.float32, dtype):
        for p, oracle in zip(pair.params, pair.oracles, strict=True):
            p.grad = None
            p.data = p.data.to(target)
            oracle.dtype, oracle.param = DTYPE_NAMES[target], to_numpy(p)
        for _ in range(3):
            pair.step()


@pytest.mark.parametrize("rule", LIVELY)
@pytest.mark.parametrize("in_place", [False, True])
def test_a_groups_list_is_replaced(backend: BackendCase, rule: str, in_place: bool) -> None:
    """Accelerate puts other parameters into `group["params"]`; they start anew, the old ones rest."""
    first = Lockstep(backend, rule, ([(5,), (6,)], {}), ([(4,)], {}), **LIVELY[rule])
    first.step()
    resting = [p.detach().clone() for p in first.params[:2]]
    fresh = make_params([(6,), (5,), (9,)], seed=3, device=backend.device)
    second = Lockstep(backend, rule, (fresh, {}), **LIVELY[rule])
    second.optimizer = first.optimizer
    if in_place:
        first.optimizer.param_groups[0]["params"][:] = fresh
    else:
        first.optimizer.param_groups[0]["params"] = fresh
    first.params[2].grad = None
    for p in first.params[:2]:
        p.grad = torch.ones_like(p)
    for _ in range(3):
        second.step()
    for p, before in zip(first.params[:2], resting, strict=True):
        assert same_tensor_bits(p, before)


@pytest.mark.parametrize("rule", LIVELY)
def test_a_group_is_added(backend: BackendCase, rule: str) -> None:
    """Progressive unfreezing: a group added in the run starts then, by its own hyperparameters."""
    pair = Lockstep(backend, rule, ([(5,)], {}), **LIVELY[rule])
    for t in range(4):
        if t == 2:
            other = Lockstep(backend, rule, ([(7,), (0,), (3, 3)], {"lr": 0.3}), seed=4, **LIVELY[rule])
            pair.optimizer.add_param_group({"params": other.params, "lr": 0.3})
            pair.params += other.params
            pair.oracles += other.oracles
        pair.step()


@pytest.mark.parametrize("rule", LIVELY)
@pytest.mark.parametrize("how", ["clear", "replace", "one", "empty"])
def test_state_is_cleared(backend: BackendCase, rule: str, how: str) -> None:
    """A parameter without state starts anew from where it is: step 1, phi = theta, moments 0."""
    pair = Lockstep(backend, rule, ([(5,), (6,)], {}), **LIVELY[rule])
    for _ in range(3):
        pair.step()
    state = pair.optimizer.state
    if how == "clear":
        state.clear()
    elif how == "replace":
        pair.optimizer.state = type(state)(dict)
    elif how == "one":
        del state[pair.params[0]]
    else:
        state[pair.params[0]] = {}
    for i, oracle in enumerate(pair.oracles):
        if i == 0 or how in ("clear", "replace"):
            oracle.state.clear()
            oracle.step_count = 0
    for _ in range(3):
        pair.step()


@pytest.mark.parametrize("anew", ["cleared", "another parameter"])
def test_a_load_is_forgotten_with_its_state(backend: BackendCase, anew: str) -> None:
    """torch's SGD saves a momentum buffer and no step: that it was loaded is to be remembered, but neither
    for a parameter whose state was cleared, nor for another one that has come to its id."""
    hyper = {"lr": 1.0, "momentum": 0.5, "dampening": 0.5, "k": 100}
    saved = torch.optim.SGD(make_params([(3,)]), lr=1.0, momentum=0.5)
    saved.param_groups[0]["params"][0].grad = torch.ones(3)
    saved.step()
    p = torch.nn.Parameter(torch.zeros(3, device=backend.device))
    optimizer = make_optimizer("sgd", [p], backend, **hyper)
    optimizer.load_state_dict({**saved.state_dict(), "param_groups": optimizer.state_dict()["param_groups"]})
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert p.tolist() == [-1.0] * 3  # 0.5 * 1 + 0.5 * 1: the loaded buffer counts
    optimizer.state.clear()
    if anew == "another parameter":
        address, spare = id(p), []
        other = torch.nn.Parameter(torch.zeros(1, device=backend.device))
        other.grad = torch.ones_like(other)
        optimizer.param_groups[0]["params"] = [other]
        optimizer.step()
        del p
        while len(spare) < 1000 and (not spare or id(spare[-1]) != address):
            spare.append(torch.nn.Parameter(torch.zeros(3, device=backend.device)))
        p = spare[-1]
        optimizer.param_groups[0]["params"] = [p]
        p.grad = torch.ones_like(p)
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p, before - 1)  # a new buffer starts at the gradient, undampened


@pytest.mark.parametrize("rule", LIVELY)
def test_versions_are_bumped(backend: BackendCase, rule: str) -> None:
    """Autograd must see the write: a second backward through the old weights is wrong and has to say so."""
    p = torch.nn.Parameter(torch.ones(4, device=backend.device))
    optimizer = make_optimizer(rule, [p], backend, **LIVELY[rule])
    loss = (p * p).sum()
    loss.backward(retain_graph=True)
    for _ in range(3):
        version = p._version
        optimizer.step()
        assert p._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    version = p._version
    optimizer.sync()
    assert p._version > version


def test_parameters_can_be_swapped_after_a_step(backend: BackendCase) -> None:
    """torch.utils.swap_tensors, by which modules may convert their parameters, wants the only reference to each. The
    step after it is one of the tensor that came, and bumps its version."""
    p = torch.nn.Parameter(torch.ones(4, device=backend.device))
    optimizer = lookahead_fused.LookaheadSGD([p], lr=1.0, backend=backend.name)
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.grad = None
    torch.utils.swap_tensors(p, torch.nn.Parameter(torch.full_like(p, 5.0)))
    p.grad = torch.ones_like(p)
    for expected in (4.0, 3.0):
        version = p._version
        optimizer.step()
        assert torch.equal(p, torch.full_like(p, expected))
        assert p._version > version


def test_a_resting_parameter_keeps_its_version(backend: BackendCase) -> None:
    """Bumping what was not written would fail graphs that are still right."""
    p, q = (torch.nn.Parameter(torch.ones(4, device=backend.device)) for _ in range(2))
    optimizer = lookahead_fused.LookaheadAdamW([p, q], backend=backend.name)
    loss = (q * q).sum()
    p.grad = torch.ones_like(p)
    optimizer.step()
    loss.backward()
    assert q.grad is not None
