"""The quick stage of `make gpu-report` without a GPU: all its logic, over the CPU and the stand-in for CUDA."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_host import HOST
from test_cuda_graphs import Capture

from bench.gpu import bandwidth, benchmarks, bits, graphs, quick
from bench.gpu.bandwidth import CHUNKS, COPY, List
from bench.gpu.results import Results
from bench.harness.figures import Report
from bench.suites import suite
from lookahead_fused.bench.device import Cpu
from lookahead_fused.bench.measure import Schedule, Side
from lookahead_fused.bench.parameters import Case, equal


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a loaded machine many small parallel regions would take minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def first_of_each() -> list[bits.Case]:
    return bits.cases()[: len(bits.DTYPES)]


def test_the_first_cases_have_every_rule_and_dtype() -> None:
    """And all of them every pair of a rule and a policy, in every dtype that it takes."""
    first, everything = first_of_each(), bits.cases()
    assert {case.rule for case in first} == bits.RULES.keys()
    assert {case.dtype for case in first} == bits.DTYPES.keys()
    assert len({case.policy for case in first}) == len(first)
    assert len(set(everything)) == len(everything) == 6 * (8 * 8 - 2 * 2)


def test_the_rooms_on_a_cpu(tmp_path: Path) -> None:
    """Each leaves its JSON, with figures of the size that they must have."""
    words = [*quick.ROOMS, "--device", "cpu", "--small", "--cases", "3", "--out", str(tmp_path)]
    assert quick.main(words) == 0
    told = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in quick.ROOMS}
    assert all(content["torch"] == torch.__version__ and not content["left_out"] for content in told.values())
    assert [record["difference"] for record in told["bits"]["records"]] == [""] * 3
    assert len(told["graphs"]["records"]) == 3
    for record in told["bandwidth"]["records"]:
        assert list(record["chunks"]) == [str(chunk) for chunk in CHUNKS]
        assert all(own["ms"] > 0 for own in record["chunks"].values())
    assert all(record["host_seconds"] > 0 for record in told["times"]["records"])


@pytest.mark.usefixtures("runtime")
def test_the_cuda_sources_have_the_bits_of_the_cpu() -> None:
    results = Results()
    assert bits.compare(first_of_each(), HOST.name, "cpu", "cpu", results), results.records


@pytest.mark.parametrize(("name", "at"), [("parameter of parameter 3 ", -1), ("exp_avg of parameter 1 ", 7)])
def test_one_wrong_bit_is_found(monkeypatch: pytest.MonkeyPatch, name: str, at: int) -> None:
    """In the last element of a tensor, and in state."""
    honest = bits.run

    def run(case: bits.Case, backend: str, device: str) -> dict[str, torch.Tensor]:
        found = honest(case, backend, device)
        if backend == "reference":
            (wrong,) = (value for key, value in found.items() if key.startswith(name))
            wrong.view(torch.int32).view(-1)[at] ^= 1
        return found

    monkeypatch.setattr(bits, "run", run)
    results = Results()
    assert not bits.compare([bits.Case("adamw", "fp32", "lookahead")], "reference", "cpu", "cpu", results)
    assert results.records[0]["difference"].startswith(name)
    assert " 1 of " in results.records[0]["difference"]


def test_a_case_that_raises_differs_and_the_next_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the device is lost: nothing can be believed after that."""
    raised = iter([RuntimeError("refused"), RuntimeError("CUDA error: an illegal memory access")])

    def run(*arguments: Any) -> Any:
        raise next(raised)

    monkeypatch.setattr(bits, "run", run)
    results = Results()
    assert not bits.compare(first_of_each(), "reference", "cpu", "cpu", results)
    assert [r["difference"].partition(":")[0] for r in results.records] == ["RuntimeError"] * 2
    assert results.head["summary"].startswith("stopped")


def test_without_time_nothing_passes(tmp_path: Path) -> None:
    results = Results(tmp_path / "bits.json", budget=0)
    assert not bits.compare(first_of_each(), "reference", "cpu", "cpu", results)
    assert len(json.loads((tmp_path / "bits.json").read_text())["left_out"]) == len(first_of_each())


def test_captured_steps_of_the_cuda_sources(runtime: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """In graphs of the stand-in's, which run what was captured and nothing else."""
    keep: list[Any] = []

    def capture(step: Callable[[], object]) -> Callable[[], object]:
        captured = Capture(runtime, monkeypatch)
        keep.append((captured, step))
        with captured:
            step()
        monkeypatch.undo()
        return captured.replay

    results = Results()
    assert graphs.compare(graphs.CASES, HOST.name, "cpu", capture, results), results.records

    def lost(step: Callable[[], object]) -> Callable[[], object]:
        capture(step)
        return lambda: None

    assert not graphs.compare(graphs.CASES[:1], HOST.name, "cpu", lost, Results())


class Fixed(Cpu):
    """A device on which a copy takes a second, and a step one more for each size of chunks; takes every step once."""

    def interleave(self, sides: Sequence[Side], schedule: Schedule) -> dict[str, list[float]]:
        assert schedule.turns == 1  # or one size of chunks would have all syncs
        assert schedule.steps % schedule.period == 0
        for side in sides:
            side.step()
        return {side.name: [1.0 + i] * 3 for i, side in enumerate([sides[-1], *sides[:-1]])}


def test_the_share_of_a_copy_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """1000 elements of 29.6 bytes in two seconds against a copy of 4096 bytes, which moves 8192, in one."""
    used = []
    honest = bandwidth.Table

    class Table(honest):  # type: ignore[misc, valid-type]
        def step(self, *arguments: Any) -> None:
            used.append(self.tuning.chunk_elements)
            super().step(*arguments)

    monkeypatch.setattr(bandwidth, "Table", Table)
    found = bandwidth.shares(List(Case("", equal(2, 500))), "cpu", Fixed(), 4096, rounds=2)
    assert found["copy_gb_per_s"] == pytest.approx(8192e-9)
    assert [own["ms"] for own in found["chunks"].values()] == [2000, 3000, 4000, 5000, 6000]
    assert found["chunks"][CHUNKS[0]]["share"] == pytest.approx(29600 / 2 / 8192)
    assert used == list(CHUNKS)
    assert COPY not in found["chunks"]


def test_a_list_that_does_not_fit_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    device, results = Fixed(), Results()
    monkeypatch.setattr(device, "available_bytes", lambda: 1000)
    assert not bandwidth.measure(bandwidth.SMALL, "cpu", device, 1 << 30, results)
    assert all("needs 2.0 GiB" in record["skipped"] for record in results.records)


def test_benchmarks_are_written_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails or has no time is told, and hides no other."""
    path = tmp_path / "benchmarks.json"

    def run(name: str, device: Cpu, effort: object) -> Report:
        if name == "third":
            assert len(json.loads(path.read_text())["benchmarks"]) == 1
        if name == "second":
            raise RuntimeError("no")
        return Report(name, "", [], {"ours": [1.0]})

    monkeypatch.setattr(suite, "run", run)
    assert not benchmarks.measure(["first", "second", "third"], Cpu(), path, budget=60)
    told = json.loads(path.read_text())
    assert [b["extra_info"]["title"] for b in told["benchmarks"]] == ["first", "third"]
    assert told["skipped"] == {"second": "RuntimeError: no"}
    assert not benchmarks.measure(["first"], Cpu(), path, budget=-1)
    assert json.loads(path.read_text())["skipped"] == {"first": "no time was left for it"}
