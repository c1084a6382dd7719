"""Checkpoints of bf16 parameters with masters: of halves and of whole ones, of one process and of several."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import BackendCase, assert_unchanged, make_params, same_tensor_bits, snapshot
from oracle import round_bfloat16
from processes import needs_gloo, on_ranks
from runs import advance, assert_same_run, through_a_file
from test_masters import BF16, FP16, SHAPES, masters_of
from test_pairs import POLICIES, RULES
from torch import Tensor

from lookahead_fused import GPA, Lookahead, LookaheadAdamW


def of_adamw(params: Sequence[Tensor], backend: BackendCase, **more: Any) -> LookaheadAdamW:
    return LookaheadAdamW(params, lr=0.1, k=3, master_weights=True, backend=backend.name, **more)


def loaded(values: Sequence[Tensor], device: str) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(v.detach().clone().to(device)) for v in values]


def with_whole_masters(state_dict: dict[str, Any], whole: Sequence[np.ndarray]) -> dict[str, Any]:
    """The checkpoint as it was before masters were halved."""
    saved = copy.deepcopy(state_dict)
    for own, master in zip(saved["state"].values(), whole, strict=True):
        own.pop("master_low")
        own["master_param"] = torch.from_numpy(master.copy())
    return saved


@pytest.mark.parametrize("first", ["weights", "state"])
@pytest.mark.parametrize("cut", [2, 3, 4])
def test_a_whole_master_loads(backend: BackendCase, cut: int, first: str) -> None:
    """Its run goes on with the same bits, also where its weights were rounded to the other side of a tie, and whether
    they are loaded before the optimizer's state or after it."""
    params = make_params(SHAPES, BF16, device=backend.device)
    optimizer = of_adamw(params, backend)
    advance(optimizer, params, range(cut))
    # To tell who decides, ties: to even the number below, here the one above.
    with torch.no_grad():
        for p in params:
            p.copy_((p.view(torch.int16) // 2 * 2 + 1).view(BF16))
            optimizer.state[p]["master_low"].fill_(-(2**15))
    whole = masters_of(optimizer, params)
    weights = [torch.from_numpy(round_bfloat16(master)).to(BF16) for master in whole]
    assert not any(torch.equal(w, p.cpu()) for w, p in zip(weights, params, strict=True) if p.numel())
    saved = through_a_file(with_whole_masters(optimizer.state_dict(), whole))
    resumed = make_params(SHAPES, BF16, device=backend.device) if first == "state" else loaded(weights, backend.device)
    again = of_adamw(resumed, backend)
    again.load_state_dict(saved)
    if first == "state":
        with torch.no_grad():
            for p, w in zip(resumed, weights, strict=True):
                p.copy_(w)
    for one, members in ((optimizer, params), (again, resumed)):
        advance(one, members, range(cut, cut + 3))
    assert_same_run(again, optimizer)


def test_a_whole_master_is_there_for_what_reads_it_before_a_step(backend: BackendCase) -> None:
    """GPA's average follows from the master, and a sync interpolates it."""
    params = make_params(SHAPES, BF16, device=backend.device)
    optimizers = []
    for make in (
        lambda ps: GPA(RULES["sgd"](ps), 0.5, 0.8, master_weights=True, backend=backend.name),
        lambda ps: of_adamw(ps, backend),
    ):
        members = loaded(params, backend.device)
        optimizer = make(members)
        advance(optimizer, members, range(2))
        saved = with_whole_masters(optimizer.state_dict(), masters_of(optimizer, members))
        resumed = loaded(members, backend.device)
        again = make(resumed)
        again.load_state_dict(saved)
        with optimizer.slow_weights(), again.slow_weights():
            assert all(same_tensor_bits(p, q) for p, q in zip(members, resumed, strict=True))
        optimizers.append((optimizer, members, again, resumed))
    optimizer, members, again, resumed = optimizers[1]
    optimizer.sync()
    optimizer.zero_grad()
    again.sync()
    assert_same_run(again, optimizer)


def test_a_refused_step_leaves_what_was_loaded() -> None:
    params = make_params(SHAPES, BF16)
    backend = BackendCase("reference", "cpu", 0.0)
    optimizer = of_adamw(params, backend)
    advance(optimizer, params, range(2))
    saved = with_whole_masters(optimizer.state_dict(), masters_of(optimizer, params))
    again = of_adamw(params, backend)
    again.load_state_dict(saved)
    before = snapshot(again)
    again.param_groups[0]["k"] = 0
    with pytest.raises(ValueError, match="k must be"):
        again.step()
    again.param_groups[0]["k"] = 3
    assert_unchanged(before, snapshot(again))
    assert "master_param" in again.state[params[0]]


def test_a_low_half_says_nothing_of_an_fp16_parameter(backend: BackendCase) -> None:
    """Its master begins at the weights that were loaded."""
    params = make_params(SHAPES, BF16, device=backend.device)
    optimizer = of_adamw(params, backend)
    advance(optimizer, params, range(2))
    cast = [torch.nn.Parameter(p.detach().to(FP16)) for p in params]
    again = of_adamw(cast, backend, weight_decay=0.0)
    again.load_state_dict(optimizer.state_dict())
    again.param_groups[0].update(lr=0.0, weight_decay=0.0, k=100)
    advance(again, cast, range(1))
    for p, q in zip(params, cast, strict=True):
        assert "master_low" not in again.state[q]
        assert same_tensor_bits(again.state[q]["master_param"], p.detach().to(FP16).float())


@pytest.mark.parametrize("how", ["file", "pickle", "copy", "spelling"])
def test_it_goes_along(backend: BackendCase, how: str) -> None:
    """By every way in which an optimizer is carried over, also to the same pair in another spelling."""
    params = make_params(SHAPES, BF16, device=backend.device)
    optimizer = of_adamw(params, backend)
    advance(optimizer, params, range(4))
    if how in ("file", "spelling"):
        resumed = loaded(params, backend.device)
        again: Any = of_adamw(resumed, backend)
        if how == "spelling":
            again = Lookahead(torch.optim.AdamW(resumed, lr=0.1), 3, master_weights=True, backend=backend.name)
        again.load_state_dict(through_a_file(optimizer.state_dict()))
    else:
        again = copy.deepcopy(optimizer) if how == "copy" else pickle.loads(pickle.dumps(optimizer))
        resumed = again.param_groups[0]["params"]
    lows = [again.state[p]["master_low"] for p in resumed]
    assert all(low.dtype == torch.int16 and low.shape == p.shape for low, p in zip(lows, resumed, strict=True))
    for one, members in ((optimizer, params), (again, resumed)):
        advance(one, members, range(4, 7))
    for p, q in zip(params, resumed, strict=True):
        assert same_tensor_bits(p, q)
        assert all(same_tensor_bits(value, again.state[q][name]) for name, value in optimizer.state[p].items())


@pytest.mark.parametrize("policy", ["lookahead", "ema", "gpa", "schedule-free"])
def test_it_stays_while_slow_weights_are_in_the_parameters(backend: BackendCase, policy: str) -> None:
    """And a checkpoint that is taken meanwhile resumes as if nobody had evaluated."""
    params = make_params(SHAPES, BF16, device=backend.device)
    optimizer = POLICIES[policy](RULES["adamw"](params), master_weights=True, backend=backend.name)
    advance(optimizer, params, range(3))
    before = snapshot(optimizer)
    optimizer.eval()
    assert any(not torch.equal(p, q) for p, q in zip(params, before["params"], strict=True))
    saved, weights = through_a_file(optimizer.state_dict()), [p.detach().clone() for p in params]
    optimizer.train()
    assert_unchanged(before, snapshot(optimizer))
    resumed = loaded(weights, backend.device)
    again = POLICIES[policy](RULES["adamw"](resumed), master_weights=True, backend=backend.name)
    again.load_state_dict(saved)
    again.train()
    for one, members in ((optimizer, params), (again, resumed)):
        advance(one, members, range(3, 6))
    assert_same_run(again, optimizer)


SHARDED = """
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from lookahead_fused import LookaheadAdamW

mesh = init_device_mesh("cpu", (size,))

def value(step):
    return torch.randn(7, 3, generator=torch.Generator().manual_seed(step)).to(torch.bfloat16)

def sharded(step):
    return distribute_tensor(value(step), mesh, [Shard(0)])

def begun(of):
    p = torch.nn.Parameter(of(0))
    return p, LookaheadAdamW([p], lr=0.1, k=5, master_weights=True)

def advance(p, optimizer, of, steps):
    for step in steps:
        p.grad = of(step + 1)
        optimizer.step()

def checkpoint(p, optimizer):
    return {"p": p.detach(), "state": optimizer.state_dict()["state"][0]}

p, optimizer = begun(sharded)
if SAVES:
    advance(p, optimizer, sharded, range(7))
    dcp.save(checkpoint(p, optimizer), checkpoint_id=PLACE)
else:
    advance(p, optimizer, sharded, range(90, 91))
    template = checkpoint(p, optimizer)
    dcp.load(template, checkpoint_id=PLACE)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: template["state"]}})
    advance(p, optimizer, sharded, range(7, 12))
    whole, twin = begun(value)
    advance(whole, twin, value, range(12))
    for name, ours, theirs in (("p", p, whole), *((n, optimizer.state[p][n], v) for n, v in twin.state[whole].items())):
        assert ours.dtype == theirs.dtype, name
        if isinstance(ours, DTensor):
            # gloo sends no int16.
            ours = (ours.to(torch.int32) if ours.dtype == torch.int16 else ours).full_tensor()
        assert torch.equal(ours, theirs.to(ours.dtype)), (name, ours, theirs)
    low = optimizer.state[p]["master_low"]
    assert isinstance(low, DTensor) and low.placements == p.placements
"""


@needs_gloo
def test_it_is_saved_by_shards_and_loaded_onto_other_ranks(tmp_path: Path) -> None:
    """Amid a window, from two ranks onto three."""
    for size, saves in ((2, True), (3, False)):
        place = tmp_path / str(size)
        place.mkdir()
        on_ranks(size, f"SAVES, PLACE = {saves}, {str(tmp_path / 'saved')!r}\n" + SHARDED, place)
