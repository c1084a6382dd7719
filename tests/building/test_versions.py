"""`make test-versions`, as far as it needs no other release: what it leaves out and what it tells."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import versions


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel to name, and a folder for the environments."""
    monkeypatch.setattr(versions, "PLACE", tmp_path / "versions")
    (tmp_path / "package.whl").touch()
    return tmp_path / "package.whl"


def fake_python(wheel: Path, monkeypatch: pytest.MonkeyPatch, name: str, body: str) -> None:
    script = wheel.parent / "bin" / name
    script.parent.mkdir(exist_ok=True)
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")


def test_a_python_that_is_not_here_is_left_out(wheel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert versions.main(["--wheel", str(wheel), "0.9:2.6.0"]) == 0
    assert "== 0.9:2.6.0: left out, since python0.9 is not here" in capsys.readouterr().out


def test_a_shim_of_no_python_is_none(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pyenv's, which is on PATH for every Python that it ever had."""
    fake_python(wheel, monkeypatch, "python0.9", "echo 'python0.9: command not found' >&2; exit 127")
    assert versions.python_of("0.9:2.6.0") == ""
    fake_python(wheel, monkeypatch, "python0.9", 'test "$PYENV_VERSION" = 0.9 && echo /there/python0.9')
    assert versions.python_of("0.9:2.6.0") == "/there/python0.9"


def test_what_cannot_be_installed_fails_and_is_told_of(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_python(wheel, monkeypatch, "python0.9", 'case "$1" in -c) echo "$0";; *) mkdir -p "$3"; exit 3;; esac')
    assert versions.main(["--wheel", str(wheel), "0.9:2.6.0", "0.8:2.6.0", "--", "-x"]) == 1
    out = capsys.readouterr().out
    assert "exit status 3" in out
    assert "== 0.8:2.6.0: left out" in out
    assert list(versions.PLACE.iterdir()) == []


def test_a_wheel_that_is_not_there_is_refused(wheel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        versions.main(["--wheel", str(wheel.with_name("no.whl")), "2.6.0"])
    assert "there is no file" in capsys.readouterr().err


def test_arguments_of_pytest_come_last() -> None:
    assert versions.split(["2.6.0", "--", "-k", "rules"]) == (["2.6.0"], ["-k", "rules"])
    assert versions.split(["2.6.0"]) == (["2.6.0"], ())


def test_what_its_own_environment_has_compiled_is_not_compiled_again(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any other Python's environment has nothing to build with, and pip makes one."""
    isolated: dict[str, bool] = {}

    def builds(command: list[object], *, check: bool) -> None:
        place = Path(str(command[command.index("--wheel-dir") + 1]))
        place.mkdir(parents=True)
        (place / "package.whl").touch()
        isolated[str(command[0])] = "--no-build-isolation" not in command

    monkeypatch.setattr(subprocess, "run", builds)
    assert [versions.built(python).name for python in (sys.executable, "/there/python0.9")] == ["package.whl"] * 2
    assert isolated == {sys.executable: False, "/there/python0.9": True}
