"""`make gpu-report` and `make sanitize`: their stages and limits, what they do without a GPU, and that no failure gets
lost."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.gpu import card, profile, runner, sanitizer, stages
from bench.gpu.card import Card
from bench.gpu.runner import SKIPPED, Outcome, Piece
from bench.harness import processes

ROOT = Path(__file__).resolve().parents[2]
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="runs make")
NO_GPU = Card(reason="none is visible")
SERVED = Card(("Some Card 6000",), ("12.0",), True)


def shell(name: str, script: str, limit: float = 300, needs: str = "") -> Piece:
    return Piece(name, ["sh", "-c", script], limit, needs)


def run(pieces: list[Piece], out: Path, found: Card = SERVED) -> list[str]:
    """What became of each, without the seconds."""
    outcomes = runner.run_stage("some", pieces, out, found.refusal)
    return [f"{o.verdict}: {o.why}" if o.why else o.verdict for o in outcomes]


# ------------------------------------------------------------------------------------------------------------
# pieces under limits


def test_a_piece_that_fails_is_told_and_the_others_run(tmp_path: Path) -> None:
    pieces = [shell("first", "echo told; exit 3"), shell("second", "echo more"), Piece("third", ["no-such-tool"], 5)]
    verdicts = ["FAILED: exit status 3; it said last: told", "passed", "skipped: no-such-tool is not there"]
    assert run(pieces, tmp_path) == verdicts
    text = (tmp_path / "some.txt").read_text()
    assert "told\n== some: first: FAILED" in text
    assert "more\n== some: second: passed" in text
    assert (tmp_path / "report.txt").read_text() == text
    told = json.loads((tmp_path / "some.json").read_text())
    assert [piece["verdict"] for piece in told["pieces"]] == ["FAILED", "passed", "skipped"]


def test_a_piece_that_has_nothing_to_do_says_why_in_its_last_line(tmp_path: Path) -> None:
    assert run([shell("first", f"echo one; echo no ncu here; exit {SKIPPED}")], tmp_path) == ["skipped: no ncu here"]


@pytest.mark.parametrize("deaf", [False, True])
def test_what_hangs_is_killed_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaf: bool
) -> None:
    """One that hears no request to end is ended without; the next runs, and what came before the limit is there."""
    monkeypatch.setattr(runner, "GRACE", 0.3)
    pids = tmp_path / "pids"
    trap = "trap '' TERM; " if deaf else ""
    noted = f"echo $! >> {pids}"
    script = f"{trap}(sleep 600 & {noted}; wait) & {noted}; echo so far; wait; sleep 600"

    def got_so_far() -> bool:
        started = pids.read_text().split() if pids.exists() else []
        return len(started) == 2 and "\nso far\n" in (tmp_path / "some.txt").read_text()

    class Popen(subprocess.Popen):  # type: ignore[type-arg]
        def wait(self, timeout: float | None = None) -> int:
            if timeout == 1.0:
                # The limit is over when the piece has got so far, however long it takes for it here.
                hung = time.monotonic() + 300
                while not got_so_far() and time.monotonic() < hung:
                    time.sleep(0.01)
                timeout = 0.0
            return super().wait(timeout)

    monkeypatch.setattr(runner.subprocess, "Popen", Popen)
    verdicts = run([shell("hangs", script, limit=1.0), shell("next", "echo here")], tmp_path)
    assert verdicts == ["KILLED: it was not done in 1 s", "passed"]
    assert "so far\n== some: hangs: KILLED" in (tmp_path / "some.txt").read_text()
    for pid in pids.read_text().split():
        status = Path(f"/proc/{pid}/stat")
        assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def test_what_is_left_running_holds_up_nothing(tmp_path: Path) -> None:
    """It has the output open, and would be read to its end."""
    start = time.monotonic()
    assert run([shell("leaves", "sleep 600 & echo done")], tmp_path) == ["passed"]
    assert time.monotonic() - start < 500


def test_results_are_there_while_the_next_piece_runs(tmp_path: Path) -> None:
    look = (
        f"{sys.executable} -c \"import json; print(json.load(open('{tmp_path}/some.json'))['pieces'][0]['verdict'])\""
    )
    run([shell("first", "echo one"), shell("second", look + f" && grep -q one {tmp_path}/some.txt")], tmp_path)
    assert json.loads((tmp_path / "some.json").read_text())["pieces"][1]["verdict"] == "passed"


# ------------------------------------------------------------------------------------------------------------
# with and without a GPU


def test_without_a_gpu_what_needs_one_is_skipped_with_the_reason(tmp_path: Path) -> None:
    pieces = [
        shell("first", "echo told"),
        shell("second", "exit 1", needs="triton"),
        shell("third", "exit 1", needs="cuda"),
    ]
    skipped = "skipped: no GPU here: none is visible"
    assert run(pieces, tmp_path, NO_GPU) == ["passed", skipped, skipped]


def test_a_gpu_that_is_not_served_is_a_failure(tmp_path: Path) -> None:
    """As a torch without CUDA would have it, or a build for other cards. Triton may serve it all the same."""
    why = "there is a GPU (Some Card 6000), and the CUDA backend does not serve it: built for 9.0"
    unserved = dataclasses.replace(SERVED, serves=False, reason="built for 9.0")
    pieces = [shell("triton", "echo told", needs="triton"), shell("tests", "echo told", needs="cuda")]
    assert run(pieces, tmp_path, unserved) == ["passed", f"FAILED: {why}"]


def test_a_triton_that_is_too_old_is_no_failure(tmp_path: Path) -> None:
    """And its tests, all skipped, are no success."""
    old = dataclasses.replace(SERVED, triton="triton 3.6.0 is too old")
    assert run([shell("triton", "echo told", needs="triton")], tmp_path, old) == ["skipped: triton 3.6.0 is too old"]


def test_a_gpu_that_torch_does_not_see_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lookahead_fused

    if lookahead_fused.backends()["cuda"].available:
        pytest.skip("here the CUDA backend serves")
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: Some Card 6000'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    refused = card.look().refusal("cuda")
    assert refused is not None
    assert refused.is_failure
    assert "(GPU 0: Some Card 6000), and the CUDA backend does not serve it" in refused.why


def test_a_card_is_asked_for_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that hangs in the driver, or a torch that does not load: then it is not known, and nothing is passed over."""
    monkeypatch.setattr(card, "LIMIT", 600.0)
    assert card.ask() == card.look()
    hangs = tmp_path / "python"
    hangs.write_text("#!/bin/sh\nsleep 600\n")
    hangs.chmod(0o755)
    monkeypatch.setattr(card, "LIMIT", 0.5)
    monkeypatch.setattr(card.sys, "executable", str(hangs))
    refused = card.ask().refusal("cuda")
    assert refused is not None
    assert refused.is_failure
    assert "not known whether there is a GPU: asking torch: KILLED" in refused.why
    monkeypatch.setattr(card.sys, "executable", "/bin/false")
    assert card.ask().unknown.startswith("asking torch: FAILED")


def test_a_build_is_for_the_cards_that_are_here() -> None:
    (piece,) = stages.build(("8.6", "12.0"))
    assert piece.environment == {"TORCH_CUDA_ARCH_LIST": "8.6 12.0"}
    assert list(piece.command[1:]) == ["setup.py", "-q", "build_ext", "--inplace"]
    assert stages.build(())[0].environment == {}


# ------------------------------------------------------------------------------------------------------------
# the stages


def test_no_stage_takes_ten_minutes(tmp_path: Path) -> None:
    made = {"quick": stages.quick(tmp_path), "tests": stages.tests(tmp_path, []), "sanitize": stages.sanitize(),
            "bench": stages.bench(tmp_path), "profile": stages.profiled(tmp_path)}  # fmt: skip
    assert tuple(made) == stages.STAGES
    longest = {name: sum(piece.limit for piece in pieces) for name, pieces in made.items()}
    assert longest["quick"] <= 240
    assert max(longest.values()) < 600
    for pieces in made.values():
        assert len({piece.name for piece in pieces}) == len(pieces)


def test_the_stages_run_in_their_order_and_end_with_what_became_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card, "ask", lambda: NO_GPU)
    monkeypatch.setattr(stages, "quick", lambda out: [shell("environment", "echo told; exit 2")])
    assert not stages.run(tmp_path, ["profile", "quick"], build_first=False)
    text = (tmp_path / "report.txt").read_text()
    assert [line.partition(" (")[0] for line in text[text.index("== all stages") :].splitlines()[1:]] == [
        "quick: environment: FAILED: exit status 2; it said last: told",
        *(f"profile: {name}: skipped: no GPU here: none is visible" for name in profile.LISTS),
    ]
    # Stages are run one by one into one folder.
    assert stages.run(tmp_path, ["profile"], build_first=False)
    assert (tmp_path / "report.txt").read_text().startswith(text)


@needs_make
def test_the_machine_as_it_is() -> None:
    """With SYSTEM=1 nothing is installed, the Python is the given one, and the modules are built first."""
    command = ["make", "-n", "gpu-report", "SYSTEM=1", "PYTHON=some-python", "OUT=folder", "STAGE=bench", "ARGS=-x"]
    # A make that runs the tests hands its own level and flags on, and a make within it tells where it is.
    apart = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(command, cwd=ROOT, env=apart, capture_output=True, text=True)
    assert done.stdout.strip() == "some-python -m bench.gpu.stages --out folder --only bench --build -- -x", done.stderr
    done = subprocess.run(["make", "-n", "gpu-report"], cwd=ROOT, env=apart, capture_output=True, text=True)
    assert ".venv/bin/python -m bench.gpu.stages --out gpu-report --only all" in done.stdout
    assert "--build" not in done.stdout


def test_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu.stages", "--out", str(tmp_path), "--only", "profile"]
    done = subprocess.run(command, env={**os.environ, **processes.search_path()}, capture_output=True, text=True)
    assert "== all stages\nprofile: one-large: " in done.stdout, done.stderr


def collected(*selection: str) -> list[str]:
    """The tests that a selection takes of some files, whether or not there is a GPU."""
    names = ("test_rules.py", "test_layout.py", "test_cuda_gpu.py", "test_cuda_graphs.py")
    files = [str(ROOT / "tests" / name) for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *selection, *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


@needs_make
def test_the_sanitizer_runs_the_tests_that_launch_kernels() -> None:
    variables = subprocess.run(
        ["make", "-s", "--eval", "print-selection: ; @printf '%s\\n' $(SANITIZED)", "print-selection"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert variables.returncode == 0, variables.stderr
    found = collected(*variables.stdout.splitlines())
    for words in ("test_rules.py::", "test_layout.py::", "test_cuda_gpu.py::test_the_bits_of_the_cpu", "cuda-cuda"):
        assert any(words in line for line in found), words
    assert not any("graph" in line or "cuda-host" in line for line in found)


def test_the_tests_are_those_that_launch_kernels(tmp_path: Path) -> None:
    """Of the backend that is asked for, and none of the thousands that a machine without a GPU runs as well."""
    cuda, triton = (list(piece.command) for piece in stages.tests(tmp_path, []))
    found = collected(*cuda[cuda.index("--backend") : cuda.index("-k") + 2])
    assert any("test_rules.py" in line for line in found)
    assert any("test_cuda_gpu.py::test_twelve" in line for line in found)
    assert all("cuda-cuda" in line or "test_cuda_gpu.py" in line for line in found)
    assert triton[triton.index("--backend") :][:4] == ["--backend", "triton", "-k", "triton-cuda"]


def test_the_tests_want_no_plugin_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"xdist": ["-n", "4"], "pytest_benchmark": ["--benchmark-disable"]}
    for installed in (set(), {"xdist"}, {"pytest_benchmark"}):
        monkeypatch.setattr(stages, "_installed", lambda name, installed=installed: name in installed)
        for piece in stages.tests(tmp_path, []):
            for name, words in there.items():
                assert (words[0] in piece.command) == (name in installed)


def test_a_missing_sanitizer_or_profiler_is_told_with_where_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sanitizer, "program", lambda name: None)
    assert sanitizer.main(["memcheck", "--", "-c", "pass"]) == SKIPPED
    assert "compute-sanitizer was not found" in capsys.readouterr().out
    monkeypatch.setattr(profile, "program", lambda name: None)
    assert profile.main(["one-large"]) == SKIPPED
    assert "ncu was not found" in capsys.readouterr().out


def test_a_finding_of_the_sanitizer_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that finds something ends it, with its status."""
    fake = tmp_path / "compute-sanitizer"
    noted = f'echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $*" >> {tmp_path}/calls'
    fake.write_text(f'#!/bin/sh\n{noted}\ncase "$*" in *racecheck*) exit 9;; esac\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sanitizer, "program", lambda name: str(fake))
    assert sanitizer.main(["memcheck", "racecheck", "initcheck", "--", "-c", "pass"]) == 9
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 2
    assert all(call.startswith("1 --error-exitcode 9") and call.endswith("-c pass") for call in calls)


NCU = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","void lookahead_fused::rows<A>(B)","launch__registers_per_thread","register/thread","32"
"1","7","void lookahead_fused::chunks<A>(B)","launch__registers_per_thread","register/thread","56"
"1","7","void lookahead_fused::chunks<A>(B)","dram__bytes_read.sum","byte","1,073,741,824"
"1","7","void lookahead_fused::chunks<A>(B)","sm__cycles_active.avg","cycle","9"
"""


def profiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> list[str]:
    fake = tmp_path / "ncu"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(profile, "program", lambda name: str(fake))
    return ["one-large", "--out", str(tmp_path)]


def test_what_the_profiler_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "told").write_text(NCU)
    assert profile.main(profiler(tmp_path, monkeypatch, f"cat {tmp_path}/told")) == 0
    told = json.loads((tmp_path / "profile-one-large.json").read_text())
    assert [r["launch__registers_per_thread"] for r in told["records"]] == [32, 56]
    assert told["records"][1]["dram__bytes_read.sum"] == 2**30
    assert f"must move {28 * 64 * 2**20:,} bytes" in told["summary"]


def test_counters_that_one_may_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = profiler(tmp_path, monkeypatch, "echo '==ERROR== ERR_NVGPUCTRPERM' >&2; exit 1")
    assert profile.main(words) == SKIPPED
    assert "run as root" in capsys.readouterr().out
    assert profile.main(profiler(tmp_path, monkeypatch, "exit 0")) == 1  # it told of no kernel


def test_an_outcome_is_one_line() -> None:
    assert str(Outcome("a", "KILLED", "too long", 3.21)) == "KILLED: too long (3.2 s)"
