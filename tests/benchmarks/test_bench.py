"""The benchmarks measure what they say: planted differences are found, planted disturbances are not.

Time is mostly a fake clock here, moved by the sides themselves: exact, and quick.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.harness import ceiling, cores, processes
from bench.harness.figures import Figure, Report
from bench.suites import cpu, suite
from lookahead_fused.bench import measure, memory
from lookahead_fused.bench.device import Cpu
from lookahead_fused.bench.measure import Effort, Schedule, Side, Unavailable, interleave
from lookahead_fused.bench.samples import Samples, growth_rate, ratio, slope, spread

STEP_BY_STEP = Schedule(rounds=8, turns=5, period=5)
IN_TURNS = Schedule(rounds=8, steps=10, settle=5, period=5)


class Machine:
    """A clock that sides move; ``slowness`` scales all work, as a busy neighbour does."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slowness = 1.0

    def work(self, seconds: float) -> None:
        self.now += seconds * self.slowness

    def side(self, name: str, *costs: float, **kwargs: object) -> Side:
        """A side whose steps cost ``costs`` in turn."""
        steps = iter(range(10**9))
        return Side(name, lambda: self.work(costs[next(steps) % len(costs)]), **kwargs)  # type: ignore[arg-type]

    def run(self, sides: list[Side], schedule: Schedule, pause_costs: float = 0.0) -> Samples:
        return interleave(sides, schedule, clock=lambda: self.now, sleep=lambda _: self.work(pause_costs))


@pytest.mark.parametrize("schedule", [STEP_BY_STEP, IN_TURNS])
def test_planted_slowdown(schedule: Schedule) -> None:
    machine = Machine()
    samples = machine.run([machine.side("slow", 2.0), machine.side("fast", 1.0)], schedule)
    assert samples["slow"] == pytest.approx([2.0] * 8)
    found = ratio(samples, of="slow", to="fast")
    assert [found.median, found.of_medians, found.samples] == pytest.approx([0.5, 0.5, 8])
    assert ratio(samples, of="fast", to="slow").median == pytest.approx(2.0)


def test_the_real_clock_gives_seconds_a_step() -> None:
    """None shorter than the step can be, and all steps together none longer than it took, however busy the machine."""
    schedule = Schedule(rounds=3, turns=2, steps=2, pause=0)
    start = time.perf_counter()
    samples = interleave([Side("long", lambda: time.sleep(0.02)), Side("short", lambda: time.sleep(0.002))], schedule)
    elapsed = time.perf_counter() - start
    assert min(samples["long"]) >= 0.02
    assert min(samples["short"]) >= 0.002
    assert 4 * sum(map(sum, samples.values())) <= elapsed


def test_a_neighbour_slows_times_and_leaves_ratios() -> None:
    machine = Machine()

    def drift() -> None:
        # Ten times as slow in the end as at the start: one after the other, equal sides would differ by 5x.
        machine.slowness *= 1.03

    sides = [machine.side("ours", 1.0, prepare=drift), machine.side("theirs", 1.5)]
    samples = machine.run(sides, Schedule(rounds=16, turns=5, period=5))
    assert max(samples["ours"]) > 5 * min(samples["ours"])
    found = ratio(samples, of="ours", to="theirs")
    assert found.median == pytest.approx(1.5, rel=0.02)
    assert 1.4 < found.q1 <= found.median <= found.q3 < 1.6


def test_only_steps_are_timed() -> None:
    machine = Machine()
    costly = machine.side("ours", 1.0, prepare=lambda: machine.work(100.0))
    samples = machine.run([costly, machine.side("theirs", 1.0)], IN_TURNS, pause_costs=1000.0)
    assert samples == {"ours": pytest.approx([1.0] * 8), "theirs": pytest.approx([1.0] * 8)}


def test_warm_up_and_settling_are_thrown_away() -> None:
    machine = Machine()
    # The first round costs more, and so do the first five steps of every turn.
    cold = machine.side("cold", *([50.0] * 15), *([7.0] * 5 + [1.0] * 10) * 20)
    assert machine.run([cold], IN_TURNS)["cold"] == pytest.approx([1.0] * 8)


@pytest.mark.parametrize("schedule", [STEP_BY_STEP, IN_TURNS])
def test_every_round_has_its_share_of_syncs(schedule: Schedule) -> None:
    machine = Machine()
    samples = machine.run([machine.side("ours", 1, 1, 1, 1, 6), machine.side("theirs", 1, 1, 1, 1, 1)], schedule)
    assert samples["ours"] == pytest.approx([2.0] * 8)


@pytest.mark.parametrize("wrong", [{"turns": 4}, {"steps": 7}, {"turns": 5, "settle": 1}, {"rounds": 0, "turns": 5}])
def test_schedule_refuses_part_of_a_period(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"period|rounds"):
        Schedule(**{"rounds": 3, "period": 5, **wrong})


@pytest.mark.parametrize("count", [2, 3, 6])
def test_every_side_comes_at_every_place(count: int) -> None:
    sides = [Side(str(i), lambda: None) for i in range(count)]
    places: dict[str, list[int]] = {side.name: [] for side in sides}
    for turn in range(2 * count):
        for place, side in enumerate(measure._order(sides, turn)):
            places[side.name].append(place)
    assert all(sorted(seen) == sorted([*range(count)] * 2) for seen in places.values())


def test_names_of_sides_differ() -> None:
    with pytest.raises(ValueError, match="differ"):
        interleave([Side("a", lambda: None), Side("a", lambda: None)], STEP_BY_STEP)


def test_no_round_is_begun_beyond_the_budget() -> None:
    sides = [Side("a", lambda: time.sleep(0.01))]
    assert len(interleave(sides, Schedule(rounds=50, pause=0, budget=0.05))["a"]) < 10
    assert len(interleave(sides, Schedule(rounds=50, pause=0, budget=0))["a"]) == 2
    assert [Effort(2.5).of(4), Effort(0.1).of(4), Effort(2, rounds=7).of(4)] == [10, 2, 7]


def test_garbage_collection_is_off_in_a_step_and_back_after_it() -> None:
    seen = []
    interleave([Side("a", lambda: seen.append(gc.isenabled()))], Schedule(rounds=1, pause=0))
    assert seen == [False, False]
    assert gc.isenabled()


def test_slope_is_per_further_thing() -> None:
    samples = {"few": [1.0, 2.0, 3.0], "many": [1.3, 2.3, 3.3]}
    found = slope(samples, "few", "many", further=3)
    assert [found.median, found.of_medians] == pytest.approx([0.1, 0.1])


def test_quartiles() -> None:
    found = spread([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found.q1, found.median, found.q3, found.samples) == (2.0, 3.0, 4.0, 5)


def test_targets() -> None:
    assert Figure("speed", spread([1.24]), "x", 1.25).met is False
    assert Figure("speed", spread([1.25]), "x", 1.25).met is True
    assert Figure("time", spread([0.31]), "µs", 0.3, at_least=False).met is False
    assert Figure("time", spread([0.29]), "µs", 0.3, at_least=False).met is True
    assert Figure("informs", spread([0.0]), "x").met is None
    assert "MISS" in str(Figure("speed", spread([1.24]), "x", 1.25))


def test_exponents_of_growth() -> None:
    assert growth_rate([1e4, 1e5, 1e6], [3.0, 30.0, 300.0]) == pytest.approx(1)
    assert growth_rate([10, 100, 1000], [2.0, 2.0, 2.0]) == pytest.approx(0)
    assert growth_rate([10, 100, 1000], [1.0, 100.0, 10_000.0]) == pytest.approx(2)


def ceiling_arrays(sizes: list[int], moments: int, bits: int) -> list[list[torch.Tensor]]:
    """Random rows of a ceiling: param and grad of 16 or 32 bits, the moments and slow of 32."""
    narrow = {16: (torch.int16, 2**15), 32: (torch.int32, 2**31)}[bits]
    dtypes = [narrow, narrow, *[(torch.int32, 2**31)] * (moments + 1)]
    return [[torch.randint(-most, most, (n,), dtype=dtype) for dtype, most in dtypes] for n in sizes]


# Two chunks and a tail that fills no line; a whole line a thread and one element over; many rows, an empty one too.
@pytest.mark.parametrize("sizes", [[(1 << 21) + 37], [33], [5, 0, 1, 70, 64, 300, 7]])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("moments", "bits"), [(2, 32), (1, 32), (2, 16)])
@pytest.mark.parametrize("variant", ceiling.variants())
def test_the_ceiling_reads_and_writes_every_element(
    variant: str, moments: int, bits: int, threads: int, sizes: list[int]
) -> None:
    before = ceiling_arrays(sizes, moments, bits)
    now = [[tensor.clone() for tensor in row] for row in before]
    loop = ceiling.Ceiling(variant, now, k=2, threads=threads, mask=0xFFFFFFFF)
    if not loop.works:
        pytest.skip(f"this machine has no {variant} stores")

    def expected(slow: bool) -> None:
        for old, row in zip(before, now, strict=True):
            grad = old[1]
            # A last half of a word stays.
            n = grad.numel() // (32 // bits) * (32 // bits)
            if bits == 32:
                wide = grad
            else:
                # Each line of grad's words goes into two lines of the others'.
                words = grad[:n].view(torch.int32)
                wide = torch.empty(n, dtype=torch.int32)
                whole = n // 32 * 32
                lines = words[: whole // 2].view(-1, 1, 16).expand(-1, 2, 16).reshape(-1)
                wide[:whole], wide[whole:] = lines, words[whole // 2 :].repeat_interleave(2)
            for i, (a, b) in enumerate(zip(row, old, strict=True)):
                mixed = b.clone()
                if i == 0 and not slow:
                    mixed[:n] ^= grad[:n]
                if (i > 1 and i < len(row) - 1 and not slow) or (i == len(row) - 1 and slow):
                    mixed[:n] ^= wide[:n]
                assert torch.equal(a, mixed), i

    loop.step()
    expected(slow=False)
    # The second pass of k = 2 moves the slow weight too, and takes the others back.
    loop.step()
    expected(slow=True)


def test_the_ceiling_leaves_an_optimizer_as_it_was() -> None:
    before = [torch.randn(1000) for _ in range(5)]
    now = [tensor.clone() for tensor in before]
    ceiling.Ceiling("plain", [now], k=1).step()
    assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))


def test_the_ceiling_refuses_what_it_would_fault_on() -> None:
    with pytest.raises(RuntimeError, match="64 bytes"):
        ceiling.Ceiling("plain", [[torch.zeros(65)[1:] for _ in range(5)]], k=1).step()


def test_allocations_are_seen() -> None:
    tensor = torch.ones(1000, 1000)
    assert memory.allocated_bytes(lambda: tensor.mul_(tensor)) == 0
    assert memory.allocated_bytes(lambda: tensor * tensor) == 4_000_000


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux's /proc")
def test_resident_memory_is_seen_also_when_given_back() -> None:
    tensor = torch.ones(16 << 20)
    assert memory.resident_growth(lambda: tensor.mul_(tensor)) < 2 << 20
    assert memory.resident_growth(lambda: tensor * tensor) > 60 << 20


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="other processes' time is read from Linux's /proc")
def test_a_busy_neighbour_is_seen() -> None:
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        others = cores.Others()
        time.sleep(1)
        # It has a core, or a part of one where other neighbours are busy, and these count as well.
        assert others.share() > 0.6 / (os.cpu_count() or 1)
    finally:
        neighbour.kill()
        neighbour.wait()


def test_own_work_is_not_a_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    own = os.times()
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    others = cores.Others()
    monkeypatch.setattr(os, "times", lambda: (own[0] + 1000, own[1], 0, 0, 0))
    assert others.share() == 0


def test_a_report_says_when_the_machine_was_busy() -> None:
    report = Report("title", "how", [Figure("speed", spread([2.0]), "x", 1.25)], {}, others=0.31)
    assert "31.0% of the cores: TOO BUSY" in str(report)
    assert str(report).endswith("pass?")
    assert report.record()["others"] == 0.31
    report.others = 0.01
    assert "TOO BUSY" not in str(report)
    assert str(report).endswith("pass")


def test_a_benchmark_has_a_process_of_its_own() -> None:
    assert processes.apart(os.getpid) != os.getpid()
    assert processes.apart(cpu.package) == cpu.package()
    with pytest.raises(Unavailable, match="the host does the work"):
        suite.run_apart("host-alone", Cpu(), Effort())


def test_the_command(tmp_path: Path) -> None:
    """The command prints and writes figures with targets."""
    report = tmp_path / "report" / "cpu.json"
    # One thread: on a loaded machine a thousand small parallel regions a step would take minutes.
    arguments = ["--only", "host-groups", "--rounds", "2", "--threads", "1", "--json", str(report)]
    command = [sys.executable, "-m", "bench.suites.cpu", *arguments]
    environment = {**os.environ, **processes.search_path()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    content = json.loads(report.read_text())
    assert content["conditions"]["torch"] == torch.__version__
    assert content["conditions"]["torch"] in done.stdout
    assert content["conditions"]["package"] == cpu.package()
    assert content["conditions"]["threads"] == 1
    figure = content["benchmarks"]["host-groups"]["figures"][0]
    assert figure["target"] == 1.0
    assert figure["value"]["samples"] == 2
    assert figure["met"] == (figure["value"]["median"] <= 1.0)
    assert (f"missed:\n  host-groups: {figure['label']}" in done.stdout) is not figure["met"]
