"""What the benchmarks write: pytest-benchmark's format, the table, the page and its pictures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.harness import processes
from bench.report import page, pictures, predict, tables
from bench.suites import cpu, steps
from lookahead_fused.bench import memory, opponents, parameters
from lookahead_fused.bench.device import Cpu
from lookahead_fused.bench.measure import Effort, Unavailable
from lookahead_fused.bench.opponents import OURS, PLAIN, SYNC, Setting

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run of a part of the suite wrote."""
    target = tmp_path_factory.mktemp("bench") / "bench.json"
    # Under xdist pytest-benchmark turns itself off.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= processes.search_path()
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(ROOT),
        "-c", str(ROOT / "pyproject.toml"), str(ROOT / "bench/suites/bench_suite.py"), "--benchmark-quiet",
        # Or pytest puts the source tree before what is installed.
        "--import-mode=append",
        # One thread: on a loaded machine a thousand small parallel regions a step would take minutes.
        "--rounds", "2", "--threads", "1", f"--benchmark-json={target}",
        "-k", "many-small-each or host-alone",
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    loaded: dict[str, Any] = json.loads(target.read_text())
    return loaded


def test_the_suite_writes_pytest_benchmarks_format(content: dict[str, Any]) -> None:
    [benchmark] = [b for b in content["benchmarks"] if b["param"] == "many-small-each"]
    info = benchmark["extra_info"]
    assert benchmark["stats"]["rounds"] == 2
    # The samples of ours went through the fixture's clock.
    assert benchmark["stats"]["mean"] == pytest.approx(sum(info["seconds"][OURS]) / 2, rel=1e-4)
    assert (info["rule"], info["layout"], info["tensors"], info["device"]) == ("adamw", "each", 1000, "cpu")
    assert info["threads"] == 1
    figure = next(f for f in info["figures"] if f["of"] == SYNC)
    assert figure["value"]["q1"] <= figure["value"]["median"] <= figure["value"]["q3"]
    assert content["conditions"]["torch"] == torch.__version__
    assert content["conditions"]["package"] == cpu.package(), "another package was measured"
    assert content["conditions"]["threads"] == 1


def test_what_was_not_run_is_told(content: dict[str, Any]) -> None:
    assert "host does the work" in dict(tables.skipped_rows(content))["host-alone"]


def test_the_page_needs_no_other_file(content: dict[str, Any]) -> None:
    text = page.to_html(content)
    assert 'src="data:image/png;base64,' in text
    assert "http" not in text
    assert "1000 tensors of 64, AdamW, group per tensor" in text
    assert "A prediction, not a measurement" in text
    assert content["conditions"]["torch"] in text


def made_up(*medians: float) -> dict[str, Any]:
    """A run with one comparison, of a ratio each to torch with and without a sync."""
    figures = [
        {"label": name, "unit": "x", "target": 1.25 if name == SYNC else None, "at_least": True, "met": False,
         "kind": "ratio", "of": name,
         "value": {"median": m, "q1": m - 0.02, "q3": m + 0.02, "of_medians": m, "samples": 9}}
        for name, m in zip((SYNC, PLAIN), medians, strict=True)
    ]  # fmt: skip
    info = {"short": "GPT-2, AdamW", "title": "t", "figures": figures, "others": 0.5, "skipped": {}, "device": "cuda",
            "case": "gpt2-small", "rule": "adamw", "dtype": "fp32", "k": 5, "layout": "one",
            "median_seconds": {OURS: 0.0012}}  # fmt: skip
    where = {"gpu": "NVIDIA H100 80GB HBM3", "machine": "", "cores": 2, "threads": 2, "torch": "2", "utc": "2026-01-01"}
    return {"benchmarks": [{"extra_info": info}], "conditions": where}


def test_losses_and_ties_are_said_as_wins_are() -> None:
    rows = tables.ratio_rows(made_up(0.9, 1.01))
    assert [row[-1] for row in rows] == ["slower (machine busy)", "tie (machine busy)"]
    assert tables.summary(rows).startswith("2 ratios: 0 faster, 1 tie, 1 slower")
    assert tables.target_rows(made_up(0.9, 1.01))[0][-1] == "missed"
    assert tables.target_rows(made_up(1.3, 1.01))[0][-1] == "met"


def test_pictures_are_drawn(tmp_path: Path) -> None:
    target = tmp_path / "ratios.png"
    pictures.save(pictures.ratios(made_up(0.9, 1.1), all_opponents=False), target)
    assert target.read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------------------------
# GPUs


def test_predictions_by_hand() -> None:
    records = {(r["case"], r["gpu"]): r["ms"] for r in predict.predictions()}
    assert len(records) == len(predict.LISTS) * 4
    ms = records["one-large", "H100 SXM"]
    assert ms[OURS] == pytest.approx(1e3 * (64 * 2**20 * 29.6 / 3.35e12 + 2 * 3e-6))
    assert ms[SYNC] > ms[OURS] > ms[PLAIN]  # bytes: 32, 29.6 and 28
    [offloaded] = [r for r in predict.predictions() if (r["case"], r["gpu"]) == ("one-large", "H100 SXM")]
    link = 1e3 * 64 * 2**20 * 4 / 64e9
    assert offloaded["offloaded_sync_ms"] == pytest.approx(link)
    assert offloaded["offloaded_ms"] == pytest.approx(1e3 * (4 * 64 * 2**20 * 28 / 3.35e12 / 5 + 2 * 3e-6) + link / 5)
    assert "PREDICTED" not in "".join(map(str, predict.table()))
    assert all(row[-4:] == ["—"] * 4 for row in predict.table())


def test_a_run_on_a_gpu_fills_its_own_rows() -> None:
    filled = [row for row in predict.table(made_up(1.5, 0.96)) if row[-4] != "—"]
    [row] = filled
    assert row[:2] == ["GPT-2 small", "H100 SXM"]
    assert row[-4:] == ["1.200", "—", "1.50×", "0.96×"]


# ------------------------------------------------------------------------------------------------------------
# memory


def test_a_comparison_that_does_not_fit_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Cpu()
    monkeypatch.setattr(device, "available_bytes", lambda: 10 << 30)
    with pytest.raises(Unavailable, match=r"needs \d+\.\d GiB, 10\.0 GiB are available"):
        steps.compare(steps.COMPARISONS["gpt2-xl-adamw"], device, Effort())


@pytest.mark.parametrize(("name", "expected"), [(PLAIN, 8), (SYNC, 12)])
def test_state_of_any_optimizer_is_counted_once(name: str, expected: int) -> None:
    params = parameters.make(parameters.Case("", ((10_000,),)))
    optimizer = opponents.OPPONENTS[name].make(Setting(), parameters.groups(params, "one"))
    optimizer.step()
    assert memory.state_bytes(optimizer, params) / 10_000 == pytest.approx(expected, abs=0.01)


def test_slow_weights_count_as_state_and_shared_memory_once() -> None:
    parameter = torch.nn.Parameter(torch.zeros(100))
    parameter.grad = torch.ones(100)
    inner = torch.optim.AdamW([parameter], fused=True)
    sync = opponents.ForeachSync(inner)
    sync.step()
    assert memory.state_bytes(inner, [parameter]) == 2 * 400 + 4
    assert memory.state_bytes(sync, [parameter]) == 3 * 400 + 4
    inner.state[parameter]["alias"] = inner.state[parameter]["exp_avg"][:10]
    assert memory.state_bytes(sync, [parameter]) == 3 * 400 + 4


def test_masters_count_as_state() -> None:
    setting = Setting(dtype="bf16-master")
    params = parameters.make(parameters.Case("", ((10_000,),)), dtype=torch.bfloat16)
    optimizer = opponents.OPPONENTS[opponents.MASTERS].make(setting, parameters.groups(params, "one"))
    optimizer.step()
    # master, its gradient, two moments, the slow weight: 4 bytes each
    assert memory.state_bytes(optimizer, params) / 10_000 == pytest.approx(20, abs=0.01)
