"""Narrow moments of DTensors: elements are counted and blocks are cut on each rank by itself, and what is saved is
whole. No network.

What is drawn for an element depends on its place on its rank. A shard is stepped to the bit as a plain tensor of the
same elements is, and a run resumed on as many ranks goes on to the bit. The whole on one rank, or its shards on another
number of them, draw otherwise: from the same bits their runs stay within the rounding of the moments.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import needs_gloo, on_ranks, two_ranks
from releases import is_torch, needs_torch

pytestmark = needs_gloo

COMMON = """
import copy
import torch.distributed.checkpoint as files
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from lookahead_fused import Lookahead, LookaheadAdamW

LR, K, CUT, END = 0.1, 3, 7, 12
MAKERS = {
    "class": lambda ps, narrow: LookaheadAdamW(ps, lr=LR, k=K, pullback_momentum="pullback", state_dtype=narrow),
    "wrapper": lambda ps, narrow: Lookahead(torch.optim.Adam(ps, lr=LR, amsgrad=True), k=K, state_dtype=narrow),
    "master": lambda ps, narrow: LookaheadAdamW(ps, lr=LR, k=K, master_weights=True, state_dtype=narrow),
}
CASES = ("class", "bfloat16"), ("class", "int8"), ("wrapper", "bfloat16"), ("master", "int8")
# How far apart the weights of two runs may be on average after END steps that draw otherwise, in learning rates.
APART = {"bfloat16": 0.01, "int8": 0.1}
mesh = init_device_mesh("cpu", (size,))

def make_model(name, seed=0):
    torch.manual_seed(seed)
    # Of 51 rows two ranks have 26 and 25, three 17 each, and blocks of 128 are cut otherwise than in the whole; of the
    # last layer's one row all ranks but the first have nothing.
    made = torch.nn.Sequential(torch.nn.Linear(10, 51), torch.nn.Tanh(), torch.nn.Linear(51, 1))
    return made.to(torch.bfloat16 if name == "master" else torch.float32)

def sharded(name, seed=0):
    model = make_model(name, seed)
    if FSDP2:
        from torch.distributed.fsdp import fully_shard

        for layer in model[::2]:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    for layer in model[::2]:
        for key, p in list(layer.named_parameters()):
            setattr(layer, key, torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))
    return model

def gradient(p, step, i):
    given = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i)).to(p.dtype)
    return distribute_tensor(given, mesh, [Shard(0)]) if isinstance(p, DTensor) else given

def advance(params, optimizer, steps):
    for step in steps:
        for i, p in enumerate(params):
            p.grad = gradient(p, step, i)
        optimizer.step()

def whole(tensor):
    # gloo sends no int16.
    tensor = tensor.to(torch.int32) if tensor.dtype == torch.int16 else tensor
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

def same(a, b, what):
    assert a.dtype == b.dtype and torch.equal(a, b), f"{what}: {a} and {b}"

def all_of(params, optimizer):
    # What a run goes on from, on this rank.
    named = [(str(i), p) for i, p in enumerate(params)]
    named += [(f"{i} {key}", v) for i, p in enumerate(params) for key, v in optimizer.state[p].items()]
    return {name: local(tensor.detach()).clone() for name, tensor in named}

def near(params, others, narrow, what):
    apart = [(whole(p.detach()) - whole(q.detach())).float().flatten() for p, q in zip(params, others, strict=True)]
    apart = torch.cat(apart).abs().mean() / LR
    # Not to the bit, or nothing was drawn here.
    assert 0 < apart < APART[narrow], f"{what}: {apart} learning rates apart"
"""

SHARDS = """
for name, narrow in CASES:
    what = f"{name}, {narrow}"
    model, plain = sharded(name), make_model(name)
    params = list(model.parameters())
    # On each rank what it has of them, as plain tensors.
    parts = [torch.nn.Parameter(local(p.detach()).clone()) for p in params]
    ours, twin, unsharded = (MAKERS[name](list(ps), narrow) for ps in (params, parts, plain.parameters()))
    for step in range(END):
        if FSDP2:
            ours.zero_grad()
            x = torch.randn(6, 10, generator=torch.Generator().manual_seed(step)).to(params[0].dtype)
            model(x).square().sum().backward()
        for i, (p, q, r) in enumerate(zip(params, parts, plain.parameters(), strict=True)):
            p.grad = p.grad if FSDP2 else gradient(p, step, i)
            q.grad, r.grad = local(p.grad).clone(), whole(p.grad).clone()
        for one in (ours, twin, unsharded):
            one.step()
            if step == CUT:
                one.sync()
    saved, its_saved = (one.state_dict()["state"] for one in (ours, twin))
    for i, (p, q) in enumerate(zip(params, parts, strict=True)):
        same(local(p.detach()), q.detach(), f"{what}, parameter {i}")
        own, its = ours.state[p], twin.state[q]
        assert own.keys() == its.keys() and saved[i].keys() == its_saved[i].keys(), what
        assert own["exp_avg"].dtype == (torch.uint8 if narrow == "int8" else torch.bfloat16), what
        assert saved[i]["exp_avg"].dtype == torch.bfloat16, what
        assert not any(key.endswith("_scale") for key in saved[i]), what
        for key, value in own.items():
            same(local(value), its[key], f"{what}, {key} of {i}")
            assert isinstance(value, DTensor) == (value.dim() > 0 and not key.endswith("_scale")), (what, key)
        for key, value in saved[i].items():
            # As int32, where it is int16 of a plain tensor.
            same(local(value), its_saved[i][key].to(value.dtype), f"{what}, saved {key} of {i}")
            if value.dim():
                assert isinstance(value, DTensor) and value.placements == p.placements, (what, key)
                assert value.shape == p.shape and value.stride() == p.stride(), (what, key)
    near(params, list(plain.parameters()), narrow, what)
    # Resumed on as many ranks, in the middle of a window.
    again = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = MAKERS[name](again, narrow)
    resumed.load_state_dict(copy.deepcopy(ours.state_dict()))
    advance(params, ours, range(END, END + 5))
    advance(again, resumed, range(END, END + 5))
    for key, value in all_of(params, ours).items():
        same(value, all_of(again, resumed)[key], f"{what}, resumed, {key}")
"""

SAVE = """
for name, narrow in CASES:
    model = sharded(name)
    params = list(model.parameters())
    optimizer = MAKERS[name](params, narrow)
    advance(params, optimizer, range(CUT))
    state = {"model": dcp.get_model_state_dict(model), "optimizer": dcp.get_optimizer_state_dict(model, optimizer)}
    files.save(state, checkpoint_id=f"{SAVED}/{name} {narrow}")
    kept = {"weights": [whole(p.detach()) for p in params]}
    saved = copy.deepcopy(optimizer.state_dict())["state"]
    kept["state"] = {i: {key: whole(v) for key, v in own.items()} for i, own in saved.items()}
    advance(params, optimizer, range(CUT, END))
    kept["end"], kept["ended"] = all_of(params, optimizer), [whole(p.detach()) for p in params]
    torch.save(kept, f"{SAVED}/{name} {narrow} of {rank}.pt")
"""

LOAD = """
for name, narrow in CASES:
    what = f"{name}, {narrow}, on {size}"
    model = sharded(name, seed=1) if size > 1 else make_model(name, seed=1)
    params = list(model.parameters())
    optimizer = MAKERS[name](params, narrow)
    state = {"model": dcp.get_model_state_dict(model), "optimizer": dcp.get_optimizer_state_dict(model, optimizer)}
    files.load(state, checkpoint_id=f"{SAVED}/{name} {narrow}")
    dcp.set_model_state_dict(model, state["model"])
    dcp.set_optimizer_state_dict(model, optimizer, state["optimizer"])
    kept = torch.load(f"{SAVED}/{name} {narrow} of {rank if size == 2 else 0}.pt", weights_only=True)
    # Every number comes back on any number of ranks.
    for i, p in enumerate(params):
        same(whole(p.detach()), kept["weights"][i], f"{what}, loaded parameter {i}")
        assert optimizer.state[p].keys() == kept["state"][i].keys(), what
        for key, value in optimizer.state[p].items():
            same(whole(value), kept["state"][i][key], f"{what}, loaded {key} of {i}")
    advance(params, optimizer, range(CUT, END))
    if size == 2:
        for key, value in all_of(params, optimizer).items():
            same(value, kept["end"][key], f"{what}, {key}")
    else:
        near(params, [torch.nn.Parameter(t) for t in kept["ended"]], narrow, what)
"""


@pytest.mark.parametrize("way", ["by hand", pytest.param("FSDP2", marks=needs_torch("2.9", "FSDP2 on a CPU"))])
def test_shards_are_stepped_as_plain_tensors_are(way: str, tmp_path: Path) -> None:
    two_ranks(f"FSDP2 = {way == 'FSDP2'}\n" + COMMON + SHARDS, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_goes_on_on_any_number_of_ranks(tmp_path: Path) -> None:
    """Saved by two in the middle of a window; by two it is gone on with to the bit, by three and by one that has plain
    parameters from the same numbers."""
    given = f"FSDP2, SAVED = {is_torch('2.9')}, {str(tmp_path)!r}\n"
    for size, script in ((2, SAVE), (2, LOAD), (3, LOAD), (1, LOAD)):
        place = tmp_path / f"{size} {'saving' if script is SAVE else 'loading'}"
        place.mkdir()
        on_ranks(size, given + COMMON + script, place)
