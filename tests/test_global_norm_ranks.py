"""The global norm where several ranks train: of DTensors it is summed over their mesh, and workers skip together."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import needs_gloo, on_ranks, two_ranks

pytestmark = needs_gloo

SHARDED = """
import math
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from lookahead_fused import Lookahead, LookaheadAdamW

mesh = init_device_mesh("cpu", (2,))
SHAPES = [(5, 3), (1, 4), (6,), (3,)]
# The second leaves a rank without an element, the third is whole on both, the last is no DTensor.
PLACED = [Shard(0), Shard(0), Replicate(), None]

def whole(of):
    return [torch.randn(shape, generator=torch.Generator().manual_seed(of + i)) for i, shape in enumerate(SHAPES)]

def placed(tensors):
    return [t.clone() if how is None else distribute_tensor(t.clone(), mesh, [how]) for t, how in zip(tensors, PLACED)]

MAKERS = {
    "adamw": lambda ps: LookaheadAdamW(ps, lr=0.1, k=2, max_grad_norm=0.5, skip_nonfinite=True),
    "wrapped-nadam": lambda ps: Lookahead(torch.optim.NAdam(ps, lr=0.1), k=2, max_grad_norm=0.5, skip_nonfinite=True),
}
for name, make in MAKERS.items():
    params = [torch.nn.Parameter(t) for t in placed(whole(0))]
    others = [torch.nn.Parameter(t) for t in whole(0)]
    ours, twin = make(params), make(others)
    for step in range(5):
        gradients = whole(10 * (step + 1))
        if step == 3:
            gradients[0][4, 0] = math.nan  # in the second rank's shard
        for p, q, g, h in zip(params, others, placed(gradients), gradients):
            p.grad, q.grad = g, h
        ours.step()
        twin.step()
        torch.testing.assert_close(ours.grad_norm, twin.grad_norm, rtol=1e-12, atol=0, equal_nan=True)
        assert ours.skipped_steps == twin.skipped_steps == (step >= 3)
        for p, q in zip(params, others):
            full = p.full_tensor() if hasattr(p, "full_tensor") else p
            torch.testing.assert_close(full, q, rtol=1e-6, atol=1e-6)
"""

OTHER_MESHES = """
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from lookahead_fused import LookaheadAdamW

meshes = [DeviceMesh("cpu", ranks) for ranks in ([0, 1], [0, 2], [0, 1, 2])]
def params(*of):
    return [torch.nn.Parameter(DTensor.from_local(torch.ones(3), meshes[i], [Shard(0)], run_check=False)) for i in of]
def stepped(ps):
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer = LookaheadAdamW(ps, lr=0.1, max_grad_norm=1.0)
    optimizer.step()
    return optimizer
if rank == 0:
    try:
        stepped(params(0, 1))
    except ValueError as error:
        assert "max_grad_norm" in str(error) and "[0, 1]" in str(error) and "[0, 2]" in str(error), error
    else:
        raise AssertionError("rank 1 and rank 2 have another norm than rank 0")
"""

WORKERS = """
import math
from lookahead_fused import Lookahead, LookaheadSGD

asked = dict(k=2, max_grad_norm=1.0, skip_nonfinite=True, process_group=dist.group.WORLD)
MAKERS = {
    "sgd": lambda ps: LookaheadSGD(ps, lr=0.1, **asked),
    "wrapped-nadam": lambda ps: Lookahead(torch.optim.NAdam(ps, lr=0.1), **asked),
}
for name, make in MAKERS.items():
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = make([param])
    for step in range(6):
        param.grad = torch.full((3,), float(rank + 1))
        if step in (1, 4) and rank == step % 2:
            param.grad[0] = math.inf
        before = param.detach().clone()
        optimizer.step()
        if step in (1, 4):
            assert torch.equal(param, before), (name, step)
        else:
            # Each worker clips by its own norm.
            assert optimizer.grad_norm.item() == math.sqrt(3 * (rank + 1) ** 2), (name, step)
    assert optimizer.skipped_steps == 2, (name, optimizer.skipped_steps)
    assert optimizer.state[param]["step" if name == "sgd" else optimizer._table.rule.step_name] == 4
    everywhere = [torch.empty(3) for _ in range(size)]
    dist.all_gather(everywhere, param.detach())
    assert torch.equal(*everywhere), (name, everywhere)  # the fourth update ends with a sync
"""


def test_the_norm_of_dtensors_is_that_of_the_whole(tmp_path: Path) -> None:
    two_ranks(SHARDED, tmp_path)


def test_meshes_of_other_ranks_are_refused(tmp_path: Path) -> None:
    on_ranks(3, OTHER_MESHES, tmp_path)


def test_workers_skip_together(tmp_path: Path) -> None:
    """Else one of them would wait for the others' sync for ever."""
    two_ranks(WORKERS, tmp_path)


@pytest.mark.parametrize("script", [SHARDED], ids=["one rank"])
def test_a_mesh_of_one_rank(script: str, tmp_path: Path) -> None:
    on_ranks(1, script.replace("(2,)", "(1,)"), tmp_path)
