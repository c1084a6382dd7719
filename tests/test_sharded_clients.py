"""What shards a model and steps it: tensor and sequence parallel, FSDP2 on the CPU and in two dimensions, accumulated
and recomputed gradients, steps in the backward pass, checkpoints onto another number of ranks.

A run beside it that has everything in one place gets the gradients that the shards have; the weights are then the same
to the bit.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BackendCase, same_tensor_bits, seeded
from processes import needs_gloo, on_ranks, two_ranks
from releases import needs_torch
from test_distributed import TWO
from torch.utils.checkpoint import checkpoint

from lookahead_fused import EMA, Lookahead, LookaheadAdamW

BESIDE = (
    TWO
    + """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from lookahead_fused import EMA

CLASSES["ema"] = lambda ps: EMA(torch.optim.AdamW(ps, lr=0.1), 0.7, every=2)
# All models here are in fp32.
del CLASSES["bf16-master"]

def gather_gradients(ours, plain):
    for p, q in zip(ours, plain, strict=True):
        q.grad = None if p.grad is None else whole(p.grad).clone()

def evaluated_alike(optimizer, twin, ours, plain, what):
    with optimizer.slow_weights(), twin.slow_weights():
        same(ours, plain, f"{what}, slow")

def run(model, extra, what, steps=7):
    for name, make in CLASSES.items():
        module, loose = model(), [torch.nn.Parameter(t.clone()) for t in extra]
        ours = [*module.parameters(), *loose]
        plain = [torch.nn.Parameter(whole(p.detach()).clone()) for p in ours]
        optimizer, twin = make(ours), make(plain)
        for step in range(steps):
            optimizer.zero_grad()
            module(batch(module, step)).square().sum().backward()
            for p in loose:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            gather_gradients(ours, plain)
            optimizer.step()
            twin.step()
        same(ours, plain, f"{what}, {name}")
        same_state(optimizer, twin, f"{what}, {name}")
        # A shard's state is a shard.
        for p in ours:
            for key, value in optimizer.state[p].items():
                assert value.dim() == 0 or isinstance(value, DTensor) == isinstance(p, DTensor), (what, name, key)
        evaluated_alike(optimizer, twin, ours, plain, f"{what}, {name}")
        same(ours, plain, f"{what}, {name}, after that")
    return optimizer
"""
)

# Neither 5 rows nor 3 divide by two, and one rank has nothing of the last.
OFFLOADED = """
mesh = init_device_mesh("cpu", (2,))

def model():
    made = make_model("fp32")
    for layer in made[::2]:
        fully_shard(layer, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    return fully_shard(made, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))

run(model, [torch.ones(3)], "CPUOffloadPolicy")
"""

PARALLEL = """
from torch.distributed.tensor.parallel import (
    ColwiseParallel, PrepareModuleInput, RowwiseParallel, SequenceParallel, parallelize_module)
from torch.distributed.tensor import Replicate

mesh = init_device_mesh("cpu", (2,))

def tensor_parallel():
    torch.manual_seed(0)
    made = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3), torch.nn.Linear(3, 1))
    return parallelize_module(made, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})

def sequence_parallel():
    torch.manual_seed(0)
    # Six rows are the sequence: the norm's weights are replicated, and their gradients partial.
    made = torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 4))
    plan = {
        "0": SequenceParallel(sequence_dim=0),
        "1": ColwiseParallel(input_layouts=Shard(0)),
        "3": RowwiseParallel(output_layouts=Replicate()),
    }
    return parallelize_module(made, mesh, plan)

# The last layer of the first stays plain among DTensors.
run(tensor_parallel, [torch.ones(3)], "tensor parallel")
run(sequence_parallel, [], "sequence parallel")
"""

# Slow weights in pinned host memory, of shards and of workers that train apart.
HOSTED = """
from pinned_host import pinned_host

mesh = init_device_mesh("cpu", (2,))

def model():
    made = make_model("fp32")
    for layer in made[::2]:
        fully_shard(layer, mesh=mesh)
    return fully_shard(made, mesh=mesh)

ON_HOST = ("slow_param", "outer_momentum_buffer")
CLASSES = {
    "adamw": lambda ps, **own: LookaheadAdamW(ps, lr=0.1, k=2, outer_momentum=0.5, **own),
    "int8": lambda ps, **own: LookaheadAdamW(
        ps, lr=0.1, k=2, pullback_momentum="pullback", state_dtype="int8", **own),
    "generic": lambda ps, **own: Lookahead(torch.optim.Adamax(ps, lr=0.1), k=2, **own),
    "ema": lambda ps, **own: EMA(torch.optim.AdamW(ps, lr=0.1), 0.7, every=2, **own),
}

def local(t):
    return t._local_tensor if isinstance(t, DTensor) else t

with pinned_host() as host:
    def assert_placed(optimizer, what):
        for own in optimizer.state.values():
            for name, value in own.items():
                t = local(value)
                assert t.numel() == 0 or host.has(t) == (name in ON_HOST), (what, name)

    hosted = {name: lambda ps, make=make: make(ps, offload_slow=True) for name, make in CLASSES.items()}
    for name, make in CLASSES.items():
        ours, plain = model(), model()
        optimizer, twin = hosted[name](ours.parameters()), make(plain.parameters())
        for m, o in ((ours, optimizer), (plain, twin)):
            train(m, o, range(5))
        assert_placed(optimizer, name)
        evaluated_alike(optimizer, twin, list(ours.parameters()), list(plain.parameters()), name)
        saved = copy.deepcopy(dcp.get_optimizer_state_dict(ours, optimizer))
        dcp.set_optimizer_state_dict(ours, optimizer, saved)
        for m, o in ((ours, optimizer), (plain, twin)):
            train(m, o, range(5, 8))
        assert_placed(optimizer, f"{name}, loaded")
        same(ours.parameters(), plain.parameters(), name)
        for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
            for key, value in twin.state[q].items():
                assert type(value) is type(optimizer.state[p][key]), (name, key)
                assert torch.equal(local(value), local(optimizer.state[p][key])), (name, key)

    for moments in ("float32", "int8"):
        ours, plain, what = make_model("fp32"), make_model("fp32"), f"workers, {moments}"
        together = {"process_group": dist.group.WORLD, "outer_momentum": 0.5, "k": 2, "lr": 0.1, "state_dtype": moments}
        optimizer = LookaheadAdamW(ours.parameters(), offload_slow=True, **together)
        twin = LookaheadAdamW(plain.parameters(), **together)
        for m, o in ((ours, optimizer), (plain, twin)):
            train(m, o, range(5), of=rank)
            o.sync()
        assert_placed(optimizer, what)
        same(ours.parameters(), plain.parameters(), what)
        same_state(optimizer, twin, what)
        for p in ours.parameters():
            both = [torch.empty_like(p) for _ in range(2)]
            dist.all_gather(both, p.detach())
            same(both[:1], both[1:], f"{what}, on both ranks")
"""

# Two dimensions, a layer that is sharded in one of them alone, and a plain tensor: three kinds in one optimizer.
MESHES = """
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from releases import is_torch

if not is_torch("2.13"):
    # Before, what torch's own Adamax has computed of such shards does not know their order.
    del CLASSES["generic"]

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

def model():
    torch.manual_seed(0)
    made = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4), torch.nn.Linear(4, 5))
    parallelize_module(made, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for layer in (made[0], made[2]):
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(made, mesh=mesh["dp"])
    kinds = {(p.device_mesh.ndim, len(p.placements)) for p in made.parameters()}
    assert kinds == {(2, 2), (1, 1)}, kinds
    return made

run(model, [torch.ones(3)], "two meshes")

def replicated():
    # Shards that two ranks have alike, uneven ones and empty ones too.
    made = make_model("fp32")
    for layer in made[::2]:
        fully_shard(layer, mesh=mesh)
    return fully_shard(made, mesh=mesh)

run(replicated, [], "replicated shards")
"""

ACCUMULATED = """
from torch.nn.parallel import DistributedDataParallel

for name, make in CLASSES.items():
    model, plain = DistributedDataParallel(make_model("fp32")), make_model("fp32")
    optimizer, twin = make(model.parameters()), make(plain.parameters())
    for step in range(7):
        optimizer.zero_grad()
        with model.no_sync():
            model(batch(model, 2 * step, of=rank)).square().mean().backward()
        model(batch(model, 2 * step + 1, of=rank)).square().mean().backward()
        gather_gradients(model.parameters(), plain.parameters())
        optimizer.step()
        twin.step()
    same(model.parameters(), plain.parameters(), name)
    for p in model.parameters():
        both = [torch.empty_like(p) for _ in range(2)]
        dist.all_gather(both, p.detach().contiguous())
        same(both[:1], both[1:], f"{name}, on both ranks")
"""


@needs_gloo
@needs_torch("2.9", "FSDP2 on a CPU")
@pytest.mark.parametrize("script", ["OFFLOADED", "PARALLEL", "HOSTED", "ACCUMULATED"])
def test_two_ranks(script: str, tmp_path: Path) -> None:
    two_ranks(BESIDE + globals()[script], tmp_path)


@needs_gloo
@needs_torch("2.9", "FSDP2 on a CPU")
def test_shards_of_two_meshes(tmp_path: Path) -> None:
    on_ranks(4, BESIDE + MESHES, tmp_path)


# ------------------------------------------------------------------------------------------------------------
# onto another number of ranks, amid a window of k = 5

CUT, END = 7, 12

SHARDED = f"""
import torch.distributed.checkpoint as files
CUT, END = {CUT}, {END}
OPTIONS = {{
    "nested": dcp.StateDictOptions(),
    "flat": dcp.StateDictOptions(flatten_optimizer_state_dict=True),
    "whole": dcp.StateDictOptions(full_state_dict=True, cpu_offload=True),
}}
mesh = init_device_mesh("cpu", (size,))

# In bf16 here, and so of its own among those of BESIDE.
CLASSES["bf16-master"] = lambda ps: LookaheadAdamW(ps, lr=0.1, k=5, master_weights=True)

def sharded(name, seed=0):
    model = make_model(name, seed)
    for layer in model[::2]:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)

def both(model, optimizer, options):
    return {{
        "model": dcp.get_model_state_dict(model, options=options),
        "optimizer": dcp.get_optimizer_state_dict(model, optimizer, options=options),
    }}

def together(model, optimizer, plain, twin, steps):
    for step in steps:
        optimizer.zero_grad()
        model(batch(model, step)).square().sum().backward()
        gather_gradients(model.parameters(), plain.parameters())
        optimizer.step()
        twin.step()

def put(model, optimizer, state, options):
    dcp.set_model_state_dict(model, state["model"], options=options)
    dcp.set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
"""

SAVE = """
for name, make in CLASSES.items():
    model = sharded(name)
    optimizer = make(model.parameters())
    train(model, optimizer, range(CUT))
    for kind, options in OPTIONS.items():
        state = both(model, optimizer, options)
        at = os.path.join(place, f"{name}-{kind}")
        if kind == "whole":
            # Of a whole dict rank 0 has everything, and the others nothing.
            assert bool(state["optimizer"]) == (rank == 0), (name, rank)
            if rank == 0:
                assert not any(isinstance(t, DTensor) for own in state["optimizer"]["state"].values()
                               for t in own.values()), name
                torch.save(state, at)
        else:
            files.save(state, checkpoint_id=at)
"""

LOAD = """
for name, make in CLASSES.items():
    for kind, options in OPTIONS.items():
        model, plain = sharded(name, seed=1), make_model(name)
        optimizer, twin = make(model.parameters()), make(plain.parameters())
        at = os.path.join(os.path.dirname(place), "saved", f"{name}-{kind}")
        train(plain, twin, range(CUT))
        if kind == "whole":
            state = torch.load(at, weights_only=True) if rank == 0 else {"model": {}, "optimizer": {}}
            options = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        else:
            state = both(model, optimizer, options)
            files.load(state, checkpoint_id=at)
        put(model, optimizer, state, options)
        same(model.parameters(), plain.parameters(), f"{name}, {kind}, loaded")
        same_state(optimizer, twin, f"{name}, {kind}, loaded")
        together(model, optimizer, plain, twin, range(CUT, END))
        same(model.parameters(), plain.parameters(), f"{name}, {kind}")
        same_state(optimizer, twin, f"{name}, {kind}")
        evaluated_alike(optimizer, twin, list(model.parameters()), list(plain.parameters()), f"{name}, {kind}")
"""


@needs_gloo
@needs_torch("2.9", "FSDP2 on a CPU")
@pytest.mark.filterwarnings("ignore")
def test_another_number_of_ranks(tmp_path: Path) -> None:
    """Saved by two between two syncs, in each form that torch has for it; gone on with by three and by one."""
    for size, script in ((2, SAVE), (3, LOAD), (1, LOAD)):
        place = tmp_path / ("saved" if script is SAVE else f"of{size}")
        place.mkdir()
        on_ranks(size, BESIDE + SHARDED + script, place)


# Files that each rank wrote for itself. Of 5 rows the second of two ranks has as many as the second of three, of 3 too,
# and of one as many as any but the first: by their shapes alone it could not tell that they are others.
OWN_FILES = """
import warnings
warnings.filterwarnings("ignore")

def own_file(name, of):
    return os.path.join(os.path.dirname(place), f"{name}-{of}")

def assert_refused(optimizer, params, saved, what):
    def told():
        state = (v for own in optimizer.state.values() for v in own.values())
        return [(t.to_local() if isinstance(t, DTensor) else t).detach().clone() for t in (*params, *state)]
    before = told()
    for door in (optimizer, getattr(optimizer, "base_optimizer", optimizer)):
        try:
            door.load_state_dict(saved)
        except ValueError as error:
            message = str(error)
        else:
            raise AssertionError(f"{what}: loaded on rank {rank} of {size}")
        assert "must be placed as the parameter is" in message, message
        assert f"at ({rank},) of ({size},) ranks, got" in message, message
        assert "torch.distributed.checkpoint loads" in message, message
        for x, y in zip(before, told(), strict=True):
            assert torch.equal(x, y), what
"""

OWN_SAVE = """
for name, make in CLASSES.items():
    model, plain = sharded(name), make_model(name)
    optimizer, twin = make(model.parameters()), make(plain.parameters())
    for m, o in ((model, optimizer), (plain, twin)):
        train(m, o, range(CUT))
    torch.save(optimizer.state_dict(), own_file(name, rank))
    dist.barrier()
    # On its own rank a file resumes; on another it is refused.
    again = sharded(name, seed=1)
    with torch.no_grad():
        for p, q in zip(again.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    resumed = make(again.parameters())
    resumed.load_state_dict(torch.load(own_file(name, rank), weights_only=False))
    for m, o in ((again, resumed), (plain, twin)):
        train(m, o, range(CUT, END))
    same(again.parameters(), plain.parameters(), name)
    same_state(resumed, twin, name)
    other = torch.load(own_file(name, 1 - rank), weights_only=False)
    assert_refused(resumed, list(again.parameters()), other, name)
"""

OWN_LOAD = """
for name, make in CLASSES.items():
    model, plain = sharded(name), make_model(name)
    optimizer, twin = make(model.parameters()), make(plain.parameters())
    together(model, optimizer, plain, twin, range(1))
    for of in range(2):
        saved = torch.load(own_file(name, of), weights_only=False)
        assert_refused(optimizer, list(model.parameters()), saved, f"{name}, from rank {of}")
        fresh = sharded(name)
        assert_refused(make(fresh.parameters()), list(fresh.parameters()), saved, f"{name}, from rank {of}, no state")
    # Nothing of it is left.
    together(model, optimizer, plain, twin, range(1, 7))
    same(model.parameters(), plain.parameters(), name)
    same_state(optimizer, twin, name)
"""


@needs_gloo
@needs_torch("2.9", "FSDP2 on a CPU")
@pytest.mark.filterwarnings("ignore")
def test_files_of_another_number_of_ranks_are_refused(tmp_path: Path) -> None:
    """What `torch.save` wrote on each of two ranks, on three and on one: before anything changed, and by every rank."""
    for size, script in ((2, OWN_SAVE), (3, OWN_LOAD), (1, OWN_LOAD)):
        place = tmp_path / str(size)
        place.mkdir()
        on_ranks(size, BESIDE + SHARDED + OWN_FILES + script, place)


# ------------------------------------------------------------------------------------------------------------
# one process

FORMS: dict[str, Any] = {
    "adamw": lambda ps, b: LookaheadAdamW(ps, lr=0.1, k=3, pullback_momentum="pullback", backend=b.name),
    "wrapped": lambda ps, b: Lookahead(torch.optim.SGD(ps, lr=0.1, momentum=0.9), k=3, backend=b.name),
    "external": lambda ps, b: Lookahead(torch.optim.Adamax(ps, lr=0.1), k=3, backend=b.name),
    "ema": lambda ps, b: EMA(torch.optim.AdamW(ps, lr=0.1), 0.7, backend=b.name),
}
forms = pytest.mark.parametrize("form", FORMS)


def make_model(device: str) -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = (torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3), torch.nn.Linear(3, 1))
    return torch.nn.Sequential(*layers).to(device)


def batch(step: int, device: str) -> torch.Tensor:
    return torch.randn(6, 4, generator=seeded(step)).to(device)


def assert_alike(optimizer: Any, twin: Any, model: torch.nn.Module, plain: torch.nn.Module) -> None:
    for o in ("training", "slow"):
        with contextlib.ExitStack() as stack:
            if o == "slow":
                for each in (optimizer, twin):
                    stack.enter_context(each.slow_weights())
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                assert same_tensor_bits(p, q), o


@forms
def test_recomputed_activations(backend: BackendCase, form: str) -> None:
    """Activation checkpointing runs the forward pass again within the backward one."""
    model, plain = make_model(backend.device), make_model(backend.device)
    optimizer, twin = (FORMS[form](m.parameters(), backend) for m in (model, plain))
    for step in range(7):
        x = batch(step, backend.device)
        for o in (optimizer, twin):
            o.zero_grad()
        hidden = checkpoint(model[:2], x, use_reentrant=False)
        checkpoint(model[2:], hidden, use_reentrant=False).square().mean().backward()
        plain(x).square().mean().backward()
        optimizer.step()
        twin.step()
    assert_alike(optimizer, twin, model, plain)


@forms
def test_accumulated_gradients(backend: BackendCase, form: str) -> None:
    """Three backward passes a step: the sum of what each of them gives, in their order."""
    model, plain = make_model(backend.device), make_model(backend.device)
    optimizer, twin = (FORMS[form](m.parameters(), backend) for m in (model, plain))
    for step in range(7):
        optimizer.zero_grad()
        sums: list[torch.Tensor] | None = None
        for part in range(3):
            x = batch(3 * step + part, backend.device)
            model(x).square().mean().backward()
            grads = torch.autograd.grad(plain(x).square().mean(), list(plain.parameters()))
            sums = list(grads) if sums is None else [a + b for a, b in zip(sums, grads, strict=True)]
        assert sums is not None
        for q, g in zip(plain.parameters(), sums, strict=True):
            q.grad = g
        optimizer.step()
        twin.step()
    assert_alike(optimizer, twin, model, plain)


@forms
def test_steps_in_the_backward_pass(backend: BackendCase, form: str) -> None:
    """An optimizer for each parameter, stepped as soon as its gradient is there, which is free right after that."""
    model, plain = make_model(backend.device), make_model(backend.device)
    twin = FORMS[form](plain.parameters(), backend)
    each = {p: FORMS[form]([p], backend) for p in model.parameters()}

    def step_now(p: torch.Tensor) -> None:
        each[p].step()
        each[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step_now)
    for step in range(7):
        x = batch(step, backend.device)
        model(x).square().mean().backward()
        assert all(p.grad is None for p in model.parameters())
        twin.zero_grad()
        plain(x).square().mean().backward()
        twin.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert same_tensor_bits(p, q)
        own, other = each[p].state[p], twin.state[q]
        assert own.keys() == other.keys()
        assert all(same_tensor_bits(own[name], other[name]) for name in own)
