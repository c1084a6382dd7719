"""An interpolation out of the rhythm of k, `sync()`, against the two foreach calls that it stands for."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from bench.harness.figures import Figure, Report
from bench.suites.steps import GRADIENTS
from lookahead_fused.bench import opponents, parameters
from lookahead_fused.bench.device import Device
from lookahead_fused.bench.measure import Effort, Side, schedule
from lookahead_fused.bench.opponents import OURS, ForeachSync, Setting
from lookahead_fused.bench.samples import ratio

FOREACH = "_foreach_lerp_ + _foreach_copy_"

# By list, what the ratio must reach on a CPU.
TARGETS = {"many-small": 10.0, "gpt2-small": 1.2, "one-16mi": 1.2}


def sync(case: str, device: Device, effort: Effort) -> Report:
    """Both sides interpolate the same list of parameters, which have had one step, again and again.

    Args:
        case: a key of ``parameters.CASES``.
        device: where.
        effort: how much time it may take.

    Raises:
        Unavailable: no backend serves.
    """
    listed = parameters.CASES[case]
    setting = replace(Setting(), device=device.name)
    params = parameters.make(listed, device=device.name)
    mine = opponents.ours(device.name)[0].make(setting, parameters.groups(params, "one"))
    mine.step()
    theirs = opponents.OPPONENTS[opponents.SYNC].make(setting, parameters.groups(parameters.twin(params), "one"))
    assert isinstance(theirs, ForeachSync)
    sides = [Side(OURS, mine.sync), Side(FOREACH, theirs.sync)]  # type: ignore[attr-defined]
    turns = schedule(listed.elements, 1, effort.of(20), effort.budget)
    samples = device.interleave(sides, turns)
    target = TARGETS.get(case) if device.name == "cpu" else None
    figure = Figure(f"{OURS} against {FOREACH}", ratio(samples, OURS, FOREACH), "x", target, kind="ratio", of=FOREACH)
    return Report(f"sync() alone, {listed}, fp32", f"{turns}; {GRADIENTS}", [figure], samples)


SYNCS = {f"sync-{case}": partial(sync, case) for case in TARGETS}
