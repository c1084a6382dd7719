"""A pass that makes the policy's event alone, over the table of a step, against the same in torch's operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import BackendCase, make_grads, make_optimizer, make_params, same_tensor_bits, seeded

SHAPES = ((7,), (3, 5), (), (0,), (3000,), (4096,))
CASES = [
    (torch.float32, "adamw", "pullback", {"amsgrad": True}),
    (torch.float32, "sgd", "pullback", {"momentum": 0.9}),
    (torch.float32, "sgd", "reset", {"momentum": 0.0}),
    (torch.float64, "adam", "reset", {}),
    (torch.float64, "sgd", "pullback", {"momentum": 0.9}),
    (torch.bfloat16, "adamw", "pullback", {"master_weights": True}),
    (torch.bfloat16, "sgd", "none", {"momentum": 0.9}),
    (torch.float16, "adam", "none", {"master_weights": True}),
]


def trained(backend: BackendCase, dtype: torch.dtype, rule: str, steps: int, **hyper: Any) -> Any:
    params = make_params(SHAPES, dtype, device=backend.device)
    # Two groups, whose coefficients differ.
    groups = [{"params": params[:3]}, {"params": params[3:], "alpha": 0.75}]
    optimizer = make_optimizer(rule, groups, backend, lr=0.1, k=3, alpha=0.3, **hyper)
    train(optimizer, range(steps))
    return optimizer


def train(optimizer: Any, steps: range) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for t in steps:
        for p, g in zip(params, make_grads(params, generator=seeded(t)), strict=True):
            p.grad = g
        optimizer.step()


def tensors(optimizer: Any) -> dict[str, torch.Tensor]:
    found = {}
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        found |= {f"{name} of {i}": value for name, value in {"param": p.detach(), **optimizer.state[p]}.items()}
    return found


@pytest.mark.parametrize(("dtype", "rule", "mode", "hyper"), CASES)
def test_a_sync_in_a_pass_gives_the_bits_of_a_sync_in_operators(
    backend: BackendCase, dtype: torch.dtype, rule: str, mode: str, hyper: dict[str, Any]
) -> None:
    if backend.name == "reference":
        pytest.skip("the others are compared with it")
    operators = BackendCase("reference", "cpu", 0.0)
    ours, theirs = (trained(case, dtype, rule, 4, pullback_momentum=mode, **hyper) for case in (backend, operators))
    # A sync is of every row, also of one that would take no part in a step.
    for optimizer in (ours, theirs):
        optimizer.param_groups[0]["params"][1].grad = None
    ours.sync()
    theirs.sync()
    for name, value in tensors(theirs).items():
        assert same_tensor_bits(tensors(ours)[name], value), name
    # No counter advanced, and what the next steps find on the device is a step's again.
    for optimizer in (ours, theirs):
        train(optimizer, range(4, 8))
    for name, value in tensors(theirs).items():
        assert same_tensor_bits(tensors(ours)[name], value), name


def test_a_row_without_an_update_has_nothing_to_sync(backend: BackendCase) -> None:
    """Its slow weights would be theta's, but for what found_inf skipped: then they are memory that nobody wrote."""
    optimizer = trained(backend, torch.float32, "adamw", 2, pullback_momentum="pullback")
    optimizer.state[optimizer.param_groups[0]["params"][0]]["step"].zero_()
    before = {name: value.clone() for name, value in tensors(optimizer).items()}
    optimizer.sync()
    after = tensors(optimizer)
    changed = {name for name, value in before.items() if not same_tensor_bits(after[name], value)}
    assert not {name for name in changed if name.endswith("of 0")}
    assert {"param of 1", "slow_param of 1"} <= changed
