"""Builds the native modules with CMake and packs them; everything else stands in pyproject.toml.

Read from the environment:

    LOOKAHEAD_FUSED_CPU      unset: _cpu is built where there is a C++ compiler, else left out with a message
                             1: where it cannot be built, the install fails
                             0: it is left out
    LOOKAHEAD_FUSED_CUDA     the same for _cuda, which needs nvcc besides; FORCE_CUDA=1 is the same as 1
    CUDA_HOME                the toolkit whose nvcc is taken; else the one on PATH, else that of NVIDIA's packages
    TORCH_CUDA_ARCH_LIST     what _cuda is built for: "8.0 9.0a 12.0+PTX", or with ";"; default: see ARCHITECTURES below
    LOOKAHEAD_FUSED_PYTHONS  interpreters to build modules for, side by side in one wheel, in place of the one that runs
                             this: "python3.10 python3.11"; the wheel is then tagged py3-none, and where a Python has no
                             module in it, the reference backend serves. What needs no Python is a library beside them
    LOOKAHEAD_FUSED_LOCAL_VERSION   is appended to the version: cu130 makes 0.1.0+cu130
    CXX, CXXFLAGS, LDFLAGS, CUDAFLAGS, CUDAHOSTCXX   as in CMake
    NVCC_PREPEND_FLAGS, NVCC_APPEND_FLAGS   nvcc's own; see csrc/exact.cmake for what none of these can change
    MAX_JOBS                 how many files are compiled at a time (default: Ninja's choice)

A compiler that is there and fails makes the install fail in every case: a mistake in a source file must not
end as a package that works and is slow. What was built and how, or why not, is written to
lookahead_fused/_build_info.json.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist
from setuptools.errors import ExecError, OptionError, PlatformError

ROOT = Path(__file__).resolve().parent
PACKAGE = "lookahead_fused"
BUILD_INFO = "_build_info.json"
COMPILERS = ("c++", "g++", "clang++")
READ_BY_COMPILERS = (
    *("CXX", "CXXFLAGS", "LDFLAGS", "CUDAFLAGS", "CUDAHOSTCXX"),
    *("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN"),
)
# Of each generation since Turing what most cards are, of those that the compiler knows; the newest also as PTX, which
# the driver compiles for cards that come later.
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
# The first whose runtime tells by cudaStreamGetCaptureInfo which graph a stream is captured into.
OLDEST_NVCC = (12, 0)
LOCAL_VERSION = os.environ.get("LOOKAHEAD_FUSED_LOCAL_VERSION", "")
PYTHONS = os.environ.get("LOOKAHEAD_FUSED_PYTHONS", "")
# Whether the kernels are a library beside the modules: csrc/CMakeLists.txt tells why. It takes what ELF files have.
SHARED = bool(PYTHONS) and sys.platform == "linux"


class Python(NamedTuple):
    """An interpreter that modules are built for."""

    program: str
    include: str  # the directory of Python.h
    suffix: str  # what the names of its modules end with

    ASK = "import sysconfig; print(sysconfig.get_path('include'), sysconfig.get_config_var('EXT_SUFFIX'), sep='\\n')"

    @staticmethod
    def running() -> Python:
        return Python(sys.executable, sysconfig.get_path("include"), sysconfig.get_config_var("EXT_SUFFIX"))

    @staticmethod
    def of(program: str) -> Python:
        """
        Raises:
            OptionError: the program is no Python that tells of itself.
        """
        try:
            asked = subprocess.run([program, "-c", Python.ASK], capture_output=True, text=True, check=True)
            include, suffix = asked.stdout.splitlines()
        except (OSError, subprocess.CalledProcessError, ValueError) as error:
            complaint = (getattr(error, "stderr", None) or str(error)).strip().partition("\n")[0]
            raise OptionError(f"LOOKAHEAD_FUSED_PYTHONS names {program!r}, which is no Python: {complaint}") from None
        return Python(program, include, suffix)


class NativeModule(NamedTuple):
    """A module of the package that CMake builds where it can be built."""

    name: str
    switch: str  # environment variable and CMake option
    missing: Callable[[], str | None]  # what this machine lacks to build it, as a sentence

    def reason_to_leave_out(self) -> str | None:
        """None where the module is to be built.

        Raises:
            OptionError: the switch is neither unset nor 0 nor 1.
            PlatformError: the switch is 1 and the machine cannot build the module.
        """
        asked = os.environ.get(self.switch, "")
        if not asked and self.name == "_cuda" and os.environ.get("FORCE_CUDA") == "1":
            asked = "1"
        if asked not in ("", "0", "1"):
            raise OptionError(f"{self.switch} must be 0, 1 or unset, got {asked!r}")
        if asked == "0":
            return f"{self.switch}=0 was set when the package was built"
        missing = self.missing()
        if missing and asked == "1":
            raise PlatformError(f"{self.switch}=1 asks for {PACKAGE}.{self.name}, but {missing}")
        return missing


def missing_for_cpp() -> str | None:
    """What this machine lacks to compile a Python module in C++."""
    named = shlex.split(os.environ.get("CXX", ""))
    command = named or next(([name] for name in COMPILERS if shutil.which(name)), None)
    if command is None:
        return f"no C++ compiler was found (looked for {', '.join(COMPILERS)}; CXX names another one)"
    if shutil.which(command[0]) is None:
        return f"CXX names {command[0]!r}, and there is no such program"
    # A stand-in that only asks for the real compiler to be installed (macOS has one) is no compiler.
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    if version.returncode != 0:
        complaint = (version.stderr or version.stdout).strip().partition("\n")[0]
        return f"{shlex.join(command)} does not run: {complaint}"
    for python in pythons():
        if not Path(python.include, "Python.h").is_file():
            return f"Python.h of {python.program} was not found (Debian and Ubuntu have it in python3-dev)"
    return None


@functools.cache
def pythons() -> list[Python]:
    """Those that modules are built for."""
    named = shlex.split(PYTHONS)
    return [Python.of(program) for program in dict.fromkeys(named)] or [Python.running()]


def missing_for_cuda() -> str | None:
    """What this machine lacks to compile a Python module in CUDA."""
    missing = missing_for_cpp()
    if missing:
        return missing
    nvcc = find_nvcc()
    return nvcc if isinstance(nvcc, str) else too_old(nvcc)


def find_nvcc() -> Path | str:
    """The CUDA compiler, or as a sentence why there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        nvcc = Path(home, "bin", "nvcc")
        return nvcc if nvcc.is_file() else f"CUDA_HOME names {home!r}, and there is no bin/nvcc in it"
    on_path = shutil.which("nvcc")
    if on_path:
        return toolkit_nvcc(on_path)
    # The packages nvidia-cuda-nvcc and nvidia-cuda-runtime share one directory, nvidia/cu13.
    nvidia = importlib.util.find_spec("nvidia")
    places = list(nvidia.submodule_search_locations or ()) if nvidia else []
    # Where pip builds in isolation, an import does not find what is installed.
    places += [str(Path(sysconfig.get_path(name), "nvidia")) for name in ("purelib", "platlib")]
    for place in dict.fromkeys(places):
        for nvcc in sorted(Path(place).glob("cu*/bin/nvcc"), reverse=True):
            if next(nvcc.parents[1].glob("include/cuda_runtime.h"), None):
                return nvcc
    return "no nvcc was found (looked at CUDA_HOME, PATH and the packages nvidia-cuda-nvcc and nvidia-cuda-runtime)"


def toolkit_nvcc(program: str) -> Path | str:
    """The compiler in its toolkit: on PATH there may be a script that starts it, beside which no header lies."""
    steps = answer_of(program, "--dryrun", "-x", "cu", os.devnull)
    top = re.search(r"^#\$ TOP=(.+)$", steps, re.MULTILINE)
    nvcc = Path(top[1].strip(), "bin", "nvcc").resolve() if top else Path(program)
    return nvcc if top and nvcc.is_file() else f"{program} does not tell where its toolkit is: {steps[:200]}"


def too_old(nvcc: Path) -> str | None:
    """Why a CUDA compiler cannot compile csrc/cuda, as a sentence; its own messages would be about our sources."""
    told = answer_of(str(nvcc), "--version")
    release = re.search(r"\brelease (\d+)\.(\d+)", told)
    if release is None:
        return f"{nvcc} does not tell its version: {told[:200]}"
    if (int(release[1]), int(release[2])) >= OLDEST_NVCC:
        return None
    oldest = ".".join(map(str, OLDEST_NVCC))
    found = ".".join(release.groups())
    return f"it needs nvcc {oldest} or later, and {nvcc} is {found}: name another toolkit by CUDA_HOME"


def answer_of(*command: str) -> str:
    """All that a program prints, or why it does not run."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:
        return str(error)
    return done.stdout.strip()


def cuda_architectures(nvcc: Path) -> list[str]:
    """The entries of TORCH_CUDA_ARCH_LIST, or the default list.

    Raises:
        OptionError: one of them is no architecture, is older than 7.5, or is none that the compiler knows.
    """
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = {f"{number[:-1]}.{number[-1]}" for number in re.findall(r"compute_(\d+)", listed)}
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    for entry in asked:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", entry):
            raise OptionError(f"TORCH_CUDA_ARCH_LIST must hold entries like 8.0, 9.0a or 12.0+PTX, got {entry!r}")
        number = re.match(r"\d+\.\d", entry)[0]
        if float(number) < 7.5 or number not in known:
            raise OptionError(
                f"TORCH_CUDA_ARCH_LIST asks for {entry}; lookahead_fused needs 7.5 or later, and {nvcc} builds for "
                f"{' '.join(sorted(known, key=float))}"
            )
    default = [number for number in ARCHITECTURES if number in known]
    return asked or [*default[:-1], f"{default[-1]}+PTX"]


def cmake_architectures(entries: list[str]) -> str:
    """ "8.0 12.0+PTX" in CMake's words: 80-real;120, which is both machine code and PTX."""
    return ";".join(
        entry.removesuffix("+PTX").replace(".", "") + ("" if entry.endswith("+PTX") else "-real") for entry in entries
    )


MODULES = (
    NativeModule("_cpu", "LOOKAHEAD_FUSED_CPU", missing_for_cpp),
    NativeModule("_cuda", "LOOKAHEAD_FUSED_CUDA", missing_for_cuda),
)


def library_of(module: NativeModule, build: str) -> str:
    """Where one build's library with the kernels of a module lies."""
    return f"{PACKAGE}/lib{PACKAGE}{module.name}-{build}.so"


class BuildNativeModules(build_ext):
    """Runs CMake once for all modules; setuptools' own compiler is not used."""

    def run(self) -> None:
        reasons = {module.name: module.reason_to_leave_out() for module in MODULES}
        package = self.target_root() / PACKAGE
        package.mkdir(parents=True, exist_ok=True)
        for module in MODULES:
            # What an earlier build left there must not pass for this one's.
            for file in [*self.module_files(module), *self.kernel_files(module)]:
                (self.target_root() / file).unlink(missing_ok=True)
        wanted = [module for module in MODULES if reasons[module.name] is None]
        records = self.build_with_cmake(wanted) if wanted else {}

        info = {
            "version": self.get_finalized_command("egg_info").egg_version,
            "modules": {
                module.name: {
                    "built": reasons[module.name] is None,
                    "reason": reasons[module.name] or "",
                    **records.get(module.name, {"compiler": "", "flags": ""}),
                }
                for module in MODULES
            },
        }
        (package / BUILD_INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        for name, reason in reasons.items():
            if reason:
                self.warn(f"{PACKAGE}.{name} is NOT built: {reason}. The package works without it, slower.")

    def build_with_cmake(self, wanted: list[NativeModule]) -> dict[str, dict[str, str]]:
        """Configures, compiles and installs the modules; returns each one's compiler and flags."""
        # Not build_temp: an editable install gets a temporary one, and would compile all anew each time.
        built_for = "py3" if PYTHONS else sys.implementation.cache_tag
        build = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{built_for}"
        cmake = build_tool("cmake", "CMAKE_BIN_DIR")
        configure = [
            *(cmake, "-S", str(ROOT / "csrc"), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={build_tool('ninja', 'BIN_DIR')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-Dpybind11_DIR={importlib.import_module('pybind11').get_cmake_dir()}",
            *(f"-D{module.switch}={'ON' if module in wanted else 'OFF'}" for module in MODULES),
        ]
        env = dict(os.environ)
        env["CXX"] = env.get("CXX") or next(name for name in COMPILERS if shutil.which(name))
        if any(module.name == "_cuda" for module in wanted):
            nvcc = find_nvcc()
            assert isinstance(nvcc, Path)
            architectures = cuda_architectures(nvcc)
            host_compiler = env.get("CUDAHOSTCXX") or shlex.split(env["CXX"])[0]
            configure += [
                f"-DCMAKE_CUDA_COMPILER={nvcc}",
                f"-DCMAKE_CUDA_HOST_COMPILER={shutil.which(host_compiler) or host_compiler}",
                f"-DCMAKE_CUDA_ARCHITECTURES={cmake_architectures(architectures)}",
                f"-DLOOKAHEAD_FUSED_CUDA_ARCHITECTURES={' '.join(architectures)}",
            ]
        # CMake keeps what it was first told: under another compiler or isolated environment, start over.
        told = json.dumps([configure, {name: env.get(name) for name in READ_BY_COMPILERS}])
        stamp = build / "configured_with.json"
        if not stamp.is_file() or stamp.read_text(encoding="utf-8") != told:
            shutil.rmtree(build, ignore_errors=True)
        # But not for another list of Pythons: the kernels are the same for all of them, in a library or in each module.
        configure += [
            f"-DLOOKAHEAD_FUSED_SHARED={'ON' if SHARED else 'OFF'}",
            f"-DLOOKAHEAD_FUSED_PYTHON_INCLUDES={';'.join(python.include for python in pythons())}",
            f"-DLOOKAHEAD_FUSED_PYTHON_SUFFIXES={';'.join(python.suffix for python in pythons())}",
        ]
        self.call(configure, env)
        stamp.write_text(told, encoding="utf-8")

        self.call([cmake, "--build", str(build), *parallel_arguments()], env)
        strip = [] if self.debug else ["--strip"]
        self.call([cmake, "--install", str(build), "--prefix", str(self.target_root()), *strip], env)
        records = {name: json.loads((build / f"{name}.json").read_text(encoding="utf-8")) for name, *_ in wanted}
        for module in wanted:
            kernels = [library_of(module, records[module.name]["build"])] if SHARED else []
            for file in [*self.module_files(module), *kernels]:
                if not (self.target_root() / file).is_file():
                    raise ExecError(f"CMake did not install {file}")
        return records

    def call(self, command: list[str], env: dict[str, str]) -> None:
        self.announce(shlex.join(command), level=2)
        # pip reads the two streams of this process; a child's output has to come in its place among ours.
        sys.stdout.flush()
        sys.stderr.flush()
        if subprocess.run(command, env=env, check=False).returncode != 0:
            switches = " ".join(f"{module.switch}=0" for module in MODULES)
            raise ExecError(
                f"`{shlex.join(command[:2])} ...` failed; its messages stand above. "
                f"To install without native modules, set {switches}."
            )

    def target_root(self) -> Path:
        """The directory with the package in it that the modules go into."""
        return ROOT if self.inplace else Path(self.build_lib).resolve()

    def module_files(self, module: NativeModule) -> list[str]:
        return [f"{PACKAGE}/{module.name}{python.suffix}" for python in pythons()]

    def kernel_files(self, module: NativeModule) -> list[str]:
        """The libraries in the package with the module's kernels, of whatever build."""
        root = self.target_root()
        return [str(path.relative_to(root)) for path in root.glob(library_of(module, "*"))]

    def package_files(self) -> list[str]:
        """What this command puts into the package, relative to it: the files that exist after run()."""
        modules = [file for module in MODULES for file in [*self.module_files(module), *self.kernel_files(module)]]
        files = [*modules, f"{PACKAGE}/{BUILD_INFO}"]
        return [file for file in files if (self.target_root() / file).is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        files = self.package_files() if self.inplace else []
        return {str(Path(self.build_lib, file)): str(ROOT / file) for file in files}

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib, file)) for file in self.package_files()]


class BuildPython(build_py):
    """Starts from an empty directory, so that a file deleted since the last build is not packed again."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, PACKAGE), ignore_errors=True)
        super().run()


class BuildWheel(bdist_wheel):
    """Tags a wheel that has modules for several Pythons as one for all of them, and for the platform alone."""

    def get_tag(self) -> tuple[str, str, str]:
        implementation, abi, platform = super().get_tag()
        return ("py3", "none", platform) if PYTHONS else (implementation, abi, platform)


class SourceDistribution(sdist):
    """Of what MANIFEST.in lists takes what git tracks: a scratch file in csrc/ would be compiled by whoever gets it."""

    def make_distribution(self) -> None:
        tracked = tracked_files()
        if tracked is not None:
            # What setuptools has just written about the package is tracked nowhere, and belongs in.
            written = f"{PACKAGE}.egg-info/"
            listed = [file.replace(os.sep, "/") for file in self.filelist.files]
            self.filelist.files = [file for file in listed if file in tracked or file.startswith(written)]
            sources = Path(ROOT, written, "SOURCES.txt")
            kept = [line for line in sources.read_text(encoding="utf-8").split("\n") if line in self.filelist.files]
            sources.write_text("\n".join(kept), encoding="utf-8")
        super().make_distribution()


def tracked_files() -> set[str] | None:
    """What git tracks of this tree; None where it is no clone, as an unpacked source distribution is none.

    Raises:
        ExecError: the tree is a clone, and git does not tell.
    """
    try:
        listing = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=False)
        told, complaint = listing.stdout.split("\0"), listing.stderr.strip()
    except OSError as error:
        told, complaint = [], str(error)
    if "setup.py" in told:  # else this tree lies, untracked, in the clone of something else
        return set(told)
    if (ROOT / ".git").exists():
        raise ExecError(f"git does not tell which files of {ROOT} it tracks, for the source distribution: {complaint}")
    return None


def build_tool(name: str, directory_attribute: str) -> str:
    """The program that the Python package of that name brings, else the one on PATH.

    PATH alone would miss it where builds are not isolated and the environment is not activated.
    """
    try:
        directory = getattr(importlib.import_module(name), directory_attribute)
    except ImportError:
        directory = ""
    program = shutil.which(name, path=directory) or shutil.which(name)
    if program is None:
        raise PlatformError(f"{name} is needed to build the native modules: pip install {name}")
    return program


def parallel_arguments() -> list[str]:
    jobs = os.environ.get("MAX_JOBS", "")
    if not jobs:
        return []
    if not jobs.isdecimal() or int(jobs) < 1:
        raise OptionError(f"MAX_JOBS must be a positive integer, got {jobs!r}")
    return ["--parallel", jobs]


setup(
    options={"egg_info": {"tag_build": f"+{LOCAL_VERSION}"}} if LOCAL_VERSION else {},
    # Named here so that the wheel carries the platform's tag, with or without modules in it.
    ext_modules=[Extension(f"{PACKAGE}.{module.name}", sources=[]) for module in MODULES],
    cmdclass={
        "bdist_wheel": BuildWheel,
        "build_ext": BuildNativeModules,
        "build_py": BuildPython,
        "sdist": SourceDistribution,
    },
)
