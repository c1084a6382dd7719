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
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
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
# Where it is on by default it takes a jump to another stack for an error.
FLAGS += ("-U_FORTIFY_SOURCE",)
SANITIZE = ("-g1", "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")


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
    folders = [csrc / name for name in ("rules", "table", "cuda", "python")] + [HERE]
    sources = sorted(
        path for folder in folders for path in folder.iterdir() if path.suffix in (".h", ".cuh", ".cu", ".cpp")
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
    import pybind11

    unit = module.with_name("all.cpp")
    other_module = "cpu_module.cpp"
    chosen = [path for path in sources if path.suffix in (".cu", ".cpp") and path.name != other_module]
    unit.write_text("".join(f'#include "{path}"\n' for path in chosen))
    includes = [pybind11.get_include(), sysconfig.get_path("include"), str(ROOT / "csrc"), str(HERE)]
    defines = [
        "LOOKAHEAD_FUSED_CUDA_ON_HOST",
        "LOOKAHEAD_FUSED_CUDA_MODULE=_cuda_host",
        "LOOKAHEAD_FUSED_DLPACK_DEVICE=1",
        'LOOKAHEAD_FUSED_CUDA_ARCHITECTURES="host"',
    ]
    temporary = module.with_suffix(".building")
    command = [*CXX, *FLAGS, *(options or ("-O2",)), "-Wno-unknown-pragmas"]
    command += [f"-I{path}" for path in includes] + [f"-D{define}" for define in defines]
    done = subprocess.run([*command, str(unit), "-o", str(temporary)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr}")
    temporary.rename(module)


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
    for name in ("live", "read", "written", "elsewhere", "sectors"):
        getattr(library, f"control_{name}").restype = ctypes.c_int64
    for name in ("make_stream", "end_capture"):
        getattr(library, f"control_{name}").restype = ctypes.c_void_p
    library.control_is_capturing.restype = ctypes.c_bool
    return library


def calls() -> list[str]:
    """The names of the runtime's functions that were called since the last reset, in order."""
    return control().control_calls().decode().split()


class Torch:
    """What torch would know of its CUDA streams and memory."""

    stream = 0

    @classmethod
    def pinned(cls, size: int) -> torch.Tensor:
        tensor = torch.empty(size, dtype=torch.uint8)
        address = tensor.data_ptr()
        control().control_pinned(ctypes.c_void_p(address), ctypes.c_int64(size))
        import weakref

        weakref.finalize(tensor, control().control_unpinned, ctypes.c_void_p(address))
        return tensor

    @classmethod
    def is_capturing(cls, device: torch.device) -> bool:
        return bool(control().control_is_capturing(ctypes.c_void_p(cls.stream)))

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
    module._used_on_current_stream = lambda tensor: None
    return module


if __name__ == "__main__":
    print(build(*sys.argv[1:]))
