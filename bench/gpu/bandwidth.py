"""What share of a copy's bandwidth a step reaches: lists of tensors x sizes of the chunks that blocks walk."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.cases import traffic
from bench.gpu.results import Results
from lookahead_fused._parts import Tuning
from lookahead_fused._table import Table
from lookahead_fused.backends.cuda import CHUNK_ELEMENTS
from lookahead_fused.bench import opponents, parameters
from lookahead_fused.bench.device import Device
from lookahead_fused.bench.measure import Schedule, Side
from lookahead_fused.bench.opponents import Setting
from lookahead_fused.bench.parameters import Case

CHUNKS = (1 << 12, 1 << 13, 1 << 14, 1 << 15, 1 << 16)
ROUNDS = 10
COPY = "copy"


@dataclass(frozen=True)
class List:
    """A parameter list, and how it is stepped."""

    case: Case
    setting: Setting = field(default_factory=Setting)

    @property
    def title(self) -> str:
        return f"{self.case.title}, {self.setting.dtype}, {self.setting.rule}"

    @property
    def bytes_a_step(self) -> float:
        return self.case.elements * traffic.mean_bytes(self.setting)


LISTS = (
    List(parameters.CASES["gpt2-small"]),
    List(parameters.CASES["one-large"]),
    List(parameters.CASES["many-small"]),
    List(parameters.CASES["resnet50"]),
    List(parameters.CASES["gpt2-small"], Setting(dtype="bf16-master")),
    List(parameters.CASES["moe"]),
    List(parameters.CASES["bert-large"]),
)
# Only to see it work.
SMALL = (List(Case("five tensors", parameters.equal(5, 300))), List(Case("one", parameters.equal(1, 4000))))


def measure(
    lists: Sequence[List], backend: str, device: Device, copy_bytes: int, results: Results, rounds: int = ROUNDS
) -> bool:
    """Whether some list was measured; each has a budget of its own share of the time."""
    for chosen in lists:
        need = chosen.case.elements * 20 + 2 * copy_bytes
        if not results.has_time_for(chosen.title):
            continue
        if need > device.available_bytes():
            why = f"needs {need / 2**30:.1f} GiB, {device.available_bytes() / 2**30:.1f} GiB are available"
            results.add(f"{chosen.title}: skipped: {why}", list=chosen.title, skipped=why)
            continue
        found = shares(chosen, backend, device, copy_bytes, rounds)
        best = max(found["chunks"], key=lambda chunk: found["chunks"][chunk]["share"])
        lines = [f"{chosen.title}: {chosen.case.elements:,} elements; a copy has {found['copy_gb_per_s']:.1f} GB/s"]
        for chunk, own in found["chunks"].items():
            lines.append(
                f"  chunks of {chunk:6}: {own['ms']:9.4f} ms  {own['gb_per_s']:8.1f} GB/s {own['share']:6.1%} of a copy"
                + ("  best" if chunk == best else "")
                + ("  the default" if chunk == CHUNK_ELEMENTS else "")
            )
        results.add("\n".join(lines), list=chosen.title, best=best, **found)
        gc.collect()
    measured = [record for record in results.records if "chunks" in record]
    results.close(f"{len(measured)} of {len(lists)} lists were measured")
    return bool(measured)


def shares(chosen: List, backend: str, device: Device, copy_bytes: int, rounds: int) -> dict[str, Any]:
    """For each size of chunks the time of a step, its bandwidth, and the share of a copy's in the same run."""
    setting = chosen.setting
    params = parameters.make(chosen.case, dtype=setting.param_dtype, device=device.name)
    optimizer: Any = opponents.make_ours(backend, setting, parameters.groups(params, "one"))
    optimizer.step()
    source = torch.empty(copy_bytes, dtype=torch.uint8, device=device.name)
    target = torch.empty_like(source)
    sides = [Side(str(chunk), _with_chunks(optimizer, chunk)) for chunk in CHUNKS]
    sides.append(Side(COPY, lambda: target.copy_(source)))
    # Whole periods in a turn: of steps that take turns one by one, always the same side's would sync.
    samples = device.interleave(sides, Schedule(rounds, steps=setting.k, period=setting.k))
    seconds = {name: statistics.median(own) for name, own in samples.items()}
    copied = 2 * copy_bytes / seconds[COPY]
    moved = {chunk: chosen.bytes_a_step / seconds[str(chunk)] for chunk in CHUNKS}
    return {
        "elements": chosen.case.elements,
        "copy_gb_per_s": copied / 1e9,
        "chunks": {
            chunk: {"ms": seconds[str(chunk)] * 1e3, "gb_per_s": rate / 1e9, "share": rate / copied}
            for chunk, rate in moved.items()
        },
    }


def _with_chunks(optimizer: Any, chunk: int) -> Any:
    """A step over a table of such chunks. The state is one, so that five tables take no more memory than one."""
    made = optimizer._table
    table = Table(made.rule, made.policy, Tuning(chunk_elements=chunk))

    def step() -> None:
        optimizer._table = table
        optimizer.step()

    return step
