"""What pip makes of the repository: wheels with and without a compiler, loud failures, editable installs.

Everything is built from a copy of the source tree. One build is isolated, as a user's is; the others share
one environment with the build requirements in it, and compile a module of two lines.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import zipfile
from email.parser import Parser

import pytest
from wheels import ROOT, environment, native_modules, needs_compiler, run

# One worker builds, rather than each one again.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]


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
    wanted += [path.relative_to(tree).as_posix() for path in tree.rglob("bench/**/*.*")]
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
    runtime = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libpthread.so.0", "libdl.so.2", "libc.so.6"}
    assert {name for name in needed if not name.startswith("ld-linux")} <= runtime
    assert "libstdc++.so.6" in needed  # readelf was understood
    assert not re.search(r"RPATH|RUNPATH", dynamic)
    assert not re.search(r"\.symtab|\.debug", run(["readelf", "--sections", "--wide", module]).stdout)


@needs_compiler
@pytest.mark.skipif(not shutil.which("nm"), reason="reads object files with nm")
@pytest.mark.parametrize("instruction_set", ["avx2", "avx512"])
def test_instruction_set_files_emit_nothing_that_other_files_may_share(objects, built, instruction_set):
    """The linker keeps one copy of a shared symbol, perhaps the one a smaller CPU cannot run."""
    compiled = [path for path in objects if path.name == f"walk_{instruction_set}.cpp.o"]
    if not compiled and "-mavx" not in built.build_info()["modules"]["_cpu"]["flags"]:
        pytest.skip("the compiler's target has no such instruction set")
    (object_file,) = compiled
    lines = run(["nm", "--demangle", "--defined-only", object_file]).stdout.splitlines()
    symbols = [line.split(maxsplit=2)[1:] for line in lines]
    functions = [name for kind, name in symbols if kind in "TW"]
    assert functions
    assert [name for name in functions if instruction_set not in name] == []


@pytest.mark.parametrize("cxx", [None, "/nonexistent/c++"])
def test_without_a_compiler_the_reference_backend_is_packed_and_the_reason_told(copy, build_wheel, no_compiler, cxx):
    (copy / "lookahead_fused/_cpu.so").write_text("of an editable install")
    result = build_wheel(copy, **no_compiler, **({"CXX": cxx, "CC": cxx} if cxx else {}))
    assert result.returncode == 0, result.output
    assert native_modules(result.wheel) == []
    record = result.build_info()["modules"]["_cpu"]
    assert record["built"] is False
    assert (cxx or "no C++ compiler") in record["reason"]
    assert f"NOT built: {record['reason']}" in result.output


@needs_compiler
def test_modules_of_an_earlier_build_are_not_packed_again(copy, build_wheel, no_compiler):
    renamed = copy / "lookahead_fused/renamed_since.py"
    renamed.touch()
    assert native_modules(build_wheel(copy).wheel) != []
    renamed.unlink()
    result = build_wheel(copy, **no_compiler)
    assert native_modules(result.wheel) == []
    with zipfile.ZipFile(result.wheel) as archive:
        assert "lookahead_fused/renamed_since.py" not in archive.namelist()
    assert result.build_info()["modules"]["_cpu"]["built"] is False


def test_asking_for_the_module_makes_a_missing_compiler_an_error(copy, build_wheel, no_compiler):
    result = build_wheel(copy, **no_compiler, LOOKAHEAD_FUSED_CPU="1")
    assert result.returncode != 0
    assert result.wheel is None
    assert "LOOKAHEAD_FUSED_CPU=1 asks for lookahead_fused._cpu, but no C++ compiler was found" in result.output


def test_the_module_can_be_left_out(copy, build_wheel):
    result = build_wheel(copy, LOOKAHEAD_FUSED_CPU="0")
    assert result.returncode == 0, result.output
    assert native_modules(result.wheel) == []
    assert "LOOKAHEAD_FUSED_CPU=0" in result.build_info()["modules"]["_cpu"]["reason"]


@needs_compiler
@pytest.mark.parametrize("asked", [{}, {"LOOKAHEAD_FUSED_CPU": "1"}])
def test_a_source_that_does_not_compile_fails_the_install(copy, build_wheel, asked):
    (copy / "csrc/python/cpu_module.cpp").write_text("this is not C++\n")
    result = build_wheel(copy, **asked, MAX_JOBS="1")
    assert result.returncode != 0
    assert result.wheel is None
    assert re.search(r"cpu_module\.cpp.*error", result.output)


@needs_compiler
def test_a_compiler_that_fails_is_not_taken_for_a_missing_one(copy, build_wheel, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exec echo "a compiler 1.0"\nexit 1\n')
    compiler.chmod(0o755)
    result = build_wheel(copy, CXX=str(compiler))
    assert result.returncode != 0
    assert result.wheel is None


@needs_compiler
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("LOOKAHEAD_FUSED_CPU", "yes", "LOOKAHEAD_FUSED_CPU must be 0, 1 or unset, got 'yes'"),
        ("MAX_JOBS", "0", "MAX_JOBS must be a positive integer, got '0'"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(copy, build_wheel, name, value, message):
    result = build_wheel(copy, **{name: value})
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
