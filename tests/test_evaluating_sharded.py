"""Checkpoints of between eval() and train(), by torch.distributed.checkpoint."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluating import (
    CUT,
    END,
    FEW,
    MAKERS,
    assert_hold,
    values_of,
    without_train_params,
)
from helpers import (
    BackendCase,
    assert_unchanged,
)
from processes import needs_gloo, two_ranks
from runs import advance, assert_same_run
from test_interrupts import at_all_moments, usual_handler  # noqa: F401


def make_model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("way", ["a whole dict", "a template of evaluating", "a template of training"])
def test_distributed_checkpoint(backend: BackendCase, name: str, flat: bool, way: str, tmp_path: Path) -> None:
    """What has no place in a template stays in the file, and of flat names torch reads those that stand in the state:
    what is loaded then is a checkpoint of inside a block. Else all of it is."""
    if backend.device != "cpu":
        pytest.skip("the model is on the CPU")
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as sd

    options = sd.StateDictOptions(flatten_optimizer_state_dict=flat)
    model, again, plain = make_model(), make_model(1), make_model()
    optimizer, resumed, twin = (MAKERS[name](list(m.parameters()), backend) for m in (model, again, plain))
    for m, o in ((model, optimizer), (plain, twin)):
        advance(o, list(m.parameters()), range(CUT))
        o.zero_grad()

    def both(m: torch.nn.Module, o: Any) -> dict[str, Any]:
        return {"model": sd.get_model_state_dict(m), "optim": sd.get_optimizer_state_dict(m, o, options=options)}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.eval()
        saved = both(model, optimizer)
        dcp.save(saved, checkpoint_id=tmp_path)
        if way == "a template of evaluating":
            both(again, resumed)  # makes its state
            resumed.eval()
        template = both(again, resumed)
        if way != "a whole dict":
            dcp.load(template, checkpoint_id=tmp_path)
        else:
            template = copy.deepcopy(saved)
        sd.set_model_state_dict(again, template["model"])
        sd.set_optimizer_state_dict(again, resumed, template["optim"], options=options)
    assert_hold(list(again.parameters()), values_of(list(model.parameters())))
    nested = copy.deepcopy(optimizer.state_dict())
    if flat or way == "a template of training":
        assert_unchanged(without_train_params(nested), resumed.state_dict())
        resumed.step()
        return
    assert_unchanged(nested, resumed.state_dict())
    resumed.train()
    for m, o in ((again, resumed), (plain, twin)):
        advance(o, list(m.parameters()), range(CUT, END))
    assert_same_run(twin, resumed)


SHARDS = """
import copy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from lookahead_fused import EMA, Lookahead, LookaheadAdamW

MAKERS = {
    "adamw": lambda ps: LookaheadAdamW(ps, lr=0.1, k=5),
    "external": lambda ps: Lookahead(torch.optim.Adamax(ps, lr=0.1), k=5),
    "ema": lambda ps: EMA(torch.optim.AdamW(ps, lr=0.1), 0.7),
    "master": lambda ps: LookaheadAdamW(ps, lr=0.1, k=5, master_weights=True),
}
mesh = init_device_mesh("cpu", (2,))

def value(step, dtype):
    whole = torch.randn(5, 3, generator=torch.Generator().manual_seed(step)).to(dtype)
    return distribute_tensor(whole, mesh, [Shard(0)])

def advance(optimizer, p, steps):
    for step in steps:
        p.grad = value(step + 1, p.dtype)
        optimizer.step()

def bits(t):
    return t.detach().to_local().clone()

for dtype in (torch.float32, torch.bfloat16):
    for name, make in MAKERS.items():
        p, q, r = (torch.nn.Parameter(value(0, dtype)) for _ in range(3))
        optimizer, twin, resumed = make([p]), make([q]), make([r])
        for o, x in ((optimizer, p), (twin, q)):
            advance(o, x, range(7))
        phi = bits(optimizer.state[p]["slow_param"]).to(dtype)
        optimizer.eval()
        assert torch.equal(bits(p), phi), name
        saved = copy.deepcopy(optimizer.state_dict())
        train = saved["state"][0]["train_param"]
        assert type(train) is DTensor and train.placements == p.placements and train.shape == p.shape, name
        assert torch.equal(bits(train), bits(q)), name
        resumed.load_state_dict(saved)
        with torch.no_grad():
            r.copy_(p)
        for o, x in ((optimizer, p), (resumed, r)):
            o.train()
            assert torch.equal(bits(x), bits(q)), name
        for o, x in ((optimizer, p), (resumed, r), (twin, q)):
            advance(o, x, range(7, 14))
            assert torch.equal(bits(x), bits(p)), name
        # What was loaded into a parameter first stays.
        other = copy.deepcopy(optimizer.state_dict())
        resumed.eval()
        with torch.no_grad():
            r.copy_(value(99, dtype))
        resumed.load_state_dict(other)
        assert torch.equal(bits(r), bits(value(99, dtype))), name
"""


@needs_gloo
def test_shards(tmp_path: Path) -> None:
    """Of a DTensor the training weights are one too, which torch.distributed.checkpoint can put together."""
    two_ranks(SHARDS, tmp_path)
