"""What an optimizer keeps, and what a step takes beyond it."""

from __future__ import annotations

import gc
from functools import partial

from bench.harness.figures import Figure, Report
from bench.suites.steps import GRADIENTS
from lookahead_fused.bench import opponents, parameters
from lookahead_fused.bench.device import Device
from lookahead_fused.bench.measure import Effort
from lookahead_fused.bench.memory import allocated_bytes, resident_bytes, state_bytes
from lookahead_fused.bench.opponents import OPPONENTS, OURS, K, Setting, Steps
from lookahead_fused.bench.samples import Spread, spread


def memory(device: Device, effort: Effort) -> Report:
    """What a step allocates, and what state it keeps, at 10 M and at 100 M parameters."""
    small, large = parameters.CASES["memory-10m"], parameters.CASES["memory-100m"]
    make = partial(opponents.ours(device.name)[0].make, Setting(device=device.name))
    state, peak, allocated = {}, {}, {}
    for case in (small, large):
        optimizer = make(parameters.groups(parameters.make(case, device=device.name), "one"))
        steps = partial(_steps, optimizer, K)  # a whole period: a sync is among them
        before = _used(device)
        steps()
        state[case] = _used(device) - before
        peak[case] = max(device.peak_growth(steps) for _ in range(effort.rounds or 3))
        allocated[case] = allocated_bytes(steps) if device.name == "cpu" else 0
        del optimizer, steps
        gc.collect()

    def growth(bytes_: dict[parameters.Case, int], unit: float) -> Spread:
        return spread([(bytes_[large] - bytes_[small]) / unit])

    # Resident memory is counted in pages and in per-thread batches: a megabyte is nothing beside 360 MB of
    # further parameters. torch's own count is exact and has no such allowance.
    further = large.elements - small.elements
    figures = [
        Figure(f"further memory in {K} steps at its peak", growth(peak, 2**20), "MiB", 1.0, at_least=False),
        # exp_avg, exp_avg_sq and slow_param, 4 bytes each.
        Figure("state in memory per further parameter", growth(state, further), "B", 12.1, at_least=False),
    ]
    if device.name == "cpu":
        label = f"further bytes allocated by torch in {K} steps"
        figures.insert(1, Figure(label, growth(allocated, 1), "B", 0.0, at_least=False))
    sizes = f"{large.elements:,} against {small.elements:,} parameters in 2 tensors"
    how = f"{sizes}, fp32, AdamW, k={K}; {GRADIENTS}"
    return Report("memory of a step that grows with the model", how, figures)


def memory_of_all(device: Device, effort: Effort) -> Report:
    """State and peak growth of every opponent, in bytes a parameter, over ResNet-50."""
    case = parameters.CASES["resnet50"]
    figures: list[Figure] = []
    skipped: dict[str, str] = {}
    for dtype in ("fp32", "bf16", "bf16-master"):
        setting = Setting(dtype=dtype, device=device.name)
        for other in [opponents.ours(device.name)[0], *OPPONENTS.values()]:
            if dtype != "fp32" and other.name not in (OURS, opponents.SYNC, opponents.MASTERS):
                continue
            reason = "" if other.name == OURS else other.refusal(setting)
            if reason:
                skipped[f"{other.name}, {dtype}"] = reason
                continue
            params = parameters.make(case, dtype=setting.param_dtype, device=device.name)
            optimizer = other.make(setting, parameters.groups(params, "one"))
            _steps(optimizer, 2 * setting.k)
            of = f"{other.name}, {dtype}"
            kept = state_bytes(optimizer, params) / case.elements
            # Twice: what the first pass grew into, malloc may keep for the second.
            peak = max(device.peak_growth(partial(_steps, optimizer, setting.k)) for _ in range(2)) / case.elements
            figures += [
                Figure(f"{of}: state", spread([kept]), "B/param", at_least=False, kind="state", of=of),
                Figure(
                    f"{of}: peak growth in {K} steps", spread([peak]), "B/param", at_least=False, kind="memory", of=of
                ),
            ]
            del optimizer, params
            gc.collect()
    return Report(f"memory over {case}, AdamW, k={K}", GRADIENTS, figures, skipped=skipped)


def _used(device: Device) -> int:
    if device.name == "cpu":
        return resident_bytes()
    device.synchronize()
    return int(device.cuda.memory_allocated())  # type: ignore[union-attr]


def _steps(optimizer: Steps, count: int) -> None:
    for _ in range(count):
        optimizer.step()
