"""The benchmarks under pytest-benchmark: `make bench`, or pytest bench/suites/bench_suite.py [--device cuda] [-k NAME].

pytest-benchmark times one function over and over, and so cannot let several take turns. The sides of a benchmark are
interleaved by `lookahead_fused.bench.measure` as ever; the samples of ours are then replayed through the fixture,
which writes them in its format, and all the rest (ratios with quartiles, samples of every side, shares, targets,
conditions) is in extra_info.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.harness.replay import Replay, now
from bench.suites import counts, instructions, suite
from lookahead_fused.bench.device import Device
from lookahead_fused.bench.measure import Effort, Unavailable
from lookahead_fused.bench.opponents import OURS


@pytest.mark.benchmark(timer=now, disable_gc=True)
@pytest.mark.parametrize("name", suite.BENCHMARKS)
def bench(name: str, benchmark: Any, device: Device, effort: Effort) -> None:
    try:
        report = suite.run_apart(name, device, effort)
    except Unavailable as reason:
        pytest.skip(str(reason))
    benchmark.group = "comparisons" if name in suite.COMPARISONS else "measures"
    benchmark.extra_info.update(report.record())
    Replay(report.samples.get(OURS) or next(iter(report.samples.values()), [0.0])).into(benchmark)


@pytest.mark.benchmark(timer=now)
@pytest.mark.parametrize("what", ["counts", "instructions"])
def bench_counts(what: str, benchmark: Any) -> None:
    try:
        found = counts.all_counts() if what == "counts" else instructions.count()
    except Unavailable as reason:
        pytest.skip(str(reason))
    benchmark.group = "counts"
    benchmark.extra_info.update({"title": what, "counts": found, "figures": [], "skipped": {}})
    Replay([0.0]).into(benchmark)
