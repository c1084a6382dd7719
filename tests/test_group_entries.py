"""Settings are read from a parameter group wherever they stand in it, and whatever string object names them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BackendCase, make_params, same_tensor_bits
from runs import advance

from lookahead_fused import LookaheadAdamW

Group = dict[str, Any]


def refilled(group: Group, entries: dict[str, Any]) -> None:
    group.clear()
    group.update(entries)


def moved(group: Group) -> None:
    group["lr"] = group.pop("lr")


def turned_round(group: Group) -> None:
    refilled(group, dict(reversed(list(group.items()))))


def behind_others(group: Group) -> None:
    refilled(group, {"note": 7.0, **group})


def gone_from_the_front(group: Group) -> None:
    first = next(key for key in group if key != "params")
    group[first] = group.pop(first)


def named_by_other_strings(group: Group) -> None:
    refilled(group, {"".join(list(key)): value for key, value in group.items()})


@pytest.mark.parametrize("change", [moved, turned_round, behind_others, gone_from_the_front, named_by_other_strings])
def test_settings_are_read_wherever_they_stand(backend: BackendCase, change: Callable[[Group], None]) -> None:
    optimizers, params = [], []
    for _ in range(2):
        params.append(make_params(device=backend.device))
        halves = [{"params": params[-1][:1], "weight_decay": 0.5}, {"params": params[-1][1:], "lr": 0.25}]
        optimizers.append(LookaheadAdamW(halves, lr=0.125, k=2, backend=backend.name))
    for step in range(4):
        for optimizer in optimizers:
            for number, group in enumerate(optimizer.param_groups):
                if step > 0 and optimizer is optimizers[0]:
                    change(group)
                group["lr"], group["weight_decay"], group["alpha"] = 0.5**step, 0.125 * number, 0.25 + 0.125 * step
        advance(optimizers[0], params[0], [step])
        advance(optimizers[1], params[1], [step])
        for p, twin in zip(*params, strict=True):
            assert same_tensor_bits(p, twin)
    assert not torch.equal(params[0][0], make_params(device=backend.device)[0])
