"""Builds the one wheel for every Python and every Linux on x86-64 with glibc 2.17, and reads in it that it is that.

    python csrc/release_wheel.py [--dist DIRECTORY] [PYTHON ...]

Without a PYTHON, those of NAMES that PATH has. The compiler is zig's: clang with the headers of the older glibc and
with a C++ library of its own, which is linked into each file, so that a machine's libstdc++ is no matter. nvcc takes
no host compiler of that kind; CUDAHOSTCXX or g++ serves it, for launches that use no C++ library.

The environment tells the rest, as for any other build: csrc/README.md lists it. `make release-wheel` installs what this
needs, and calls it.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import ziglang
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("python3.10", "python3.11", "python3.12", "python3.13", "python3.14", "python3.13t", "python3.14t")
MACHINE = "x86_64"
GLIBC = (2, 17)
PLATFORM = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{MACHINE}"
# The parts of glibc, and but for the wheel's own no other library: neither a C++ library nor CUDA's nor torch's.
SYSTEM = {f"lib{name}.so" for name in ("c", "m", "dl", "rt", "pthread")} | {"ld-linux-x86-64.so"}
LOADS = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location(sys.argv[1].split("/")[-1].split(".")[0], sys.argv[1])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="release_wheel.py", description="One wheel for every Python and Linux.")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="where the wheel goes (default: dist)")
    parser.add_argument("pythons", nargs="*", metavar="PYTHON", help="interpreters (default: those on PATH)")
    asked = parser.parse_args(arguments)

    pythons = asked.pythons or list(found_on_path())
    if not pythons:
        raise SystemExit(f"no Python was found on PATH (looked for {', '.join(NAMES)})")
    start = time.monotonic()
    wheel = build(pythons, asked.dist)
    seconds = time.monotonic() - start
    faults = [*faults_of(wheel), *loading_faults(wheel, pythons)]
    subprocess.run([sys.executable, "-m", "auditwheel", "show", str(wheel)], check=True)
    if faults:
        raise SystemExit("\n".join([f"{wheel.name} is not what its name says:", *faults]))
    size = wheel.stat().st_size / 2**20
    held = shared_objects_of(wheel)
    print(f"{wheel}: {size:.1f} MiB, built in {seconds:.0f} s on {os.cpu_count()} cores, with", *held)


def found_on_path() -> Iterator[str]:
    """The Pythons of NAMES that run and have headers; of the others it says what the wheel is to their users."""
    for name in NAMES:
        program = shutil.which(name)
        # A stand-in for a version that is not chosen (pyenv puts such on PATH) does not run.
        if program and subprocess.run([program, "-c", ""], capture_output=True, check=False).returncode == 0:
            yield program
        else:
            print(f"{name} is not on PATH: under it the wheel will step by its reference backend, and say why")


def build(pythons: list[str], dist: Path) -> Path:
    """The wheel with modules for these Pythons."""
    env = dict(os.environ)
    # Debian's pyconfig.h is a line that includes another one from there; the compiler's own headers come first.
    env["CXX"] = shlex.join([zig(), "c++", "-target", target(), "-idirafter", "/usr/include"])
    env["CUDAHOSTCXX"] = env.get("CUDAHOSTCXX") or "g++"
    env["LOOKAHEAD_FUSED_CPU"] = "1"
    env["LOOKAHEAD_FUSED_PYTHONS"] = shlex.join(pythons)
    with tempfile.TemporaryDirectory() as made:
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", made, str(ROOT)]
        subprocess.run([*command, f"-C--build-option=--plat-name={PLATFORM}"], env=env, check=True)
        (wheel,) = Path(made).glob("*.whl")
        dist.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(wheel, dist / wheel.name))


def zig() -> str:
    return str(Path(ziglang.__file__).with_name("zig"))


def target() -> str:
    return f"{MACHINE}-linux-gnu.{GLIBC[0]}.{GLIBC[1]}"


def faults_of(wheel: Path) -> Iterator[str]:
    """What keeps the modules and libraries of a wheel from any machine that its tag promises."""
    if not wheel.name.endswith(f"-py3-none-{PLATFORM}.whl"):
        yield f"its tag is not py3-none-{PLATFORM}"
    with zipfile.ZipFile(wheel) as archive:
        own = {Path(name).name for name in libraries_of(wheel)}
        for name in [*modules_of(wheel), *libraries_of(wheel)]:
            with archive.open(name) as file:
                for fault in faults_of_file(ELFFile(file), own):
                    yield f"{name}: {fault}"


def modules_of(wheel: Path) -> list[str]:
    return [name for name in shared_objects_of(wheel) if not Path(name).name.startswith("lib")]


def libraries_of(wheel: Path) -> list[str]:
    """Those that hold the modules' kernels."""
    return [name for name in shared_objects_of(wheel) if Path(name).name.startswith("lib")]


def shared_objects_of(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if name.endswith(".so")]


def faults_of_file(elf: ELFFile, own: set[str]) -> Iterator[str]:
    """Of a module or a library, beside which lie the libraries `own`."""
    tags = list(elf.get_section_by_name(".dynamic").iter_tags())
    needed = {tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"}
    yield from (f"needs {name}" for name in needed - own if re.sub(r"\.\d+$", "", name) not in SYSTEM)
    # The one directory that moves with it is its own.
    wanted = ["$ORIGIN"] if needed & own else []
    paths = [tag.runpath for tag in tags if tag.entry.d_tag == "DT_RUNPATH"]
    paths += [tag.rpath for tag in tags if tag.entry.d_tag == "DT_RPATH"]
    if paths != wanted:
        yield f"looks for libraries in {paths} and not in {wanted}"
    for library, version in versions_of(elf):
        number = re.fullmatch(r"GLIBC_(\d+)\.(\d+)(\.\d+)?", version)
        if library not in own and (number is None or (int(number[1]), int(number[2])) > GLIBC):
            yield f"needs {version} of {library}"


def versions_of(elf: ELFFile) -> Iterator[tuple[str, str]]:
    """The libraries whose symbols a module or a library takes, with the versions of these symbols."""
    for section in elf.iter_sections():
        if isinstance(section, GNUVerNeedSection):
            for library, versions in section.iter_versions():
                yield from ((library.name, version.name) for version in versions)


def loading_faults(wheel: Path, pythons: list[str]) -> Iterator[str]:
    """What a Python says that cannot load its modules: a symbol that is nowhere is found out here alone."""
    names = {Path(module).name.split(".")[0] for module in modules_of(wheel)}
    with tempfile.TemporaryDirectory() as unpacked, zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
        for python in pythons:
            suffix = "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))"
            told = subprocess.run([python, "-c", suffix], capture_output=True, text=True, check=True).stdout.strip()
            for name in sorted(names):
                file = Path(unpacked, "lookahead_fused", name + told)
                done = subprocess.run([python, "-c", LOADS, file], capture_output=True, text=True, check=False)
                if done.returncode != 0:
                    yield f"{python} does not load {file.name}: {done.stderr.strip()}"


if __name__ == "__main__":
    main(sys.argv[1:])
