"""The library that the modules of several Pythons load their kernels from, and what becomes of a wrong one."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from wheels import COMPILERS, RELEASED, environment, needs_compiler, run

from bench.gpu import cuda_code
from lookahead_fused import _build as build

# One worker builds, rather than each one again.
pytestmark = [pytest.mark.xdist_group("packaging")]

SHOWN = {
    "_cpu": {
        f"_ZN15lookahead_fused{len(name)}{name}{parameters}"
        for walk in ("baseline", "avx2", "avx512")
        for name, parameters in ((f"find_{walk}", "EPKcNS_5DtypeES2_S2_"), (f"squares_{walk}", "ENS_5DtypeE"))
    },
    "_cuda": {"_ZN15lookahead_fused12cuda_libraryEv"},
}
LOAD = """
import lookahead_fused, sys
from lookahead_fused import _build
loaded = _build.module(sys.argv[1])
assert loaded is None or loaded.__file__.startswith(sys.argv[2]), loaded.__file__
print(loaded is not None, _build.reason(sys.argv[1]), sep="|")
"""
# No machine has so many devices; and none without CUDA's driver has one.
FAIL = """
from lookahead_fused import _cuda
try:
    _cuda.load_kernels(10_000)
except RuntimeError as error:
    print("raised", error)
"""


@pytest.fixture(params=RELEASED)
def module(request):
    return request.param


def library(installed: Path, module: str) -> Path:
    (path,) = installed.glob(f"lookahead_fused/liblookahead_fused{module}-*.so")
    return path


def symbols(path: Path, *, defined: bool) -> set[str]:
    """What a file shows to the loader, or what it takes of others. What has no address is the name of a version."""
    elffile = pytest.importorskip("elftools.elf.elffile")
    with path.open("rb") as file:
        listed = elffile.ELFFile(file).get_section_by_name(".dynsym").iter_symbols()
        places = {s.name: s["st_shndx"] for s in listed if s.name}
    return {name for name, at in places.items() if at != "SHN_ABS" and (at != "SHN_UNDEF") == defined}


def loaded(installed: Path, module: str) -> tuple[str, str]:
    """Whether a process loads the module of the unpacked wheel, and the reason that is told where it does not."""
    env = environment(PYTHONPATH=str(installed))
    done = run([sys.executable, "-c", LOAD, module, str(installed)], cwd=installed, env=env)
    assert done.returncode == 0, done.stdout
    served, _, reason = done.stdout.strip().rpartition("\n")[2].partition("|")
    return served, reason


@pytest.mark.slow
def test_a_library_shows_what_its_modules_call_and_no_more(installed, module):
    """By the version of its build; a module shows its initialization alone."""
    path = library(installed, module)
    (importer,) = installed.glob(f"lookahead_fused/{module}.*.so")
    assert symbols(path, defined=True) == SHOWN[module]
    assert symbols(importer, defined=True) == {f"PyInit_{module}"}
    assert symbols(importer, defined=False) >= SHOWN[module]
    recorded = json.loads((installed / "lookahead_fused/_build_info.json").read_text())["modules"][module]["build"]
    assert path.name == f"liblookahead_fused{module}-{recorded}.so"
    versions = run(["readelf", "--version-info", "--wide", importer]).stdout
    assert re.search(rf"Version needs section(.|\n)*File: {path.name}\b(.|\n)*Name: build_{recorded}\b", versions)
    dynamic = run(["readelf", "--dynamic", "--program-headers", "--wide", path]).stdout
    assert "BIND_NOW" in dynamic
    assert "GNU_RELRO" in dynamic
    assert re.findall(r"GNU_STACK.* ([RWE]+) +\w+$", dynamic, re.MULTILINE) == ["RW"]


@pytest.mark.slow
def test_a_whole_install_loads(installed, module):
    assert loaded(installed, module) == ("True", "")


@pytest.mark.slow
def test_without_its_library_a_module_is_left_out_and_the_reason_told(installed, module):
    library(installed, module).unlink()
    served, reason = loaded(installed, module)
    assert served == "False"
    assert re.search(rf"liblookahead_fused{module}-\w+\.so: cannot open shared object file", reason)
    assert reason.endswith(build.REINSTALL)


@pytest.mark.slow
@needs_compiler
def test_a_library_of_another_build_is_refused_by_its_name_notwithstanding(installed, module, tmp_path):
    """The loader knows it by the version, before anything in it runs."""
    path, versions = library(installed, module), tmp_path / "versions.map"
    versions.write_text("build_0 { global: *; };\n")
    command = [COMPILERS[0], "-shared", "-x", "c++", os.devnull, f"-Wl,--version-script={versions}", "-o", path]
    done = run([*command, f"-Wl,-soname,{path.name}"])
    assert done.returncode == 0, done.stdout
    served, reason = loaded(installed, module)
    assert served == "False"
    assert re.search(rf"{path.name}: version `build_\w+' not found", reason)
    assert reason.endswith(build.REINSTALL)


@pytest.mark.slow
def test_a_module_of_another_build_than_the_record_is_left_out(installed, module):
    """As an unpacked wheel leaves it that lies over another one, for a Python that only the other was made for."""
    path = installed / "lookahead_fused" / build.RECORD
    record = json.loads(path.read_text())
    own, record["modules"][module]["build"] = record["modules"][module]["build"], "0"
    path.write_text(json.dumps(record))
    told = f"lookahead_fused.{module} is of build {own}, and {build.RECORD} tells of 0; {build.REINSTALL}"
    assert loaded(installed, module) == ("False", told)


@pytest.mark.slow
@pytest.mark.skipif("_cuda" not in RELEASED, reason="builds _cuda with nvcc, and there is none on PATH")
def test_an_error_of_the_library_is_raised_by_the_module(installed):
    """Each has a C++ library of its own: an exception of one would end the process in the other."""
    done = run([sys.executable, "-c", FAIL], cwd=installed, env=environment(PYTHONPATH=str(installed)))
    assert done.returncode == 0, done.stdout
    assert re.search(r"raised cuda(Get|Set)Device(\(10000\))? failed: .+ \(cudaError\w+\)", done.stdout)


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the kernels lie in each module")
def test_a_library_of_an_earlier_build_is_removed(copy, toolchain):
    """Built in place, where nothing else empties the directory."""
    for text in ("", "// changed\n"):
        (copy / "csrc/cpu/walk_nothing.cpp").write_text(text)
        command = [toolchain, "setup.py", "--quiet", "build_ext", "--inplace"]
        done = run(command, cwd=copy, env=environment(LOOKAHEAD_FUSED_PYTHONS=str(toolchain)))
        assert done.returncode == 0, done.stdout
        if not text:
            first = library(copy, "_cpu")
    assert library(copy, "_cpu").name != first.name


@pytest.mark.parametrize(
    ("recorded", "built", "serves"),
    [
        ({}, None, True),
        ({}, "a", True),
        ({"flags": ""}, None, True),
        ({"flags": ""}, "a", False),
        ({"build": "a"}, "a", True),
        ({"build": "a"}, None, False),
    ],
)
def test_a_module_that_names_no_build_serves_by_a_record_without_one(monkeypatch, recorded, built, serves):
    """That of one Python, which holds its kernels; and where there is no record, whatever loads."""
    made = SimpleNamespace(**({"build": built} if built else {}))
    monkeypatch.setattr(build, "info", lambda: {"modules": {"_cpu": recorded}})
    monkeypatch.setattr(build.importlib, "import_module", lambda name: made)
    found, reason = build._load.__wrapped__("_cpu")
    assert (found is made, reason == "") == (serves, serves)


def test_machine_code_is_read_where_it_lies():
    modules = [f"lookahead_fused/_cuda.cpython-3{n}-x86_64-linux-gnu.so" for n in (10, 11)]
    kernels = ["lookahead_fused/liblookahead_fused_cuda-0.so"]
    others = ["lookahead_fused/_cpu.so", "lookahead_fused/liblookahead_fused_cpu-0.so"]
    assert cuda_code.with_code([*others, *modules]) == modules
    assert cuda_code.with_code([*others, *modules, *kernels]) == kernels
