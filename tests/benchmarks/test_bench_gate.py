"""The gate catches what became worse and passes what did not; what it counts is what the design says.

Most of it runs on planted numbers; what is planted into the optimizer itself is measured for real, on one thread.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cuda_on_host
from bench.cases import traffic
from bench.harness import processes
from bench.harness.figures import Figure
from bench.suites import counts, gate, instructions, steps
from lookahead_fused import LookaheadAdamW, LookaheadSGD
from lookahead_fused.bench import opponents, parameters
from lookahead_fused.bench.device import Cpu
from lookahead_fused.bench.measure import Schedule, Side, interleave
from lookahead_fused.bench.opponents import PLAIN, SYNC, Setting
from lookahead_fused.bench.samples import Samples, Spread

# What one worker has counted and measured serves all tests here.
pytestmark = pytest.mark.xdist_group("gate")

DEVICE = {"processor": "a", "cores": 2, "threads": 2, "gpu": ""}


def figures(*medians: float, q1: float = 0.0) -> Callable[[str], dict[str, Figure]]:
    """A benchmark that measures these medians in turn, the last one for ever."""
    left = list(medians)

    def run(name: str) -> dict[str, Figure]:
        median = left.pop(0) if len(left) > 1 else left[0]
        return {SYNC: Figure("", Spread(median, median - q1, median + q1), "x", kind="ratio", of=SYNC)}

    return run


def baseline(median: float, spread: float) -> dict[str, Any]:
    return {"device": DEVICE, "benchmarks": {"gpt2": {SYNC: {"median": median, "spread": spread}}}}


def test_counts_must_be_equal_or_better() -> None:
    before = {"launches": 2.0, "bytes": 28.0, "uploads": 0.0}
    assert gate.compare_counts(dict(before), before).problems == []
    better = gate.compare_counts({**before, "bytes": 24.0}, before)
    assert better.problems == []
    assert "better: bytes: 24, and was 28" in better.notes
    assert gate.compare_counts({**before, "uploads": 1.0}, before).problems == ["uploads: 1, and was 0"]
    assert "no longer counted" in gate.compare_counts({"launches": 2.0, "bytes": 28.0}, before).problems[0]
    assert gate.compare_counts({**before, "new": 1.0}, before).notes == ["not in the baseline: new: 1"]


def test_instructions_have_a_tolerance_and_an_environment() -> None:
    environment = {"python": "3.11", "processor": "a"}
    recorded = {"environment": environment, "counts": {"step": 1000.0}}

    def verdict(now: float, where: dict[str, str]) -> gate.Verdict:
        return gate.compare_instructions(lambda: {"step": now}, where, recorded)

    assert verdict(1000 * (1 + instructions.TOLERANCE), environment).problems == []
    assert verdict(1000 * (1 + 2 * instructions.TOLERANCE), environment).problems
    other = verdict(9000, {**environment, "processor": "b"})
    assert (other.problems, other.compared) == ([], 0)
    assert "not compared: processor 'b', was 'a'" in other.notes[0]


def test_ratios_may_fall_within_their_spread() -> None:
    assert gate.compare_ratios(figures(1.16), DEVICE, baseline(1.2, 0.05)).problems == []
    fallen = gate.compare_ratios(figures(1.14), DEVICE, baseline(1.2, 0.05))
    assert fallen.problems == [f"gpt2: {SYNC}: 1.140, and was 1.200 with a spread of 0.050"]


def test_a_fallen_ratio_is_measured_again() -> None:
    assert gate.compare_ratios(figures(0.9, 1.0, 1.2), DEVICE, baseline(1.2, 0.05)).problems == []
    assert gate.compare_ratios(figures(0.9, 1.0, 1.1, 1.2), DEVICE, baseline(1.2, 0.05)).problems


@pytest.mark.parametrize("key", DEVICE)
def test_times_of_another_device_are_not_compared(key: str) -> None:
    def never(name: str) -> dict[str, Figure]:
        raise AssertionError("measured on another device")

    verdict = gate.compare_ratios(never, {**DEVICE, key: "other"}, baseline(1.2, 0.05))
    assert (verdict.problems, verdict.compared) == ([], 0)
    assert "not compared, this is another device" in verdict.notes[0]
    assert key in verdict.notes[0]


def test_a_ratio_that_is_gone_is_a_problem() -> None:
    assert "no longer" in gate.compare_ratios(lambda name: {}, DEVICE, baseline(1.2, 0.05)).problems[0]


def test_a_baseline_has_the_spread_of_several_runs() -> None:
    made = gate.make_ratios(figures(1.2, 1.3, 1.25, q1=0.02), ["gpt2"], DEVICE)
    entry = made["benchmarks"]["gpt2"][SYNC]
    # Half as much again as they are apart.
    assert entry == {"median": 1.25, "spread": 0.15, "medians": [1.2, 1.3, 1.25]}
    made = gate.make_ratios(figures(1.25, 1.25, 1.24, q1=0.02), ["gpt2"], DEVICE)
    # The lowest median is 0.01 below, and its own uncertainty is 0.04 over the root of one sample, twice.
    assert made["benchmarks"]["gpt2"][SYNC]["spread"] == 0.09


def test_the_gate_measures_in_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(processes, "apart", lambda *task: asked.append(task))
    gate.measure_apart("gpt2-adamw")
    assert asked == [(gate.measure_ratios, "gpt2-adamw")]


# ------------------------------------------------------------------------------------------------------------
# what is counted


@pytest.fixture(scope="module")
def counted() -> dict[str, float]:
    if cuda_on_host.missing():
        pytest.skip(cuda_on_host.missing())
    return counts.all_counts()


def test_the_arithmetic_is_what_is_counted(counted: dict[str, float]) -> None:
    for setting in counts.SETTINGS:
        name = f"{setting.rule}, {setting.dtype}"
        assert counted[f"bytes per parameter, {name}"] == traffic.step_bytes(setting)
        in_sync = counted[f"bytes per parameter, {name}, in a sync"]
        assert in_sync == traffic.step_bytes(setting) + traffic.sync_bytes(setting)
        assert counted[f"accesses elsewhere, {name}"] == 0
        assert counted[f"bytes allocated by torch in a period, {name}"] == 0
    assert counted["bytes per parameter, adamw, fp32"] == 28
    assert counted["bytes per parameter, adamw, fp32, in a sync"] == 36
    assert counted["state bytes per parameter, adamw, fp32"] == 12
    launches = [number for name, number in counted.items() if name.startswith("launches")]
    assert set(launches) == {traffic.OUR_LAUNCHES}


def test_the_committed_baseline_counts_the_same_things(counted: dict[str, float]) -> None:
    recorded = json.loads(gate.BASELINE.read_text())
    assert recorded["counts"].keys() == counted.keys()
    assert gate.compare_counts(counted, recorded["counts"]).problems == []


def test_a_second_pass_is_caught_by_the_counts(counted: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    backend = cuda_on_host.backend()
    exact = backend.Stepper.run

    def twice(*arguments: Any) -> None:
        exact(*arguments)
        exact(*arguments)

    monkeypatch.setattr(backend.Stepper, "run", twice)
    problems = gate.compare_counts(counts.all_counts(), counted).problems
    assert any(problem.startswith("launches, gpt2-small") for problem in problems)
    assert any(problem.startswith("bytes per parameter, adamw, fp32:") for problem in problems)


def test_launches_of_torch_by_hand() -> None:
    """The loop of multi_tensor_apply at its two limits: tensors a launch, and blocks a launch."""
    assert traffic.multi_tensor_launches([(64,)] * 252, 4) == 1
    assert traffic.multi_tensor_launches([(64,)] * 253, 4) == 2
    assert traffic.multi_tensor_launches([(0,)] * 1000, 4) == 0
    assert traffic.multi_tensor_launches([(64,)] * 1000, 4, "CUDA 12") == 28
    one = [(64 * 2**20,)]  # 1024 chunks
    assert traffic.multi_tensor_launches(one, 4) == 1
    assert traffic.multi_tensor_launches(one, 4, "CUDA 12") == 4
    assert traffic.torch_bytes(Setting(), SYNC) == pytest.approx(32)
    assert traffic.torch_bytes(Setting(), PLAIN) == 28


# ------------------------------------------------------------------------------------------------------------
# planted slowdowns, measured


@dataclass
class Watched:
    """A comparison of which the gate has a baseline, made here and now."""

    name: str
    recorded: dict[str, Any]

    def verdict(self) -> gate.Verdict:
        return gate.compare_ratios(gate.measure_ratios, DEVICE, self.recorded)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On a loaded machine a step of several threads waits for the last of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# By how much of itself a ratio may fall here; what is planted makes it less than half.
ROOM = 0.4
PLANTED = {
    # SGD moves the fewest bytes: an extra pass that reads two arrays and writes one is 12 beside 21.6, four are 48.
    "large": steps.Comparison("planted", Setting("sgd"), near=(PLAIN,), rounds=30),
    "many": steps.Comparison("many-small", near=(PLAIN,), rounds=5),
}


def _recorded(name: str) -> dict[str, Any]:
    """A baseline made now, with as much room as a busier or a quieter minute after it takes; a planted slowdown is far
    beyond."""
    recorded = gate.make_ratios(gate.measure_ratios, [name], DEVICE)
    ratio = recorded["benchmarks"][name][PLAIN]
    ratio["spread"] = ROOM * ratio["median"]
    return recorded


def _interleave(self: Cpu, sides: Sequence[Side], schedule: Schedule) -> Samples:
    """By the time that this thread has had a core, which leaves out what other work has of the machine."""
    return interleave(sides, schedule, clock=time.thread_time, sleep=lambda _: None)


@pytest.fixture(scope="module", params=PLANTED)
def watched(request: pytest.FixtureRequest, one_thread: None) -> Iterator[Watched]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cpu, "interleave", _interleave)
        patch.setitem(parameters.CASES, "planted", parameters.Case("8 tensors", parameters.equal(8, 1 << 19)))
        patch.setitem(steps.COMPARISONS, request.param, PLANTED[request.param])
        yield Watched(request.param, _recorded(request.param))


@pytest.mark.slow
def test_the_same_code_passes(watched: Watched) -> None:
    verdict = watched.verdict()
    assert verdict.problems == []
    assert verdict.compared == 1


@pytest.mark.slow
@pytest.mark.parametrize("slowdown", ["further passes", "a Python loop"])
def test_a_planted_slowdown_is_caught(watched: Watched, slowdown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if (watched.name, slowdown) == ("large", "a Python loop"):
        pytest.skip("eight tensors make no loop")
    for planted in (LookaheadAdamW, LookaheadSGD):
        exact = planted.step

        def slower(self: Any, closure: Any = None, exact: Any = exact) -> Any:
            found = exact(self, closure)
            with torch.no_grad():
                params = self.param_groups[0]["params"]
                if slowdown == "further passes":
                    for _ in range(4):
                        torch._foreach_add_(params, [p.grad for p in params], alpha=0.0)
                else:
                    for p in params:
                        p.mul_(1.0)
            return found

        monkeypatch.setattr(planted, "step", slower)
    [problem] = watched.verdict().problems
    assert PLAIN in problem


@pytest.mark.slow
@pytest.mark.skipif(bool(instructions.unavailable()), reason=f"counts instructions: {instructions.unavailable()}")
def test_instructions_are_the_same_twice_and_more_with_a_loop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The loop is over the first group: a second run has the same counts where that is one tensor of many groups."""
    first = instructions.count()
    (tmp_path / "sitecustomize.py").write_text(
        "import lookahead_fused._fused as o\n"
        "exact = o.FusedLookahead.step\n"
        "def step(self, closure=None):\n"
        "    exact(self, closure)\n"
        "    for p in self.param_groups[0]['params']: p.grad\n"
        "o.FusedLookahead.step = step\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    verdict = gate.compare_counts(instructions.count(), first, instructions.TOLERANCE)
    told = " ".join(verdict.problems + verdict.notes)
    assert sum("1000 tensors, gradients" in problem for problem in verdict.problems) == 2
    assert "a group per tensor" in " ".join(first)
    assert "a group per tensor" not in told


def test_the_command_says_what_is_worse(
    counted: dict[str, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(counts, "all_counts", lambda: counted)
    monkeypatch.setattr(instructions, "count", lambda: {"step": 1000.0})
    file = tmp_path / "baseline.json"
    command = ["--counts", "--baseline", str(file)]
    assert gate.main(["check", *command]) == 1
    assert "there is no baseline" in capsys.readouterr().out
    assert gate.main(["baseline", *command]) == 0
    assert gate.main(["check", *command]) == 0
    assert "0 worse" in capsys.readouterr().out
    worse = {**counted, "launches, moe, one group, gradients stay": 3.0}
    monkeypatch.setattr(counts, "all_counts", lambda: worse)
    assert gate.main(["check", *command]) == 1
    assert "WORSE: launches, moe, one group, gradients stay: 3, and was 2" in capsys.readouterr().out


def test_ours_is_named_by_its_backend() -> None:
    params = parameters.make(parameters.CASES["scalars-1"])
    optimizer: Any = opponents.ours("cpu")[0].make(Setting(), parameters.groups(params, "one"))
    assert optimizer.defaults["backend"] == "cpu"
