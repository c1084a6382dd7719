"""A base's own methods and attributes, which trainers call by duck typing, are the wrapper's too, and no others are."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BackendCase, make_params
from runs import advance, assert_same_run

import lookahead_fused
from lookahead_fused import Lookahead


class WithWays(torch.optim.RMSprop):
    """What bases have that are schedule-free, sharded or in two halves."""

    is_sharded = True

    def __init__(self, params: Any, **hyper: Any) -> None:
        super().__init__(params, **hyper)
        self.calls: list[Any] = []
        self.rank = 3

    def train(self) -> None:
        self.calls.append("train")

    def eval(self) -> None:
        self.calls.append("eval")

    def consolidate_state_dict(self, to: int = 0) -> int:
        self.calls.append(("consolidate", to))
        return to

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.calls.append(("zero_grad", set_to_none))
        super().zero_grad(set_to_none)

    @property
    def world(self) -> int:
        return self.rank + 1

    @property
    def gone(self) -> None:
        raise AttributeError("this base has none now")

    def __getattr__(self, name: str) -> Any:
        if name == "made_up":
            return 7
        raise AttributeError(name)


MAKERS: dict[str, Callable[[Any], Any]] = {
    "fused": lambda params: torch.optim.AdamW(params, lr=0.1),
    "of its own": lambda params: WithWays(params, lr=0.1),
}


def test_a_bases_methods_reach_it() -> None:
    (p,) = make_params([(3,)])
    base = WithWays([p], lr=0.1)
    optimizer = Lookahead(base)
    optimizer.eval()
    optimizer.train()
    assert optimizer.consolidate_state_dict(to=2) == 2
    p.grad = torch.ones_like(p)
    optimizer.zero_grad(set_to_none=False)
    assert p.grad is not None
    assert not p.grad.any()
    optimizer.zero_grad()
    assert p.grad is None
    assert base.calls == ["eval", "train", ("consolidate", 2), ("zero_grad", False), ("zero_grad", True)]
    assert (optimizer.rank, optimizer.world, optimizer.is_sharded, optimizer.made_up) == (3, 4, True, 7)
    base.rank = 5
    assert (optimizer.rank, optimizer.world) == (5, 6)


def test_what_is_asked_for_by_name() -> None:
    """As trainers do: `hasattr`, then a call. Around a base that has no such method there must be none."""
    own, plain = (Lookahead(MAKERS[name](make_params([(3,)]))) for name in ("of its own", "fused"))
    for name in ("consolidate_state_dict", "rank", "world", "is_sharded", "made_up"):
        assert hasattr(own, name)
        assert callable(getattr(own, name)) == callable(getattr(own.base_optimizer, name))
        assert not hasattr(plain, name)
        with pytest.raises(AttributeError, match=name):
            getattr(plain, name)
    for name in ("gone", "no_such_thing"):
        assert not hasattr(own, name)
    plain.base_optimizer.rank = 1
    assert plain.rank == 1


def test_a_bases_private_names_are_its_own() -> None:
    """torch's scalers, hooks and compiler ask optimizers for some, and mean this one."""
    optimizer = Lookahead(MAKERS["of its own"](make_params([(3,)])))
    optimizer.base_optimizer._secret = 1
    assert not hasattr(optimizer, "_secret")
    assert not hasattr(optimizer, "__no_dunder__")


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(
    "how",
    [copy.copy, copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies_have_a_base_of_their_own(backend: BackendCase, name: str, how: Callable[[Any], Any]) -> None:
    """Copying and unpickling ask an object for much before it has a base to be asked for it."""
    params = make_params([(3,), (4,)], device=backend.device)
    optimizer = Lookahead(MAKERS[name](params), k=2, backend=backend.name)
    advance(optimizer, params, range(3))
    twin = how(optimizer)
    assert hasattr(twin, "consolidate_state_dict") == (name == "of its own")
    if how is copy.copy:
        assert twin.base_optimizer is optimizer.base_optimizer
        return
    assert twin.base_optimizer is not optimizer.base_optimizer
    twin_params = [p for group in twin.param_groups for p in group["params"]]
    for o, ps in ((optimizer, params), (twin, twin_params)):
        advance(o, ps, range(3, 6))
    assert_same_run(optimizer, twin)


def test_one_without_a_base_yet() -> None:
    optimizer = Lookahead.__new__(Lookahead)
    for name in ("base_optimizer", "rank", "param_groups", "state", "defaults", "__deepcopy__", "grad_scale"):
        assert not hasattr(optimizer, name)


def test_the_classes_have_no_such_door() -> None:
    optimizer = lookahead_fused.LookaheadAdamW(make_params([(3,)]))
    for name in ("consolidate_state_dict", "base_optimizer", "rank"):
        assert not hasattr(optimizer, name)
