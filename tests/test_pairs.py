"""Every rule with every policy: fused, on every backend, the bits of the reference; and around optimizers of torch's
and of a user's own."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import BackendCase, make_params, same_tensor_bits
from oracle import ulps
from runs import advance, copies, through_a_file

from lookahead_fused import EMA, GPA, Lion, Lookahead, ScheduleFree

SHAPES = ((4, 3), (5,), (), (0,), (300,))
RULES: dict[str, Any] = {
    "adam": lambda params: torch.optim.Adam(params, lr=0.1, amsgrad=True, weight_decay=0.1),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.1),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01, momentum=0.5, centered=True),
    "radam": lambda params: torch.optim.RAdam(params, lr=0.1, betas=(0.9, 0.99)),
    "lion": lambda params: Lion(params, lr=0.1, weight_decay=0.1),
}
POLICIES: dict[str, Any] = {
    "lookahead": lambda base, **own: Lookahead(base, 2, 0.3, "pullback", **own),
    "outer momentum": lambda base, **own: Lookahead(base, 2, 1.2, "reset", outer_momentum=0.5, **own),
    "ema": lambda base, **own: EMA(base, 0.7, every=2, start=1, warmup=True, **own),
    "mean": lambda base, **own: EMA(base, "uniform", **own),
    "gpa": lambda base, **own: GPA(base, 0.6, 0.8, **own),
    "schedule-free": lambda base, **own: ScheduleFree(base, 0.8, r=1, **own),
}
PAIRS = list(itertools.product(RULES, POLICIES))


class Own(torch.optim.Optimizer):
    """A user's own, which keeps nothing and has an argument of the same name as ours."""

    def __init__(self, params: Any, alpha: float) -> None:
        super().__init__(params, {"alpha": alpha})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.sign(), alpha=group["alpha"])


OTHERS: dict[str, Any] = {
    "own": lambda params: Own(params, 0.1),
    "muon": lambda params: torch.optim.Muon(params, lr=0.1),
}


@pytest.mark.parametrize(("rule", "policy"), PAIRS)
def test_a_pair_has_one_set_of_bits(backend: BackendCase, rule: str, policy: str) -> None:
    """In fp32 parameters and in bf16 ones with a master, with slow weights evaluated on the way."""
    for dtype in (torch.float32, torch.bfloat16):
        params = make_params(SHAPES, dtype, device=backend.device)
        twins = [torch.nn.Parameter(p.detach().cpu().clone()) for p in params]
        optimizer = POLICIES[policy](RULES[rule](params), master_weights=True, backend=backend.name)
        reference = POLICIES[policy](RULES[rule](twins), master_weights=True, backend="reference")
        assert optimizer._is_fused
        for one, members in ((optimizer, params), (reference, twins)):
            advance(one, members, range(3))
            with one.slow_weights():
                pass
            advance(one, members, range(3, 5))
        for p, twin in zip(params, twins, strict=True):
            own, theirs = optimizer.state[p], reference.state[twin]
            assert own.keys() == theirs.keys()
            for found, value in ((p, twin), *((own[name], theirs[name]) for name in theirs)):
                if backend.ulps == 0:
                    assert same_tensor_bits(found.cpu(), value)
                elif found.dim() > 0:
                    assert ulps(found.detach().float().cpu().numpy(), value.detach().float().numpy()) <= 2**16


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("base", OTHERS)
def test_around_any_optimizer(backend: BackendCase, base: str, policy: str) -> None:
    """What the base steps has the bits that it has alone, up to the first event that it goes on from; and a checkpoint
    in the middle resumes."""
    if base == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    params = make_params(((4, 3), (6, 6)), device=backend.device)
    twins = copies(params)
    settings: dict[str, Any] = {"backend": backend.name}
    if policy in ("lookahead", "outer momentum"):
        optimizer = Lookahead(OTHERS[base](params), 2, outer_momentum=0.5 * (policy != "lookahead"), **settings)
    else:
        optimizer = POLICIES[policy](OTHERS[base](params), **settings)
    alone = OTHERS[base](twins)
    assert not optimizer._is_fused
    for one, members in ((optimizer, params), (alone, twins)):
        advance(one, members, range(1))
    for p, twin in zip(params, twins, strict=True):
        assert same_tensor_bits(optimizer.state[p].get("z", p), twin)
    others = copies(params)
    again: Any = type(optimizer)(OTHERS[base](others), **settings)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    for one, members in ((optimizer, params), (again, others)):
        advance(one, members, range(1, 5))
    for p, other in zip(params, others, strict=True):
        assert same_tensor_bits(p, other)
        assert all(same_tensor_bits(value, again.state[other][name]) for name, value in optimizer.state[p].items())
