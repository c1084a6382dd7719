"""torch.set_default_device: what a step makes lies beside its parameters or on the host, not where the user's own
tensors go. "meta" stands in for "cuda" here: like it, it is not the CPU, and memory there is not the host's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import BackendCase, assert_unchanged, make_grads, make_optimizer, make_params, seeded, set_grad, snapshot
from torch.overrides import TorchFunctionMode

import lookahead_fused
from lookahead_fused.backends import cuda, triton


class Inner(torch.optim.SGD):
    """Stepped by itself: a subclass is. torch's SGD makes no tensor that would ask the default device."""


def external(params: Any, backend: BackendCase) -> torch.optim.Optimizer:
    base = Inner(params, lr=0.1, momentum=0.9)
    return lookahead_fused.Lookahead(base, 2, 0.5, "pullback", backend=backend.name)


MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda params, backend: make_optimizer("adamw", params, backend, k=2, amsgrad=True, master_weights=True),
    "sgd": lambda params, backend: make_optimizer("sgd", params, backend, k=2, lr=0.1, momentum=0.9),
    "wrapped-adamw": lambda params, backend: make_optimizer("wrapped-adamw", params, backend, k=2),
    "external": external,
}


@contextmanager
def set_default(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("under", [torch.device, set_default])
@pytest.mark.parametrize("made_under", [False, True])
@pytest.mark.parametrize("form", MAKERS)
def test_a_run(backend: BackendCase, form: str, made_under: bool, under: Any, dtype: torch.dtype) -> None:
    """A first step, a parameter that wakes later, loss scaling, slow weights, a sync, and a loaded optimizer: the same
    bits as without a default device, and state beside its parameter."""
    ends = []
    for device in ("cpu", "meta"):
        params = make_params([(7,), (3, 4), ()], dtype, device=backend.device)
        loaded_params = make_params([(7,), (3, 4), ()], dtype, device=backend.device)
        steps = [make_grads(params, generator=seeded(step)) for step in range(7)]
        scale, found = (torch.tensor(value, device=backend.device) for value in (2.0, 0.0))
        optimizer = None if made_under else MAKERS[form](params, backend)
        with under(device):
            optimizer = optimizer or MAKERS[form](params, backend)
            for step, grads in enumerate(steps[:5]):
                for p, g in zip(params, grads, strict=True):
                    set_grad(p, None if step == 0 and p is params[1] else g)
                if step == 3 and form != "external":
                    optimizer.grad_scale, optimizer.found_inf = scale, found
                optimizer.step()
                if step == 3 and form != "external":
                    del optimizer.grad_scale, optimizer.found_inf
            with optimizer.slow_weights():
                slow = [p.detach().clone() for p in params]
            optimizer.sync()
            loaded = MAKERS[form](loaded_params, backend)
            loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            with torch.no_grad():
                for p, q in zip(params, loaded_params, strict=True):
                    q.copy_(p)
            for grads in steps[5:]:
                for p, g in zip(loaded_params, grads, strict=True):
                    set_grad(p, g)
                loaded.step()
        for p in loaded_params:
            assert {value.device for value in loaded.state[p].values()} == {p.device}
        ends.append((slow, [p.detach() for p in params], snapshot(loaded)))
    for end in ends:
        del end[-1]["members"]
    assert_unchanged(list(ends[0]), list(ends[1]))


@pytest.mark.parametrize("count", [3, 3.0, torch.tensor(3), torch.tensor([3.0])])
def test_a_count_of_another_form(backend: BackendCase, count: Any) -> None:
    """A number or a tensor of another form in a loaded state is the count that the next step goes on from."""
    (p,) = make_params([(5,)], device=backend.device)
    optimizer = make_optimizer("adamw", [p], backend, k=4)
    p.grad = torch.ones_like(p)
    optimizer.step()
    slow = optimizer.state[p]["slow_param"].clone()
    optimizer.state[p]["step"] = count
    with torch.device("meta"):
        optimizer.step()
    assert optimizer.state[p]["step"].item() == 4
    assert not torch.equal(optimizer.state[p]["slow_param"], slow), "no sync at the fourth step"


def test_memory_of_the_host_is_the_hosts() -> None:
    """What a table is packed into, and pinned memory: torch pins dense CPU tensors only. Whether this machine can pin
    or not, a spy behind the default device's mode sees what is asked for."""
    asked: list[Any] = []

    class Spy(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if kwargs.pop("pin_memory", False):
                asked.append(kwargs.get("device"))
            return function(*args, **kwargs)

    with Spy(), torch.device("meta"):
        cuda._pinned(8)
        assert triton._host_bytes(8).device.type == "cpu"
    assert [torch.device(device).type for device in asked] == ["cpu"]
