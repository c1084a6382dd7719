"""`make gpu-report` and `make sanitize`: what they do where there is no GPU, and that no failure gets lost."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import stages
from bench.gpu.stages import Stage
from bench.harness import processes

ROOT = Path(__file__).resolve().parents[2]
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="runs make")


def test_a_stage_that_fails_is_told_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pipe to `tee` its exit status would be lost."""
    monkeypatch.setattr(stages, "gpu_found", lambda: (True, ""))
    report = io.StringIO()
    chosen = [Stage("first", "echo told; exit 3", False), Stage("second", "echo more", True)]
    assert not stages.run(chosen, report)
    text = report.getvalue()
    assert "told\n== first FAILED with exit status 3" in text
    assert text.endswith("== all stages\nfirst: FAILED with exit status 3\nsecond: passed\n")


def test_without_a_gpu_its_stages_are_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "gpu_found", lambda: (False, "no GPU here: none is visible"))
    report = io.StringIO()
    assert stages.run([Stage("first", "echo told", False), Stage("second", "exit 1", True)], report)
    assert "first: passed\nsecond: skipped: no GPU here: none is visible\n" in report.getvalue()


def test_a_gpu_that_is_not_served_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a torch without CUDA would have it, or a build for other cards."""
    import lookahead_fused

    if lookahead_fused.backends()["cuda"].available:
        pytest.skip("here the CUDA backend serves")
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: Some Card 6000'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(RuntimeError, match="the CUDA backend does not serve it"):
        stages.gpu_found()
    assert not stages.run([Stage("tests", "echo told", True)], io.StringIO())


def test_the_command_line() -> None:
    assert stages.parse(["a", "b c", "--gpu", "d", "e"]) == [Stage("a", "b c", False), Stage("d", "e", True)]
    command = [sys.executable, "-m", "bench.gpu.stages", os.devnull, "bad", "exit 1"]
    done = subprocess.run(command, env={**os.environ, **processes.search_path()}, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr


@needs_make
def test_the_report_has_every_stage() -> None:
    done = subprocess.run(["make", "-n", "gpu-report"], cwd=ROOT, capture_output=True, text=True)
    for words in (
        "nvidia-smi",
        "-m lookahead_fused",
        "cuda or triton",
        "sanitize",
        "bench_suite.py",
        "bench.report.predict",
    ):
        assert words in done.stdout, done.stdout + done.stderr


@needs_make
def test_the_sanitizer_runs_the_tests_that_launch_kernels() -> None:
    """Its selection, on the CUDA backend, collects them whether or not there is a GPU."""
    variables = subprocess.run(
        ["make", "-s", "--eval", "print-selection: ; @echo '$(SANITIZED)'", "print-selection"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert variables.returncode == 0, variables.stderr
    command = f"{sys.executable} -m pytest -q --collect-only -p no:cacheprovider {variables.stdout.strip()} tests"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    collected = done.stdout.splitlines()
    for words in ("test_rules.py::", "test_layout.py::", "test_cuda_gpu.py::test_the_bits_of_the_cpu", "cuda-cuda"):
        assert any(words in line for line in collected), words
    assert not any("graph" in line or "cuda-host" in line for line in collected)


@needs_make
@pytest.mark.skipif(shutil.which("compute-sanitizer") is not None, reason="here there is a compute-sanitizer")
def test_a_missing_sanitizer_is_told_with_where_to_get_it() -> None:
    done = subprocess.run(["make", "-s", "sanitizer-found"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    for words in ("compute-sanitizer", "CUDA toolkit", "nvidia-cuda-sanitizer-api"):
        assert words in done.stdout + done.stderr
