"""Settings of the slow weights that are tensors: read where they lie in every step, also in replays of a graph."""

from __future__ import annotations

import copy
import ctypes
from typing import Any

import pytest
import torch
from cuda_host import HOST
from helpers import EXTERNAL_CLASSES, TORCH_CLASSES, BackendCase, make_params, same_tensor_bits
from runs import advance, copies, gradients_of, through_a_file
from test_cuda_graphs import Capture

from lookahead_fused import EMA, GPA, Lookahead, LookaheadRMSprop, ScheduleFree

SHAPES = ((4, 3), (5,), (), (0,), (300,))
# A wrapper, the arguments that may be tensors, and for each step their values: in fp32, where a float is the same.
LIVE: dict[str, tuple[Any, dict[str, Any], tuple[str, ...], list[tuple[float, ...]]]] = {
    "alpha": (Lookahead, {"k": 1}, ("alpha",), [(0.5,), (0.25,), (1.0,), (0.0,), (0.75,)]),
    "outer alpha": (Lookahead, {"k": 2, "outer_momentum": 0.5}, ("alpha",), [(0.5,), (1.5,), (2.0,), (0.25,), (1.0,)]),
    "decay": (EMA, {}, ("decay",), [(0.5,), (0.25,), (1.0,), (0.0,), (0.75,)]),
    "warmup": (EMA, {"warmup": True}, ("decay",), [(0.5,), (0.125,), (1.0,), (0.0,), (0.25,)]),
    "interpolations": (
        *(GPA, {}, ("train_interp", "eval_interp")),
        [(0.5, 0.75), (0.25, 1.0), (1.0, 0.5), (0.75, 0.0), (0.125, 0.25)],
    ),
    "interp": (ScheduleFree, {"r": 1}, ("interp",), [(0.5,), (0.25,), (1.0,), (0.75,), (0.125,)]),
}
LRS = [0.5, 0.25, 0.125, 0.0, 0.5]


def make(name: str, rule: str, params: Any, backend: BackendCase, dtype: torch.dtype | None) -> tuple[Any, list[Any]]:
    """A wrapper, and its live settings with the learning rate at first: tensors of a dtype, or floats for None."""
    cls, settings, names, values = LIVE[name]
    numbers = [LRS[0], *values[0]]
    live = numbers if dtype is None else [torch.tensor(n, dtype=dtype, device=params[0].device) for n in numbers]
    base = (TORCH_CLASSES | EXTERNAL_CLASSES)[rule](params, lr=live[0])
    return cls(base, **settings, **dict(zip(names, live[1:], strict=True)), backend=backend.name), live


def set_step(name: str, optimizer: Any, live: list[Any], step: int) -> None:
    _, _, names, values = LIVE[name]
    keys = ["lr", *(optimizer.policy.prefix + n for n in names)]
    for key, setting, value in zip(keys, live, (LRS[step], *values[step]), strict=True):
        if isinstance(setting, torch.Tensor):
            setting.fill_(value)
        else:
            optimizer.param_groups[0][key] = value


def assert_same_bits(optimizer: Any, params: Any, other: Any, twins: Any) -> None:
    for p, twin in zip(params, twins, strict=True):
        assert same_tensor_bits(p, twin)
        assert optimizer.state[p].keys() == other.state[twin].keys()
        for key, value in optimizer.state[p].items():
            assert same_tensor_bits(value, other.state[twin][key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", ["adamw", "sgd", "nadam"])
@pytest.mark.parametrize("name", LIVE)
def test_bits_are_those_of_the_number(backend: BackendCase, name: str, rule: str, dtype: torch.dtype) -> None:
    """Filled in place between steps, together with the learning rate."""
    params = make_params(SHAPES, device=backend.device)
    twins = copies(params)
    (optimizer, live), (other, floats) = (
        make(name, rule, *a) for a in ((params, backend, dtype), (twins, backend, None))
    )
    if rule == "nadam":
        # torch's class takes no tensor for its own without capturable.
        optimizer.param_groups[0]["lr"] = LRS[0]
        live[0] = LRS[0]
    for step in range(len(LRS)):
        for one, settings, members in ((optimizer, live, params), (other, floats, twins)):
            set_step(name, one, settings, step)
            advance(one, members, [step])
        assert_same_bits(optimizer, params, other, twins)


def test_numbers_and_tensors_take_turns(backend: BackendCase) -> None:
    """Another tensor, a number again, a tensor whose memory moved or whose dtype is another."""
    params = make_params(SHAPES, device=backend.device)
    twins = copies(params)
    make_one: Any = lambda members: EMA(torch.optim.SGD(members, lr=0.5), backend=backend.name)  # noqa: E731
    optimizer, other = make_one(params), make_one(twins)
    tensor = torch.tensor(0.25, device=params[0].device)
    moved = torch.tensor(0.5, device=params[0].device)
    for step, value in enumerate([0.75, tensor, 0.5, moved, moved, tensor, tensor.double(), 1]):
        if step == 4:
            moved.data = torch.tensor(0.125, device=params[0].device)
        optimizer.param_groups[0]["ema_decay"] = value
        other.param_groups[0]["ema_decay"] = float(value)
        for one, members in ((optimizer, params), (other, twins)):
            advance(one, members, [step])
        assert_same_bits(optimizer, params, other, twins)


def test_one_on_another_device_is_asked_in_every_step(backend: BackendCase) -> None:
    """A number of another dtype is not read where it lies, and nothing is missed."""
    params = make_params(SHAPES, device=backend.device)
    twins = copies(params)
    decay = torch.tensor(0.5, dtype=torch.float16)
    optimizer = EMA(torch.optim.SGD(params, lr=0.5), decay, backend=backend.name)
    other = EMA(torch.optim.SGD(twins, lr=0.5), backend=backend.name)
    for step, value in enumerate([0.5, 0.25, 0.75]):
        decay.fill_(value)
        other.param_groups[0]["ema_decay"] = value
        for one, members in ((optimizer, params), (other, twins)):
            advance(one, members, [step])
        assert_same_bits(optimizer, params, other, twins)


@pytest.mark.parametrize("name", LIVE)
def test_replays_of_a_captured_step(name: str, runtime: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written into the tensors between two replays counts in the second."""
    results = []
    for captured in (False, True):
        params = make_params(SHAPES)
        optimizer, live = make(name, "adamw", params, HOST, torch.float32)
        advance(optimizer, params, [0])
        capture = Capture(runtime, monkeypatch)
        if captured:
            with capture:
                optimizer.step()
            monkeypatch.undo()
        for step in range(1, len(LRS)):
            set_step(name, optimizer, live, step)
            capture.replay() if captured else optimizer.step()
        results.append([value for p in params for value in (p, *optimizer.state[p].values())])
    for eager, replayed in zip(*results, strict=True):
        assert torch.equal(eager, replayed)


def test_a_checkpoint_has_the_number(backend: BackendCase) -> None:
    params = make_params(SHAPES, device=backend.device)
    optimizer, _ = make("interpolations", "adamw", params, backend, torch.float32)
    advance(optimizer, params, range(2))
    saved, twins = through_a_file(optimizer.state_dict()), copies(params)
    other, _ = make("interpolations", "adamw", twins, backend, torch.float32)
    other.load_state_dict(saved)
    twin = copy.deepcopy(optimizer)
    others = twin.param_groups[0]["params"]
    for one, members in ((optimizer, params), (other, twins), (twin, others)):
        advance(one, members, range(2, 4))
    assert_same_bits(optimizer, params, other, twins)
    assert_same_bits(optimizer, params, twin, others)


def test_a_class_takes_one_too(backend: BackendCase) -> None:
    """Beside RMSprop's own alpha, which is none."""
    params = make_params(SHAPES, device=backend.device)
    twins = copies(params)
    alpha = torch.tensor(0.5, device=params[0].device)
    optimizer = LookaheadRMSprop(params, k=1, lookahead_alpha=alpha, backend=backend.name)
    other = LookaheadRMSprop(twins, k=1, lookahead_alpha=0.5, backend=backend.name)
    for one, members in ((optimizer, params), (other, twins)):
        advance(one, members, range(2))
    alpha.fill_(0.25)
    other.param_groups[0]["lookahead_alpha"] = 0.25
    for one, members in ((optimizer, params), (other, twins)):
        advance(one, members, range(2, 4))
        one.sync()
    assert_same_bits(optimizer, params, other, twins)
    with pytest.raises(TypeError, match=r"^alpha must be .*, got a Tensor; pass alpha\.item\(\)$"):
        LookaheadRMSprop(make_params(SHAPES), alpha=torch.tensor(0.9))


BAD: list[tuple[Any, str, torch.Tensor, type[Exception], str]] = [
    (Lookahead, "alpha", torch.tensor(1.5), ValueError, r"alpha must be a float in \[0, 1\] without outer momentum"),
    (Lookahead, "alpha", torch.tensor(-0.5), ValueError, "alpha must be .* got tensor"),
    (Lookahead, "alpha", torch.ones(2), ValueError, r"alpha must be .* got a Tensor of shape \(2,\)$"),
    (Lookahead, "outer_momentum", torch.tensor(0.5), TypeError, "outer_momentum must be .* got a Tensor"),
    (EMA, "decay", torch.tensor(1.5), ValueError, "decay must be .* got tensor"),
    (EMA, "decay", torch.tensor(True), TypeError, "decay must be .* got a Tensor of torch.bool$"),
    (EMA, "every", torch.tensor(2), TypeError, "every must be an int >= 1, got a Tensor"),
    (GPA, "train_interp", torch.tensor(0.0), ValueError, r"train_interp must be a float in \(0, 1\], got tensor"),
    (GPA, "eval_interp", torch.empty(1, device="meta"), TypeError, "eval_interp must be .* on the meta device"),
    (ScheduleFree, "interp", torch.tensor(1j), TypeError, "interp must be .* got a Tensor of torch.complex64$"),
]


@pytest.mark.parametrize(("cls", "name", "value", "error", "told"), BAD, ids=str)
def test_bad_tensors(cls: Any, name: str, value: torch.Tensor, error: type[Exception], told: str) -> None:
    """At construction, and where one is put into a group: nothing has changed then."""
    with pytest.raises(error, match=f"^{told}"):
        cls(torch.optim.SGD(make_params(SHAPES), lr=0.5), **{name: value})
    params = make_params(SHAPES)
    optimizer = cls(torch.optim.SGD(params, lr=0.5))
    advance(optimizer, params, range(2))
    optimizer.param_groups[0][optimizer.policy.prefix + name] = value
    before = [p.detach().clone() for p in params]
    for p, g in zip(params, gradients_of(3, params), strict=True):
        p.grad = g
    with pytest.raises(error, match=f"^{optimizer.policy.prefix}{told}"):
        optimizer.step()
    assert all(torch.equal(p, theta) for p, theta in zip(params, before, strict=True))
