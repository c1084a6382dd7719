"""Fast math in the environment of a build: undone, or refused by its name."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import zipfile
from pathlib import Path

import pytest
from wheels import COMPILERS, native_modules, needs_compiler, run

# One worker builds, rather than each one again.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging"), needs_compiler]

# Of what a compiler knows of these, every one changes what the module below computes, or is part of one that does.
FAST_MATH = (
    *("-ffast-math", "-funsafe-math-optimizations", "-fassociative-math", "-freciprocal-math", "-ffinite-math-only"),
    *("-fno-signed-zeros", "-fno-trapping-math", "-fsingle-precision-constant", "-ffp-contract=fast", "-mfpmath=387"),
    *("-fcx-limited-range", "-fexcess-precision=fast", "-fapprox-func", "-fno-honor-nans", "-fno-honor-infinities"),
)

ROUNDING_MODULE = """
#include <Python.h>

static PyObject* results(PyObject*, PyObject* numbers) {
    double a, small, tenth, product, zero, nan, large;
    if (!PyArg_ParseTuple(numbers, "ddddddd", &a, &small, &tenth, &product, &zero, &nan, &large)) return nullptr;
    const double reciprocal = a / 3.0;
    const double associated = (a + small) - a;
    const double contracted = a * tenth - product;
    const double constant = a * 0.1;
    const double overflown = (large * a) / a;
    const double positive = zero + 0.0;
    const double is_nan = nan != nan;
    return Py_BuildValue("ddddddd", reciprocal, associated, contracted, constant, overflown, positive, is_nan);
}

static PyMethodDef methods[] = {{"results", results, METH_VARARGS, nullptr}, {}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, methods};
PyMODINIT_FUNC PyInit__cpu() { return PyModule_Create(&definition); }
"""
NUMBERS = (5.0, 1e-20, 0.1, 0.5, -0.0, math.nan, 1e308)
EXACT = [5.0 / 3.0, 0.0, 0.0, 5.0 * 0.1, math.inf, 0.0, 1.0]

ASK = f"""
import importlib.util, sys
from math import nan
spec = importlib.util.spec_from_file_location("_cpu", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
smallest = float("5e-324")
print([*module.results{NUMBERS}, smallest + float("0")])
"""


@pytest.fixture
def rounding(copy):
    """A tree whose _cpu tells how it rounds."""
    (copy / "csrc/python/cpu_module.cpp").write_text(ROUNDING_MODULE)
    return copy


def accepted(flags: tuple[str, ...]) -> list[str]:
    """Those that the compiler knows, and that this machine can run; among them what a contraction is made of."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file() and " fma " in cpuinfo.read_text():
        flags += ("-mfma",)
    return [f for f in flags if run([COMPILERS[0], "-Werror", f, "-E", "-x", "c++", os.devnull]).returncode == 0]


def test_the_numbers_tell_exact_from_fast() -> None:
    assert NUMBERS[0] * (1 / 3.0) != EXACT[0]
    assert NUMBERS[0] * float.fromhex("0x1.99999ap-4") != EXACT[3]  # the constant as a float


@pytest.mark.parametrize("variable", ["CXX", "CXXFLAGS", "LDFLAGS"])
def test_fast_math_is_undone(rounding, build_wheel, toolchain, tmp_path, variable):
    flags = shlex.join(accepted(FAST_MATH))
    assert "-ffast-math" in flags
    result = build_wheel(rounding, **{variable: f"{COMPILERS[0]} {flags}" if variable == "CXX" else flags})
    assert result.returncode == 0, result.output
    with zipfile.ZipFile(result.wheel) as archive:
        module = archive.extract(native_modules(result.wheel)[0], tmp_path)
    # The last is what the module leaves of the process's smallest number: crtfastmath.o makes it 0.
    assert run([toolchain, "-c", ASK, module]).stdout.strip() == repr([*EXACT, 5e-324])
    if variable != "LDFLAGS":  # and a bug report tells of it
        assert "-ffast-math" in result.build_info()["modules"]["_cpu"]["flags"]


@pytest.mark.skipif(not shutil.which("g++"), reason="asks for what GCC links with -Ofast")
def test_what_changes_the_rounding_of_the_process_is_refused(rounding, build_wheel):
    result = build_wheel(rounding, CXX="g++", LDFLAGS="-Ofast")
    assert result.returncode != 0
    assert result.wheel is None
    assert "CXX, CXXFLAGS or LDFLAGS (-Ofast) link crtfastmath.o" in re.sub(r"\s+", " ", result.output)


@pytest.mark.skipif(not shutil.which("g++"), reason="reads GCC's macros")
@pytest.mark.parametrize("flag", ["-ffast-math", "-freciprocal-math", "-ffinite-math-only", "-mfpmath=387"])
def test_a_compiler_that_has_the_last_word_is_refused(rounding, build_wheel, tmp_path, flag):
    script = tmp_path / "g++"
    script.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} "$@" {flag}\n')
    script.chmod(0o755)
    result = build_wheel(rounding, CXX=str(script))
    assert result.returncode != 0
    assert result.wheel is None
    assert re.search(f"ask for.*{flag}.*cannot be undone", re.sub(r"\s+", " ", result.output))


@pytest.mark.skipif(not shutil.which("nvcc"), reason="asks nvcc, and there is none on PATH")
@pytest.mark.parametrize(
    ("variable", "flags", "told"),
    [
        ("CUDAFLAGS", "-use_fast_math", "-fast-math"),
        (
            "NVCC_APPEND_FLAGS",
            "--fmad=true -prec-div=false -prec-sqrt=false -ftz=true",
            "-ftz=1 -prec_div=0 -prec_sqrt=0 -fmad=1",
        ),
        ("NVCC_APPEND_FLAGS", "-Xcompiler -freciprocal-math", "-freciprocal-math"),
    ],
)
def test_what_nvcc_would_do_otherwise_is_refused(copy, build_wheel, variable, flags, told):
    changes = {"LOOKAHEAD_FUSED_CUDA": "1", "LOOKAHEAD_FUSED_CPU": "0", variable: flags}
    result = build_wheel(copy, **changes)
    assert result.returncode != 0
    output = re.sub(r"[\s;]+", " ", result.output)
    assert "CUDAFLAGS, CUDAHOSTCXX, NVCC_PREPEND_FLAGS, NVCC_APPEND_FLAGS or" in output
    assert re.search(rf"{told}, which changes results", output)
