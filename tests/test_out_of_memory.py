"""Memory that cannot be had: a first step that fails for it changes nothing, and slow_weights() gives theta back."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import BackendCase, assert_unchanged, make_optimizer, make_params, set_grad, snapshot
from processes import in_fork, needs_cpu_backend
from runs import advance, gradients_of

from lookahead_fused import Lookahead
from lookahead_fused import _entries as entries
from lookahead_fused import _rows as rows

LOADED = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "wrapped-sgd": torch.optim.SGD,
    "nadam": torch.optim.NAdam,
}


def make(rule: str, params: list[torch.nn.Parameter], backend: BackendCase) -> Any:
    ours: dict[str, Any] = {"k": 2, "pullback_momentum": "pullback"}
    hyper = {"momentum": 0.9, "dampening": 0.5} if rule.endswith("sgd") else {}
    if rule == "nadam":
        return Lookahead(torch.optim.NAdam(params, lr=0.1), **ours, backend=backend.name)
    return make_optimizer(rule, params, backend, lr=0.1, **ours, **hyper)


@contextmanager
def memory_for(count: int) -> Iterator[Callable[[], bool]]:
    """So many tensors can be made, and none more. Gives what tells whether one more was wanted."""
    made = 0

    def out(function: Callable) -> Callable:
        def limited(*args: Any) -> Any:
            nonlocal made
            made += 1
            if made > count:
                raise torch.OutOfMemoryError("out of memory")
            return function(*args)

        return limited

    with ExitStack() as stack:
        for module, name in ((entries, "new_state"), (entries, "copy_in_layout"), (rows, "copy_in_layout")):
            stack.enter_context(mock.patch.object(module, name, out(getattr(module, name))))
        yield lambda: made > count


def test_a_first_step_makes_its_state_once(backend: BackendCase) -> None:
    params = make_params([(7,), (3, 5)], device=backend.device)
    optimizer = make_optimizer("adamw", params, backend)
    for p in params:
        set_grad(p, torch.ones_like(p))
    with mock.patch.object(entries, "new_state", wraps=entries.new_state) as made:
        optimizer.step()
    assert made.call_count == sum(value.dim() > 0 for own in optimizer.state.values() for value in own.values()) == 6


@pytest.mark.parametrize("rule", LOADED)
@pytest.mark.parametrize("loaded", [False, True])
def test_a_first_step(backend: BackendCase, rule: str, loaded: bool) -> None:
    """Wherever it fails there is no state but what was there before: none at all, or what torch's own optimizer saved;
    of its SGD, a momentum without a count, which counts in the step that succeeds."""

    def fresh() -> tuple[Any, list[torch.nn.Parameter]]:
        params = make_params([(7,), (3, 5)], device=backend.device)
        # One that has gaps is stepped in a copy, around another base only after that has stepped.
        gaps = torch.ones(4, 6, device=backend.device)[:, ::2]
        params.append(torch.nn.Parameter(gaps.contiguous() if rule == "nadam" else gaps))
        optimizer = make(rule, params, backend)
        if loaded:
            momentum = {"momentum": 0.9} if rule.endswith("sgd") else {}
            saved = LOADED[rule](make_params([(7,), (3, 5), (4, 3)], device=backend.device), lr=0.1, **momentum)
            advance(saved, saved.param_groups[0]["params"], [9])
            groups = [{**optimizer.state_dict()["param_groups"][0]}]
            optimizer.load_state_dict({"state": copy.deepcopy(saved.state_dict()["state"]), "param_groups": groups})
        return optimizer, params

    twin, twin_params = fresh()
    advance(twin, twin_params, range(3))
    optimizer, params = fresh()
    for p, g in zip(params, gradients_of(0, params), strict=True):
        set_grad(p, g)
    before = snapshot(optimizer)
    for count in range(100):
        with memory_for(count) as wanted_more:
            try:
                optimizer.step()
            except torch.OutOfMemoryError:
                assert_unchanged(before, snapshot(optimizer), f"with memory for {count}")
                continue
            assert not wanted_more()
        break
    assert count >= 3
    advance(optimizer, params, range(1, 3))
    mine, expected = snapshot(optimizer), snapshot(twin)
    del mine["members"], expected["members"]
    assert_unchanged(expected, mine)


SCRIPT = """
import contextlib, ctypes, json, resource, sys
import torch
import lookahead_fused
from lookahead_fused import Lookahead, LookaheadAdamW

torch.set_num_threads(1)
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8
ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
COUNT = 4 << 20

def make(kind, dtype):
    params = [torch.nn.Parameter(torch.full((COUNT,), i + 1.0, dtype=dtype)) for i in range(3)]
    if kind == "external":
        optimizer = Lookahead(torch.optim.Rprop(params, lr=0.25), k=100)
    else:
        optimizer = LookaheadAdamW(params, lr=0.25, k=100, weight_decay=0, backend=kind)
    for p in params:
        p.grad = torch.ones(COUNT, dtype=dtype)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer, params

@contextlib.contextmanager
def limited(free):
    # Not psutil, which is not here: the first number is the size of the address space in pages.
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

def first(tensors):
    return [t[0].item() for t in tensors] + [t[-1].item() for t in tensors]
"""


@needs_cpu_backend
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space, as Linux measures it")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_slow_weights(dtype: str) -> None:
    """An evaluation takes all the memory there is: leaving needs none. Nor does entering, where the two trade places;
    where theta has to be set aside and there is no room for it, it is refused with nothing changed."""
    script = f"""
    dtype, found = torch.{dtype}, []
    for kind in ("cpu", "reference", "external", "plain swap"):
        if kind == "plain swap":
            lookahead_fused._build.module = lambda name: None
            kind = "reference"
        optimizer, params = make(kind, dtype)
        theta = first(params)
        phi = first([own["slow_param"] for own in optimizer.state.values()])
        inside, refused = None, ""
        with limited(12 << 20):
            try:
                with optimizer.slow_weights():
                    inside = first(params)
                    torch.ones(COUNT * 16)
            except (RuntimeError, MemoryError) as error:
                refused = str(error)
        assert "memory" in refused, refused
        entered = inside is not None
        assert not entered or inside == phi != theta, (inside, phi)
        assert first(params) == theta, (first(params), theta)
        with contextlib.suppress(RuntimeError, MemoryError), optimizer.slow_weights(), limited(1 << 20):
            assert first(params) == phi
            torch.ones(COUNT * 16)
        assert first(params) == theta, (first(params), theta)
        optimizer.step()
        found.append(entered)
    print(json.dumps(found))
    """
    found = in_fork(script, SCRIPT)
    assert found == [dtype == "float32"] * 4
