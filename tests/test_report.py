"""`python -m lookahead_fused` tells what a bug ticket needs, above all where something is broken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import lookahead_fused
from lookahead_fused import build, report

ROOT = str(Path(lookahead_fused.__file__).parent.parent)


def run(*broken: str, at: Path) -> subprocess.CompletedProcess[str]:
    """`python -m lookahead_fused` in a process of its own, where some modules cannot be imported."""
    lines = [f"sys.modules[{name!r}] = None" for name in broken]
    (at / "sitecustomize.py").write_text("\n".join(["import sys", *lines]))
    return subprocess.run(
        [sys.executable, "-m", "lookahead_fused"],
        env={**os.environ, "PYTHONPATH": f"{at}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_healthy_report(tmp_path: Path) -> None:
    result = run(at=tmp_path)
    assert result.returncode == 0, result.stderr
    for expected in (torch.__version__, "reference", "serves", "self-test", "OMP_NUM_THREADS", "threads of a step"):
        assert expected in result.stdout


@pytest.mark.parametrize("missing", ["torch", "lookahead_fused.table"])
def test_what_cannot_be_imported_is_told(missing: str, tmp_path: Path) -> None:
    result = run(missing, at=tmp_path)
    assert result.returncode == 1
    assert missing in result.stdout
    assert sys.version.split()[0] in result.stdout
    assert "Traceback" not in result.stderr


def test_a_broken_module_is_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    result = run("lookahead_fused._cpu", at=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "_cpu could not be imported" in result.stdout
    assert "reference" in result.stdout


def test_a_section_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise OSError("no such processor")

    monkeypatch.setattr(report, "_processor", fail)
    sections, healthy = report.collect()
    text = report.render(sections)
    assert not healthy
    assert "no such processor" in text
    assert torch.__version__ in text


def test_a_backend_with_other_bits_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    if build.module("_cpu") is None:
        pytest.skip(build.reason("_cpu"))
    cpu: ModuleType = report.backends.__globals__["cpu"]
    exact = cpu.step

    def off_by_a_bit(part, grad_scale, found_inf) -> None:  # type: ignore[no-untyped-def]
        exact(part, grad_scale, found_inf)
        for place in part.places:
            place.param[0] = torch.nextafter(place.param[0], torch.tensor(9.0))

    monkeypatch.setattr(cpu, "step", off_by_a_bit)
    sections, healthy = report.collect()
    assert not healthy
    assert "differs from the reference" in report.render(sections)
