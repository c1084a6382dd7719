"""What a step costs the host and what it costs the device, as two figures; beside them torch's fused optimizer."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Sequence

from bench.gpu.bandwidth import List
from bench.gpu.results import Results
from lookahead_fused.bench import opponents, parameters
from lookahead_fused.bench.device import Device, host_seconds
from lookahead_fused.bench.measure import Schedule, Side
from lookahead_fused.bench.opponents import OURS, PLAIN, SYNC

LISTS = (
    List(parameters.CASES["many-small"]),
    List(parameters.CASES["resnet50"]),
    List(parameters.CASES["gpt2-small"]),
    List(parameters.CASES["moe"]),
)
ROUNDS = 10
PERIODS = 6


def measure(lists: Sequence[List], backend: str, device: Device, results: Results, rounds: int = ROUNDS) -> bool:
    """Whether some list was measured."""
    for chosen in lists:
        if not results.has_time_for(chosen.title):
            continue
        setting = chosen.setting
        params = parameters.make(chosen.case, dtype=setting.param_dtype, device=device.name)
        mine = opponents.make_ours(backend, setting, parameters.groups(params, "one"))
        sides = [Side(OURS, mine.step)]
        for name in (PLAIN, SYNC):
            own = parameters.twin(params)
            sides.append(Side(name, opponents.OPPONENTS[name].make(setting, parameters.groups(own, "one")).step))
        samples = device.interleave(sides, Schedule(rounds, steps=setting.k, period=setting.k))
        for side in sides:
            on_host = [host_seconds(device, side.step) for _ in range(PERIODS * setting.k)]
            on_device = statistics.median(samples[side.name])
            host = statistics.median(on_host)
            results.add(
                f"{chosen.title}: {side.name}: device {on_device * 1e6:9.1f} µs, host {host * 1e6:9.1f} µs a step, "
                f"{host * 1e6 / chosen.case.tensors:.3f} µs a tensor",
                list=chosen.title, side=side.name, device_seconds=on_device, host_seconds=host,
                host_seconds_per_tensor=host / chosen.case.tensors,
            )  # fmt: skip
        gc.collect()
    results.close(f"{len({record['list'] for record in results.records})} of {len(lists)} lists were measured")
    return bool(results.records)
