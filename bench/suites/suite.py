"""Every benchmark by its name: what `make bench`, `make bench-cpu`, `make gpu-report` and the gate choose from.

A benchmark is a function of a device and an effort that returns a report, or raises `Unavailable`
with the reason why it cannot be made here.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial

import torch

from bench.harness.cores import Others
from bench.harness.figures import Report
from bench.harness.processes import apart
from bench.suites import growth, memory, shards
from bench.suites.averaging import AVERAGING
from bench.suites.clip import CLIPS
from bench.suites.family import FAMILY
from bench.suites.low_bit import LOW_BIT, PEER_ROWS
from bench.suites.steps import COMPARISONS, Comparison, compare
from bench.suites.syncs import SYNCS
from lookahead_fused.bench.device import Cpu, Cuda, Device
from lookahead_fused.bench.measure import Effort

Benchmark = Callable[[Device, Effort], Report]

DEVICES: dict[str, Callable[[], Device]] = {"cpu": Cpu, "cuda": Cuda}

BENCHMARKS: dict[str, Benchmark] = {
    **{name: partial(compare, comparison) for name, comparison in COMPARISONS.items()},
    **SYNCS,
    **FAMILY,
    **LOW_BIT,
    **PEER_ROWS,
    **AVERAGING,
    **CLIPS,
    "host-tensors": growth.host_tensors,
    "host-groups": growth.host_groups,
    "host-dtensors": shards.host_dtensors,
    "host-alone": growth.host_alone,
    "memory": memory.memory,
    "memory-of-all": memory.memory_of_all,
    "first-step": growth.first_step,
    "growth-parameters": growth.by_parameters,
    "growth-tensors": growth.by_tensors,
}

# Those with figures that have targets on a CPU.
TARGETED = (
    *(name for name, comparison in COMPARISONS.items() if comparison.targets),
    *SYNCS, *FAMILY, *LOW_BIT, *AVERAGING, *CLIPS, "host-tensors", "host-groups", "host-dtensors",
    "memory",
)  # fmt: skip


def gated(comparison: Comparison) -> bool:
    """Whether the gate watches a comparison's ratios."""
    return bool(comparison.targets) or comparison.case == "moe"


GATED = tuple(name for name, comparison in COMPARISONS.items() if gated(comparison))


def run(name: str, device: Device, effort: Effort) -> Report:
    """Run a benchmark, and note what others did to the machine meanwhile.

    Raises:
        Unavailable: it cannot be made here; the message says why.
    """
    others = Others()
    report = BENCHMARKS[name](device, effort)
    report.others = others.share()
    report.about.setdefault("device", device.name)
    report.about["threads"] = torch.get_num_threads()
    gc.collect()  # optimizers are cyclic: some gigabytes that the next benchmark needs
    return report


def run_apart(name: str, device: Device, effort: Effort) -> Report:
    """The same; on a CPU by a process of its own, on as many threads as this one has torch use.

    Raises:
        Unavailable: it cannot be made here; the message says why.
    """
    if device.name != "cpu":
        return run(name, device, effort)
    return apart(_run_on_cpu, name, effort, torch.get_num_threads())


def _run_on_cpu(name: str, effort: Effort, threads: int) -> Report:
    torch.set_num_threads(threads)
    return run(name, Cpu(), effort)


def without_opponents(name: str) -> Benchmark:
    """A comparison with its near opponents alone."""
    comparison = COMPARISONS[name]
    return partial(compare, Comparison(**{**vars(comparison), "far": ()}))
