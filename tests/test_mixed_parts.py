"""Parts of two kinds in one optimizer: rows that a compiled table takes beside rows that torch's operators step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BackendCase, Lockstep, UnfusedRMSprop, make_params, same_tensor_bits, seeded, set_grad
from tables import count_tables
from torch import Tensor

import lookahead_fused
from lookahead_fused import Lookahead, LookaheadAdamW


@pytest.mark.parametrize("rule", ["adamw", "sgd", "wrapped-adamw"])
@pytest.mark.parametrize("reference_first", [False, True])
def test_a_backend_per_group(
    backend: BackendCase, rule: str, reference_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either way round, to the bit, and no table is made after the first step."""
    key = "lookahead_backend" if rule.startswith("wrapped") else "backend"
    tables = count_tables(monkeypatch)
    pair = Lockstep(backend, rule, ([(33,), (3, 5)], {}), ([(7,), (0,)], {}), k=2, lr=0.1)
    pair.optimizer.param_groups[0 if reference_first else 1][key] = "reference"
    pair.step()
    made = tables.made
    assert made == (0 if backend.name == "reference" else 1)
    for _ in range(5):
        pair.step()
    pair.optimizer.sync()
    assert (tables.made, tables.rows) == (made, 2 * made)


BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "NAdam": lambda params: torch.optim.NAdam(params, lr=0.1, foreach=False),
    "RMSprop": lambda params: UnfusedRMSprop(params, lr=0.1, momentum=0.9, foreach=False),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("mode", ["pullback", "reset"])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_moments_of_two_dtypes(
    backend: BackendCase, base: str, mode: str, dtypes: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch keeps a 16-bit parameter's moments in 16 bits, which no compiled table takes: beside fp32 ones each is what
    it is alone."""

    def train(params: list[torch.nn.Parameter], optimizer: Lookahead, steps: range) -> None:
        for step in steps:
            for p in params:
                p.grad = torch.randn(p.shape, generator=seeded(step)).to(p.device, p.dtype)
            optimizer.step()

    def make(dtypes: tuple[torch.dtype, ...]) -> tuple[list[torch.nn.Parameter], Lookahead]:
        params = [torch.nn.Parameter(torch.ones(8, dtype=dtype, device=backend.device)) for dtype in dtypes]
        return params, Lookahead(BASES[base](params), 2, 0.5, mode, backend=backend.name)

    tables = count_tables(monkeypatch)
    params, optimizer = make(dtypes)
    train(params, optimizer, range(1))
    made = tables.made
    assert made == (0 if backend.name == "reference" else 1)
    train(params, optimizer, range(1, 7))
    assert (tables.made, tables.rows) == (made, made)
    for p in params:
        alone, other = make((p.dtype,))
        train(alone, other, range(7))
        assert same_tensor_bits(p, alone[0])


@pytest.mark.parametrize("mixed_by", ["backend", "dtype"])
def test_slow_weights_and_loads(backend: BackendCase, mixed_by: str) -> None:
    """Swapped, loaded and stepped on together, whichever kind a parameter's part is of."""

    def make() -> tuple[list[torch.nn.Parameter], lookahead_fused.LookaheadAdamW]:
        params = make_params([(4, 6), (5,)], device=backend.device)
        groups = [{"params": [params[0]]}, {"params": [params[1]], "backend": "reference"}]
        if mixed_by == "dtype":
            del groups[1]["backend"]
            params[1].data = params[1].data.to(torch.bfloat16)
        return params, LookaheadAdamW(groups, lr=0.1, k=2, backend=backend.name)

    def train(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            for p in params:
                set_grad(p, torch.randn(p.shape, generator=seeded(step)).to(p.device, p.dtype))
            optimizer.step()

    params, optimizer = make()
    train(params, optimizer, range(3))
    fast: list[Tensor] = [p.detach().clone() for p in params]
    with optimizer.slow_weights():
        for p, before in zip(params, fast, strict=True):
            assert not same_tensor_bits(p, before)
    for p, before in zip(params, fast, strict=True):
        assert same_tensor_bits(p, before)
    resumed_params, resumed = make()
    resumed.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        for p, q in zip(params, resumed_params, strict=True):
            q.copy_(p)
    for ps, o in ((params, optimizer), (resumed_params, resumed)):
        o.sync()
        train(ps, o, range(3, 6))
    for p, q in zip(params, resumed_params, strict=True):
        assert same_tensor_bits(p, q)
