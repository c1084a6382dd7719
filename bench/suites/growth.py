"""How the cost of a step grows: with parameters, with tensors, with groups; and what the first step costs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise

from torch import nn

from bench.harness.figures import Figure, Report, scaled
from bench.suites.steps import GRADIENTS
from lookahead_fused.bench import opponents, parameters
from lookahead_fused.bench.device import Device, host_seconds
from lookahead_fused.bench.measure import Effort, Schedule, Side, Unavailable, schedule
from lookahead_fused.bench.opponents import OPPONENTS, OURS, PLAIN, SYNC, K, Setting, Steps
from lookahead_fused.bench.samples import Spread, growth_rate, ratio, slope, spread

# How gradients come: short in the names of sides, spelled out once in a report.
REUSED, FRESH = "same gradients", "new gradients"
SPELLED = {REUSED: GRADIENTS, FRESH: "new gradient tensors at every step"}
PARAMETERS = tuple(10**n for n in range(4, 10))
PARAMETER_TENSORS = 16
TENSORS = (1, 10, 100, 1000, 5000, 20_000)
# Ours, torch's with a sync, and what stays in memory of both, in bytes a parameter: 20 + 16, and a page here and there.
BYTES = 37


def makers(device: str, *names: str) -> list[tuple[str, Callable[[list[dict[str, object]]], Steps]]]:
    """Ours and some opponents, each as a function of groups."""
    setting = Setting(device=device)
    first = opponents.ours(device)[0]
    return [(name, partial((first if name == OURS else OPPONENTS[name]).make, setting)) for name in names]


def host_tensors(device: Device, effort: Effort) -> Report:
    """What a step costs for each further tensor, with next to nothing to compute."""
    sizes = [parameters.CASES[f"scalars-{count}"] for count in (1, 1000, 4000)]
    who_and_how = [(OURS, FRESH), (OURS, REUSED), (SYNC, FRESH)]
    sides = []
    for who, gradients in who_and_how:
        [(_, make)] = makers(device.name, who)
        for case in sizes:
            params = parameters.make(case, device=device.name)
            renew = partial(parameters.renew_gradients, params) if gradients == FRESH else None
            optimizer = make(parameters.groups(params, "one"))
            sides.append(Side(f"{who}, {gradients}, tensors: {case.tensors}", optimizer.step, renew))
    plan = Schedule(effort.of(12), steps=2 * K, settle=K, period=K, budget=effort.budget)
    samples = device.interleave(sides, plan)

    # The slope from one tensor leaves a step's fixed cost out. From 1000 to 4000 the tensor objects alone
    # outgrow a core's cache: what is measured there is memory, and it only informs.
    figures = []
    for few, many in pairwise(sizes):
        for who, gradients in who_and_how:
            small, large = (f"{who}, {gradients}, tensors: {case.tensors}" for case in (few, many))
            each = scaled(slope(samples, small, large, many.tensors - few.tensors), 1e6)
            target = 0.3 if (who, gradients, few.tensors, device.name) == (OURS, FRESH, 1, "cpu") else None
            label = f"{who}, {gradients}, per tensor from {few.tensors} to {many.tensors}"
            figures.append(Figure(label, each, "µs", target, at_least=False, kind="host", of=who))
    spelled = ", ".join(f"{short}: {long}" for short, long in SPELLED.items())
    return Report(f"host work per tensor of 1 element, AdamW, k={K}", f"{plan}; {spelled}", figures, samples)


def host_groups(device: Device, effort: Effort) -> Report:
    """What a step costs for each further parameter group."""
    case = parameters.CASES["groups-465"]
    sides = []
    for who, make in makers(device.name, OURS, PLAIN):
        for layout in ("one", "each"):
            params = parameters.make(case, device=device.name)
            own = parameters.groups(params, layout)
            renew = partial(parameters.renew_gradients, params)
            sides.append(Side(f"{who}, groups: {len(own)}", make(own).step, renew))
    plan = Schedule(effort.of(12), steps=2 * K, settle=K, period=K, budget=effort.budget)
    samples = device.interleave(sides, plan)

    one, each, torch_one, torch_each = (side.name for side in sides)
    further = case.tensors - 1
    ours = scaled(slope(samples, one, each, further), 1e6)
    torchs = scaled(slope(samples, torch_one, torch_each, further), 1e6)
    # ratio() says how many times faster "of" is: 1 group so many times faster is 465 so many times slower.
    total = ratio(samples, of=one, to=each)
    goals = (1.0, 2.0) if device.name == "cpu" else (None, None)
    figures = [
        Figure(f"{OURS}, per further group", ours, "µs", goals[0], at_least=False, kind="host", of=OURS),
        Figure(f"{OURS}, time with {case.tensors} groups over that with 1", total, "x", goals[1], at_least=False),
        Figure(f"{PLAIN}, per further group", torchs, "µs", at_least=False, kind="host", of=PLAIN),
        Figure(f"{each} against {torch_each}", ratio(samples, each, torch_each), "x", kind="ratio", of=torch_each),
    ]
    title = f"host work per parameter group: {case.tensors} tensors of 64, AdamW, k={K}"
    return Report(title, f"{plan}; {SPELLED[FRESH]}", figures, samples)


def host_alone(device: Device, effort: Effort) -> Report:
    """The host's time for a step of a GPU, the device's work not waited for. On a CPU there is no such thing."""
    if device.name == "cpu":
        raise Unavailable("on a CPU the host does the work: see host-tensors for what is not arithmetic")
    figures = []
    for name in ("gpt2-small", "many-small", "moe"):
        params = parameters.make(parameters.CASES[name], device=device.name)
        for who, make in makers(device.name, OURS, SYNC, PLAIN):
            step = make(parameters.groups(parameters.twin(params), "one")).step
            taken = [host_seconds(device, step) for _ in range(effort.of(10) * K + K)][K:]
            value = scaled(spread(taken), 1e6)
            label = f"{parameters.CASES[name].title}: {who}"
            figures.append(Figure(label, value, "µs", at_least=False, kind="host", of=f"{name}: {who}"))
    return Report(f"host work of a step, not waiting for the device, AdamW, k={K}", GRADIENTS, figures)


def first_step(device: Device, effort: Effort) -> Report:
    """From parameters with gradients to the end of the first step: construction, state, tables."""
    figures, samples = [], {}
    plan = Schedule(effort.of(5), pause=0.0, budget=effort.budget / 2)
    for name in ("resnet50", "many-small"):
        case = parameters.CASES[name]
        params = parameters.make(case, device=device.name)
        sides = [
            _First(f"{case.title}: {who}", make, params).side() for who, make in makers(device.name, OURS, SYNC, PLAIN)
        ]
        taken = device.interleave(sides, plan)
        mine, *others = (side.name for side in sides)
        figures.append(Figure(mine, scaled(spread(taken[mine]), 1e3), "ms", at_least=False, kind="first step", of=name))
        figures += [
            Figure(
                f"{mine} against {other.partition(': ')[2]}",
                ratio(taken, mine, other),
                "x",
                kind="first step",
                of=other,
            )
            for other in others
        ]
        samples.update(taken)
    how = f"{plan}; constructor and first step; parameters and gradients are there before"
    return Report("time to the end of the first step, AdamW", how, figures, samples)


class _First:
    """A side whose every step is a new optimizer's first."""

    def __init__(self, name: str, make: Callable[..., Steps], params: list[nn.Parameter]) -> None:
        self.name, self.make, self.params = name, make, params
        self.optimizer: Steps | None = None
        self.own: list[nn.Parameter] = []

    def prepare(self) -> None:
        self.optimizer = None
        gc.collect()  # the memory of the one before
        self.own = parameters.twin(self.params)

    def step(self) -> None:
        self.optimizer = self.make(parameters.groups(self.own, "one"))
        self.optimizer.step()

    def side(self) -> Side:
        return Side(self.name, self.step, self.prepare)


def by_parameters(device: Device, effort: Effort) -> Report:
    """From 10⁴ parameters to as many of 10⁹ as memory holds, in equally many tensors."""
    # Half of the memory: the other half is for whoever else is on the machine, and for time.
    have = device.available_bytes() // 2
    sizes = [n for n in PARAMETERS if n * BYTES < have]
    skipped = {
        f"{n:,} parameters": f"needs {n * BYTES / 2**30:.0f} GiB; half of what is available: {have / 2**30:.0f} GiB"
        for n in PARAMETERS
        if n not in sizes
    }
    if skipped:
        # The largest round number that fits beside what is left out.
        more = int(have / BYTES / 1e8) * 10**8
        sizes += [more] if more > sizes[-1] else []
    lists = [(n, parameters.Case("", parameters.equal(PARAMETER_TENSORS, n // PARAMETER_TENSORS))) for n in sizes]
    report = _curve(device, "parameters", lists, effort)
    report.skipped = skipped
    return report


def by_tensors(device: Device, effort: Effort) -> Report:
    """From 1 tensor of 64 elements to 20,000."""
    return _curve(device, "tensors", [(n, parameters.Case("", parameters.equal(n, 64))) for n in TENSORS], effort)


def _curve(device: Device, what: str, lists: Iterable[tuple[int, parameters.Case]], effort: Effort) -> Report:
    points: dict[str, list[Spread]] = {OURS: [], SYNC: []}
    samples, figures, sizes = {}, [], []
    for size, case in lists:
        params = parameters.make(case, device=device.name)
        sides = [
            Side(who, make(parameters.groups(params if who == OURS else parameters.twin(params), "one")).step)
            for who, make in makers(device.name, OURS, SYNC)
        ]
        plan = schedule(case.elements, K, effort.of(5 if case.elements < 5e7 else 3), effort.budget / 4)
        taken = device.interleave(sides, plan)
        sizes.append(size)
        for who in points:
            points[who].append(spread(taken[who]))
            samples[f"{who}, {what}: {size}"] = taken[who]
        label = f"{OURS} against {SYNC} at {size:,} {what}"
        figures.append(Figure(label, ratio(taken, OURS, SYNC), "x", kind="growth", of=f"{what}: {size}"))
        del sides, params
        gc.collect()
    for who, found in points.items():
        medians = [point.median for point in found]
        for part, first in (("", 0), (f" from {sizes[-3]:,} on", len(sizes) - 3)):
            rate = growth_rate(sizes[first:], medians[first:])
            label = f"{who}: exponent of growth with {what}{part} (1: linear)"
            figures.append(Figure(label, spread([rate]), "", at_least=False, kind="growth", of=f"{what}, exponent"))
    report = Report(f"cost growth with {what}, fp32, AdamW, k={K}", GRADIENTS, figures, samples)
    report.about = {
        "curve": {
            "of": what,
            "sizes": sizes,
            "seconds": {who: [p.median for p in found] for who, found in points.items()},
        }
    }
    return report
