"""The demo tells the truth: a wrong optimizer makes it fail, and its figures are of what they say.

What needs matplotlib, rich and scikit-learn is skipped without them (``pip install '.[demo]'``).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import lookahead_fused
from bench.demo import data, results, runs, train
from bench.demo.check import EARLY_STEPS, LOSS, WEIGHTS, departures
from bench.demo.models import GPT, ConvNet
from bench.demo.runs import FUSED, PLAIN, UNFUSED, K, Task
from bench.demo.train import Deviations
from bench.harness import cores, processes
from lookahead_fused.bench import memory
from lookahead_fused.bench.cores import core_seconds, waited_share

EARLY_SYNCS = EARLY_STEPS // K


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Nothing here is large enough for two, which only wait for each other where tests run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def demo() -> ModuleType:
    for package in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(package)
    from bench.demo import __main__ as demo

    return demo


def tiny_gpt(steps: int = 3 * K + 4) -> Task:
    return Task(
        key="gpt",
        title="Tiny GPT",
        model=partial(GPT, width=32, layers=2, heads=2, context=16),
        data=partial(data.stdlib_text, context=16, batch=4, seed=0, held_out_batches=2),
        steps=steps,
        lr=1e-3,
        weight_decay=0.1,
        warmup=5,
    )


def tiny_digits() -> Task:
    return Task(
        key="digits",
        title="Tiny [network]",
        model=partial(ConvNet, channels=4),
        data=partial(data.digits, batch=32, seed=0),
        steps=3 * K + 4,
        lr=1e-3,
        weight_decay=0.01,
        classifies=True,
    )


def coinciding() -> Deviations:
    """As far apart as is just allowed, everywhere."""
    return Deviations(
        loss=[LOSS.early] * EARLY_STEPS + [LOSS.whole] * 10,
        weights=[WEIGHTS.early] * EARLY_SYNCS + [WEIGHTS.whole] * 2,
    )


# ---- the check -------------------------------------------------------------------------------------------


def test_runs_within_the_tolerances_coincide() -> None:
    assert departures(coinciding()) == []


@pytest.mark.parametrize(
    ("kind", "at", "value", "step"),
    [
        ("loss", 0, 1.1 * LOSS.early, 1),
        ("loss", EARLY_STEPS - 1, LOSS.whole, EARLY_STEPS),
        ("loss", -1, 1.1 * LOSS.whole, EARLY_STEPS + 10),
        ("loss", 3, math.nan, 4),
        ("weights", EARLY_SYNCS - 1, WEIGHTS.whole, EARLY_STEPS),
        ("weights", -1, 1.1 * WEIGHTS.whole, EARLY_STEPS + 2 * K),
        ("weights", 0, math.nan, K),
        ("weights", -1, math.inf, EARLY_STEPS + 2 * K),
    ],
)
def test_a_deviation_anywhere_is_found_and_named(kind: str, at: int, value: float, step: int) -> None:
    deviations = coinciding()
    getattr(deviations, kind)[at] = value
    (line,) = departures(deviations)
    assert kind in line
    assert f"at step {step}," in line


def test_nothing_compared_is_no_agreement() -> None:
    assert len(departures(Deviations([], []))) == 2


@pytest.mark.parametrize("wrong", [{"alpha": 0.501}, {"k": K + 1}, {"betas": (0.9, 0.998)}, {"eps": 1e-6}])
def test_a_slightly_wrong_optimizer_is_found_out(wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def ours(params: Any, **settings: Any) -> lookahead_fused.LookaheadAdamW:
        return lookahead_fused.LookaheadAdamW(params, **{**settings, **wrong})

    monkeypatch.setattr(runs, "LookaheadAdamW", ours)
    assert departures(train.run_task(tiny_gpt()).deviations)


# ---- the whole demo --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_reports_what_happened(demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.run([tiny_gpt(), tiny_digits()], tmp_path / "new" / "folder", "auto") == 0

    out = capsys.readouterr().out
    picture = tmp_path / "new" / "folder" / "demo.png"
    assert str(picture) in out.replace("\n", "")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"torch {torch.__version__}" in out
    assert "Tiny [network]" in out, "rich took a bracket for markup"
    content = json.loads(picture.with_suffix(".json").read_text())
    assert set(content["tasks"]) == {"gpt", "digits"}
    for task in content["tasks"].values():
        check_task(task)


def check_task(task: dict[str, Any]) -> None:
    fused, unfused, plain = (task["runs"][name] for name in (FUSED, UNFUSED, PLAIN))
    assert task["departures"] == []
    for run in (fused, unfused, plain):
        assert len(run["losses"]) == len(run["seconds"]) == task["steps"]
        assert 0 < run["step"]["q1"] <= run["step"]["median"] <= run["step"]["q3"]
        assert 0 < run["share"] < 1
    # One start and one stream of batches for all; Lookahead shows from the step after the first sync on.
    assert fused["losses"][0] == unfused["losses"][0] == plain["losses"][0]
    assert abs(plain["losses"][K] - unfused["losses"][K]) > abs(fused["losses"][K] - unfused["losses"][K])
    # Two moments and the slow weights in fp32, and a counter for each tensor: ours in fp64, torch's in fp32.
    copies, tensors = 4 * task["parameters"], task["tensors"]
    assert fused["state_bytes"] == 3 * copies + 8 * tensors
    assert unfused["state_bytes"] == 3 * copies + 4 * tensors
    assert plain["state_bytes"] == 2 * copies + 4 * tensors
    # Between two syncs the slow weights are others, and the same others in both runs.
    assert plain["held_out_slow"] is None
    for run in (fused, unfused):
        assert run["held_out_slow"]["loss"] != run["held_out"]["loss"]
    assert fused["held_out_slow"]["loss"] == pytest.approx(unfused["held_out_slow"]["loss"], abs=1e-5)


@pytest.mark.slow
def test_the_demo_fails_where_the_runs_differ(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "LookaheadAdamW", partial(lookahead_fused.LookaheadAdamW, maximize=True))
    assert demo.run([tiny_gpt()], tmp_path, "auto") == 1
    captured = capsys.readouterr()
    assert "Tiny GPT" in captured.err
    assert "do not coincide" in captured.err
    assert "DIFFER" in captured.out
    assert json.loads((tmp_path / "demo.json").read_text())["tasks"]["gpt"]["departures"]


def test_quick_only_shortens(demo: ModuleType) -> None:
    for full, quick in zip(demo.tasks(False), demo.tasks(True), strict=True):
        assert quick.steps < full.steps
        same = ("key", "title", "lr", "weight_decay", "warmup", "classifies")
        assert all(getattr(full, name) == getattr(quick, name) for name in same)


def test_a_missing_package_is_named_with_the_remedy() -> None:
    code = "import sys; sys.modules['rich'] = None; import bench.demo.__main__"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **processes.search_path()},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1
    assert done.stderr.strip().startswith("the demo needs ")
    assert ".[demo]" in done.stderr


def test_the_backend_that_serves_is_told_with_the_reason(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    status = {"cpu": lookahead_fused.BackendStatus(False, "no compiler was found")}
    monkeypatch.setattr(lookahead_fused, "backends", lambda: status)
    assert demo.backend_in_use("reference") == "reference"
    assert demo.backend_in_use("auto").startswith("reference")
    assert "no compiler was found" in demo.backend_in_use("auto")
    status["cpu"] = lookahead_fused.BackendStatus(True, "")
    assert demo.backend_in_use("auto").startswith("cpu")


def test_a_disturbed_run_says_so(demo: ModuleType) -> None:
    assert "do not rely on the times" in demo.disturbance(0.5)
    assert "50%" in demo.disturbance(0.5)
    assert "do not rely" not in demo.disturbance(0.01)
    assert "not told" in demo.disturbance(None)


# ---- what is measured ------------------------------------------------------------------------------------


def test_step_time_weighs_syncs_as_often_as_they_come() -> None:
    period = [1.0] * (K - 1) + [6.0]
    step = results.step_time([1000.0] * K + period)
    assert (step.ordinary, step.sync) == (1.0, 6.0), "the steps that create state count"
    assert step.median == pytest.approx((4 * 1.0 + 6.0) / 5)
    with_a_pause = [1000.0] * K + [50.0, *period[1:]] + 4 * period
    assert results.step_time(with_a_pause).median == step.median


class Wasteful(torch.optim.SGD):
    """Takes memory in every ``K``-th step only, and gives it back."""

    steps = 0
    size = 32 << 20

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        if self.steps % K == 0:
            torch.ones(self.size, dtype=torch.uint8)


def test_memory_of_a_step_includes_what_only_a_sync_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = Wasteful([nn.Parameter(torch.zeros(1))])
    growth, allocated = results._memory_of_steps(optimizer)
    assert optimizer.size <= allocated < 1.1 * optimizer.size
    if sys.platform == "linux":
        assert growth is not None
        assert growth > 0.9 * optimizer.size

    def refuse(run: Any) -> int:
        raise PermissionError

    monkeypatch.setattr(memory, "resident_growth", refuse)
    assert results._memory_of_steps(optimizer)[0] is None


def test_swapped_shows_the_slow_weights_and_puts_the_fast_ones_back() -> None:
    fast, slow = [torch.ones(3)], [torch.zeros(3)]
    inside: list[list[float]] = []
    with contextlib.suppress(KeyError), runs._swapped(fast, slow):
        inside.append(fast[0].tolist())
        raise KeyError
    assert inside == [[0.0] * 3]
    assert fast[0].tolist() == [1.0] * 3
    assert slow[0].tolist() == [0.0] * 3


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    task = tiny_gpt()
    model = task.model()
    with torch.no_grad():
        next(model.parameters()).fill_(math.inf)
    broken = Task(**{**vars(task), "model": lambda: model})
    with pytest.raises(FloatingPointError, match=r"Tiny GPT.*step 1 is nan"):
        train.run_task(broken)


@pytest.mark.parametrize("steps", [4 * K, K])
def test_steps_that_end_at_a_sync_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps must .* got {steps}"):
        tiny_gpt(steps)


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_waiting_for_a_core_is_a_share_of_the_time_between() -> None:
    assert waited_share((10.0, 5.0), (13.0, 6.0)) == pytest.approx(0.25)
    assert waited_share(None, (1.0, 1.0)) is None


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_time_on_cores_is_seen() -> None:
    before = core_seconds()
    burn(0.1)
    after = core_seconds()
    assert before is not None
    assert after is not None
    assert 0.05 < after[0] - before[0] < 5


def test_a_thread_that_ends_while_threads_are_counted_is_left_out(tmp_path: Path) -> None:
    for name, content in (("1", "3000000000 1000000000 7"), ("2", None), ("3", "500000000 0 1")):
        (tmp_path / name).mkdir()
        if content:
            (tmp_path / name / "schedstat").write_text(content)
    assert core_seconds(tmp_path) == (3.5, 1.0)
    assert core_seconds(tmp_path / "nowhere") is None


@pytest.mark.parametrize(("idle", "policy"), [(95, {}), (40, {"OMP_WAIT_POLICY": "passive"})])
def test_threads_sleep_only_where_other_work_holds_the_cores(
    idle: int, policy: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([(1000, 5000), (1000 + idle, 5100)])
    monkeypatch.setattr(cores, "_core_times", lambda: next(times))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert cores.waiting_policy() == policy


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_busy_cores_are_seen() -> None:
    burner = threading.Thread(target=burn, args=(0.3,))
    burner.start()
    busy = cores.busy_share(0.3)
    burner.join()
    assert busy is not None
    # One core of all; other work may add to it. Ticks are 10 ms, and the interpreter's lock takes its share.
    assert 0.5 / (os.cpu_count() or 1) < busy <= 1


# ---- data ------------------------------------------------------------------------------------------------


def library(root: Path, files: int = 20) -> None:
    for folder in ("", "test", "pkg/tests", "site-packages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for at in range(files):
            letter = (chr(ord("a") + at) if not folder else "#").encode()
            (root / folder / f"{at:02}.py").write_bytes(letter * 10)


def test_text_is_read_in_order_without_tests_and_holds_out_whole_files(tmp_path: Path) -> None:
    library(tmp_path)
    train, held_out, files = data.read_stdlib(tmp_path, 10**6)
    assert files == 20
    assert bytes(held_out.tolist()) == b"j" * 10 + b"t" * 10
    assert bytes(train.tolist()) == b"".join(bytes([c]) * 10 for c in b"abcdefghiklmnopqrs")
    assert data.read_stdlib(tmp_path, 109)[2] == 10
    with pytest.raises(FileNotFoundError, match="found 9"):
        data.read_stdlib(tmp_path, 99)


def test_text_batches_repeat_with_the_seed_and_targets_are_one_further() -> None:
    make = partial(data.stdlib_text, context=16, batch=4, held_out_batches=3)
    one, same, other = make(seed=1), make(seed=1), make(seed=2)
    for _ in range(3):
        inputs, targets = next(one.train)
        assert inputs.shape == targets.shape == (4, 16)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert torch.equal(inputs, next(same.train)[0])
        assert not torch.equal(inputs, next(other.train)[0])
    assert [inputs.shape for inputs, _ in one.held_out] == [(4, 16)] * 3


def test_digits_hold_out_images_that_training_never_sees() -> None:
    pytest.importorskip("sklearn")
    images = data.digits(batch=64, seed=0)
    ((held_out, classes),) = images.held_out
    assert held_out.shape == (360, 1, 8, 8)
    assert held_out.min() == 0
    assert held_out.max() == 1
    assert sorted(set(classes.tolist())) == list(range(10))
    seen = torch.cat([next(images.train)[0] for _ in range((1797 - 360) // 64)]).flatten(1)
    assert len(torch.unique(seen, dim=0)) == len(seen), "an epoch repeats no image"
    assert torch.cdist(held_out.flatten(1), seen).min() > 0
