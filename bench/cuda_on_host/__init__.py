"""The CUDA backend on the host: its sources compiled against a stand-in for the CUDA runtime, as a further backend.

`cuda-host` is the class, the table, `backends/cuda.py`, the launch code and the kernels, as they are; only the runtime
and what torch would answer about streams and devices are stood in for.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
NAME = "cuda-host"
CXX = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or "c++"]
FLAGS = ("-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden")
# Of the optimizations the first level: to compile by the second takes longer than the tests have of it.
FLAGS += ("-O1",)
# Where it is on by default it takes a jump to another stack for an error.
FLAGS += ("-U_FORTIFY_SOURCE",)
SANITIZE = ("-g1", "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")


@functools.cache
def missing() -> str:
    """What this machine lacks to build the stand-in, or ""."""
    if shutil.which(CXX[0]) is None:
        return f"no C++ compiler ({CXX[0]}) was found"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return ""


def build(*options: str) -> Path:
    """The module, compiled with further options unless that was done before."""
    csrc = ROOT / "csrc"
    folders = [csrc / name for name in ("rules", "slow", "state", "table", "cuda", "torch", "python")] + [HERE]
    sources = sorted(
        path for folder in folders for path in folder.iterdir() if path.suffix in (".h", ".cuh", ".cu", ".cpp", ".in")
    )
    digest = hashlib.sha256(repr((CXX, FLAGS, options, sys.version)).encode())
    for path in sources:
        digest.update(path.read_bytes())
    directory = ROOT / "build" / "cuda-on-host" / digest.hexdigest()[:16]
    module = directory / f"_cuda_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not module.is_file():
            _compile(sources, options, module)
    return module


def _compile(sources: list[Path], options: tuple[str, ...], module: Path) -> None:
    """As in the module itself a file for each rule and each width that it computes in, side by side, and one for the
    rest."""
    import pybind11

    other_module = "cpu_module.cpp"
    chosen = [path for path in sources if path.suffix in (".cu", ".cpp") and path.name != other_module]
    units = {"rest": "".join(f'#include "{path}"\n' for path in chosen)}
    template = (ROOT / "csrc/cuda/walk.cu.in").read_text(encoding="utf-8")
    listed = re.search(r"using Rules = List<([^>]+)>;", (ROOT / "csrc/rules/all.h").read_text(encoding="utf-8"))
    assert listed is not None
    for rule, fp64 in itertools.product(re.findall(r"\w+", listed[1]), ("false", "true")):
        units[f"{rule}_{fp64}"] = template.replace("@RULE@", rule).replace("@FP64@", fp64)
    includes = [pybind11.get_include(), sysconfig.get_path("include"), str(ROOT / "csrc"), str(HERE)]
    defines = [
        "LOOKAHEAD_FUSED_CUDA_ON_HOST",
        "LOOKAHEAD_FUSED_CUDA_MODULE=_cuda_host",
        "LOOKAHEAD_FUSED_DLPACK_DEVICE=1",
        'LOOKAHEAD_FUSED_CUDA_ARCHITECTURES="host"',
    ]
    command = [*CXX, *FLAGS, *options, "-Wno-unknown-pragmas"]
    command += [f"-I{path}" for path in includes] + [f"-D{define}" for define in defines]

    def compiled(name: str) -> str:
        unit = module.with_name(f"{name}.cpp")
        unit.write_text(units[name], encoding="utf-8")
        made = unit.with_suffix(".o")
        _run([*command, "-c", str(unit), "-o", str(made)])
        return str(made)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, units))
    temporary = module.with_suffix(".building")
    _run([*command, *objects, "-o", str(temporary)])
    temporary.rename(module)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr}")


@functools.cache
def load() -> ModuleType:
    """The module; under LOOKAHEAD_FUSED_CUDA_HOST, the one that this variable names."""
    path = os.environ.get("LOOKAHEAD_FUSED_CUDA_HOST") or build()
    spec = importlib.util.spec_from_file_location("_cuda_host", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def control() -> ctypes.CDLL:
    """The stand-in's own functions: all that is marked CONTROL."""
    library = ctypes.CDLL(load().__file__)
    library.control_calls.restype = ctypes.c_char_p
    for name in ("live", "read", "written", "elsewhere", "sectors", "nodes"):
        getattr(library, f"control_{name}").restype = ctypes.c_int64
    for name in ("make_stream", "end_capture"):
        getattr(library, f"control_{name}").restype = ctypes.c_void_p
    for name in ("is_capturing", "pin"):
        getattr(library, f"control_{name}").restype = ctypes.c_bool
    return library


def calls() -> list[str]:
    """The names of the runtime's functions that were called since the last reset, in order."""
    return control().control_calls().decode().split()


class Torch:
    """What torch would know of its CUDA streams and memory."""

    stream = 0

    @classmethod
    def pinned(cls, size: int) -> torch.Tensor:
        tensor = torch.empty(size, dtype=torch.uint8, device="cpu")
        address = tensor.data_ptr()
        if not control().control_pin(ctypes.c_void_p(address), ctypes.c_int64(size)):
            raise RuntimeError("cudaHostAlloc failed: operation not permitted when stream is capturing")
        weakref.finalize(tensor, control().control_unpin, ctypes.c_void_p(address))
        return tensor

    @classmethod
    def memory_apart(cls, device: torch.device, size: int) -> tuple[torch.Tensor, int]:
        stream = control().control_make_stream(0)
        # Zeros: read before the copy has arrived, they are null addresses and not any.
        tensor = torch.zeros(size, dtype=torch.uint8, device="cpu")
        weakref.finalize(tensor, control().control_destroy_stream, ctypes.c_void_p(stream))
        return tensor, stream

    @classmethod
    def is_capturing(cls, device: torch.device) -> bool:
        return bool(control().control_is_capturing(ctypes.c_void_p(cls.stream)))

    @staticmethod
    @contextmanager
    def current(device: torch.device) -> Iterator[None]:
        """What torch.cuda.device is."""
        before = control().control_go_to_device(device.index)
        try:
            yield
        finally:
            control().control_go_back_to_device(before)

    @classmethod
    @contextmanager
    def on(cls, stream: int) -> Iterator[None]:
        before, cls.stream = cls.stream, stream
        try:
            yield
        finally:
            cls.stream = before


@functools.cache
def backend() -> ModuleType:
    """The backend's Python module, a second `backends/cuda.py` over the stand-in."""
    spec = importlib.util.find_spec("lookahead_fused.backends.cuda")
    assert spec is not None
    assert spec.origin is not None
    spec = importlib.util.spec_from_file_location("lookahead_fused.backends.cuda_host", spec.origin)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.NAME, module.DEVICES = NAME, ("cpu",)
    module.native = load
    module.unavailable = lambda device=None: missing()
    module._index = lambda device: 0
    module._current = lambda device: nullcontext()
    module._stream = lambda device: Torch.stream
    module._is_capturing = Torch.is_capturing
    module._pinned = Torch.pinned
    module._memory_apart = Torch.memory_apart
    module._used_on_current_stream = lambda tensor: None
    return module


if __name__ == "__main__":
    print(build(*sys.argv[1:]))
