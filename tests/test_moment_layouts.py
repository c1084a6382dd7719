"""A base's first moment that lies otherwise than its parameter, from some step on: a sync takes it as it lies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bases import GENERIC, WITH_MOMENT, make_base
from helpers import BackendCase
from runs import advance

from lookahead_fused import Lookahead

NAMES = [name for name in WITH_MOMENT if name not in ("Muon", "SparseAdam")]
STEPS = 7


def to_channels_last(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, name: str) -> None:
    """`model.to(memory_format=torch.channels_last)`: the state stays as it is."""
    for p in params:
        p.data = p.data.contiguous(memory_format=torch.channels_last)


def load(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, name: str) -> None:
    """A checkpoint of the model as it was before."""
    to_channels_last(params, optimizer, name)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def turn(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, name: str) -> None:
    """The moment alone, by hand."""
    for p in params:
        moment = optimizer.state[p][name]
        optimizer.state[p][name] = moment.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)


def spread(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, name: str) -> None:
    """The moment becomes every other element of something larger."""
    for p in params:
        moment = optimizer.state[p][name]
        wide = torch.full((*moment.shape, 2), float("nan"), device=moment.device)
        optimizer.state[p][name] = wide[..., 0].copy_(moment)


@pytest.mark.parametrize("how", [to_channels_last, load, turn, spread])
@pytest.mark.parametrize("mode", ["pullback", "reset"])
@pytest.mark.parametrize("name", NAMES)
def test_a_moment_laid_out_otherwise(backend: BackendCase, name: str, mode: str, how: Callable) -> None:
    """The run in which all lies as it lay, whenever the layout changes."""

    def run(changes: tuple[int, ...]) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(4, 3, 2, 5, generator=generator) for _ in range(2)]
        params = [torch.nn.Parameter(value.to(backend.device)) for value in values]
        optimizer: Any = Lookahead(make_base(name, params), 2, 0.3, mode, backend=backend.name)
        for t in range(STEPS):
            if t in changes:
                how(params, optimizer, GENERIC[name][1])
            advance(optimizer, params, [t])
            if t == 4:
                optimizer.sync()
        ends = [*params, *(optimizer.state[p][key] for p in params for key in ("slow_param", GENERIC[name][1]))]
        ends += [optimizer.state[p]["cached_momentum"] for p in params if mode == "pullback"]
        return [end.detach().clone() for end in ends]

    expected = run(())
    assert all(bool(e.any()) for e in expected)
    for changes in ((1,), (2, 5), (STEPS - 1,)):
        for end, e in zip(run(changes), expected, strict=True):
            # torch's roots are one ulp off where a vector's lanes are not full, which is elsewhere in another layout.
            torch.testing.assert_close(end, e, rtol=1e-5, atol=1e-6)
