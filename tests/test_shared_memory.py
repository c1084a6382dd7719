"""Parameters that share memory: an assigning load unties weights into parameters over one storage, models take views of
one buffer. They are stepped one after the other, as torch steps them, whatever the threads and the order of blocks."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_host import HOST
from helpers import BackendCase, Composed, UnfusedRMSprop, make_optimizer, make_tensor, same_tensor_bits, seeded, tune
from torch import Tensor

RULES: dict[str, dict[str, Any]] = {
    "adamw": {"weight_decay": 0.1, "amsgrad": True, "pullback_momentum": "pullback"},
    "sgd": {"momentum": 0.9, "weight_decay": 0.1, "pullback_momentum": "reset"},
    "wrapped-adamw": {"weight_decay": 0.1},
}
of_each_rule = pytest.mark.parametrize("rule", RULES)
N = 48


def of_two_dtypes(x: Tensor) -> list[Tensor]:
    """Of two parts, with the parameters of one between those of the other. What is a number of one dtype is nonsense
    in the other; in the right order it is the right nonsense."""
    wide = x.view(torch.float64).fill_(1)
    return [x[:8], wide[2:6], x[8:16], wide[7:12], x[20:28]]


SHARED: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "whole": lambda x: [x, x, x],
    "of other shapes": lambda x: [x, x.view(6, 8), x.view(6, 8).t()],
    "parts": lambda x: [x[:20], x[10:40], x[30:], x[5:8]],
    "the second holds the first": lambda x: [x[8:16], x],
    "a chain whose ends do not meet": lambda x: [x[32:], x[16:40], x[:20]],
    "every other element": lambda x: [x, x[::2], x[1::2]],
    "every other element first": lambda x: [x[::2], x, x[1::2]],
    "interleaved": lambda x: [x[::2], x[1::2]],
    "columns and rows": lambda x: [x.view(6, 8)[:, :3], x.view(6, 8)[1:3], x.view(6, 8)[:, 2:5]],
    "two dtypes": of_two_dtypes,
}


def make(shared: str, device: str = "cpu") -> list[torch.nn.Parameter]:
    x = make_tensor((N,), generator=seeded(0), device=device)
    return [torch.nn.Parameter(view) for view in SHARED[shared](x)]


def gradient(p: Tensor, step: int, index: int) -> Tensor:
    return make_tensor(p.shape, p.dtype, generator=seeded(100 * step + index), device=p.device.type)


def in_turn(rule: str, params: list[Any], backend: BackendCase) -> list[Any]:
    """What one after the other is: an optimizer for each."""
    return [make_optimizer(rule, [p], backend, lr=0.1, k=2, **RULES[rule]) for p in params]


def assert_same(ours: Any, params: list[Any], theirs: list[Any], twins: list[Any]) -> None:
    for p, q, twin in zip(params, twins, theirs, strict=True):
        assert same_tensor_bits(p, q)
        state = twin.state.get(q, {})
        assert ours.state.get(p, {}).keys() == state.keys()
        for name, value in state.items():
            assert same_tensor_bits(ours.state[p][name], value), name


def follow(ours: Any, params: list[Any], theirs: list[Any], twins: list[Any], step: int, wakes: bool = False) -> None:
    """A step of all, and of one after the other."""
    for index, (p, q) in enumerate(zip(params, twins, strict=True)):
        rests = wakes and step < index
        p.grad, q.grad = (None, None) if rests else (gradient(p, step, index), gradient(q, step, index))
    ours.step()
    for twin in theirs:
        twin.step()
    assert_same(ours, params, theirs, twins)


@of_each_rule
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize(("groups", "wakes"), [(False, False), (True, False), (True, True)])
def test_one_after_the_other(backend: BackendCase, rule: str, shared: str, groups: bool, wakes: bool) -> None:
    params, twins = make(shared, backend.device), make(shared, backend.device)
    members = [{"params": [p]} for p in params] if groups else params
    ours = make_optimizer(rule, members, backend, lr=0.1, k=2, **RULES[rule])
    theirs = in_turn(rule, twins, backend)
    for step in range(6):
        follow(ours, params, theirs, twins, step, wakes)
    ours.sync()
    for twin in theirs:
        twin.sync()
    assert_same(ours, params, theirs, twins)


@of_each_rule
@pytest.mark.parametrize("shared", SHARED)
def test_they_come_to_share_memory(backend: BackendCase, rule: str, shared: str) -> None:
    """In the run, by `.data`, and part again: where parameters lie is looked at in every step."""
    params, twins = make(shared, backend.device), make(shared, backend.device)
    for tensors in (params, twins):
        for p in tensors:
            p.data = p.data.clone()
    ours = make_optimizer(rule, params, backend, lr=0.1, k=2, **RULES[rule])
    theirs = in_turn(rule, twins, backend)
    for step in range(9):
        if step in (3, 6):
            for tensors in (params, twins):
                for p, view in zip(tensors, make(shared, backend.device), strict=True):
                    p.data = view.data if step == 3 else p.data.clone()
        follow(ours, params, theirs, twins, step)


@of_each_rule
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("order", [1, 2])
def test_blocks_in_any_order(runtime: ctypes.CDLL, rule: str, shared: str, order: int) -> None:
    """On a GPU nothing says which block of a launch runs first."""
    params, twins = make(shared), make(shared)
    ours = make_optimizer(rule, params, HOST, lr=0.1, k=2, **RULES[rule])
    tune(ours, chunk_elements=8)
    theirs = in_turn(rule, twins, HOST)
    runtime.control_order(order)
    for step in range(3):
        follow(ours, params, theirs, twins, step)


@of_each_rule
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("moves", [False, True])
def test_no_two_of_a_part_share_memory(backend: BackendCase, rule: str, shared: str, moves: bool) -> None:
    """Threads share the rows of a part out as they like: a right result of two that race would be luck."""
    params = make(shared, backend.device)
    ours = make_optimizer(rule, params, backend, lr=0.1, **RULES[rule])
    if moves:
        for p in params:
            p.data = p.data.clone()
    for step in range(2):
        if moves and step == 1:
            for p, view in zip(params, make(shared, backend.device), strict=True):
                p.data = view.data
        for index, p in enumerate(params):
            p.grad = gradient(p, step, index)
        ours.step()
    stepped: list[Any] = []
    for part in ours._table.parts:
        if not hasattr(part, "tensors"):
            continue
        owners = part.tensors()[0]
        for p, q in itertools.combinations(owners, 2):
            assert not elements(p) & elements(q)
        stepped += owners
    for p, q in itertools.combinations(stepped, 2):
        before = [id(p), id(q)] == [id(t) for t in params if t is p or t is q]
        assert before or not elements(p) & elements(q), "stepped before one that stands before it"


def elements(p: Tensor) -> set[int]:
    """The addresses of all of its bytes."""
    offsets = [0]
    for size, stride in zip(p.shape, p.stride(), strict=True):
        offsets = [at + i * stride for at in offsets for i in range(size)]
    width = p.element_size()
    return {p.data_ptr() + at * width + byte for at in offsets for byte in range(width)}


@pytest.mark.parametrize("shared", [name for name in SHARED if name != "two dtypes"])
def test_around_a_base_of_its_own(backend: BackendCase, shared: str) -> None:
    """The base steps all, and then all are synced, one after the other."""
    params, twins = make(shared, backend.device), make(shared, backend.device)
    ours = make_optimizer("wrapped-external", params, backend, lr=0.1, k=2)
    theirs = Composed(UnfusedRMSprop(twins, lr=0.1, foreach=False), k=2)
    for step in range(6):
        for index, (p, q) in enumerate(zip(params, twins, strict=True)):
            p.grad, q.grad = gradient(p, step, index), gradient(q, step, index)
        ours.step()
        theirs.step()
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@of_each_rule
@pytest.mark.parametrize("shared", SHARED)
def test_slow_weights_are_taken_back(backend: BackendCase, rule: str, shared: str) -> None:
    """Each trades places in turn: in the block the last one's are there, and after it all is as it was."""
    params = make(shared, backend.device)
    ours = make_optimizer(rule, params, backend, lr=0.1, k=3, **RULES[rule])
    for step in range(5):
        for index, p in enumerate(params):
            p.grad = gradient(p, step, index)
        ours.step()
    before = [p.detach().clone() for p in params]
    slow = [ours.state[p]["slow_param"].clone() for p in params]
    with ours.slow_weights():
        assert same_tensor_bits(params[-1], slow[-1])
    for p, value, phi in zip(params, before, slow, strict=True):
        assert same_tensor_bits(p, value)
        assert same_tensor_bits(ours.state[p]["slow_param"], phi)
