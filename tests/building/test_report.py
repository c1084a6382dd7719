"""`python -m lookahead_fused` tells what a bug ticket needs, above all where something is broken."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from types import ModuleType

import pytest
import torch

import lookahead_fused
from lookahead_fused import _build as build
from lookahead_fused import _report as report
from lookahead_fused.backends import cpu

ROOT = Path(lookahead_fused.__file__).parent.parent
# What stands for the module that is asked for, once it is looked for.
FAILS = """
import importlib.abc
class Fails(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            {does}
sys.meta_path.insert(0, Fails())
"""
CANNOT_OPEN = "libnone.so.1: cannot open shared object file"
# What a process with -c runs to print the report too.
REPORT = "import runpy; runpy.run_module('lookahead_fused', run_name='__main__')"


def failing(name: str, error: str = "OSError") -> str:
    """Lines of Python after which the import of a module raises an error."""
    return FAILS.format(name=name, does=f"raise {error}({CANNOT_OPEN!r})")


def missing(name: str) -> str:
    return f"sys.modules[{name!r}] = None"


def run(
    broken: str = "", *, at: Path, command: tuple[str, ...] = ("-m", "lookahead_fused"), package: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """A Python process in which some lines ran first, by default `python -m lookahead_fused`."""
    return subprocess.run(
        [sys.executable, *command],
        env=environment(broken, at=at, package=package),
        cwd=at,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def environment(broken: str, *, at: Path, package: Path = ROOT) -> dict[str, str]:
    """In which a Python process runs some lines first, and buffers what it prints."""
    (at / "sitecustomize.py").write_text(f"import sys\n{broken}\n", encoding="utf-8")
    return {**os.environ, "PYTHONPATH": f"{at}{os.pathsep}{package}", "PYTHONUNBUFFERED": ""}


def told() -> str:
    """The whole report of this process."""
    return "\n".join(report.render(section) for section in report.sections())


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


@pytest.fixture
def isolated(tmp_path: Path) -> Path:
    """An environment of its own that finds this package and torch, also with -I, which ignores PYTHONPATH."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    if not (tmp_path / "venv/bin/python").is_file():
        pytest.skip("the environment's Python lies elsewhere on this platform")
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "found.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
    return tmp_path / "venv"


def test_a_healthy_report_under_many_options(isolated: Path) -> None:
    """Isolated, without home or path; no docstring is there to be extended, no assertion to be relied on, and every
    warning is an error."""
    options = ["-X", "importtime", "-X", "utf8", "-W", "error", "-bb", "-IOOm"]
    result = subprocess.run(
        [isolated / "bin/python", *options, "lookahead_fused"],
        env={"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    for expected in (torch.__version__, "reference", "serves", "self-test", "OMP_NUM_THREADS  1\n"):
        assert expected in result.stdout
    if build.module("_cpu") is not None:
        assert "instruction sets" in result.stdout
        assert "the reference's bits" in result.stdout


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "lookahead_fused", "an argument"),
        ("-mlookahead_fused",),
        ("-m", "lookahead_fused.__main__"),
        ("-X", "importtime", "-m", "lookahead_fused"),
        ("-Xutf8=0", "-X", "dev", "-m", "lookahead_fused"),
        ("-W", "error", "-Pm" if sys.version_info >= (3, 11) else "-m", "lookahead_fused"),
        ("-OOm", "lookahead_fused"),
        ("--check-hash-based-pycs", "always", "-m", "lookahead_fused"),
    ],
    ids=" ".join,
)
def test_a_broken_torch_is_told_under_any_options(command: tuple[str, ...], tmp_path: Path) -> None:
    result = run(failing("torch"), at=tmp_path, command=command)
    assert result.returncode == 1, result.stderr
    assert f"OSError: {CANNOT_OPEN}" in result.stdout
    assert sys.version.split()[0] in result.stdout
    assert "Traceback" not in result.stderr


def test_a_missing_torch_is_told_in_isolated_mode(isolated: Path) -> None:
    (site,) = isolated.glob("lib/python*/site-packages")
    (site / "sitecustomize.py").write_text(f"import sys\n{missing('torch')}\n")
    command = [isolated / "bin/python", "-I", "-m", "lookahead_fused"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == 1, result.stderr
    assert "import of torch halted" in result.stdout


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        (missing("lookahead_fused._averaging"), "lookahead_fused._averaging"),
        (missing("lookahead_fused._report"), "cannot make its report: ModuleNotFoundError"),
        ("import types; sys.modules['torch'] = types.ModuleType('torch')", "cannot import name 'Tensor' from 'torch'"),
        (failing("torch", "SystemError"), f"SystemError: {CANNOT_OPEN}"),
    ],
    ids=["a module missing", "its own module missing", "a torch without attributes", "SystemError"],
)
def test_what_cannot_be_imported_is_told(broken: str, expected: str, tmp_path: Path) -> None:
    result = run(broken, at=tmp_path)
    assert result.returncode == 1
    assert expected in result.stdout
    assert sys.version.split()[0] in result.stdout
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("ends", ["import os; os.abort()", "raise SystemExit(3)"], ids=["abort", "exit"])
def test_a_torch_that_ends_the_process_leaves_what_was_told_before(ends: str, tmp_path: Path) -> None:
    result = run(FAILS.format(name="torch", does=ends), at=tmp_path)
    assert result.returncode not in (0, 1)
    assert sys.version.split()[0] in result.stdout
    assert "processor" in result.stdout
    if "abort" in ends:
        assert "sitecustomize.py" in result.stderr  # where it crashed


def test_who_reads_the_report_may_stop_early(tmp_path: Path) -> None:
    """`python -m lookahead_fused | head -1`; the reader is gone before the first line is written."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "lookahead_fused"]
    result = subprocess.run(
        command, env=environment(failing("torch"), at=tmp_path), stdout=writing, stderr=subprocess.PIPE, timeout=600
    )
    os.close(writing)
    assert result.returncode == 1
    assert result.stderr == b""


def test_a_report_that_cannot_be_written_says_why(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this platform has no /dev/full")
    command = [sys.executable, "-m", "lookahead_fused"]
    with full.open("w") as output:
        result = subprocess.run(
            command, env=environment(failing("torch"), at=tmp_path), stdout=output, stderr=subprocess.PIPE, timeout=600
        )
    assert result.returncode == 1
    assert result.stderr == b"lookahead_fused cannot print its report: [Errno 28] No space left on device\n"


def test_without_a_standard_output_nothing_breaks(tmp_path: Path) -> None:
    shell = ["sh", "-c", '"$0" -m lookahead_fused >&-', sys.executable]
    result = subprocess.run(
        shell, env=environment(failing("torch"), at=tmp_path), capture_output=True, check=False, timeout=600
    )
    assert result.returncode == 1
    assert result.stderr == b""


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
    result = run(failing("torch"), at=tmp_path, command=command)
    assert result.returncode == 1
    assert f"OSError: {CANNOT_OPEN}" in result.stderr


@pytest.mark.parametrize("error", [ImportError, OSError, SystemError])
def test_a_module_that_does_not_load_has_a_reason(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    imported = build.importlib.import_module

    def fail(name: str) -> ModuleType:
        if name == "lookahead_fused._none":
            raise error(CANNOT_OPEN)
        return imported(name)

    monkeypatch.setattr(build.importlib, "import_module", fail)
    module, reason = build._load.__wrapped__("_none")
    assert module is None
    assert reason == f"lookahead_fused._none could not be imported: {error.__name__}: {CANNOT_OPEN}"


def test_a_broken_module_is_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    step = (
        "import torch, lookahead_fused as l; p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3); "
        f"l.LookaheadAdamW([p]).step(); print(p.tolist()); {REPORT}"
    )
    result = run(failing("lookahead_fused._cpu"), at=tmp_path, command=("-W", "ignore", "-c", step))
    assert result.returncode == 0, result.stderr
    assert "1.0, " not in result.stdout
    assert f"_cpu could not be imported: OSError: {CANNOT_OPEN}" in result.stdout
    assert "reference  runs: " in result.stdout


@pytest.mark.parametrize(
    ("record", "expected"),
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
    record: bytes, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / build.RECORD).write_bytes(record)
    monkeypatch.setattr(build.resources, "files", lambda package: tmp_path)
    (section,) = [section for section in report.sections() if section.title == "build"]
    assert not section.healthy
    ((name, fault),) = section.lines
    assert name == "record"
    assert f"{build.RECORD} cannot be read: " in fault
    assert expected in fault
    assert build.version() == "unknown"


def test_with_a_broken_build_record_the_package_works(package: Path) -> None:
    path = package / "lookahead_fused" / build.RECORD
    path.unlink(missing_ok=True)
    path.write_bytes(b'{"version": "0.1.0", "mod')
    version = f"import lookahead_fused as l; print(l.__file__, l.__version__, *l.backends()); {REPORT}"
    result = run(at=package.parent, package=package, command=("-W", "ignore", "-c", version))
    assert result.returncode == 1, result.stderr
    assert str(package) in result.stdout
    assert "unknown cuda triton cpu reference" in result.stdout
    assert f"{build.RECORD} cannot be read: " in result.stdout
    assert "self-test" in result.stdout


def test_without_a_build_record_the_version_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree that nothing was built in is no fault."""
    monkeypatch.setattr(build.resources, "files", lambda package: tmp_path)
    (section,) = [section for section in report.sections() if section.title == "build"]
    assert section == ("build", [], True)
    assert build.version() == "unknown"


def test_a_letter_that_the_terminal_lacks_is_printed_as_its_number(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    result = run(failing("torch").replace("libnone", "libnön"), at=tmp_path)
    assert r"libn\xf6n.so.1: cannot open" in result.stdout
    assert "Traceback" not in result.stderr


def test_a_fact_that_cannot_be_had_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those before it in its section, and the other sections."""

    def fail() -> str:
        raise OSError("no such processor")

    monkeypatch.setattr(report, "_processor", fail)
    (machine,) = [section for section in report.sections() if section.title == "machine"]
    assert not machine.healthy
    assert ("cores", str(os.cpu_count())) in machine.lines
    text = told()
    assert "no such processor" in text
    assert torch.__version__ in text


def test_a_processor_that_cannot_be_read_has_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str, **_: str) -> None:
        raise PermissionError(f"{path} is not for everybody")

    monkeypatch.setattr("builtins.open", fail)
    name = report._processor()
    monkeypatch.undo()
    assert name == (platform.processor() or "unknown")


def test_a_backend_with_other_bits_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    if build.module("_cpu") is None:
        pytest.skip(build.reason("_cpu"))
    exact = cpu.Stepper.run

    def off_by_a_bit(self, part, grad_scale, found_inf, clip) -> None:  # type: ignore[no-untyped-def]
        exact(self, part, grad_scale, found_inf, clip)
        for param in part.tensors()[0]:
            param[0] = torch.nextafter(param[0], torch.tensor(9.0))

    monkeypatch.setattr(cpu.Stepper, "run", off_by_a_bit)
    *_, self_test = report.sections()
    assert not self_test.healthy
    assert "differs from the reference" in report.render(self_test)
