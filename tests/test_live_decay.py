"""A weight decay that is a tensor: read where it lies in every step, also in replays of a graph, beside the other
numbers that may be tensors."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from cuda_host import HOST
from helpers import LOOKAHEAD_CLASSES, TORCH_CLASSES, BackendCase, make_params, same_tensor_bits
from runs import advance, copies, gradients_of, through_a_file
from test_cuda_graphs import Capture

from lookahead_fused import EMA, GPA, Lion, Lookahead, LookaheadAdam, LookaheadAdamW, LookaheadSGD, ScheduleFree

SHAPES = ((4, 3), (5,), (), (0,), (300,))
# In fp32, where a float is the same; also none, from which and to which a rule goes another way.
DECAYS = [0.5, 0.25, 0.0, 0.125, 1.0]
WAYS: dict[str, Any] = {
    **{f"Lookahead's {name}": lambda ps, cls=cls, **kw: cls(ps, k=2, **kw) for name, cls in LOOKAHEAD_CLASSES.items()},
    "decoupled adam": lambda ps, **kw: LookaheadAdam(ps, decoupled_weight_decay=True, **kw),
    "lion alone": lambda ps, **kw: Lion(ps, **kw),
    **{
        f"around {name}": lambda ps, backend, cls=cls, **kw: Lookahead(cls(ps, **kw), k=2, backend=backend)
        for name, cls in TORCH_CLASSES.items()
    },
    "EMA": lambda ps, backend, **kw: EMA(torch.optim.AdamW(ps, **kw), 0.5, backend=backend),
    "GPA": lambda ps, backend, **kw: GPA(torch.optim.SGD(ps, **kw), backend=backend),
    "ScheduleFree": lambda ps, backend, **kw: ScheduleFree(torch.optim.RAdam(ps, **kw), backend=backend),
}


def set_decay(optimizer: Any, value: float) -> None:
    group = optimizer.param_groups[0]
    if isinstance(group["weight_decay"], torch.Tensor):
        group["weight_decay"].fill_(value)
    else:
        group["weight_decay"] = value


def assert_same_bits(optimizer: Any, params: Any, other: Any, twins: Any) -> None:
    for p, twin in zip(params, twins, strict=True):
        assert same_tensor_bits(p, twin)
        assert optimizer.state[p].keys() == other.state[twin].keys()
        for key, value in optimizer.state[p].items():
            assert same_tensor_bits(value, other.state[twin][key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("way", WAYS)
def test_bits_are_those_of_the_number(backend: BackendCase, way: str, dtype: torch.dtype) -> None:
    """Filled in place between steps; of a dtype that is not read where it lies, nothing is missed either."""
    params = make_params(SHAPES, device=backend.device)
    twins = copies(params)
    decay = torch.tensor(DECAYS[0], dtype=dtype, device=backend.device)
    optimizer = WAYS[way](params, lr=0.1, weight_decay=decay, backend=backend.name)
    other = WAYS[way](twins, lr=0.1, weight_decay=DECAYS[0], backend=backend.name)
    assert optimizer.param_groups[0]["weight_decay"] is decay
    for step, value in enumerate(DECAYS):
        for one, members in ((optimizer, params), (other, twins)):
            set_decay(one, value)
            advance(one, members, [step])
        assert_same_bits(optimizer, params, other, twins)


def test_numbers_and_tensors_take_turns(backend: BackendCase) -> None:
    """Another tensor, a number again, a tensor whose memory moved or whose dtype is another."""
    params = make_params(SHAPES, device=backend.device)
    twins = copies(params)
    optimizer, other = (LookaheadSGD(members, lr=0.5, backend=backend.name) for members in (params, twins))
    tensor, moved = (torch.tensor(n, device=backend.device) for n in (0.25, 0.5))
    for step, value in enumerate([0.75, tensor, 0.5, moved, moved, tensor, tensor.double(), 0, tensor]):
        if step == 4:
            moved.data = torch.tensor(0.125, device=backend.device)
        optimizer.param_groups[0]["weight_decay"] = value
        other.param_groups[0]["weight_decay"] = float(value)
        for one, members in ((optimizer, params), (other, twins)):
            advance(one, members, [step])
        assert_same_bits(optimizer, params, other, twins)


def test_a_checkpoint_has_the_number(backend: BackendCase) -> None:
    params = make_params(SHAPES, device=backend.device)
    decay = torch.tensor(0.25, device=backend.device)
    optimizer = LookaheadAdamW(params, weight_decay=decay, k=2, backend=backend.name)
    advance(optimizer, params, range(3))
    saved, twins = through_a_file(optimizer.state_dict()), copies(params)
    other = LookaheadAdamW(twins, k=2, backend=backend.name)
    other.load_state_dict(saved)
    decay.fill_(0.5)
    assert float(other.param_groups[0]["weight_decay"]) == 0.25
    set_decay(other, 0.5)
    for one, members in ((optimizer, params), (other, twins)):
        advance(one, members, range(3, 6))
    assert_same_bits(optimizer, params, other, twins)


VALUES = [0.5, 0.25, 0.75, 0.125]


@pytest.mark.parametrize("rule", TORCH_CLASSES)
def test_replays_of_a_captured_step(rule: str, runtime: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written into the tensor between two replays counts in the second, as a number would in a step."""
    results = []
    for captured in (False, True):
        params = make_params(SHAPES)
        decay = torch.tensor(DECAYS[0]) if captured else DECAYS[0]
        optimizer = LOOKAHEAD_CLASSES[rule](params, weight_decay=decay, k=2, backend=HOST.name)
        advance(optimizer, params, [0])
        capture = Capture(runtime, monkeypatch)
        if captured:
            with capture:
                optimizer.step()
            monkeypatch.undo()
        for value in DECAYS[1:]:
            set_decay(optimizer, value)
            capture.replay() if captured else optimizer.step()
        results.append([value for p in params for value in (p, *optimizer.state[p].values())])
    for eager, replayed in zip(*results, strict=True):
        assert torch.equal(eager, replayed)


@pytest.mark.parametrize("name", ["GPA", "EMA"])
def test_replays_read_every_number_that_is_a_tensor(
    name: str, runtime: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the same numbers given as such in steps."""
    make, keys = {
        "GPA": (GPA, {"train_interp": "gpa_train_interp", "eval_interp": "gpa_eval_interp"}),
        "EMA": (EMA, {"decay": "ema_decay"}),
    }[name]
    results = []
    for captured in (False, True):
        params = make_params(SHAPES)
        names = ("lr", "weight_decay", *keys)
        given: dict[str, Any] = {one: torch.tensor(VALUES[0]) if captured else VALUES[0] for one in names}
        base = torch.optim.SGD(params, lr=given["lr"], weight_decay=given["weight_decay"])
        optimizer = make(base, **{key: given[key] for key in keys}, backend=HOST.name)
        advance(optimizer, params, [0])
        capture = Capture(runtime, monkeypatch)
        if captured:
            with capture:
                optimizer.step()
            monkeypatch.undo()
        for step in range(1, len(VALUES)):
            for place, (one, number) in enumerate(given.items()):
                value = VALUES[(step + place) % len(VALUES)]
                if captured:
                    number.fill_(value)
                else:
                    optimizer.param_groups[0][keys.get(one, one)] = value
            capture.replay() if captured else optimizer.step()
        results.append([value for p in params for value in (p, *optimizer.state[p].values())])
    for eager, replayed in zip(*results, strict=True):
        assert torch.equal(eager, replayed)


BAD: list[tuple[torch.Tensor, type[Exception], str]] = [
    (torch.tensor(-0.5), ValueError, "got tensor"),
    (torch.ones(2), ValueError, r"got a Tensor of shape \(2,\)$"),
    (torch.tensor(True), TypeError, "got a Tensor of torch.bool$"),
    (torch.tensor(1j), TypeError, "got a Tensor of torch.complex64$"),
    (torch.empty((), device="meta"), TypeError, "got a Tensor on the meta device, which holds no value$"),
]


@pytest.mark.parametrize("name", [*LOOKAHEAD_CLASSES, "lion alone"])
@pytest.mark.parametrize(("value", "error", "told"), BAD, ids=str)
def test_bad_tensors(name: str, value: torch.Tensor, error: type[Exception], told: str) -> None:
    """At construction, and where one is put into a group: nothing has changed then."""
    cls = LOOKAHEAD_CLASSES.get(name, Lion)
    expected = f"^weight_decay must be a float >= 0 or a tensor of one element, {told}"
    with pytest.raises(error, match=expected):
        cls(make_params(SHAPES), lr=0.1, weight_decay=value)
    if value.numel() == 1 and value.dtype == torch.float32 and not value.is_meta:
        return  # a bound is asked of what is passed, and a step computes with it
    params = make_params(SHAPES)
    optimizer = cls(params, lr=0.1)
    advance(optimizer, params, range(2))
    optimizer.param_groups[0]["weight_decay"] = value
    before = [p.detach().clone() for p in params]
    for p, g in zip(params, gradients_of(3, params), strict=True):
        p.grad = g
    with pytest.raises(error, match=expected):
        optimizer.step()
    assert all(torch.equal(p, theta) for p, theta in zip(params, before, strict=True))
