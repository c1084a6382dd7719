"""`state_dtype="int8"` of DTensors: blocks are a rank's own, and what is saved is whole. Two ranks, no network."""

from __future__ import annotations

from pathlib import Path

import torch
from narrow import assert_same_numbers, of_class, run
from processes import needs_gloo, two_ranks

pytestmark = needs_gloo

COMMON = """
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from lookahead_fused import Lookahead, LookaheadAdamW

MAKERS = {
    "class": lambda ps: LookaheadAdamW(ps, lr=0.1, k=2, pullback_momentum="pullback", state_dtype="int8"),
    "wrapper": lambda ps: Lookahead(torch.optim.AdamW(ps, lr=0.1), k=2, state_dtype="int8"),
}
# Of 51 rows one rank has 26 and the other 25, which blocks of 128 cut otherwise than the whole; one has nothing of 1.
SHAPES = (51, 10), (1, 200)
mesh = init_device_mesh("cpu", (2,))

def numbers(step, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(step))

def sharded(tensor):
    return distribute_tensor(tensor, mesh, [Shard(0)])
"""

SHARDS = """
for name, make in MAKERS.items():
    params = [torch.nn.Parameter(sharded(numbers(0, shape))) for shape in SHAPES]
    # On each rank what it has of them, as plain tensors.
    parts = [torch.nn.Parameter(p.detach().to_local().clone()) for p in params]
    ours, twin = make(params), make(parts)
    for step in range(1, 8):
        for p, q, shape in zip(params, parts, SHAPES):
            p.grad = sharded(numbers(step, shape))
            q.grad = p.grad.to_local().clone()
        ours.step()
        twin.step()
        if step == 5:
            ours.sync()
            twin.sync()
    saved, local = ours.state_dict()["state"], twin.state_dict()["state"]
    for i, (p, q) in enumerate(zip(params, parts)):
        assert torch.equal(p.detach().to_local(), q.detach()), name
        own, its = ours.state[p], twin.state[q]
        assert own.keys() == its.keys()
        for key, value in own.items():
            if key.endswith("_scale"):
                assert type(value) is torch.Tensor and torch.equal(value, its[key]), (name, key)
            elif value.dim():
                assert isinstance(value, DTensor) and value.placements == p.placements, (name, key)
                assert value.shape == p.shape and torch.equal(value.to_local(), its[key]), (name, key)
        assert not any(key.endswith("_scale") for key in saved[i])
        for key, value in saved[i].items():
            if value.dim():
                assert isinstance(value, DTensor) and value.placements == p.placements, (name, key)
                assert value.shape == p.shape and value.stride() == p.stride(), (name, key)
                assert torch.equal(value.to_local(), local[i][key]) and value.dtype == local[i][key].dtype, (name, key)
        assert saved[i]["exp_avg"].dtype == torch.bfloat16
    # Resumed on as many ranks.
    again = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = make(again)
    resumed.load_state_dict(ours.state_dict())
    for step in range(8, 14):
        for p, q, shape in zip(params, again, SHAPES):
            p.grad = sharded(numbers(step, shape))
            q.grad = p.grad.clone()
        ours.step()
        resumed.step()
    for p, q in zip(params, again):
        assert torch.equal(p.detach().to_local(), q.detach().to_local())
        for key, value in ours.state[p].items():
            other = resumed.state[q][key]
            a, b = (t.to_local() if isinstance(t, DTensor) else t for t in (value, other))
            assert torch.equal(a, b), (name, key)
"""

SAVE = """
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from pathlib import Path

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = torch.nn.ParameterList([torch.nn.Parameter(sharded(numbers(0, shape))) for shape in SHAPES])

model = Model()
optimizer = MAKERS["class"](model.parameters())
for step in range(1, 6):
    for p, shape in zip(model.parameters(), SHAPES):
        p.grad = sharded(numbers(step, shape))
    optimizer.step()
dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=Path(place) / "saved")
whole = {f"{i} {key}": value.full_tensor() if isinstance(value, DTensor) else value
         for i, own in optimizer.state_dict()["state"].items() for key, value in own.items()}
weights = [p.detach().full_tensor() for p in model.parameters()]
if rank == 0:
    torch.save((whole, weights), Path(place) / "whole.pt")
"""


def test_shards_are_stepped_as_plain_tensors_are(tmp_path: Path) -> None:
    two_ranks(COMMON + SHARDS, tmp_path)


def test_a_checkpoint_of_two_ranks_goes_on_in_one_process(tmp_path: Path) -> None:
    """Every number of it comes back; in blocks of other elements it is encoded to the nearest."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    two_ranks(COMMON + SAVE, tmp_path)
    expected, weights = torch.load(tmp_path / "whole.pt", weights_only=True)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterList([torch.nn.Parameter(w) for w in weights])

    model = Model()
    params = list(model.parameters())
    optimizer: torch.optim.Optimizer = of_class("adamw", lr=0.1, k=2, pullback_momentum="pullback")(
        params, "auto", "int8"
    )
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=tmp_path / "saved")
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    for i, p in enumerate(params):
        for name, value in optimizer.state[p].items():
            assert value.dtype == expected[f"{i} {name}"].dtype
            assert torch.equal(value, expected[f"{i} {name}"]), name
    run(optimizer, params, range(6, 9))
    assert all(optimizer.state[p]["exp_avg"].dtype == torch.uint8 for p in params)
    # What was saved of it again goes on exactly.
    again = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = of_class("adamw", lr=0.1, k=2, pullback_momentum="pullback")(again, "auto", "int8")
    resumed.load_state_dict(optimizer.state_dict())
    run(optimizer, params, range(9, 12))
    run(resumed, again, range(9, 12))
    assert_same_numbers(optimizer, params, resumed, again)
