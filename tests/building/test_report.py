"""`python -m lookahead_fused` tells what a bug ticket needs, above all where something is broken."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch

import lookahead_fused
from lookahead_fused import _build as build
from lookahead_fused import _report as report
from lookahead_fused.backends import cpu

ROOT = Path(lookahead_fused.__file__).parent.parent
IMPORT_FAILS = """
import importlib.abc
class Fails(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            raise {error}("libnone.so.1: cannot open shared object file")
sys.meta_path.insert(0, Fails())
"""


def failing(name: str, error: str) -> str:
    """Lines of Python after which the import of a module raises an error."""
    return IMPORT_FAILS.format(name=name, error=error)


def missing(name: str) -> str:
    return f"sys.modules[{name!r}] = None"


def run(
    broken: str = "", *, at: Path, command: tuple[str, ...] = ("-m", "lookahead_fused"), package: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """A Python process in which some lines ran first, by default `python -m lookahead_fused`."""
    (at / "sitecustomize.py").write_text(f"import sys\n{broken}\n", encoding="utf-8")
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": f"{at}{os.pathsep}{package}"},
        cwd=at,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A directory with a package in it whose files are links to this one's, so that some can be replaced."""
    root = tmp_path / "linked"
    source = ROOT / "lookahead_fused"
    for path in source.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            link = root / "lookahead_fused" / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    return root


def test_a_healthy_report(tmp_path: Path) -> None:
    result = run(at=tmp_path)
    assert result.returncode == 0, result.stderr
    for expected in (torch.__version__, "reference", "serves", "self-test", "OMP_NUM_THREADS", "threads of a step"):
        assert expected in result.stdout


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "lookahead_fused", "an argument"),
        ("-mlookahead_fused",),
        ("-m", "lookahead_fused.__main__"),
        ("-X", "importtime", "-m", "lookahead_fused"),
        ("-W", "error", "-m", "lookahead_fused"),
        ("-OOm", "lookahead_fused"),
    ],
    ids=" ".join,
)
def test_a_broken_torch_is_told_under_any_options(command: tuple[str, ...], tmp_path: Path) -> None:
    result = run(failing("torch", "OSError"), at=tmp_path, command=command)
    assert result.returncode == 1, result.stderr
    assert "OSError: libnone.so.1: cannot open" in result.stdout
    assert sys.version.split()[0] in result.stdout
    assert "Traceback" not in result.stderr


def test_a_healthy_report_under_many_options(tmp_path: Path) -> None:
    """No docstring is there to be extended, no assertion to be relied on, and every warning is an error."""
    result = run(at=tmp_path, command=("-X", "importtime", "-W", "error", "-OOm", "lookahead_fused"))
    assert result.returncode == 0, result.stderr
    assert "the reference's bits" in result.stdout


@pytest.mark.parametrize("broken", ["", missing("torch")], ids=["healthy", "without torch"])
def test_the_report_is_printed_in_isolated_mode(broken: str, tmp_path: Path) -> None:
    """-I ignores PYTHONPATH: the package is found where it is installed, here in an environment of its own."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv/bin/python"
    if not python.is_file():
        pytest.skip("the environment's Python lies elsewhere on this platform")
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "found.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
    (site / "sitecustomize.py").write_text(f"import sys\n{broken}\n", encoding="utf-8")
    command = [python, "-I", "-m", "lookahead_fused"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == (1 if broken else 0), result.stderr
    assert ("import of torch halted" if broken else "the reference's bits") in result.stdout


@pytest.mark.parametrize("broken", ["torch", "lookahead_fused._table", "lookahead_fused._report"])
def test_what_cannot_be_imported_is_told(broken: str, tmp_path: Path) -> None:
    result = run(missing(broken), at=tmp_path)
    assert result.returncode == 1
    assert broken in result.stdout
    assert sys.version.split()[0] in result.stdout
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("-c", "import lookahead_fused", "-m", "lookahead_fused"),
        ("-m", "another", "lookahead_fused"),
        ("-m", "not_lookahead_fused"),
    ],
    ids=" ".join,
)
def test_a_failed_import_is_raised_to_everybody_else(command: tuple[str, ...], tmp_path: Path) -> None:
    """Also to a package that is started with -m itself, and imports this one while Python looks for its module."""
    for name in ("another", "not_lookahead_fused"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("import lookahead_fused\n")
        (tmp_path / name / "__main__.py").touch()
    result = run(failing("torch", "OSError"), at=tmp_path, command=command)
    assert result.returncode == 1
    assert "OSError: libnone.so.1: cannot open" in result.stderr


@pytest.mark.parametrize("error", ["ImportError", "OSError", "SystemError"])
def test_a_broken_module_is_told_and_the_rest_goes_on(error: str, tmp_path: Path) -> None:
    broken = failing("lookahead_fused._cpu", error)
    result = run(broken, at=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"_cpu could not be imported: {error}: libnone.so.1" in result.stdout
    assert "reference" in result.stdout

    step = (
        "import torch, lookahead_fused as l; p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3); "
        "l.LookaheadAdamW([p]).step(); print(p.tolist(), l.backends()['cpu'].reason)"
    )
    result = run(broken, at=tmp_path, command=("-W", "ignore", "-c", step))
    assert result.returncode == 0, result.stderr
    assert "1.0, " not in result.stdout
    assert f"{error}: libnone.so.1" in result.stdout


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (b'{"version": "0.1.0", "mod', "JSONDecodeError"),
        (b"", "JSONDecodeError"),
        (b"\xff\xfe", "UnicodeDecodeError"),
        (b"[1, 2]", "TypeError"),
        (b"{}", "KeyError: 'modules'"),
        (b'{"version": "0.1.0", "modules": []}', "AttributeError"),
        (b'{"version": "0.1.0", "modules": {"_cpu": "yes"}}', "the record of a module is not a dict"),
        (b"[" * 100_000, "RecursionError"),
    ],
    ids=["cut off", "empty", "not text", "a list", "no modules", "modules a list", "a module no dict", "deep"],
)
def test_a_broken_build_record_is_told(
    record: bytes, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / build.RECORD).write_bytes(record)
    monkeypatch.setattr(build.resources, "files", lambda package: tmp_path)
    (_, lines), *_ = [section for section in report.collect()[0] if section[0] == "build"]
    (fault,) = [value for name, value in lines if name == "record"]
    assert f"{build.RECORD} cannot be read: " in fault
    assert told in fault
    assert build.version() == "unknown"


def test_with_a_broken_build_record_the_package_works(package: Path) -> None:
    path = package / "lookahead_fused" / build.RECORD
    path.unlink(missing_ok=True)
    path.write_bytes(b'{"version": "0.1.0", "mod')
    result = run(at=package.parent, package=package)
    assert result.returncode == 1
    assert f"{build.RECORD} cannot be read: " in result.stdout
    assert "self-test" in result.stdout
    version = "import lookahead_fused as l; print(l.__file__, l.__version__, *l.backends())"
    result = run(at=package.parent, package=package, command=("-c", version))
    assert result.returncode == 0, result.stderr
    assert str(package) in result.stdout
    assert "unknown cuda triton cpu reference" in result.stdout


def test_a_letter_that_the_terminal_lacks_is_printed_as_its_number(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    result = run(failing("torch", "OSError").replace("libnone", "libnön"), at=tmp_path)
    assert r"libn\xf6n.so.1: cannot open" in result.stdout
    assert "Traceback" not in result.stderr


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
    exact = cpu.Stepper.run

    def off_by_a_bit(self, part, grad_scale, found_inf) -> None:  # type: ignore[no-untyped-def]
        exact(self, part, grad_scale, found_inf)
        for param in part.tensors()[0]:
            param[0] = torch.nextafter(param[0], torch.tensor(9.0))

    monkeypatch.setattr(cpu.Stepper, "run", off_by_a_bit)
    sections, healthy = report.collect()
    assert not healthy
    assert "differs from the reference" in report.render(sections)
