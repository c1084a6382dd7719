"""Whether replays of a captured step are that many steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.gpu import bits
from bench.gpu.bits import Case
from bench.gpu.results import Results

# A rule and a policy of each kind, and a master.
CASES = (
    Case("adamw", "fp32", "lookahead"),
    Case("sgd", "fp32", "outer"),
    Case("adam", "bf16-master", "pullback"),
    Case("adamw", "fp32", "ema"),
    Case("adamw", "fp32", "schedule-free"),
    Case("radam", "bf16", "lookahead"),
    Case("lion", "fp64", "gpa"),
)
REPLAYS = 12

# Takes a step, and gives back what replays it.
Capture = Callable[[Callable[[], object]], Callable[[], object]]


def on_gpu(step: Callable[[], object]) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def as_it_is(step: Callable[[], object]) -> Callable[[], object]:
    """Where there are no graphs: only to see the comparison work."""
    return step


def steps(case: Case, backend: str, device: str, capture: Capture) -> dict[str, Tensor]:
    """One step, then replays of a second, each with other gradients in the same memory; an eager step among them."""
    params = bits.parameters(bits.DTYPES[case.dtype][0], device)
    optimizer = bits.optimizer(case, params, backend)
    bits.set_gradients(params, 0)
    optimizer.step()
    replay = capture(optimizer.step)
    for t in range(REPLAYS):
        for p, value in zip(params, bits.drawn(1 + t, params[0].dtype), strict=True):
            assert p.grad is not None
            p.grad.copy_(value)
        replay()
        if t == REPLAYS // 2:
            optimizer.step()
    return bits.contents(params, optimizer)


def compare(cases: Sequence[Case], backend: str, device: str, capture: Capture, results: Results) -> bool:
    """Whether all cases have the bits of eager steps of the same backend."""
    equal = tried = 0
    for case in cases:
        if not results.has_time_for(str(case)):
            continue
        tried += 1
        try:
            replayed = steps(case, backend, device, capture)
            found = bits.difference(replayed, steps(case, backend, device, as_it_is))
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        equal += not found
        results.add(f"{REPLAYS} replays of {case}: {found or 'equal'}", case=str(case), difference=found)
    results.close(f"{equal} of {tried} captured steps of {backend} replay as eager ones")
    return 0 < tried == equal
