"""The CPU benchmarks: every figure with its spread, its target and whether it is met.

    python bench/cpu.py [--only NAME ...] [--json FILE] [--rounds N] [--threads N] [--strict]

All sides of a benchmark live in one process and take turns; measure.py says how, and why only ratios count.
Gradients are the same tensors at every step, except where a benchmark is about what new ones cost.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

# Before torch is imported: its profiler, which only counts allocations here, is chatty on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import cases
import measure
import opponents
import torch
from ceiling import Ceiling, variants
from measure import Samples, Schedule, Side, Spread, interleave, ratio, slope, spread
from report import Figure, Report, scaled
from torch import nn

import lookahead_fused

OURS = "lookahead_fused"
SYNC = "torch fused + foreach sync"
PLAIN = "torch fused, no Lookahead"
K = opponents.K
# How gradients come: short in the names of sides, spelled out once in a report.
REUSED = "same gradients"
FRESH = "new gradients"
GRADIENTS = {
    REUSED: "the same gradient tensors at every step",
    FRESH: "new gradient tensors at every step",
}


def against(samples: Samples, of: str, to: str, target: float | None) -> Figure:
    """How many times faster one side is than another."""
    return Figure(f"{of} against {to}", ratio(samples, of, to), "x", target)


def gpt2_adamw(rounds: int | None) -> Report:
    """GPT-2 small's tensors, AdamW."""
    case = cases.CASES["gpt2-small"]
    params = cases.parameters(case)
    sides = [
        Side(OURS, opponents.ours_adamw(params).step),
        Side(SYNC, opponents.torch_adamw_sync(cases.twin(params)).step),
        Side(PLAIN, opponents.torch_adamw(cases.twin(params)).step),
    ]
    schedule = Schedule(rounds or 30, turns=K, period=K)
    samples = interleave(sides, schedule)
    figures = [against(samples, OURS, SYNC, 1.25), against(samples, OURS, PLAIN, 1.0)]
    return Report(f"{case}, fp32, AdamW, k={K}", f"{schedule}; {GRADIENTS[REUSED]}", figures, samples)


def gpt2_sgd(rounds: int | None) -> Report:
    """GPT-2 small's tensors, SGD with momentum."""
    case = cases.CASES["gpt2-small"]
    params = cases.parameters(case)
    sides = [
        Side(OURS, opponents.ours_sgd(params).step),
        Side(SYNC, opponents.torch_sgd_sync(cases.twin(params)).step),
    ]
    schedule = Schedule(rounds or 30, turns=K, period=K)
    samples = interleave(sides, schedule)
    title = f"{case}, fp32, SGD momentum {opponents.SGD['momentum']}, k={K}"
    return Report(title, f"{schedule}; {GRADIENTS[REUSED]}", [against(samples, OURS, SYNC, 1.1)], samples)


def gpt2_bf16(rounds: int | None) -> Report:
    """GPT-2 small's tensors in bf16 with fp32 moments, against ours in fp32."""
    case = cases.CASES["gpt2-small"]
    half, full = f"{OURS}, bf16", f"{OURS}, fp32"
    sides = [
        Side(full, opponents.ours_adamw(cases.parameters(case)).step),
        Side(half, opponents.ours_adamw(cases.parameters(case, dtype=torch.bfloat16)).step),
    ]
    schedule = Schedule(rounds or 30, turns=K, period=K)
    samples = interleave(sides, schedule)
    title = f"{case}, bf16 parameters and gradients, fp32 moments and slow weights, AdamW, k={K}"
    return Report(title, f"{schedule}; {GRADIENTS[REUSED]}", [against(samples, half, full, 1.0)], samples)


def many_small(rounds: int | None) -> Report:
    """1000 tensors of 64 elements."""
    case = cases.CASES["many-small"]
    params = cases.parameters(case)
    sides = [
        Side(OURS, opponents.ours_adamw(params).step),
        Side(SYNC, opponents.torch_adamw_sync(cases.twin(params)).step),
        Side(PLAIN, opponents.torch_adamw(cases.twin(params)).step),
    ]
    schedule = Schedule(rounds or 25, steps=4 * K, settle=K, period=K)
    samples = interleave(sides, schedule)
    figures = [against(samples, OURS, SYNC, 20), against(samples, OURS, PLAIN, None)]
    return Report(f"{case}, fp32, AdamW, k={K}", f"{schedule}; {GRADIENTS[REUSED]}", figures, samples)


def one_large(rounds: int | None) -> Report:
    """One tensor of 64 Mi elements, also against the bandwidth ceiling."""
    case = cases.CASES["one-large"]
    params = cases.parameters(case)
    ours = opponents.ours_adamw(params)
    for _ in range(K):
        ours.step()
    loops = {f"ceiling, {loop.variant}": loop for loop in _ceilings(params[0], ours.state[params[0]])}
    sides = [
        Side(OURS, ours.step),
        Side(SYNC, opponents.torch_adamw_sync(cases.twin(params)).step),
        Side(PLAIN, opponents.torch_adamw(cases.twin(params)).step),
        *(Side(name, loop.step) for name, loop in loops.items()),
    ]
    schedule = Schedule(rounds or 40, turns=K, period=K)
    samples = interleave(sides, schedule)
    best = measure.fastest(samples, list(loops))
    # p, g, m, v read and p, m, v written; the slow weight read and written in one step of k.
    gigabytes = case.elements * (28 + 8 / K) / 1e9
    figures = [
        against(samples, OURS, SYNC, 1.15),
        against(samples, OURS, PLAIN, 0.97),
        Figure(f"share of the bandwidth ceiling ({best})", scaled(ratio(samples, OURS, best), 100), "%", 95),
        Figure("bandwidth of the ceiling", spread([gigabytes / s for s in samples[best]]), "GB/s"),
    ]
    own = f"the ceiling moves the same bytes of the very tensors that {OURS} steps over"
    how = f"{schedule}; {GRADIENTS[REUSED]}; {own}"
    return Report(f"{case}, fp32, AdamW, k={K}", how, figures, samples)


def _ceilings(param: nn.Parameter, state: dict[str, Any]) -> list[Ceiling]:
    """Every loop that this machine can run, over one parameter's own tensors."""
    assert param.grad is not None
    tensors = (param.detach(), param.grad, state["exp_avg"], state["exp_avg_sq"], state["slow_param"])
    return [loop for name in variants() if (loop := Ceiling(name, *tensors, k=K)).works]


def host_tensors(rounds: int | None) -> Report:
    """What a step costs for each further tensor, with next to nothing to compute."""
    sizes = [cases.CASES[f"scalars-{count}"] for count in (1, 1000, 4000)]
    makers: list[tuple[str, Callable[..., opponents.Steps], str]] = [
        (OURS, opponents.ours_adamw, FRESH),
        (OURS, opponents.ours_adamw, REUSED),
        (SYNC, opponents.torch_adamw_sync, FRESH),
    ]
    sides = []
    for who, maker, gradients in makers:
        for case in sizes:
            params = cases.parameters(case)
            renew = partial(cases.renew_gradients, params) if gradients == FRESH else None
            sides.append(Side(f"{who}, {gradients}, tensors: {case.tensors}", maker(params).step, renew))
    schedule = Schedule(rounds or 25, steps=2 * K, settle=K, period=K)
    samples = interleave(sides, schedule)

    # The slope from one tensor leaves a step's fixed cost out. From 1000 to 4000 the tensor objects alone
    # outgrow a core's cache: what is measured there is memory, and it only informs.
    figures = []
    for few, many in pairwise(sizes):
        for who, _, gradients in makers:
            small, large = (f"{who}, {gradients}, tensors: {case.tensors}" for case in (few, many))
            each = scaled(slope(samples, small, large, many.tensors - few.tensors), 1e6)
            target = 0.3 if (who, gradients, few.tensors) == (OURS, FRESH, 1) else None
            label = f"{who}, {gradients}, per tensor from {few.tensors} to {many.tensors}"
            figures.append(Figure(label, each, "µs", target, at_least=False))
    spelled = ", ".join(f"{short}: {long}" for short, long in GRADIENTS.items())
    return Report(f"host work per tensor of 1 element, AdamW, k={K}", f"{schedule}; {spelled}", figures, samples)


def host_groups(rounds: int | None) -> Report:
    """What a step costs for each further parameter group."""
    case = cases.CASES["groups-465"]
    makers: list[tuple[str, Callable[..., opponents.Steps]]] = [
        (OURS, opponents.ours_adamw),
        (PLAIN, opponents.torch_adamw),
    ]
    sides = []
    for who, maker in makers:
        for apart in (False, True):
            params = cases.parameters(case)
            groups = [{"params": [p]} for p in params] if apart else [{"params": params}]
            renew = partial(cases.renew_gradients, params)
            sides.append(Side(f"{who}, groups: {len(groups)}", maker(groups).step, renew))
    schedule = Schedule(rounds or 25, steps=2 * K, settle=K, period=K)
    samples = interleave(sides, schedule)

    one, each, torch_one, torch_each = (side.name for side in sides)
    further = case.tensors - 1
    ours = scaled(slope(samples, one, each, further), 1e6)
    torchs = scaled(slope(samples, torch_one, torch_each, further), 1e6)
    # ratio() says how many times faster "of" is: 1 group so many times faster is 465 so many times slower.
    total = ratio(samples, of=one, to=each)
    figures = [
        Figure(f"{OURS}, per further group", ours, "µs", 1.0, at_least=False),
        Figure(f"{OURS}, time with {case.tensors} groups over that with 1", total, "x", 2.0, at_least=False),
        Figure(f"{PLAIN}, per further group", torchs, "µs"),
        against(samples, each, torch_each, None),
    ]
    title = f"host work per parameter group: {case.tensors} tensors of 64, AdamW, k={K}"
    return Report(title, f"{schedule}; {GRADIENTS[FRESH]}", figures, samples)


def memory(rounds: int | None) -> Report:
    """What a step allocates, and what state it keeps, at 10 M and at 100 M parameters."""
    small, large = cases.CASES["memory-10m"], cases.CASES["memory-100m"]
    state, resident, allocated = {}, {}, {}
    for case in (small, large):
        optimizer = opponents.ours_adamw(cases.parameters(case))
        steps = partial(_steps, optimizer, K)  # a whole period: a sync is among them
        before = measure.resident_bytes()
        steps()
        state[case] = measure.resident_bytes() - before
        resident[case] = max(measure.resident_growth(steps) for _ in range(rounds or 3))
        allocated[case] = measure.allocated_bytes(steps)
        del optimizer, steps

    def growth(bytes_: dict[cases.Case, int], unit: float) -> Spread:
        return spread([(bytes_[large] - bytes_[small]) / unit])

    # Resident memory is counted in pages and in per-thread batches: a megabyte is nothing beside 360 MB of
    # further parameters. torch's own count is exact and has no such allowance.
    further = large.elements - small.elements
    figures = [
        Figure(f"further resident memory in {K} steps", growth(resident, 2**20), "MiB", 1.0, at_least=False),
        Figure(f"further bytes allocated by torch in {K} steps", growth(allocated, 1), "B", 0.0, at_least=False),
        # exp_avg, exp_avg_sq and slow_param, 4 bytes each.
        Figure("resident state per further parameter", growth(state, further), "B", 12.1, at_least=False),
    ]
    sizes = f"{large.elements:,} against {small.elements:,} parameters in 2 tensors"
    how = f"{sizes}, fp32, AdamW, k={K}; {GRADIENTS[REUSED]}"
    return Report("memory of a step that grows with the model", how, figures)


def _steps(optimizer: opponents.Steps, count: int) -> None:
    for _ in range(count):
        optimizer.step()


BENCHMARKS: dict[str, Callable[[int | None], Report]] = {
    "gpt2-adamw": gpt2_adamw,
    "gpt2-sgd": gpt2_sgd,
    "gpt2-bf16": gpt2_bf16,
    "one-large": one_large,
    "many-small": many_small,
    "host-tensors": host_tensors,
    "host-groups": host_groups,
    "memory": memory,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="CPU benchmarks of lookahead_fused", allow_abbrev=False)
    parser.add_argument("--only", action="append", choices=BENCHMARKS, help="run this one (may be repeated)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures, samples and conditions there")
    parser.add_argument("--rounds", type=int, help="rounds of each benchmark, instead of its own number")
    parser.add_argument("--threads", type=int, help="threads of every side, instead of torch's default")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a target is missed")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    where = measure.conditions()
    package = f"lookahead_fused {lookahead_fused.__version__} ({Path(lookahead_fused.__file__).parent})"
    print(f"{measure.describe(where)}\n{package}\n", flush=True)
    start = time.perf_counter()
    reports = {}
    for name in options.only or BENCHMARKS:
        others = measure.Others()
        reports[name] = BENCHMARKS[name](options.rounds)
        reports[name].others = others.share()
        print(f"[{name}] {reports[name]}\n", flush=True)
        gc.collect()  # optimizers are cyclic: some gigabytes that the next benchmark needs
    seconds = time.perf_counter() - start
    load_after = round(os.getloadavg()[0], 2)

    missed = [
        f"{name}: {figure.label}"
        for name, report in reports.items()
        for figure in report.figures
        if figure.met is False
    ]
    print(f"{seconds:.0f} s; load after: {load_after}")
    print("all targets met" if not missed else "missed:\n  " + "\n  ".join(missed))
    busy = [name for name, report in reports.items() if report.busy]
    if busy:
        print("measure again on a quiet machine: " + ", ".join(busy))
    if options.json:
        content = {
            "conditions": {**asdict(where), "load_after": load_after, "package": package},
            "seconds": round(seconds, 1),
            "benchmarks": {name: report.record() for name, report in reports.items()},
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return 1 if missed and options.strict else 0


if __name__ == "__main__":
    raise SystemExit(main())
