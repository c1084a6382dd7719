"""The one wheel for every Python and Linux: what it needs of a machine, and that its compiler keeps the bits."""

from __future__ import annotations

import os
import re
import shlex
import sys
import zipfile
from pathlib import Path

import pytest
from wheels import COMPILERS, RELEASED, ROOT, environment, native_modules, needs_compiler, run

from lookahead_fused import _build as build

# One worker builds, rather than each one again.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]

# Steps of every dtype by every instruction set, and what identifies their bits; first, what stepped. By the rule that
# has a sum, a product, a division and a root: each takes zig half a minute to compile.
BITS = """
import hashlib, torch, lookahead_fused
from helpers import make_grads, make_params, seeded, set_grad, tune
from lookahead_fused import _cpu
print(_cpu.__file__)
HYPER = {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True, "k": 2, "alpha": 0.3, "pullback_momentum": "pullback"}
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for instruction_set in _cpu.instruction_sets():
        params = make_params([(size,) for size in (1, 7, 33, 4097, 150_001)], dtype)
        optimizer = lookahead_fused.LookaheadAdamW(params, backend="cpu", **HYPER)
        tune(optimizer, instruction_set=instruction_set)
        generator = seeded(1)
        for _ in range(5):
            for p, g in zip(params, make_grads(params, generator=generator)):
                set_grad(p, g)
            optimizer.step()
        state = [t for p in params for t in (p.detach(), *optimizer.state[p].values()) if torch.is_tensor(t)]
        bits = b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in state if t.dim())
        print(dtype, instruction_set, len(bits), hashlib.sha256(bits).hexdigest())
"""


def test_a_release_wheel_needs_no_more_than_its_tag_promises(released, release):
    wheel, output = released
    assert wheel.name.endswith("-py3-none-manylinux_2_17_x86_64.whl")
    assert names(release.modules_of(wheel)) == {f"{module}{extension_suffix()}" for module in RELEASED}
    assert list(release.faults_of(wheel)) == []
    assert 'consistent with the following platform tag: "manylinux_2_17_x86_64"' in re.sub(r"\s+", " ", output)
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        assert "Tag: py3-none-manylinux_2_17_x86_64" in archive.read(metadata).decode().splitlines()


def test_the_wheel_of_one_machine_is_refused_as_a_release(built, release):
    """Else the reading might be of nothing: this one needs the machine's C++ library, and is tagged for its Python."""
    faults = "\n".join(release.faults_of(built.wheel))
    assert "its tag is not py3-none-manylinux_2_17_x86_64" in faults
    assert re.search(r"_cpu\..*: needs libstdc\+\+\.so\.6\n", faults)
    assert re.search(r"_cpu\..*: needs GLIBCXX_[\d.]+ of libstdc\+\+", faults)


@needs_compiler
@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["-Wl,-rpath,/opt/lib"], "looks for libraries in ['/opt/lib'] and not in []"),
        (["-Wl,--no-as-needed", "liblookahead_fused_cpu-0.so"], "looks for libraries in [] and not in ['$ORIGIN']"),
        (["-Wl,--no-as-needed", "libother.so"], "needs libother.so"),
    ],
)
def test_a_library_is_looked_for_beside_the_module_alone(release, tmp_path, options, fault):
    libraries, wheel = ("liblookahead_fused_cpu-0.so", "libother.so"), tmp_path / "made.whl"
    for name, further in (*((name, [f"-Wl,-soname,{name}"]) for name in libraries), ("_cpu.so", options)):
        done = run([COMPILERS[0], "-shared", "-x", "c++", os.devnull, "-x", "none", *further, "-o", name], cwd=tmp_path)
        assert done.returncode == 0, done.stdout
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("_cpu.so", libraries[0]):
            archive.write(tmp_path / name, f"lookahead_fused/{name}")
    assert f"lookahead_fused/_cpu.so: {fault}" in list(release.faults_of(wheel))


def test_a_module_that_does_not_load_is_a_fault(release, tmp_path):
    wheel = tmp_path / "broken.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"lookahead_fused/_cpu{extension_suffix()}", b"\x7fELF")
    (fault,) = release.loading_faults(wheel, [sys.executable])
    assert f"{sys.executable} does not load _cpu{extension_suffix()}: " in fault


@pytest.mark.skipif(build.module("_cpu") is None, reason=build.reason("_cpu"))
def test_a_release_wheel_steps_with_the_same_bits(installed):
    """Its compiler is another than the one that built what is tested here, and so is its list of instruction sets."""
    of_release, *bits = bits_of(installed)
    of_this, *expected = bits_of(Path(build.module("_cpu").__file__).parents[1])
    assert Path(of_release).is_relative_to(installed)
    assert not Path(of_this).is_relative_to(installed)
    assert len(expected) == 4 * len(build.module("_cpu").instruction_sets())
    assert bits == expected


def bits_of(package: Path) -> list[str]:
    env = environment(PYTHONPATH=os.pathsep.join([str(package), str(ROOT / "tests"), str(ROOT)]))
    # Not from here: what lies in the working directory is imported first.
    done = run([sys.executable, "-c", BITS], cwd=package, env=env)
    assert done.returncode == 0, done.stdout
    return done.stdout.splitlines()


def test_pythons_that_do_not_run_are_told(release, tmp_path, monkeypatch, capsys):
    for name, status in (("python3.10", 0), ("python3.11", 127)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list(release.found_on_path()) == [str(tmp_path / "python3.10")]
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told] == list(release.NAMES[1:])
    assert "the wheel will step by its reference backend" in told[0]


@needs_compiler
def test_modules_for_several_pythons_lie_in_one_wheel(copy, build_wheel, toolchain, tmp_path):
    other = tmp_path / "python3.99"
    include = run([toolchain, "-c", "import sysconfig; print(sysconfig.get_path('include'))"]).stdout.strip()
    other.write_text(f"#!/bin/sh\necho {include}\necho .cpython-399-x86_64-linux-gnu.so\n")
    other.chmod(0o755)
    result = build_wheel(copy, LOOKAHEAD_FUSED_PYTHONS=shlex.join([str(toolchain), str(other)]))
    assert result.returncode == 0, result.output
    assert re.search(r"-py3-none-\w+\.whl$", result.wheel.name)
    expected = {f"_cpu{extension_suffix()}", "_cpu.cpython-399-x86_64-linux-gnu.so"}
    if sys.platform == "linux":
        expected.add(f"liblookahead_fused_cpu-{result.build_info()['modules']['_cpu']['build']}.so")
    assert names(native_modules(result.wheel)) == expected


@needs_compiler
def test_a_name_that_is_no_python_is_refused(copy, build_wheel):
    result = build_wheel(copy, LOOKAHEAD_FUSED_PYTHONS="/nonexistent/python3.10")
    assert result.returncode != 0
    expected = "LOOKAHEAD_FUSED_PYTHONS names '/nonexistent/python3.10', which is no Python: [Errno 2]"
    assert expected in re.sub(r"\s+", " ", result.output)


def test_a_python_without_a_module_is_told_for_which_there_are(tmp_path, monkeypatch):
    def import_nothing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for python in ("313t", "310", "313"):
        (tmp_path / f"_cpu.cpython-{python}-x86_64-linux-gnu.so").touch()
    monkeypatch.setattr(build.resources, "files", lambda package: tmp_path)
    monkeypatch.setattr(build.importlib, "import_module", import_nothing)
    monkeypatch.setattr(build.machinery, "EXTENSION_SUFFIXES", [".cpython-314-x86_64-linux-gnu.so", ".abi3.so", ".so"])
    told = "this installation has _cpu for CPython 3.10, 3.13, 3.13t, and this is 3.14"
    assert build._load.__wrapped__("_cpu") == (None, told)
    # One that is for this Python, and does not load, is another matter.
    (tmp_path / "_cpu.cpython-314-x86_64-linux-gnu.so").touch()
    assert build._load.__wrapped__("_cpu") == (
        None,
        "lookahead_fused._cpu could not be imported: ModuleNotFoundError: No module named 'lookahead_fused._cpu'",
    )


def names(paths: list[str]) -> set[str]:
    return {Path(path).name for path in paths}


def extension_suffix() -> str:
    return build.machinery.EXTENSION_SUFFIXES[0]
