"""This package against torch's optimizers, in one process and in turns: what `run` measures and `check` compares."""

from __future__ import annotations

import gc
import math
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import lookahead_fused

from . import opponents, parameters, schema
from .conditions import conditions
from .cores import core_seconds, waited_share
from .device import Cpu, Cuda, Device
from .measure import Side, Unavailable, schedule
from .opponents import OPPONENTS, OURS, Setting
from .samples import Spread, ratio, spread

DEVICES: dict[str, Callable[[], Device]] = {"cpu": Cpu, "cuda": Cuda}
# By the name that the command takes.
AGAINST = {
    "torch-fused": opponents.PLAIN,
    "torch-fused-sync": opponents.SYNC,
    "torch-foreach-sync": "torch foreach + foreach sync",
    "torch-per-tensor-sync": "torch per-tensor + Python sync",
    "torch-masters": opponents.MASTERS,
    "timm": "timm's Lookahead over torch fused",
    "pytorch-optimizer": "pytorch_optimizer's Lookahead over torch fused",
    "torch-optimi": "torch-optimi's Ranger",
}
DEFAULT_AGAINST = ("torch-fused", "torch-fused-sync")
# Standard errors that a ratio must be beyond a limit, or within it, to be called so: 99 % on one side.
SURE = statistics.NormalDist().inv_cdf(0.99)


def measure(case: str, setting: Setting, against: Sequence[str], device: Device, seconds: float) -> schema.Result:
    """Step a list of parameters by this package and by others, in turns.

    Args:
        case: a key of ``parameters.CASES``.
        setting: rule, dtype and k; its device is `device`'s.
        against: keys of ``AGAINST``.
        device: where.
        seconds: after which no further round is begun, once there are two.

    Raises:
        Unavailable: no backend serves, or there is not the memory.
    """
    setting = replace(setting, device=device.name)
    listed = parameters.CASES[case]
    skipped = {name: reason for name in against if (reason := OPPONENTS[AGAINST[name]].refusal(setting))}
    serving = [name for name in against if name not in skipped]
    # A side's parameters, moments, slow weights and temporaries, in fp32; the gradients are shared.
    need, have = listed.elements * 4 * (5 * (len(serving) + 1) + 1), device.available_bytes()
    if need > have:
        raise Unavailable(f"{case}: needs {need / 2**30:.1f} GiB, {have / 2**30:.1f} GiB are available")
    mine = opponents.ours(device.name)[0]
    params = parameters.make(listed, dtype=setting.param_dtype, device=device.name)
    sides = [Side(OURS, mine.make(setting, parameters.groups(params, "one")).step)]
    for name in serving:
        groups = parameters.groups(parameters.twin(params), "one")
        sides.append(Side(name, OPPONENTS[AGAINST[name]].make(setting, groups).step))
    before = core_seconds()
    samples = device.interleave(sides, schedule(listed.elements, setting.k, 10_000, seconds))
    waited = waited_share(before, core_seconds())
    del sides
    gc.collect()  # optimizers are cyclic: some gigabytes that the next case needs
    return schema.Result(
        work=schema.Work(case, setting.rule, setting.dtype, setting.k, device.name),
        tensors=listed.tensors,
        elements=listed.elements,
        waited=waited,
        seconds={name: _figure(spread(times)) for name, times in samples.items()},
        ratios={name: _figure(ratio(samples, OURS, name)) for name in serving},
        skipped=skipped,
    )


def _figure(value: Spread) -> schema.Figure:
    return schema.Figure(value.median, value.q1, value.q3, value.samples)


def package() -> schema.Package:
    """The install that this process runs."""
    folder = Path(lookahead_fused.__file__).parent
    return schema.Package(lookahead_fused.__version__, str(folder), platform.python_version(), torch.__version__)


def machine(device: str) -> schema.Machine:
    """Where this process runs."""
    now = conditions()
    gpu = torch.cuda.get_device_name() if device == "cuda" else ""
    return schema.Machine(
        now.machine, now.cores, now.threads, gpu, now.system, now.huge_pages, now.load_before, now.utc
    )


# ------------------------------------------------------------------------------------------------------------
# against an earlier run


@dataclass(frozen=True)
class Change:
    """A figure of a run by the same figure of an earlier one.

    Attributes:
        work: what was stepped.
        of: whose figure it is: an opponent's, or this package's time.
        before, now: the figures' medians.
        relative: how many times as good the figure is now.
        low, high: between which `relative` is, with 99 % on either side.
    """

    work: schema.Work
    of: str
    before: float
    now: float
    relative: float
    low: float
    high: float

    def verdict(self, fail_below: float) -> str:
        """ "slower", "holds", or "undecided" where the rounds scatter too much to tell."""
        return "slower" if self.high < fail_below else "holds" if self.low >= fail_below else "undecided"


def changes_of_ratios(before: schema.Run, now: schema.Run) -> list[Change]:
    """The ratios to opponents that both runs have."""
    return [
        _change(result.work, name, earlier.ratios[name], figure)
        for earlier, result in _shared(before, now)
        for name, figure in result.ratios.items()
        if name in earlier.ratios
    ]


def changes_of_times(before: schema.Run, now: schema.Run) -> list[Change]:
    """This package's times that both runs have."""
    # A time is better where it is less: the earlier one takes the place of the later.
    return [
        _change(result.work, OURS, result.seconds[OURS], earlier.seconds[OURS])
        for earlier, result in _shared(before, now)
    ]


def other_machine(before: schema.Machine, now: schema.Machine) -> list[str]:
    """In what the machines of two runs differ, of what ratios of times depend on."""
    pairs = [(name, getattr(before, name), getattr(now, name)) for name in schema.Machine.SAME]
    return [f"{name}: was {old!r}, is {new!r}" for name, old, new in pairs if old != new]


def _shared(before: schema.Run, now: schema.Run) -> list[tuple[schema.Result, schema.Result]]:
    earlier = {result.work: result for result in before.results}
    return [(earlier[result.work], result) for result in now.results if result.work in earlier]


def _change(work: schema.Work, of: str, before: schema.Figure, now: schema.Figure) -> Change:
    relative = now.median / before.median
    # Of logarithms, in which a ratio's scatter is even: about a median's standard error, for each of both.
    error = math.hypot(*((math.log(f.q3 / f.q1)) / math.sqrt(f.rounds) for f in (before, now)))
    reach = math.exp(SURE * error)
    return Change(work, of, before.median, now.median, relative, relative / reach, relative * reach)
