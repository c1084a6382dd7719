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
from processes import needs_gloo, on_ranks, two_ranks
from releases import needs_torch
from runs import advance, assert_same_run, through_a_file
from test_distributed import TWO
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


GATHERED = (
    TWO
    + """
import torch.distributed.checkpoint as files
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from lookahead_fused import EMA, GPA, Lion

MASTERS = {
    "adamw": lambda ps: LookaheadAdamW(ps, lr=0.1, k=5, master_weights=True),
    "wrapped": lambda ps: Lookahead(torch.optim.SGD(ps, lr=0.1, momentum=0.9), k=5, master_weights=True),
    "ema": lambda ps: EMA(torch.optim.AdamW(ps, lr=0.1), 0.7, every=2, master_weights=True),
    "gpa": lambda ps: GPA(torch.optim.AdamW(ps, lr=0.1), master_weights=True),
    "lion": lambda ps: Lion(ps, lr=0.01, master_weights=True),
}
WHOLE, FLAT = {"full_state_dict": True}, {"flatten_optimizer_state_dict": True}
HOST, SENT = {"cpu_offload": True}, {"broadcast_from_rank0": True}
# How it is got, and how it is set; torch sets none that is both flat and whole.
FORMS = {
    "shards": ({}, {}),
    "shards on the host": (HOST, {}),
    "whole": (WHOLE, WHOLE),
    "whole on rank 0": ({**WHOLE, **HOST}, {**WHOLE, **SENT}),
    "flat": (FLAT, FLAT),
    "flat and whole": ({**FLAT, **WHOLE, **HOST}, None),
}
mesh = init_device_mesh("cpu", (size,))

def sharded(seed=0):
    model = make_model("bf16", seed)
    for layer in model[::2]:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)

def got(model, optimizer, how):
    return copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer, options=dcp.StateDictOptions(**how)))

def entries(saved):
    # Of the state alone, by path.
    return {path: t for path, t in dcp._flatten_state_dict(saved)[0].items() if isinstance(t, torch.Tensor)}

def trained(make):
    model, plain = sharded(), make_model("bf16")
    optimizer, twin = make(model.parameters()), make(plain.parameters())
    for m, o in ((model, optimizer), (plain, twin)):
        train(m, o, range(7))
    return model, optimizer, plain, twin
"""
)

IN_EVERY_FORM = """
for name, make in MASTERS.items():
    model, optimizer, plain, twin = trained(make)
    end, ended = copy.deepcopy((plain, twin.state_dict()))
    last = make(end.parameters())
    last.load_state_dict(ended)
    train(end, last, range(7, 12))
    for form, (how, then) in FORMS.items():
        what = f"{name}, {form}"
        saved = got(model, optimizer, how)
        lows = [t for path, t in entries(saved).items() if path.endswith("master_low")]
        on_every_rank = how.get("cpu_offload") is None or "full_state_dict" not in how
        assert len(lows) == (len(list(model.parameters())) if on_every_rank or rank == 0 else 0), what
        assert all(low.dtype == torch.int32 and isinstance(low, DTensor) != ("whole" in form) for low in lows), what
        # Of the base of a wrapper, and of a copy.
        for one in (getattr(optimizer, "base_optimizer", optimizer), copy.deepcopy(optimizer)):
            others = [own["master_low"] for own in one.state_dict()["state"].values()]
            assert [low.dtype for low in others] == [torch.int32] * len(list(model.parameters())), what
        if name != "lion":
            with optimizer.slow_weights():
                inside = entries(got(model, optimizer, how))
            for path, t in entries(saved).items():
                same([t], [inside[path]], f"{what}, {path} in a block")
        if then is None:
            continue
        resumed_model = sharded(seed=1)
        with torch.no_grad():
            for p, q in zip(resumed_model.parameters(), model.parameters(), strict=True):
                p.copy_(q)
        resumed = make(resumed_model.parameters())
        dcp.set_optimizer_state_dict(resumed_model, resumed, saved, options=dcp.StateDictOptions(**then))
        same_state(resumed, optimizer, f"{what}, loaded")
        train(resumed_model, resumed, range(7, 12))
        same(resumed_model.parameters(), end.parameters(), what)
        same_state(resumed, last, what)
    # Nothing that was saved meanwhile is left, or was changed.
    counts = []
    for times in (1, 5):
        for _ in range(times):
            optimizer.state_dict()
        gc.collect()
        counts.append(sum(isinstance(thing, DTensorSpec) for thing in gc.get_objects()))
    assert counts[0] == counts[1], (name, counts)
    train(model, optimizer, range(7, 12))
    same(model.parameters(), end.parameters(), f"{name}, gone on")
    same_state(optimizer, last, f"{name}, gone on")
"""

BY_FILES = """
# Of its own for what is written beside the training.
writers = dist.new_group(backend="gloo")
for name, make in MASTERS.items():
    model, optimizer, plain, twin = trained(make)
    at = {kind: os.path.join(place, f"{name}-{kind}") for kind in ("plain", "later")}
    sent = got(plain, twin, {})
    files.save({"optimizer": sent}, checkpoint_id=at["plain"])
    # What is saved beside the training is of when it was asked for.
    live = {"optimizer": dcp.get_optimizer_state_dict(model, optimizer)}
    writing = files.async_save(live, checkpoint_id=at["later"], process_group=writers)
    kept = copy.deepcopy(dcp.get_model_state_dict(model))
    train(model, optimizer, range(7, 12))
    writing.result()
    train(plain, twin, range(7, 12))
    for kind in ("plain", "later"):
        resumed_model = sharded(seed=1)
        dcp.set_model_state_dict(resumed_model, copy.deepcopy(kept))
        resumed = make(resumed_model.parameters())
        template = {"optimizer": dcp.get_optimizer_state_dict(resumed_model, resumed)}
        files.load(template, checkpoint_id=at[kind])
        dcp.set_optimizer_state_dict(resumed_model, resumed, template["optimizer"])
        train(resumed_model, resumed, range(7, 12))
        same(resumed_model.parameters(), plain.parameters(), f"{name}, {kind}")
        same_state(resumed, twin, f"{name}, {kind}")
    # From one process by way of rank 0, widened by hand.
    resumed_model = sharded(seed=1)
    dcp.set_model_state_dict(resumed_model, copy.deepcopy(kept))
    resumed = make(resumed_model.parameters())
    for own in sent["state"].values():
        assert own["master_low"].dtype == torch.int16, name
        own["master_low"] = own["master_low"].to(torch.int32)
    options = dcp.StateDictOptions(**WHOLE, **SENT)
    dcp.set_optimizer_state_dict(resumed_model, resumed, sent if rank == 0 else {}, options=options)
    train(resumed_model, resumed, range(7, 12))
    same(resumed_model.parameters(), plain.parameters(), f"{name}, sent")
    same_state(resumed, twin, f"{name}, sent")
    # And from shards into plain parameters.
    loose = make_model("bf16", seed=1)
    with torch.no_grad():
        for p, q in zip(loose.parameters(), kept.values(), strict=True):
            p.copy_(q.full_tensor())
    loaded = make(loose.parameters())
    template = {"optimizer": dcp.get_optimizer_state_dict(loose, loaded)}
    files.load(template, checkpoint_id=at["later"])
    dcp.set_optimizer_state_dict(loose, loaded, template["optimizer"])
    train(loose, loaded, range(7, 12))
    same(loose.parameters(), plain.parameters(), f"{name}, into plain parameters")
    same_state(loaded, twin, f"{name}, into plain parameters")
    # Nothing is read where no memory is.
    own = next(iter(optimizer.state.values()))
    own["master_low"].to_local().untyped_storage().resize_(0)
    try:
        optimizer.state_dict()
    except ValueError as error:
        assert "state 'master_low' of parameter 0 must have its memory" in str(error), error
    else:
        raise AssertionError(f"{name}: memory that is gone was read")
"""


@needs_gloo
@needs_torch("2.9", "FSDP2 on a CPU")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", ["IN_EVERY_FORM", "BY_FILES"])
def test_of_shards_in_a_form_that_ranks_can_send(script: str, tmp_path: Path) -> None:
    """Whole on one rank or on all, flat, broadcast, gathered inside a block, written beside the training; every run
    that loads one goes on with the same bits, amid a window. Two ranks, of which one has nothing of the last layer."""
    two_ranks(GATHERED + globals()[script], tmp_path)
