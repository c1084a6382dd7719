"""DTensors whose gradients are not what their parameters are: placed otherwise, still on their way, of another class.
Two ranks, no network: what all of them hold is what one process computes that has everything."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import needs_gloo, two_ranks

pytestmark = needs_gloo

COMMON = """
import torch.distributed._functional_collectives as funcol
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from lookahead_fused import Lookahead, LookaheadAdamW, LookaheadSGD

MAKERS = {
    "adamw": lambda ps, b: LookaheadAdamW(ps, lr=0.1, k=2, pullback_momentum="pullback", backend=b),
    "sgd": lambda ps, b: LookaheadSGD(ps, lr=0.1, k=2, momentum=0.9, backend=b),
    "wrapped-adamw": lambda ps, b: Lookahead(torch.optim.AdamW(ps, lr=0.1), k=2, backend=b),
    "wrapped-adamax": lambda ps, b: Lookahead(torch.optim.Adamax(ps, lr=0.1), k=2, backend=b),
}
# What is made of a DTensor is the same for every rule: one of a fused step and one of torch's tell the backends apart.
CASES = [*((name, "auto") for name in MAKERS), ("adamw", "reference"), ("wrapped-adamax", "reference")]
mesh = init_device_mesh("cpu", (2,))
SHAPE = (5, 3)  # does not divide by two
value = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))

def addend(step, of):
    # Whole numbers: their sum is exact in any order.
    return torch.randint(-8, 8, SHAPE, generator=torch.Generator().manual_seed(100 * step + of)).float()

def whole_gradient(step):
    return addend(step, 0) + addend(step, 1)

def distributed(tensor, placement):
    return distribute_tensor(tensor, mesh, [placement])

def bare(tensor):
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return vars(local).get("inner", local)

def gathered(tensor):
    '''What all ranks hold together; where each should hold all, that of both.'''
    if not isinstance(tensor, DTensor):
        return [tensor.detach()]
    plain = DTensor.from_local(bare(tensor.detach()), mesh, tensor.placements, run_check=False,
                               shape=tensor.shape, stride=tensor.stride())
    if plain.placements != (Replicate(),):
        return [plain.full_tensor()]
    both = [torch.empty(SHAPE) for _ in range(2)]
    dist.all_gather(both, plain.to_local().contiguous())
    return both

def same(ours, p, twin, q, what):
    for t in gathered(p):
        assert torch.equal(t, q.detach()), (what, t, q)
    assert ours.state[p].keys() == twin.state[q].keys(), what
    for key, state in twin.state[q].items():
        for t in gathered(ours.state[p][key]):
            assert torch.equal(t, state), (what, key, t, state)

def run(name, backend, parameter, gradient_of, what, steps=5):
    p, q = torch.nn.Parameter(parameter), torch.nn.Parameter(value.clone())
    ours, twin = MAKERS[name]([p], backend), MAKERS[name]([q], backend)
    for step in range(steps):
        p.grad, q.grad = gradient_of(step), whole_gradient(step)
        ours.step()
        twin.step()
        same(ours, p, twin, q, (*what, step))
    ours.sync()
    twin.sync()
    same(ours, p, twin, q, (*what, "sync"))

def refused(error, words, what, call):
    try:
        call()
    except error as caught:
        assert all(word in str(caught) for word in words), (what, str(caught))
    else:
        raise AssertionError(f"{what} was not refused")
"""

PLACEMENTS = """
def of(step, placement):
    if placement.is_partial():
        return DTensor.from_local(addend(step, rank), mesh, [Partial()], run_check=False)
    return distributed(whole_gradient(step), placement)

for name, backend in CASES:
    for own in (Shard(0), Shard(1), Replicate()):
        for other in (Shard(0), Shard(1), Replicate(), Partial()):
            run(name, backend, distributed(value, own), lambda step: of(step, other), (name, backend, own, other), 3)
        # From step to step another, tables being made for one that fits.
        turns = (own, Partial(), own, Replicate(), Shard(0))
        run(name, backend, distributed(value, own), lambda step: of(step, turns[step]), (name, backend, own, "in turn"))
"""

ON_THEIR_WAY = """
for name, backend in CASES:
    # Until somebody waits the memory may hold one rank's addend.
    def reduced(step):
        grad = funcol.all_reduce(addend(step, rank), "sum", dist.group.WORLD)
        assert type(grad) is funcol.AsyncCollectiveTensor
        return grad

    run(name, backend, value.clone(), reduced, (name, backend, "plain"))

    def scattered(step):
        partial = DTensor.from_local(addend(step, rank), mesh, [Partial()], run_check=False)
        grad = partial.redistribute(placements=[Shard(0)], async_op=True)
        assert type(grad._local_tensor) is funcol.AsyncCollectiveTensor
        return grad

    run(name, backend, distributed(value, Shard(0)), scattered, (name, backend, "shard"))

    def replicated(step):
        partial = DTensor.from_local(addend(step, rank), mesh, [Partial()], run_check=False)
        grad = partial.redistribute(placements=[Replicate()], async_op=True)
        assert type(grad._local_tensor) is funcol.AsyncCollectiveTensor
        return grad

    run(name, backend, distributed(value, Replicate()), replicated, (name, backend, "replicate"))
"""

CLASSES = """
from test_tensor_classes import Around, AroundState, WithoutDivision, WithoutState

def around(cls, tensor):
    shard = distributed(tensor, Shard(0))
    made = DTensor.from_local(
        cls(shard._local_tensor.clone()), mesh, [Shard(0)], run_check=False, shape=SHAPE, stride=shard.stride()
    )
    assert type(made._local_tensor) is cls
    return made

for name, backend in CASES:
    for cls in (Around, AroundState):
        for gradients in (torch.Tensor, cls):
            def of(step):
                whole = whole_gradient(step)
                return distributed(whole, Shard(0)) if gradients is torch.Tensor else around(cls, whole)
            run(name, backend, around(cls, value), of, (name, backend, cls.__name__, gradients.__name__))
    for cls in (WithoutState, WithoutDivision):
        params = [torch.nn.Parameter(distributed(value, Shard(0))), torch.nn.Parameter(around(cls, value))]
        optimizer = MAKERS[name](params, backend)
        for p in params:
            p.grad = distributed(whole_gradient(0), Shard(0))
        before = [bare(p).clone() for p in params]
        words = ("parameter 1 of group 0", f"got a {cls.__name__}")
        refused(TypeError, words, (name, backend), optimizer.step)
        assert not any(optimizer.state.values()), (name, cls, optimizer.state)
        assert all(torch.equal(bare(p), old) for p, old in zip(params, before, strict=True)), (name, cls)
"""

CHANGED = """
def on_its_way(step):
    partial = DTensor.from_local(addend(step, rank), mesh, [Partial()], run_check=False)
    return partial.redistribute(placements=[Shard(0)], async_op=True)

def partial(step):
    return DTensor.from_local(addend(step, rank), mesh, [Partial()], run_check=False)

def shard(step):
    return distributed(whole_gradient(step), Shard(0))

def whole(step):
    return distributed(whole_gradient(step), Replicate())

def other_columns(step):
    return distributed(whole_gradient(step), Shard(1))

for name, backend in CASES:
    # One gradient whose insides are replaced by those of another.
    gradient = shard(0)
    made = [shard, shard, on_its_way, shard, partial, shard, whole, other_columns, shard]

    def replaced(step):
        new = made[step](step)
        gradient._local_tensor, gradient._spec = new._local_tensor, new._spec
        return gradient

    if name != "wrapped-adamax":  # torch's own step asks the outer tensor's size
        run(name, backend, distributed(value, Shard(0)), replaced, (name, backend, "replaced"), len(made))

    # Of a replica, where each rank's addend looks like the sum.
    made = [whole, partial, whole, whole, partial, partial, whole]
    gradient = whole(0)
    if name != "wrapped-adamax":
        run(name, backend, distributed(value, Replicate()), replaced, (name, backend, "replica"), len(made))

    # A gradient that has its parameter's own spec, as FSDP2's has: what lies there is taken whatever becomes of that.
    p, q = torch.nn.Parameter(distributed(value, Shard(0))), torch.nn.Parameter(value.clone())
    ours, twin = MAKERS[name]([p], backend), MAKERS[name]([q], backend)
    for step in range(8):
        p.grad, q.grad = shard(step), whole_gradient(step)
        if step % 2:
            p.grad._spec = p._spec
        if step in (2, 5):
            p._local_tensor = p._local_tensor.clone()
        if step == 3:
            p._local_tensor.set_(p._local_tensor.clone())
        if step == 6:
            ours.state[p]["slow_param"]._local_tensor = ours.state[p]["slow_param"]._local_tensor.clone()
        ours.step()
        twin.step()
        same(ours, p, twin, q, (name, backend, "moved", step))

    # The shard is gone, or another tensor's: nothing is read there, and nothing written.
    if name != "wrapped-adamax":
        for what, spoil in {
            "freed": lambda p: p.grad._local_tensor.untyped_storage().resize_(0),
            "of other numbers": lambda p: setattr(p.grad, "_local_tensor", p.grad._local_tensor.double()),
            "of a row": lambda p: setattr(p.grad, "_local_tensor", torch.ones(1, 3)),
        }.items():
            p.grad = shard(9)
            spoil(p)
            before = bare(p).clone()
            refused((TypeError, ValueError), ("the gradient of parameter 0 of group 0",), (name, what), ours.step)
            assert torch.equal(bare(p), before)
"""

REFUSED = """
from torch.distributed.optim import ZeroRedundancyOptimizer

from torch.distributed.device_mesh import DeviceMesh

grid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))
turned = DeviceMesh("cpu", [1, 0])

def sharded():
    return distributed(value, Shard(0))

def on_turned():
    # Of the parameter's shape on each rank: the rows are these ranks' the other way round.
    shard = sharded()
    local, stride = shard._local_tensor, shard.stride()
    return DTensor.from_local(local, turned, [Shard(0)], run_check=False, shape=SHAPE, stride=stride)

REFUSALS = {
    "another mesh": (sharded, lambda: distribute_tensor(value, grid, [Shard(0), Replicate()]), ("mesh", f"got {grid}")),
    "the same ranks in another order": (sharded, on_turned, ("mesh",)),
    "a plain gradient": (sharded, lambda: value.clone(), ("must be a DTensor", "got a Tensor")),
    "a plain gradient of a replica": (
        lambda: distributed(value, Replicate()), lambda: value.clone(), ("must be a DTensor", "got a Tensor")
    ),
    "a plain parameter": (value.clone, lambda: distributed(value, Replicate()), ("a plain Tensor", "got a DTensor")),
}

for name, backend in CASES:
    if name == "wrapped-adamax":
        continue  # the base reads the gradient first
    for what, (parameter, gradient, words) in REFUSALS.items():
        params = [torch.nn.Parameter(sharded()), torch.nn.Parameter(parameter())]
        optimizer = MAKERS[name](params, backend)
        for steps in range(3):
            params[0].grad, params[1].grad = sharded(), gradient()
            before = [bare(p).clone() for p in params]
            states = [{key: bare(v).clone() for key, v in optimizer.state.get(p, {}).items()} for p in params]
            words = ("the gradient of parameter 1 of group 0", *words)
            refused((TypeError, ValueError), words, (name, backend, what, steps), optimizer.step)
            for p, old, own in zip(params, before, states, strict=True):
                assert torch.equal(bare(p), old), (name, what)
                assert optimizer.state.get(p, {}).keys() == own.keys(), (name, what)
                assert all(torch.equal(bare(optimizer.state[p][key]), v) for key, v in own.items()), (name, what)
            params[1].grad = torch.zeros_like(params[1])
            optimizer.step()

model = torch.nn.Linear(3, 2)
zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.1)
refused(TypeError, ("base_optimizer", "ZeroRedundancyOptimizer"), "ZeRO", lambda: Lookahead(zero))

class Own(ZeroRedundancyOptimizer):
    pass

own = Own(model.parameters(), torch.optim.AdamW, lr=0.1)
refused(TypeError, ("base_optimizer", "ZeroRedundancyOptimizer"), "its child", lambda: Lookahead(own))
"""


@pytest.mark.parametrize("script", ["PLACEMENTS", "ON_THEIR_WAY", "CLASSES", "CHANGED", "REFUSED"])
def test_two_ranks(script: str, tmp_path: Path) -> None:
    two_ranks(COMMON + globals()[script], tmp_path)
