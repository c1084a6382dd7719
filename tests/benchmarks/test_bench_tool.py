"""The installed benchmark: it finds what is slower and nothing else, and says how sure it is.

The statistics run on drawn numbers, the workers on lists of a few tensors.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lookahead_fused
from bench.harness import processes
from bench.suites.power import planted
from lookahead_fused.bench import __main__ as tool
from lookahead_fused.bench import pairs, run, schema, sequential, tables
from lookahead_fused.bench.opponents import OURS
from lookahead_fused.bench.pairs import Install, Work, WorkerFailed
from lookahead_fused.bench.schema import Figure, Malformed

OWN = Path(lookahead_fused.__file__).parents[1]
LIMIT = 0.98


def drawn(
    generator: random.Random, change: float, between: float, pairs: int, scatter: float = 0.02
) -> list[list[float]]:
    """Blocks as a busy machine gives them: one in twenty is four times as far off as the rest."""
    groups = []
    for _ in range(pairs):
        own = generator.gauss(math.log(1 + change), between)
        groups.append([generator.gauss(own, scatter * (4 if generator.random() < 0.05 else 1)) for _ in range(12)])
    return groups


def verdict(groups: list[list[float]]) -> str:
    """What a comparison says that stops as soon as it can."""
    progress = pairs.Progress()
    for group in groups:
        for clock in pairs.CLOCKS:
            progress.groups[clock].append(group)
        progress.judge(LIMIT)
        if progress.verdict != "undecided":
            break
    return progress.verdict


@pytest.mark.parametrize(("change", "expected"), [(-0.02, "slower"), (0.0, "holds"), (0.02, "holds")])
def test_two_percent_are_found_and_nothing_else(change: float, expected: str) -> None:
    generator = random.Random(0)
    verdicts = [verdict(drawn(generator, change, 0.003, 10)) for _ in range(60)]
    assert verdicts.count(expected) >= 56
    if change >= 0:
        assert verdicts.count("slower") <= 1


def test_what_is_too_noisy_to_tell_is_undecided_and_not_slower() -> None:
    """Where nothing is known it must not be decided by which side happened to be ahead."""
    generator = random.Random(3)
    verdicts = [verdict(drawn(generator, 0.0, 0.003, 6, scatter=0.2)) for _ in range(100)]
    assert verdicts.count("undecided") >= 80
    assert verdicts.count("slower") <= 2


def test_the_interval_is_below_one_exactly_where_a_clock_says_slower() -> None:
    """Else a reader sees "slower" beside an interval with both slower and faster in it."""
    generator = random.Random(4)
    said = []
    for number in range(200):
        progress = pairs.Progress()
        change, scatter = generator.uniform(-0.03, 0.01), generator.choice((0.02, 0.05))
        for clock in pairs.CLOCKS:
            progress.groups[clock] = drawn(generator, change, 0.003, 5 + number % 4, scatter)
        progress.judge(LIMIT)
        for clock, answer in progress.answers.items():
            assert answer.slower == (progress.interval(clock)[1] < 0)
            said.append(answer.slower)
    assert 50 < sum(said) < 350


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, 3), (1000.0, 5)])
def test_a_comparison_ends_with_a_look(seconds: float, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At what there is where the time is over before the first look would come."""
    generator = random.Random(5)

    def blocks(*_: object) -> Iterator[dict[str, dict[str, float]]]:
        for ratio in drawn(generator, -0.1, 0.003, 1)[0]:
            yield {"A": dict.fromkeys(pairs.CLOCKS, 1.0), "B": dict.fromkeys(pairs.CLOCKS, math.exp(-ratio))}

    monkeypatch.setattr(pairs, "_blocks", blocks)
    found = pairs.compare(Install("A", OWN), Install("B", OWN), Work("scalars-1"), limit=LIMIT, seconds=seconds)
    assert (found.verdict, len(found.groups["cores"]), found.look) == ("slower", expected, 1)


def test_pairs_of_processes_that_differ_widen_the_interval() -> None:
    """As many blocks say less where they come from processes that differ by more than their blocks do."""
    generator = random.Random(1)
    alike, apart = (sequential.estimate(drawn(generator, 0, between, 10)) for between in (0.0, 0.05))
    assert apart.error > 3 * alike.error
    assert apart.between == pytest.approx(0.05, rel=0.5)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    generator = random.Random(2)
    held = 0
    for _ in range(300):
        low, high = sequential.estimate(drawn(generator, 0.01, 0.01, 5)).bounds(0.05)
        held += low <= math.log(1.01) <= high
    assert 0.85 <= held / 300 <= 0.97


def test_one_burst_of_a_neighbour_moves_no_mean() -> None:
    calm = [0.001 * i for i in range(-6, 7)]
    mean, _ = sequential.trimmed([*calm[:-1], 3.0])
    assert abs(mean) < 0.002


def test_all_looks_together_spend_the_whole_bound_and_no_more() -> None:
    assert 0.999 < sum(sequential.share(look) for look in range(1, 5000)) < 1


@pytest.mark.parametrize(
    ("p", "freedom", "expected"), [(0.975, 5, 2.570582), (0.995, 10, 3.169273), (0.9999, 30, 4.233986)]
)
def test_quantiles_are_those_of_the_tables(p: float, freedom: float, expected: float) -> None:
    assert sequential.t_quantile(p, freedom) == pytest.approx(expected, abs=1e-6)


# ------------------------------------------------------------------------------------------------------------
# workers


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few blocks a pair, one pair before the first look: what is tested is the way there."""
    monkeypatch.setattr(pairs, "BLOCKS", (5, 6))
    monkeypatch.setattr(pairs, "FIRST_LOOK", 1)
    monkeypatch.setattr(pairs, "TURN", 0.002)


def command(*arguments: object) -> int:
    return tool.main([str(word) for word in arguments])


@pytest.mark.usefixtures("quick")
def test_a_directory_with_a_slower_copy_fails(tmp_path: Path) -> None:
    """A copy that walks its memory three times is slower than itself, and its record says by how much."""
    slow = planted(tmp_path / "slow", 200)
    file, page = tmp_path / "found" / "compared.json", tmp_path / "found.md"
    # On a quiet machine the first pair decides; a busy one takes as many as it needs.
    options = ("--case", "one-16mi", "--k", 1, "--seconds", 120, "--json", file, "--markdown", page)
    assert command("compare", OWN, slow, *options) == tool.SLOWER
    found = schema.read(file, schema.Comparison)
    assert found.verdict == "slower"
    assert 0.2 < found.ratios["cores"].median < 0.6
    assert min(ratio.high for ratio in found.ratios.values()) < 1
    assert Path(found.b.folder) == slow / "lookahead_fused"
    assert page.read_text().startswith("**B is slower by ")
    assert "\n| a step | A | B |" in page.read_text()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("source", "told"),
    [("import os; os._exit(3)", "status 3"), ("import nothing_of_that_name", "nothing_of_that_name")],
)
def test_a_worker_that_dies_is_told_with_its_last_words(
    source: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lookahead_fused").mkdir()
    (tmp_path / "lookahead_fused" / "__init__.py").write_text(source)
    assert command("compare", tmp_path, tmp_path, "--case", "scalars-1") == tool.FAULT
    error = capsys.readouterr().err
    assert "the worker of A" in error
    assert told in error


def test_a_worker_that_hangs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lookahead_fused").mkdir()
    (tmp_path / "lookahead_fused" / "__init__.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(pairs, "PATIENCE", 0.5)
    install = Install("B", tmp_path)
    with pairs.Worker(install) as worker:
        worker.send(do="make", **vars(Work("scalars-1")))
        with pytest.raises(WorkerFailed, match=r"worker of B .* said nothing for 0 s"):
            worker.answer()
    assert worker.process.returncode is not None


def test_an_interpreter_runs_its_own_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what PYTHONPATH of this process says; a directory is what PYTHONPATH says."""
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    _, environment = Install("A", Path(sys.executable)).command()
    assert "PYTHONPATH" not in environment
    words, environment = Install("A", OWN).command()
    assert (words[0], environment["PYTHONPATH"]) == (sys.executable, str(OWN))


@pytest.mark.parametrize(
    ("given", "told"),
    [("missing", "there is no file or directory"), ("", "has no lookahead_fused"), ("file", "neither a directory nor")],
)
def test_what_is_no_install_is_refused(
    given: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert command("compare", OWN, tmp_path / given) == tool.FAULT
    assert told in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------
# runs, and what they are compared with


def a_run(ratio: float = 2.0, scatter: float = 0.01, **machine: object) -> schema.Run:
    """A run of one case, with `ratio` against torch's."""
    place = {"processor": "a", "cores": 2, "threads": 2, "gpu": "", "system": "", "huge_pages": "", "load_before": 0.0}
    work = schema.Work("many-small", "adamw", "fp32", 5, "cpu")

    def figure(median: float) -> Figure:
        return Figure(median, median * (1 - scatter), median * (1 + scatter), 100)

    result = schema.Result(
        work, 1000, 64_000, 0.0, {OURS: figure(1e-3), "torch-fused": figure(1e-3 * ratio)},
        {"torch-fused": figure(ratio)}, {"timm": "timm is not installed"},
    )  # fmt: skip
    package = schema.Package("0.1.0", "/there", "3.11", "2.13")
    return schema.Run(package, schema.Machine(**{**place, "utc": "", **machine}), [result])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("now", "scatter", "status"),
    [(2.0, 0.01, 0), (2.2, 0.01, 0), (1.96, 0.01, 0), (1.8, 0.01, 1), (1.92, 0.4, 3)],
)
def test_check_compares_ratios(
    now: float, scatter: float, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema.write(a_run(), tmp_path / "baseline.json")
    monkeypatch.setattr(tool, "_measured", lambda options: a_run(now, scatter))
    assert command("check", "--baseline", tmp_path / "baseline.json", "--fail-below", 0.95) == status


def test_check_says_where_the_machine_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    schema.write(a_run(), tmp_path / "baseline.json")
    monkeypatch.setattr(tool, "_measured", lambda options: a_run(threads=64))
    assert command("check", "--baseline", tmp_path / "baseline.json") == 0
    assert "another machine than before, where ratios may differ: threads: was 2, is 64" in capsys.readouterr().out


def test_two_files_are_compared_by_their_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    schema.write(a_run(), a)
    slower = a_run()
    times = {OURS: Figure(1.1e-3, 1.09e-3, 1.11e-3, 100)}
    schema.write(dataclasses.replace(slower, results=[dataclasses.replace(slower.results[0], seconds=times)]), b)
    assert command("compare", a, b) == tool.SLOWER
    assert "Times of different moments" in capsys.readouterr().out
    assert command("compare", b, a) == 0


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    schema.write(a_run(), tmp_path / "run.json")
    assert schema.read(tmp_path / "run.json", schema.Run) == a_run()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"schema_version": 2}, "schema_version must be 1, got 2"),
        ({"kind": "comparison"}, "kind: expected"),
        ({"results": [{}]}, "results: 0: has no work, tensors"),
        ({"results": {}}, "results: expected list"),
        ({"machine": {**dataclasses.asdict(a_run().machine), "cores": "2"}}, "machine: cores: expected int, got '2'"),
    ],
)
def test_a_malformed_file_is_refused_by_its_field(change: dict[str, object], told: str, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({**dataclasses.asdict(a_run()), **change}))
    with pytest.raises(Malformed) as refused:
        schema.read(file, schema.Run)
    assert told in str(refused.value)
    assert str(file) in str(refused.value)


def test_a_later_field_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({**dataclasses.asdict(a_run()), "later": 1}))
    assert schema.read(file, schema.Run) == a_run()


def test_the_page_lists_every_field_of_the_schema() -> None:
    page = (Path(__file__).parents[2] / "bench" / "README.md").read_text(encoding="utf-8")
    classes = (schema.Run, schema.Comparison, schema.Result, schema.Work, schema.Figure, schema.Ratio)
    names = {entry.name for cls in (*classes, schema.Package, schema.Machine) for entry in dataclasses.fields(cls)}
    assert {name for name in names if f"`{name}`" not in page} == set()


def test_markdown_tables_hold_what_they_are_given() -> None:
    lines = tables.table(["a|b", "c"], [["1", "2|3"]], markdown=True)
    assert lines == ["| a\\|b | c |", "|---|---|", "| 1 | 2\\|3 |"]
    assert "many-small, adamw, fp32, k=5: without timm: timm is not installed" in tables.run_lines(a_run(), True)


def test_the_command_of_an_install(tmp_path: Path) -> None:
    """As a user runs it, in a process of its own."""
    file = tmp_path / "run.json"
    words = ["run", "--case", "scalars-1", "--seconds", "0.5", "--threads", "1", "--json", str(file)]
    environment = {**os.environ, **processes.search_path()}
    tool_command = [sys.executable, "-m", "lookahead_fused.bench", *words]
    done = subprocess.run(tool_command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (result,) = schema.read(file, schema.Run).results
    assert set(result.ratios) == set(run.DEFAULT_AGAINST)
    assert result.seconds[OURS].rounds >= 2
    assert "torch-fused-sync" in done.stdout


@pytest.mark.parametrize(
    "words", [["compare", "a"], ["run", "--seconds", "0"], ["check"], ["compare", "a", "b", "--fail-below", "1.1"], []]
)
def test_a_wrong_call_exits_with_two(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tool.main(words)
    assert ended.value.code == tool.FAULT


def test_importing_the_package_imports_no_benchmark() -> None:
    code = "import sys, lookahead_fused; sys.exit('lookahead_fused.bench' in sys.modules)"
    environment = {**os.environ, **processes.search_path()}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
