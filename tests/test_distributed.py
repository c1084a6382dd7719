"""torch.distributed: its checkpoints, DDP, FSDP2's DTensors, ZeRO's sharded state. Two processes, no network."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BackendCase, assert_unchanged, make_optimizer, same_tensor_bits, seeded, snapshot
from processes import needs_gloo, two_ranks
from releases import needs_torch
from runs import assert_same_run

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch was built without torch.distributed"
)

RULES: dict[str, dict[str, Any]] = {
    "adamw": {"weight_decay": 0.1, "amsgrad": True, "pullback_momentum": "pullback"},
    "sgd": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    "wrapped-adamw": {"weight_decay": 0.1},
}


def make_model(backend: BackendCase, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    layers = (torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    return torch.nn.Sequential(*layers).to(backend.device)


def make(rule: str, model: torch.nn.Module, backend: BackendCase, lr: Any = 0.1) -> torch.optim.Optimizer:
    first, second = list(model[0].parameters()), list(model[2].parameters())
    groups = [{"params": first}, {"params": second, "weight_decay": 0.3}]
    return make_optimizer(rule, groups, backend, lr=lr, k=5, **RULES[rule])


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(6, 4, generator=seeded(step)).to(next(model.parameters()).device)
        model(x).square().sum().backward()
        optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_checkpoint(backend: BackendCase, rule: str, tensor_lr: bool, flat: bool) -> None:
    """torch.distributed.checkpoint makes a step with zero gradients and another learning rate, 0, to have a state
    it can load into: the weights stay to the bit, the learning rate is the old one again, and the run goes on
    between two syncs as if nothing had been."""
    from torch.distributed.checkpoint import state_dict as dcp

    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    lr = torch.tensor(0.1) if tensor_lr else 0.1
    model = make_model(backend)
    optimizer = make(rule, model, backend, lr=copy.copy(lr))
    train(model, optimizer, range(7))
    before = snapshot(optimizer)
    weights, saved = dcp.get_state_dict(model, optimizer, options=options)
    assert_unchanged(before, snapshot(optimizer))
    weights, saved = copy.deepcopy((weights, saved))

    resumed_model = make_model(backend, seed=1)
    resumed_model.load_state_dict(weights)
    own_lr = copy.copy(lr)
    resumed = make(rule, resumed_model, backend, lr=own_lr)
    dcp.get_optimizer_state_dict(resumed_model, resumed, options=options)
    assert all(resumed.state[p] for p in resumed_model.parameters())
    assert all(group["lr"] is own_lr for group in resumed.param_groups)
    for p, q in zip(model.parameters(), resumed_model.parameters(), strict=True):
        assert same_tensor_bits(p, q)
    resumed.state.clear()
    dcp.set_optimizer_state_dict(resumed_model, resumed, saved, options=options)
    for p, q in zip(model.parameters(), resumed_model.parameters(), strict=True):
        assert same_tensor_bits(p, q)
    assert_same_run(optimizer, resumed)
    for m, o in ((model, optimizer), (resumed_model, resumed)):
        train(m, o, range(7, 13))
    assert_same_run(optimizer, resumed)


@pytest.mark.parametrize("rule", RULES)
def test_checkpoint_of_torchs_class(backend: BackendCase, rule: str) -> None:
    """A distributed checkpoint of torch's optimizer: its moments, and phi where the weights are at the next step
    and not where they were at torch's trial step."""
    from torch.distributed.checkpoint import state_dict as dcp

    name = rule.removeprefix("wrapped-")
    hyper = {key: value for key, value in RULES[rule].items() if key != "pullback_momentum"}
    donor_model = make_model(backend)
    donor_class = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]
    donor = donor_class([{"params": list(layer.parameters())} for layer in donor_model[::2]], lr=0.1, **hyper)
    train(donor_model, donor, range(7))
    weights, saved = copy.deepcopy(dcp.get_state_dict(donor_model, donor))

    model = make_model(backend, seed=1)
    optimizer = make(rule, model, backend)
    dcp.set_optimizer_state_dict(model, optimizer, saved)
    model.load_state_dict(weights)
    theta = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, range(7, 8))
    moment = "exp_avg" if name == "adamw" else "momentum_buffer"
    for p, q, t in zip(model.parameters(), donor_model.parameters(), theta, strict=True):
        assert same_tensor_bits(optimizer.state[p]["slow_param"], t)
        assert not torch.equal(optimizer.state[p][moment], donor.state[q][moment])
    # The next update of torch's own, from the same moments.
    train(donor_model, donor, range(7, 8))
    for p, q in zip(model.parameters(), donor_model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(optimizer.state[p][moment], donor.state[q][moment])


# ------------------------------------------------------------------------------------------------------------
# two processes

TWO = """
import copy, gc
from torch.distributed.checkpoint import state_dict as dcp
from lookahead_fused import Lookahead, LookaheadAdamW, LookaheadSGD

CLASSES = {
    "adamw": lambda ps: LookaheadAdamW(ps, lr=0.1, k=5, pullback_momentum="pullback"),
    "wrapped": lambda ps: Lookahead(torch.optim.SGD(ps, lr=0.1, momentum=0.9), k=5),
    "generic": lambda ps: Lookahead(torch.optim.Adamax(ps, lr=0.1), k=5),
    "bf16-master": lambda ps: LookaheadAdamW(ps, lr=0.1, k=5, master_weights=True),
}

def make_model(name, seed=0):
    torch.manual_seed(seed)
    # Over two ranks neither 5 nor 3 rows divide, and one rank has nothing of the last.
    layers = torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3), torch.nn.Linear(3, 1)
    return torch.nn.Sequential(*layers).to(torch.bfloat16 if "bf16" in name else torch.float32)

def batch(model, step, of=0):
    given = torch.randn(6, 4, generator=torch.Generator().manual_seed(100 * of + step))
    return given.to(next(model.parameters()).dtype)

def train(model, optimizer, steps, of=0):
    for step in steps:
        optimizer.zero_grad()
        model(batch(model, step, of)).square().sum().backward()
        optimizer.step()
    optimizer.zero_grad()

def whole(tensor):
    # gloo sends no int16.
    tensor = tensor.to(torch.int32) if tensor.dtype == torch.int16 else tensor
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

def same(a, b, what):
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        x, y = whole(x.detach()), whole(y.detach())
        assert x.dtype == y.dtype and torch.equal(x, y), f"{what}, {i}: {x} and {y}"

def same_state(a, b, what):
    states = [list(o.state.values()) for o in (a, b)]
    for i, (x, y) in enumerate(zip(*states, strict=True)):
        assert list(x) == list(y), what
        same(x.values(), y.values(), f"{what}, {list(x)} of {i}")
"""

FSDP = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec

mesh = init_device_mesh("cpu", (2,))

def sharded(name, seed=0):
    model = make_model(name, seed)
    for layer in model[::2]:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)

for name, make in CLASSES.items():
    # Both ranks see the same batch: the mean of two equal gradients is that gradient, to the bit.
    model, plain = sharded(name), make_model(name)
    optimizer, twin = make(model.parameters()), make(plain.parameters())
    for m, o in ((model, optimizer), (plain, twin)):
        train(m, o, range(7))
    same(model.parameters(), plain.parameters(), name)
    same_state(optimizer, twin, name)
    for p in model.parameters():
        for key, value in optimizer.state[p].items():
            if value.dim():
                assert isinstance(value, DTensor) and value.placements == p.placements, (name, key)
                assert value.shape == p.shape and value._spec.tensor_meta.stride == p.stride(), (name, key)

    fast = [whole(p.detach()).clone() for p in model.parameters()]
    with optimizer.slow_weights(), twin.slow_weights(), torch.no_grad():
        same(model.parameters(), plain.parameters(), f"{name}, slow")
        same([model(batch(model, 0))], [plain(batch(plain, 0))], f"{name}, evaluated on the slow weights")
        # The root stays gathered after a forward pass: its parameters are not the optimizer's until this.
        model.reshard()
        inside = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer))
    same(model.parameters(), fast, f"{name}, fast again")
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer))
    for fqn, own in saved["state"].items():
        same(own.values(), inside["state"][fqn].values(), f"{name}, saved inside, {fqn}")

    resumed_model = sharded(name, seed=1)
    with torch.no_grad():
        for p, q in zip(resumed_model.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    resumed = make(resumed_model.parameters())
    dcp.set_optimizer_state_dict(resumed_model, resumed, saved)
    same_state(resumed, optimizer, f"{name}, loaded")
    for m, o in ((resumed_model, resumed), (model, optimizer), (plain, twin)):
        train(m, o, range(7, 12))
        o.sync()
    same(resumed_model.parameters(), plain.parameters(), f"{name}, resumed")
    same(model.parameters(), plain.parameters(), f"{name}, gone on")
    same_state(resumed, twin, f"{name}, resumed")

    # What a step makes of a DTensor it makes once: descriptions of it do not pile up.
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    counts = []
    for steps in (1, 3):
        for _ in range(steps):
            optimizer.step()
        gc.collect()
        counts.append(sum(isinstance(thing, DTensorSpec) for thing in gc.get_objects()))
    assert counts[0] == counts[1], (name, counts)
"""

DDP = """
from torch.nn.parallel import DistributedDataParallel

for name, make in CLASSES.items():
    model, plain = DistributedDataParallel(make_model(name)), make_model(name)
    optimizer, twin = make(model.parameters()), make(plain.parameters())
    for step in range(7):
        optimizer.zero_grad()
        model(batch(model, step, of=rank)).square().sum().backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        twin.step()
        same(model.parameters(), plain.parameters(), name)
    for p in model.parameters():
        both = [torch.empty_like(p) for _ in range(2)]
        dist.all_gather(both, p.detach().contiguous())
        same(both[:1], both[1:], f"{name}, on both ranks")
"""

ZERO = """
from torch.distributed.optim import ZeroRedundancyOptimizer

SHARDED = {
    "adamw": (LookaheadAdamW, {"lr": 0.1, "k": 5, "pullback_momentum": "pullback"}),
    "sgd": (LookaheadSGD, {"lr": 0.1, "momentum": 0.9, "k": 5}),
    "bf16-master": (LookaheadAdamW, {"lr": 0.1, "k": 5, "master_weights": True}),
}
for name, (cls, hyper) in SHARDED.items():
    model, plain = make_model(name), make_model(name)
    optimizer, twin = ZeroRedundancyOptimizer(model.parameters(), cls, **hyper), cls(plain.parameters(), **hyper)
    for m, o in ((model, optimizer), (plain, twin)):
        train(m, o, range(7))
    same(model.parameters(), plain.parameters(), name)
    assert 0 < len(optimizer.optim.state) < len(twin.state), name
    # Slow weights lie where the state is: a rank swaps its own share, and the others' stays as it was.
    share = {id(p) for group in optimizer.optim.param_groups for p in group["params"]}
    fast = [p.detach().clone() for p in plain.parameters()]
    with optimizer.optim.slow_weights(), twin.slow_weights():
        mixture = [q if id(p) in share else f for p, q, f in zip(model.parameters(), plain.parameters(), fast)]
        same(model.parameters(), mixture, f"{name}, on this rank's slow weights")
        assert any(not torch.equal(q, f) for q, f in zip(plain.parameters(), fast)), name
    same(model.parameters(), fast, f"{name}, after slow_weights()")
    optimizer.consolidate_state_dict(to=0)
    # Copied: torch's state dict and loading here alias what they are given.
    box = [copy.deepcopy(optimizer.state_dict()) if rank == 0 else None]
    dist.broadcast_object_list(box, src=0)
    resumed_model = make_model(name)
    with torch.no_grad():
        for p, q in zip(resumed_model.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    resumed = ZeroRedundancyOptimizer(resumed_model.parameters(), cls, **hyper)
    resumed.load_state_dict(box[0])
    for m, o in ((resumed_model, resumed), (model, optimizer), (plain, twin)):
        train(m, o, range(7, 12))
    same(model.parameters(), plain.parameters(), f"{name}, gone on")
    same(resumed_model.parameters(), plain.parameters(), f"{name}, resumed")
"""


@needs_gloo
@pytest.mark.parametrize(
    "wrapped",
    [
        pytest.param(FSDP, marks=needs_torch("2.9", "FSDP2 on a CPU"), id="FSDP2"),
        pytest.param(DDP + ZERO, id="DDP and ZeRO"),
    ],
)
def test_two_ranks(wrapped: str, tmp_path: Path) -> None:
    """On the CPU: the run of one process that holds everything, to the bit."""
    two_ranks(TWO + wrapped, tmp_path)
