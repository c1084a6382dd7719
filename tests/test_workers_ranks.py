"""`process_group` over processes: two and four workers beside one that does it all by hand. No network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import needs_gloo, on_ranks
from releases import needs_torch

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch was built without torch.distributed"
)

COMMON = """
import io
from helpers import assert_unchanged, snapshot
from lookahead_fused import Lookahead, LookaheadAdamW, LookaheadSGD, _workers
from lookahead_fused import _masters as masters

WORLD, K = dist.group.WORLD, 3
SHAPES = ((7,), (3, 5), (), (0,), (3000,))

class Own(torch.optim.AdamW):
    "A base whose step is its own, and which looks at found_inf itself."

CASES = {
    "adamw": (torch.float32, lambda ps, **at: LookaheadAdamW(
        ps, lr=0.1, alpha=0.3, pullback_momentum="pullback", **at)),
    "sgd": (torch.float64, lambda ps, **at: LookaheadSGD(
        ps, lr=0.05, momentum=0.9, alpha=0.7, outer_momentum=0.5, pullback_momentum="reset", **at)),
    "bf16": (torch.bfloat16, lambda ps, **at: LookaheadSGD(ps, lr=0.05, **at)),
    "bf16-master": (torch.bfloat16, lambda ps, **at: LookaheadSGD(ps, lr=0.05, master_weights=True, **at)),
    "bfloat16": (torch.bfloat16, lambda ps, **at: Lookahead(
        torch.optim.SGD(ps, lr=0.05, momentum=0.9), master_weights=True, state_dtype="bfloat16", **at)),
    "int8": (torch.float32, lambda ps, **at: LookaheadAdamW(
        ps, lr=0.1, alpha=0.3, pullback_momentum="pullback", state_dtype="int8", **at)),
    "wrapped": (torch.float32, lambda ps, **at: Lookahead(
        torch.optim.AdamW(ps, lr=0.1), alpha=1.2, outer_momentum=0.6, outer_nesterov=False, **at)),
    "unfused": (torch.float32, lambda ps, **at: Lookahead(
        torch.optim.NAdam(ps, lr=0.1), pullback_momentum="pullback", **at)),
    "unfused-amp": (torch.float32, lambda ps, **at: Lookahead(Own(ps, lr=0.1, fused=True), **at)),
}

def make_params(dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]

def gradient(p, t, i, worker):
    # Parameter 1 misses a step, and its phase differs from then on.
    if (t, i) == (1, 1):
        return None
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * worker + 10 * t + i)).to(p.dtype)

def theta(optimizer, p):
    return masters.read(p.detach(), optimizer.state[p].get("master_low"))

def same(a, b, what, exact=True, rtol=1e-5):
    a, b = a.detach(), b.detach()
    assert a.dtype == b.dtype
    if exact:
        assert torch.equal(a, b), f"{what}: {a} and {b}"
    else:
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol, msg=lambda m: f"{what}: {m}")

def same_state(optimizer, params, twins, twin_params, what, exact):
    # Where a sum in another order rounds a weight to the next one of 16 bits.
    rtol = 2**-6 if params[0].dtype == torch.bfloat16 else 1e-5
    for i, (p, q, twin) in enumerate(zip(params, twin_params, twins, strict=True)):
        same(p, q, f"{what}, parameter {i}", exact, rtol)
        own, other = optimizer.state[p], twin.state[q]
        assert own.keys() == other.keys(), what
        same(theta(optimizer, p), theta(twin, q), f"{what}, theta of {i}", exact, rtol)
        for key in own.keys() - {"master_low"}:
            same(torch.as_tensor(own[key]), torch.as_tensor(other[key]), f"{what}, {key} of {i}", exact, rtol)
"""

# The same by hand in every process: all workers' copies, one optimizer for each parameter, which never syncs by itself.
BY_HAND = """
def by_hand(make, dtype, steps, skipped=()):
    copies = [make_params(dtype) for _ in range(size)]
    twins = [[make([p], k=2**53) for p in params] for params in copies]
    for t in range(steps):
        if t in skipped:
            continue
        for worker, params in enumerate(copies):
            for i, p in enumerate(params):
                p.grad = gradient(p, t, i, worker)
                if p.grad is not None:
                    twins[worker][i].step()
        for i in range(len(SHAPES)):
            name = "lookahead_step" if "lookahead_step" in twins[0][i].state[copies[0][i]] else "step"
            updates = twins[0][i].state[copies[0][i]][name]
            if copies[0][i].grad is None or updates % K != 0:
                continue
            with torch.no_grad():
                thetas = [theta(optimizers[i], params[i]) for optimizers, params in zip(twins, copies)]
                total = thetas[0].to(torch.float64 if dtype == torch.float64 else torch.float32, copy=True)
                for other in thetas[1:]:
                    total += other
                for optimizers, params in zip(twins, copies):
                    low = optimizers[i].state[params[i]].get("master_low")
                    masters.write(total / size, params[i], low)
            for optimizers in twins:
                optimizers[i].sync()
    return twins[rank], copies[rank]
"""

RUNS = """
_workers.BUCKET_BYTES = 4096
# Of more than two: a mean, one of 16 bits, and a step that one of them skips.
for name in CASES if size == 2 else ("adamw", "bf16-master", "unfused-amp"):
    dtype, make = CASES[name]
    params = make_params(dtype)
    optimizer = make(params, k=K, process_group=WORLD)
    amp = getattr(optimizer, "_step_supports_amp_scaling", False)
    # A sync is due here, had the step not been skipped; one rank alone overflows.
    skipped = (5,) if amp else ()
    for t in range(11):
        for i, p in enumerate(params):
            p.grad = gradient(p, t, i, rank)
        if amp:
            optimizer.grad_scale = torch.tensor(1.0)
            optimizer.found_inf = torch.tensor(float(t in skipped and rank == 1))
        before = snapshot(optimizer)
        optimizer.step()
        if t in skipped:
            assert_unchanged(before, snapshot(optimizer))
        if t == 7:
            # Every rank resumes from a file of its own, in the middle of a window.
            file = io.BytesIO()
            torch.save((params, optimizer.state_dict()), file)
            file.seek(0)
            saved, state = torch.load(file, weights_only=True)
            params = [torch.nn.Parameter(p.detach().clone()) for p in saved]
            optimizer = make(params, k=K, process_group=WORLD)
            optimizer.load_state_dict(state)
    twins, twin_params = by_hand(make, dtype, 11, skipped)
    same_state(optimizer, params, twins, twin_params, name, exact=size == 2)
    assert any(not torch.equal(p, optimizer.state[p]["slow_param"]) for p in params), name
    for i, p in enumerate(params):
        # The moments are each worker's own; phi and its momentum are everybody's, whatever the order of a sum.
        for key in ("slow_param", "outer_momentum_buffer", "exp_avg", "momentum_buffer"):
            if not isinstance(optimizer.state[p].get(key), torch.Tensor) or p.numel() < 2:
                continue
            mine = optimizer.state[p][key].detach().contiguous()
            if not mine.any():
                # A moment that was just reset.
                continue
            all_of_them = [torch.empty_like(mine) for _ in range(size)]
            dist.all_gather(all_of_them, mine)
            equal = all(torch.equal(other, mine) for other in all_of_them)
            assert equal == (key in ("slow_param", "outer_momentum_buffer")), (name, i, key)
    optimizer.sync()
    for p in params:
        all_of_them = [torch.empty_like(p.data) for _ in range(size)]
        dist.all_gather(all_of_them, p.data.contiguous())
        assert all(torch.equal(other, p) for other in all_of_them), name
"""

# DiLoCo as it is written down: mean, outer momentum, the outer step; mu and alpha are exact in fp32.
DILOCO = """
params = [torch.nn.Parameter(torch.linspace(-1, 1, 9))]
optimizer = LookaheadSGD(params, lr=0.125, k=2, alpha=0.75, outer_momentum=0.5, process_group=WORLD)
workers = [torch.linspace(-1, 1, 9) for _ in range(size)]
phi, b = workers[0].clone(), torch.zeros(9)
for t in range(6):
    params[0].grad = gradient(params[0], t, 0, rank)
    optimizer.step()
    workers = [theta - gradient(theta, t, 0, w) * 0.125 for w, theta in enumerate(workers)]
    if t % 2 == 1:
        s = phi - sum(workers[1:], workers[0]) / size
        b = b * 0.5 + s
        phi = phi - (s + b * 0.5) * 0.75
        workers = [phi] * size
    same(params[0], workers[rank], f"DiLoCo, step {t}", exact=size == 2)
"""

DIFFERENCES = """
def refused(optimizer, call, words):
    before = snapshot(optimizer)
    try:
        call()
    except RuntimeError as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"rank {rank} went on")
    assert_unchanged(before, snapshot(optimizer))

def fresh(shapes, has_gradient, **at):
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    for p, has in zip(params, has_gradient, strict=True):
        p.grad = torch.ones_like(p) if has else None
    return LookaheadSGD(params, lr=0.1, k=1, process_group=WORLD, **at)

first = rank == 0
# One worker has fewer; as many elements otherwise spread; other ones of the same sizes; another dtype of sums.
different = {
    "fewer": fresh([(4,), (3,)], [True, first]),
    "spread": fresh([(4,), (3,)] if first else [(3,), (4,)], [True, True]),
    "others": fresh([(4,), (4,)], [first, not first]),
}
for name, optimizer in different.items():
    refused(optimizer, optimizer.step, "must sync the same parameters")
if first:
    words = "got 2 of 7 elements on this worker, and on all of them from 1 to 2 of 4 to 7 elements"
else:
    words = "got 1 of 4 elements on this worker"
refused(different["fewer"], different["fewer"].step, words)
# Where found_inf is told, a worker in whose step nothing is due is told of one in whose step something is.
uneven = fresh([(4,)], [True])
uneven.param_groups[0]["k"] = 1 if first else 2
uneven.found_inf = torch.tensor(0.0)
refused(uneven, uneven.step, "must sync the same parameters")
# Steps were not the same: a sync finds one that had none.
late = fresh([(4,), (3,)], [True, first])
late.param_groups[0]["k"] = 100
late.step()
refused(late, late.sync, "must sync the same parameters")
"""

MISSING = """
params = make_params(torch.float32)
optimizer = LookaheadAdamW(params, lr=0.1, k=K, process_group=dist.new_group())

def set_gradients(t):
    for i, p in enumerate(params):
        p.grad = gradient(p, t, i, rank) if i != 1 else torch.ones_like(p)

def impatient(tensor, op, group):
    # Of the group's own time both would have to come within a second also where they share a core.
    options = dist.AllreduceOptions()
    options.reduceOp, options.timeout = op, datetime.timedelta(seconds=1)
    group.allreduce([tensor], options).wait()

for t in range(2):
    set_gradients(t)
    optimizer.step()
set_gradients(2)
if rank == 0:
    # Nobody else comes.
    patient, dist.all_reduce = dist.all_reduce, impatient
    before = snapshot(optimizer)
    try:
        optimizer.step()
    except RuntimeError:
        pass
    else:
        raise AssertionError("went on alone")
    assert_unchanged(before, snapshot(optimizer))
    dist.all_reduce = patient
# In a group that works, both make the step that was not made.
resumed = LookaheadAdamW(params, lr=0.1, k=K, process_group=WORLD)
resumed.load_state_dict(optimizer.state_dict())
resumed.step()
for p in params:
    found = [torch.empty_like(p.data) for _ in range(2)]
    dist.all_gather(found, p.data.contiguous())
    assert torch.equal(*found)
    assert resumed.state[p]["step"] == 3
"""


@needs_gloo
def test_two_workers_are_the_same_by_hand(tmp_path: Path) -> None:
    """To the bit, for every kind of optimizer: a mean of phi, of rounded masters, of some ranks, by a wrong size, or
    before the inner step gives others; so does a moment that is averaged too, a skip that one rank makes alone, and a
    phase lost in a checkpoint."""
    on_ranks(2, COMMON + BY_HAND + RUNS + DILOCO, tmp_path)


@needs_gloo
def test_four_workers_are_the_same_by_hand(tmp_path: Path) -> None:
    """In what order gloo adds four is its own business, but that all of them get one sum."""
    on_ranks(4, COMMON + BY_HAND + RUNS + DILOCO, tmp_path)


@needs_gloo
def test_workers_that_differ_are_all_told(tmp_path: Path) -> None:
    on_ranks(2, COMMON + DIFFERENCES, tmp_path)


@needs_gloo
@needs_torch("2.9", "gloo heed the time that an operation is given")
def test_a_missing_worker(tmp_path: Path) -> None:
    """gloo's own error after its time, a step that was not made, and a run that goes on from there."""
    on_ranks(2, COMMON + MISSING, tmp_path)
