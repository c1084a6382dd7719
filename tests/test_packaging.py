"""What pip makes of the repository: wheels with and without a compiler, loud failures, editable installs.

Everything is built from a copy of the source tree. One build is isolated, as a user's is; the others share
one environment with the build requirements in it, and compile a module of two lines.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import NamedTuple

import pytest

build = pytest.importorskip("build", reason="the build frontend is in the extra 'test'")

ROOT = Path(__file__).resolve().parents[1]
COMPILERS = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
READ_BY_THE_BUILD = (
    *("CC", "CXX", "CXXFLAGS", "LDFLAGS", "LOOKAHEAD_FUSED_CPU", "MAX_JOBS"),
    *("CUDA_HOME", "CUDA_PATH", "FORCE_CUDA", "LOOKAHEAD_FUSED_CUDA", "TORCH_CUDA_ARCH_LIST"),
    "LOOKAHEAD_FUSED_LOCAL_VERSION",
)

SMALL_MODULE = """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cpu"};
PyMODINIT_FUNC PyInit__cpu() { return PyModule_Create(&definition); }
"""

# One worker builds, rather than each one again.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]
needs_compiler = pytest.mark.skipif(not COMPILERS, reason="builds the module, and no C++ compiler is on PATH")


class Result(NamedTuple):
    """A finished pip command: what it printed, and the wheel if it made one."""

    returncode: int
    output: str
    wheel: Path | None

    def build_info(self) -> dict:
        with zipfile.ZipFile(self.wheel) as wheel:
            return json.loads(wheel.read("lookahead_fused/_build_info.json"))


def environment(**changes: str) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name not in READ_BY_THE_BUILD}
    # _cuda has tests of its own, and takes longer to build than all that is built here.
    return env | {"LOOKAHEAD_FUSED_CUDA": "0"} | changes


def run(command: list, **options) -> subprocess.CompletedProcess[str]:
    command = [str(word) for word in command]
    return subprocess.run(
        command,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
        check=False,
        **options,
    )


def native_modules(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if name.endswith((".so", ".dylib", ".pyd"))]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("packaging")


@pytest.fixture(scope="module")
def tree(base):
    """A copy of what a clean clone holds."""
    left_out = (
        ".git",
        ".venv",
        "build",
        "dist",
        "*.egg-info",
        "__pycache__",
        ".*_cache",
        ".hypothesis",
        "*.so",
    )
    ignore = shutil.ignore_patterns(*left_out, "_build_info.json")
    return shutil.copytree(ROOT, base / "source-tree", ignore=ignore)


@pytest.fixture(scope="module")
def toolchain(base, tree):
    """The Python of an environment with the build requirements and nothing else, torch least of all."""
    run([sys.executable, "-m", "venv", base / "toolchain"])
    python = next(path for path in base.glob("toolchain/*/python*") if path.name in ("python", "python.exe"))
    requirements = sorted(build.ProjectBuilder(tree).build_system_requires)
    installed = run([python, "-m", "pip", "install", *requirements])
    assert installed.returncode == 0, installed.stdout
    return python


@pytest.fixture(scope="module")
def unpacked(base, tree, toolchain):
    """The source distribution of the tree, unpacked."""
    sdist = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    done = run([toolchain, "-c", sdist], cwd=tree, env=environment())
    assert done.returncode == 0, done.stdout
    (archive,) = tree.glob("dist/*.tar.gz")
    shutil.unpack_archive(archive, base / "sdist")
    (directory,) = (base / "sdist").iterdir()
    return directory


@pytest.fixture(scope="module")
def built(toolchain, unpacked):
    """The wheel of the source distribution, built in isolation; its build directory stays."""
    result = wheel_of(unpacked, [toolchain, "-m", "pip", "wheel", "-v"])
    assert result.returncode == 0, result.output
    return result


@pytest.fixture(scope="module")
def pip_wheel(toolchain):
    """Builds the wheel of a source tree under the given environment variables, without isolation."""

    def pip_wheel(source: Path, **changes: str) -> Result:
        command = [toolchain, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-index"]
        return wheel_of(source, command, **changes)

    return pip_wheel


def wheel_of(source: Path, command: list, **changes: str) -> Result:
    dist = source.parent / f"{source.name}-dist"
    shutil.rmtree(dist, ignore_errors=True)
    done = run([*command, "--no-deps", "--wheel-dir", dist, source], env=environment(**changes))
    return Result(done.returncode, done.stdout, next(dist.glob("*.whl"), None))


@pytest.fixture
def copy(tree, tmp_path):
    """A tree to break or to build, whose _cpu compiles in a moment: what it does is no matter here."""
    copy = shutil.copytree(tree, tmp_path / "tree", ignore=shutil.ignore_patterns("dist", "*.egg-info"))
    for directory in ("cpu", "python"):
        shutil.rmtree(copy / "csrc" / directory)
        (copy / "csrc" / directory).mkdir()
    (copy / "csrc/python/cpu_module.cpp").write_text(SMALL_MODULE)
    return copy


@pytest.fixture
def no_compiler(tmp_path):
    """A PATH without any program."""
    (tmp_path / "empty").mkdir()
    return {"PATH": str(tmp_path / "empty")}


def test_suite_runs_the_package_it_is_told_to():
    expected = os.environ.get("LOOKAHEAD_FUSED_EXPECTED_IN")
    if expected is None:
        pytest.skip("LOOKAHEAD_FUSED_EXPECTED_IN, set by make test and make test-torches, does not name a directory")
    import lookahead_fused

    where = Path(lookahead_fused.__file__).resolve()
    assert where.is_relative_to(Path(expected).resolve())
    # An installed wheel lies in site-packages, also where the environment itself lies in the source tree.
    assert ("site-packages" in where.parts) == (Path(expected).resolve() != ROOT)


def test_no_source_includes_a_torch_header():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu")]
    assert sources
    torch_header = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|aten|c10|caffe2|libtorch)/', re.MULTILINE)
    assert [path for path in sources if torch_header.search(path.read_text(encoding="utf-8"))] == []


@needs_compiler
def test_wheel_of_the_source_distribution_holds_the_package_and_no_more(base, tree, built):
    expected = {path.relative_to(tree).as_posix() for path in (tree / "lookahead_fused").rglob("*.py")}
    expected |= {"lookahead_fused/py.typed", "lookahead_fused/_build_info.json"}
    with zipfile.ZipFile(built.wheel) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    (module,) = native_modules(built.wheel)
    assert re.fullmatch(r"lookahead_fused/_cpu\..*\.so", module)
    assert {name for name in contents if ".dist-info/" not in name} == expected | {module}
    # Where it was built stays untold: base is above the sources, the build directory and the tools.
    assert [name for name, content in contents.items() if str(base).encode() in content] == []


def test_source_distribution_holds_what_its_own_tests_need(tree, unpacked):
    wanted = ["setup.py", "pyproject.toml", "Makefile", "README.md", "LICENSE", ".clang-format"]
    wanted += [path.relative_to(tree).as_posix() for path in tree.rglob("tests/**/*.py")]
    wanted += [path.relative_to(tree).as_posix() for path in tree.rglob("csrc/**/*.h")]
    assert [name for name in wanted if not (unpacked / name).is_file()] == []


@needs_compiler
def test_metadata_and_build_record(built):
    with zipfile.ZipFile(built.wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    assert [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r] == ["torch>=2.6"]
    assert metadata["Requires-Python"] == ">=3.10"
    info = built.build_info()
    assert info["version"] == metadata["Version"]
    record = info["modules"]["_cpu"]
    assert (record["built"], record["reason"]) == (True, "")
    assert re.fullmatch(r"\w+ \d[\d.]*", record["compiler"])
    assert {"-O3", "-std=c++17", "-ffp-contract=off"} <= set(record["flags"].split())


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("readelf"), reason="reads ELF files with readelf")
def test_module_links_the_language_runtime_only_and_is_stripped(built, tmp_path):
    with zipfile.ZipFile(built.wheel) as archive:
        module = archive.extract(native_modules(built.wheel)[0], tmp_path)
    dynamic = run(["readelf", "--dynamic", module]).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    runtime = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libpthread.so.0", "libc.so.6"}
    assert {name for name in needed if not name.startswith("ld-linux")} <= runtime
    assert "libstdc++.so.6" in needed  # readelf was understood
    assert not re.search(r"RPATH|RUNPATH", dynamic)
    assert not re.search(r"\.symtab|\.debug", run(["readelf", "--sections", "--wide", module]).stdout)


@needs_compiler
@pytest.mark.skipif(not shutil.which("nm"), reason="reads object files with nm")
@pytest.mark.parametrize("instruction_set", ["avx2", "avx512"])
def test_instruction_set_files_emit_nothing_that_other_files_may_share(unpacked, built, instruction_set):
    """The linker keeps one copy of a shared symbol, perhaps the one a smaller CPU cannot run."""
    objects = list(unpacked.glob(f"build/cmake-*/**/walk_{instruction_set}.cpp.o"))
    if not objects and "-mavx" not in built.build_info()["modules"]["_cpu"]["flags"]:
        pytest.skip("the compiler's target has no such instruction set")
    (object_file,) = objects
    lines = run(["nm", "--demangle", "--defined-only", object_file]).stdout.splitlines()
    symbols = [line.split(maxsplit=2)[1:] for line in lines]
    functions = [name for kind, name in symbols if kind in "TW"]
    assert functions
    assert [name for name in functions if instruction_set not in name] == []


@pytest.mark.parametrize("cxx", [None, "/nonexistent/c++"])
def test_without_a_compiler_the_reference_backend_is_packed_and_the_reason_told(copy, pip_wheel, no_compiler, cxx):
    (copy / "lookahead_fused/_cpu.so").write_text("of an editable install")
    result = pip_wheel(copy, **no_compiler, **({"CXX": cxx, "CC": cxx} if cxx else {}))
    assert result.returncode == 0, result.output
    assert native_modules(result.wheel) == []
    record = result.build_info()["modules"]["_cpu"]
    assert record["built"] is False
    assert (cxx or "no C++ compiler") in record["reason"]
    assert f"NOT built: {record['reason']}" in result.output


@needs_compiler
def test_modules_of_an_earlier_build_are_not_packed_again(copy, pip_wheel, no_compiler):
    renamed = copy / "lookahead_fused/renamed_since.py"
    renamed.touch()
    assert native_modules(pip_wheel(copy).wheel) != []
    renamed.unlink()
    result = pip_wheel(copy, **no_compiler)
    assert native_modules(result.wheel) == []
    with zipfile.ZipFile(result.wheel) as archive:
        assert "lookahead_fused/renamed_since.py" not in archive.namelist()
    assert result.build_info()["modules"]["_cpu"]["built"] is False


def test_asking_for_the_module_makes_a_missing_compiler_an_error(copy, pip_wheel, no_compiler):
    result = pip_wheel(copy, **no_compiler, LOOKAHEAD_FUSED_CPU="1")
    assert result.returncode != 0
    assert result.wheel is None
    assert "LOOKAHEAD_FUSED_CPU=1 asks for lookahead_fused._cpu, but no C++ compiler was found" in result.output


def test_the_module_can_be_left_out(copy, pip_wheel):
    result = pip_wheel(copy, LOOKAHEAD_FUSED_CPU="0")
    assert result.returncode == 0, result.output
    assert native_modules(result.wheel) == []
    assert "LOOKAHEAD_FUSED_CPU=0" in result.build_info()["modules"]["_cpu"]["reason"]


@needs_compiler
@pytest.mark.parametrize("asked", [{}, {"LOOKAHEAD_FUSED_CPU": "1"}])
def test_a_source_that_does_not_compile_fails_the_install(copy, pip_wheel, asked):
    (copy / "csrc/python/cpu_module.cpp").write_text("this is not C++\n")
    result = pip_wheel(copy, **asked, MAX_JOBS="1")
    assert result.returncode != 0
    assert result.wheel is None
    assert re.search(r"cpu_module\.cpp.*error", result.output)


@needs_compiler
def test_a_compiler_that_fails_is_not_taken_for_a_missing_one(copy, pip_wheel, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exec echo "a compiler 1.0"\nexit 1\n')
    compiler.chmod(0o755)
    result = pip_wheel(copy, CXX=str(compiler))
    assert result.returncode != 0
    assert result.wheel is None


@needs_compiler
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("LOOKAHEAD_FUSED_CPU", "yes", "LOOKAHEAD_FUSED_CPU must be 0, 1 or unset, got 'yes'"),
        ("MAX_JOBS", "0", "MAX_JOBS must be a positive integer, got '0'"),
        ("CXXFLAGS", "-O2 -ffast-math", "ask for -ffast-math, which changes results"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(copy, pip_wheel, name, value, message):
    result = pip_wheel(copy, **{name: value})
    assert result.returncode != 0
    assert message in re.sub(r"\s+", " ", result.output)


@needs_compiler
def test_editable_install_builds_next_to_the_sources(copy, toolchain, no_compiler):
    command = [
        toolchain,
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "--editable",
    ]
    package = copy / "lookahead_fused"

    done = run([*command, copy], env=environment())
    assert done.returncode == 0, done.stdout
    assert len(list(package.glob("_cpu*.so"))) == 1
    assert json.loads((package / "_build_info.json").read_text())["modules"]["_cpu"]["built"] is True
    find = "import importlib.util; print(importlib.util.find_spec('lookahead_fused').origin)"
    assert run([toolchain, "-c", find], cwd=copy.parent).stdout.strip() == str(package / "__init__.py")

    # The module built before must go, or it would be imported beside a record that denies it.
    done = run([*command, copy], env=environment(**no_compiler))
    assert done.returncode == 0, done.stdout
    assert list(package.glob("_cpu*.so")) == []
    assert json.loads((package / "_build_info.json").read_text())["modules"]["_cpu"]["built"] is False


# ------------------------------------------------------------------------------------------------------------
# the CUDA module


@pytest.fixture
def nvcc(tmp_path):
    """The path of a script that answers as nvcc does from its toolkit, and compiles nothing."""
    program = tmp_path / "toolkit/bin/nvcc"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho '#$ TOP='$(dirname $0)/.. >&2\necho compute_75 compute_80 compute_120\n")
    program.chmod(0o755)
    return program


@needs_compiler
@pytest.mark.parametrize("switch", ["FORCE_CUDA", "LOOKAHEAD_FUSED_CUDA"])
def test_asking_for_cuda_makes_a_missing_nvcc_an_error(copy, pip_wheel, switch):
    changes = {"LOOKAHEAD_FUSED_CUDA": "", switch: "1", "CUDA_HOME": "/nonexistent"}
    result = pip_wheel(copy, **changes)
    assert result.returncode != 0
    expected = "LOOKAHEAD_FUSED_CUDA=1 asks for lookahead_fused._cuda, but CUDA_HOME names '/nonexistent'"
    assert expected in re.sub(r"\s+", " ", result.output)


@needs_compiler
def test_without_nvcc_the_reason_is_recorded(copy, pip_wheel):
    result = pip_wheel(copy, LOOKAHEAD_FUSED_CUDA="", CUDA_HOME="/nonexistent")
    assert result.returncode == 0, result.output
    record = result.build_info()["modules"]["_cuda"]
    assert record["built"] is False
    assert "CUDA_HOME names '/nonexistent'" in record["reason"]


@needs_compiler
@pytest.mark.parametrize(
    ("architectures", "message"),
    [
        ("8.0;Ampere", "TORCH_CUDA_ARCH_LIST must hold entries like 8.0, 9.0a or 12.0+PTX, got 'Ampere'"),
        ("7.0 8.0", "TORCH_CUDA_ARCH_LIST asks for 7.0; lookahead_fused needs 7.5 or later"),
        ("9.0", "builds for 7.5 8.0 12.0"),
    ],
)
def test_architectures_that_cannot_be_built_are_refused(copy, pip_wheel, nvcc, architectures, message):
    home = str(nvcc.parents[1])
    result = pip_wheel(copy, LOOKAHEAD_FUSED_CUDA="1", CUDA_HOME=home, TORCH_CUDA_ARCH_LIST=architectures)
    assert result.returncode != 0
    assert message in re.sub(r"\s+", " ", result.output)


@needs_compiler
def test_local_version(copy, pip_wheel):
    result = pip_wheel(copy, LOOKAHEAD_FUSED_LOCAL_VERSION="cu130")
    assert result.returncode == 0, result.output
    assert "+cu130-" in result.wheel.name
    assert result.build_info()["version"].endswith("+cu130")


@needs_compiler
@pytest.mark.skipif(not shutil.which("nvcc"), reason="compiles with nvcc, and there is none on PATH")
def test_the_cuda_module_is_built_where_nvcc_is(tree, pip_wheel, tmp_path):
    """Found on PATH, be it a script or a link; the module links no CUDA library and records what it was built for."""
    source = shutil.copytree(tree, tmp_path / "tree")
    result = pip_wheel(source, LOOKAHEAD_FUSED_CUDA="1", LOOKAHEAD_FUSED_CPU="0", TORCH_CUDA_ARCH_LIST="8.0+PTX")
    assert result.returncode == 0, result.output
    (module,) = native_modules(result.wheel)
    assert re.fullmatch(r"lookahead_fused/_cuda\..*\.so", module)
    record = result.build_info()["modules"]["_cuda"]
    assert record["compiler"].startswith("NVIDIA ")
    assert {"-fmad=false", "-prec-div=true", "-prec-sqrt=true"} <= set(record["flags"].split())
    assert "(for 8.0+PTX)" in record["flags"]
    with zipfile.ZipFile(result.wheel) as archive:
        extracted = archive.extract(module, tmp_path)
    needed = run(["readelf", "--dynamic", extracted]).stdout
    assert "libstdc++" in needed
    assert not re.search(r"libcud|libnv", needed)
