"""What a built module shows to the process, and what makes a mistake in its memory harder to exploit."""

from __future__ import annotations

import re
import shutil
import sys
import zipfile

import pytest
from wheels import native_modules, needs_compiler, run

# One worker builds, rather than each one again.
pytestmark = [
    *(pytest.mark.slow, pytest.mark.xdist_group("packaging"), needs_compiler),
    pytest.mark.skipif(sys.platform != "linux", reason="the linker's options are for ELF files"),
    pytest.mark.skipif(not (shutil.which("readelf") and shutil.which("nm")), reason="readelf or nm is missing"),
]


@pytest.fixture(params=["_cpu", "_cuda"])
def module(request, tmp_path):
    """A built module, and its name."""
    if request.param == "_cpu":
        wheel = request.getfixturevalue("built").wheel
    elif shutil.which("nvcc"):
        wheel = request.getfixturevalue("built_with_cuda").wheel
    else:
        pytest.skip("builds _cuda with nvcc, and there is none on PATH")
    with zipfile.ZipFile(wheel) as archive:
        (path,) = native_modules(wheel)
        return archive.extract(path, tmp_path), request.param


def test_a_module_is_hardened_and_shows_its_initialization_alone(module):
    """An inline function of the standard library that is shown may be taken for another library's, and its for ours."""
    path, name = module
    shown = [line.split()[-1] for line in run(["nm", "--dynamic", "--defined-only", path]).stdout.splitlines()]
    assert shown == [f"PyInit_{name}"]
    segments = run(["readelf", "--program-headers", "--wide", path]).stdout
    assert "GNU_RELRO" in segments
    (stack,) = re.findall(r"GNU_STACK.* ([RWE]+) +0x", segments)
    assert stack == "RW"
    assert "BIND_NOW" in run(["readelf", "--dynamic", path]).stdout
    assert "__stack_chk_fail" in run(["nm", "--dynamic", "--undefined-only", path]).stdout


def test_a_source_is_compiled_with_checks_and_a_walk_without(objects, built):
    """A check at each return from a chunk is time that a step does not have."""
    flags = built.build_info()["modules"]["_cpu"]["flags"]
    assert "-D_FORTIFY_SOURCE=2" in flags
    walks = [path for path in objects if path.name.startswith("walk_")]
    assert walks
    assert [path.name for path in walks if re.search(r"_chk\b|__stack_chk", run(["nm", path]).stdout)] == []


def test_the_users_own_level_of_checks_is_kept(copy, build_wheel):
    result = build_wheel(copy, CXXFLAGS="-O2 -Werror -D_FORTIFY_SOURCE=3")
    assert result.returncode == 0, result.output
    assert "-D_FORTIFY_SOURCE=2" not in result.build_info()["modules"]["_cpu"]["flags"]
