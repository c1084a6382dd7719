"""How `_cuda` is found, refused and built."""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest
from wheels import native_modules, needs_compiler, run

from bench.gpu import cuda_code

# One worker builds, rather than each one again.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]


@pytest.fixture
def nvcc(tmp_path):
    """The path of a script that answers as nvcc does from its toolkit, and compiles nothing."""
    program = tmp_path / "toolkit/bin/nvcc"
    program.parent.mkdir(parents=True)
    answer_as_nvcc(program, "echo Cuda compilation tools, release 12.0, V12.0.76")
    return program


def answer_as_nvcc(program: Path, version: str) -> None:
    toolkit = "echo '#$ TOP='$(dirname $0)/.. >&2; echo compute_75 compute_80 compute_120"
    program.write_text(f"#!/bin/sh\ncase $1 in --version) {version};; *) {toolkit};; esac\n")
    program.chmod(0o755)


@needs_compiler
@pytest.mark.parametrize("switch", ["FORCE_CUDA", "LOOKAHEAD_FUSED_CUDA"])
def test_asking_for_cuda_makes_a_missing_nvcc_an_error(copy, build_wheel, switch):
    changes = {"LOOKAHEAD_FUSED_CUDA": "", switch: "1", "CUDA_HOME": "/nonexistent"}
    result = build_wheel(copy, **changes)
    assert result.returncode != 0
    expected = "LOOKAHEAD_FUSED_CUDA=1 asks for lookahead_fused._cuda, but CUDA_HOME names '/nonexistent'"
    assert expected in re.sub(r"\s+", " ", result.output)


@needs_compiler
@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "CUDA_HOME names '/nonexistent'"),
        ("echo Cuda compilation tools, release 11.8, V11.8.89", "it needs nvcc 12.0 or later, and {nvcc} is 11.8: "),
        ("echo libcudart.so is gone >&2; exit 127", "{nvcc} does not tell its version: libcudart.so is gone"),
    ],
)
def test_without_an_nvcc_that_serves_the_reason_is_recorded(copy, build_wheel, nvcc, version, reason):
    """And the package installs; asked for, the module is an error. The first is found by CUDA_HOME, the others on
    PATH."""
    if version is None:
        found = {"CUDA_HOME": "/nonexistent"}
    else:
        answer_as_nvcc(nvcc, version)
        found = {"PATH": os.pathsep.join([str(nvcc.parent), os.environ["PATH"]])}
    result = build_wheel(copy, LOOKAHEAD_FUSED_CUDA="", LOOKAHEAD_FUSED_CPU="0", **found)
    assert result.returncode == 0, result.output
    record = result.build_info()["modules"]["_cuda"]
    assert record["built"] is False
    assert record["reason"].startswith(reason.format(nvcc=nvcc))
    asked_for = build_wheel(copy, LOOKAHEAD_FUSED_CUDA="", FORCE_CUDA="1", **found)
    assert asked_for.returncode != 0
    expected = f"asks for lookahead_fused._cuda, but {record['reason']}"
    assert expected in re.sub(r"\s+", " ", asked_for.output)


@needs_compiler
@pytest.mark.parametrize(
    ("architectures", "message"),
    [
        ("8.0;Ampere", "TORCH_CUDA_ARCH_LIST must hold entries like 8.0, 9.0a or 12.0+PTX, got 'Ampere'"),
        ("7.0 8.0", "TORCH_CUDA_ARCH_LIST asks for 7.0; lookahead_fused needs 7.5 or later"),
        ("9.0", "builds for 7.5 8.0 12.0"),
    ],
)
def test_architectures_that_cannot_be_built_are_refused(copy, build_wheel, nvcc, architectures, message):
    home = str(nvcc.parents[1])
    result = build_wheel(copy, LOOKAHEAD_FUSED_CUDA="1", CUDA_HOME=home, TORCH_CUDA_ARCH_LIST=architectures)
    assert result.returncode != 0
    assert message in re.sub(r"\s+", " ", result.output)


@needs_compiler
def test_nvcc_is_found_in_nvidias_packages(copy, build_wheel, toolchain, nvcc):
    """nvidia-cuda-nvcc and nvidia-cuda-runtime install into one directory; without the header it is no toolkit."""
    where = run([toolchain, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).stdout.strip()
    root = Path(where, "nvidia/cu13")
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not Path(p, "nvcc").exists())
    changes = {"LOOKAHEAD_FUSED_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0", "PATH": path}
    try:
        shutil.copytree(nvcc.parent, root / "bin")
        without_header = build_wheel(copy, **changes)
        (root / "include").mkdir()
        (root / "include/cuda_runtime.h").touch()
        found = build_wheel(copy, **changes)
    finally:
        shutil.rmtree(root.parent)
    expected = "no nvcc was found (looked at CUDA_HOME, PATH and the packages nvidia-cuda-nvcc and nvidia-cuda-runtime)"
    assert expected in re.sub(r"\s+", " ", without_header.output)
    # It is asked for what it builds for, and that is not what was wanted.
    assert f"{root}/bin/nvcc builds for 7.5 8.0 12.0" in re.sub(r"\s+", " ", found.output)


@needs_compiler
def test_local_version(copy, build_wheel):
    result = build_wheel(copy, LOOKAHEAD_FUSED_LOCAL_VERSION="cu130")
    assert result.returncode == 0, result.output
    assert "+cu130-" in result.wheel.name
    assert result.build_info()["version"].endswith("+cu130")


@needs_compiler
@pytest.mark.skipif(not shutil.which("nvcc"), reason="compiles with nvcc, and there is none on PATH")
def test_the_cuda_module_is_built_where_nvcc_is(built_with_cuda, tmp_path):
    """Found on PATH, be it a script or a link; the module links no CUDA library and records what it was built for."""
    result = built_with_cuda
    (module,) = native_modules(result.wheel)
    assert re.fullmatch(r"lookahead_fused/_cuda\..*\.so", module)
    record = result.build_info()["modules"]["_cuda"]
    assert record["compiler"].startswith("NVIDIA ")
    assert {"-fmad=false", "-prec-div=true", "-prec-sqrt=true"} <= set(record["flags"].split())
    assert "(for 8.0+PTX)" in record["flags"]
    if cuda_code.tool("cuobjdump"):
        assert cuda_code.main(["--expect", "8.0+PTX", str(result.wheel)]) == 0
    with zipfile.ZipFile(result.wheel) as archive:
        extracted = archive.extract(module, tmp_path)
    needed = run(["readelf", "--dynamic", extracted]).stdout
    assert "libstdc++" in needed
    assert not re.search(r"libcud|libnv", needed)
