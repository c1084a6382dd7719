"""Narrow moments beside fp32's: the settings that are run, what is made of the record, and one training of each arm."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from bench.evidence import narrow, results
from bench.evidence.experiment import JSON, Scale
from bench.evidence.narrow import ARMS, BASELINE, DTYPES, EXPERIMENT, Narrow, Plan, Setting, table
from bench.evidence.records import Records


def recorded(experiment: Narrow, scale: Scale, results: Mapping[str, float]) -> Records:
    """A record of all jobs, whose losses are the seed and what the kind of state adds to it."""
    records = Records(None)
    for job in experiment.jobs(scale, records):
        dtype, seed = job.setting["dtype"], job.setting["seed"]
        assert isinstance(dtype, str)
        assert isinstance(seed, int)
        loss = 1 + seed + results[dtype] * (1 + 0.1 * seed)
        width = {"float32": 8, "bfloat16": 4, "int8": 2}[dtype]
        result: dict[str, JSON] = {"final": loss, "train": loss, "parameters": 100, "moments": 100 * width}
        records.add(experiment.name, experiment.revision, job.setting, result, 1.0)
    return records


@pytest.mark.parametrize("scale", EXPERIMENT.plans)
def test_every_kind_of_state_is_run_at_the_same_settings(scale: Scale) -> None:
    settings = [dict(job.setting) for job in EXPERIMENT.jobs(scale, Records(None))]
    assert {setting["arm"] for setting in settings} == set(ARMS)
    by_dtype = [[s | {"dtype": ""} for s in settings if s["dtype"] == dtype] for dtype in DTYPES]
    assert by_dtype[0]
    assert all(of_dtype == by_dtype[0] for of_dtype in by_dtype)
    places = [tuple(setting.values()) for setting in settings]
    assert len(set(places)) == len(places)


def test_figures_compare_seed_by_seed() -> None:
    experiment = Narrow(plans={Scale.FULL: Plan(6, {"snoo": (1.0, 2.0)}), Scale.SMOKE: Plan(2, {})})
    records = recorded(experiment, Scale.FULL, {"float32": 0.0, "bfloat16": 0.5, "int8": -0.25})
    found = {figure.name: figure for figure in results.collect([experiment], Scale.FULL, records)[0].figures}
    level = found["narrow.digits.snoo.2.float32.final"]
    assert (level.value, level.high - level.value) == (pytest.approx(3.5), pytest.approx(3.5**0.5))
    assert level.note.startswith("lr 0.004; 6 seeds.")
    difference = found["narrow.gpt.snoo.1.bfloat16-float32.final"]
    assert (difference.value, difference.n, difference.p) == (pytest.approx(0.625), 6, pytest.approx(0.03125))
    assert found["narrow.gpt.snoo.1.int8-float32.final"].value == pytest.approx(-0.3125)
    assert found["narrow.gpt.snoo.1.int8.state"].value == 2
    lines = table(list(found.values())).splitlines()
    assert len(lines) == 2 + 4
    # Eight comparisons, each of them as unlikely: Holm's correction multiplies by as many.
    assert lines[2].startswith("| gpt | snoo | 0.001 | 3.5000 ± 1.8708 | +0.6250 [")
    assert lines[2].endswith("0.25 | 8, 4, 2 |")


def test_what_is_missing_of_a_seed_leaves_the_seed_out() -> None:
    experiment = Narrow(plans={Scale.FULL: Plan(4, {"ema": (1.0,)}), Scale.SMOKE: Plan(2, {})})
    whole = recorded(experiment, Scale.FULL, dict.fromkeys(DTYPES, 0.0))
    part = Records(None)
    for setting, result in itertools.islice(whole.of("narrow", 1), 11):
        part.add("narrow", 1, setting, result, 1.0)
    found = {figure.name: figure for figure in experiment.figures(part)}
    assert found["narrow.gpt.ema.1.int8-float32.final"].n == 3
    assert "narrow.digits.ema.1.int8-float32.final" not in found


def test_the_table_comes_back_from_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = recorded(EXPERIMENT, Scale.FULL, {"float32": 0.0, "bfloat16": 0.01, "int8": -0.02})
    found, _ = results.collect([EXPERIMENT], Scale.FULL, records)
    results.save(found, tmp_path / "narrow.json")
    assert narrow.main(["table", str(tmp_path / "narrow.json")]) == 0
    assert capsys.readouterr().out.strip() == table(found.figures)
    assert narrow.main(["table", str(tmp_path / "none.json")]) == 2


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_trains_with_every_kind_of_state(arm: str) -> None:
    pytest.importorskip("sklearn")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = {dtype: narrow._train(Setting("digits", arm, 1.0, dtype, 3, 40))() for dtype in DTYPES}
        again = narrow._train(Setting("digits", arm, 1.0, "bfloat16", 3, 40))()
    finally:
        torch.set_num_threads(threads)
    assert again == found["bfloat16"]
    assert found["bfloat16"]["final"] != found[BASELINE]["final"]
    for dtype, width in zip(DTYPES, (8, 4, 2), strict=True):
        one = found[dtype]
        assert isinstance(one["final"], float)
        assert one["final"] < 2.1  # that of a guess is 2.3
        assert isinstance(one["moments"], int)
        assert isinstance(one["parameters"], int)
        assert width <= one["moments"] / one["parameters"] < width + 0.1
