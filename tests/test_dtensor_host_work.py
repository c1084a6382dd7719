"""What a step over DTensors costs the host beyond one over plain tensors: no work of Python's for each, and no memory
that grows from step to step."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from processes import in_fork, needs_cpu_backend, needs_gloo
from releases import needs_torch

pytestmark = [needs_gloo, needs_cpu_backend]

compares_placements = needs_torch("2.13", "placements that are compared by no function of Python's")

PRELUDE = """
import gc, json, sys, tracemalloc
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from host_work import Stepped, bytecodes
from lookahead_fused import EMA, Lookahead, LookaheadAdamW, LookaheadSGD

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))

def sharded(value):
    return distribute_tensor(value, mesh, [Shard(0)])

def parameters(count):
    params = [torch.nn.Parameter(sharded(torch.randn(3))) for _ in range(count)]
    for p in params:
        p.grad = sharded(torch.randn(3))
    return params

MAKERS = {
    "adamw": lambda ps: LookaheadAdamW(ps, k=2, pullback_momentum="pullback"),
    "sgd": lambda ps: LookaheadSGD(ps, lr=0.1, momentum=0.9, k=2),
    "wrapped": lambda ps: Lookahead(torch.optim.AdamW(ps), k=2),
    "ema": lambda ps: EMA(torch.optim.AdamW(ps)),
}
"""

# How the gradients of a step come. FSDP2 makes new ones, each with its parameter's own spec.
GRADIENTS = {
    "the same": "lambda params: None",
    "new, of equal placements": "lambda params: [setattr(p, 'grad', sharded(torch.ones(3))) for p in params]",
    "new, of their parameters' specs": (
        "lambda params: [setattr(p, 'grad', DTensor(torch.ones(3), p._spec, requires_grad=False)) for p in params]"
    ),
    "on and off": "lambda params: [setattr(p, 'grad', None if p.grad is not None else sharded(torch.ones(3))) "
    "for p in params]",
}

COUNTED = """
found = {}
for name, make in MAKERS.items():
    for call in ("step", "sync"):
        if not hasattr(make(parameters(1)), call):
            continue
        counts = []
        for count in (1, 100):
            params = parameters(count)
            optimizer = make(params)
            optimizer.step()
            stepped = Stepped(params, getattr(optimizer, call), lambda params=params: renew(params))
            calls = 0
            def count_calls(frame, event, argument):
                global calls
                calls += event in ("call", "c_call")
            ran = bytecodes(stepped)
            stepped.before()
            sys.setprofile(count_calls)
            stepped.step()
            sys.setprofile(None)
            counts.append((ran, calls))
        found[f"{name}, {call}"] = counts
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    "gradients",
    [pytest.param(name, marks=compares_placements) if "sharded" in how else name for name, how in GRADIENTS.items()],
)
def test_python_does_the_same_for_any_number_of_dtensors(gradients: str) -> None:
    found: Any = in_fork(f"{PRELUDE}\nrenew = {GRADIENTS[gradients]}\n{COUNTED}")
    assert len(found) == 7
    for what, (one, many) in found.items():
        assert one == many, (what, one, many)
        assert one[0] > 0, what


GROWN = """
found = {}
for name, make in MAKERS.items():
    params = parameters(4)
    optimizer = make(params)
    def steps(count):
        for _ in range(count):
            renew(params)
            optimizer.step()
    steps(100)
    gc.collect()
    objects = len(gc.get_objects())
    tracemalloc.start()
    steps(100)
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    steps(10_000)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    found[name] = len(gc.get_objects()) - objects, grown
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 keeps frames of functions that have returned")
@pytest.mark.parametrize("gradients", ["the same", "new, of equal placements"])
def test_nothing_grows_in_ten_thousand_steps(gradients: str) -> None:
    found: Any = in_fork(f"{PRELUDE}\nrenew = {GRADIENTS[gradients]}\n{GROWN}")
    for name, (objects, grown) in found.items():
        # One a step would be ten thousand; tracemalloc itself keeps some.
        assert objects < 10, (name, objects)
        assert grown < 4096, (name, grown)
