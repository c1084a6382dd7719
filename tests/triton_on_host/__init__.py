"""The Triton backend on the host: its kernels in Triton's interpreter, as a further backend.

`triton-host` is the class, the table, `backends/triton.py` and the files of its kernels, as they are; only what torch
would answer about streams and devices is stood in for, and the interpreter is made quick enough for a suite.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lookahead_fused import _build as build
from lookahead_fused.backends.triton import too_old

NAME = "triton-host"
# What compiled code comes from, each file after those that it imports.
# Kernels; the rest are functions that they call.
LAUNCHED = ("rows", "chunks", "squares", "clip")
ROOMS = ("rules", "policies", "state", "codes", "prologue", "kernels", "norm")
# The first whose interpreter takes a number out of NumPy's arrays as every NumPy allows, and leaves the language as it
# was, so that kernels can be compiled afterwards.
INTERPRETS = (3, 7)


@functools.cache
def not_compiled() -> str:
    """What this machine lacks to compile kernels, or ""."""
    if build.module("_cpu") is None:
        return build.reason("_cpu")
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return too_old(_version())


@functools.cache
def missing() -> str:
    """What this machine lacks to run the stand-in, or ""."""
    if not not_compiled() and release() < INTERPRETS:
        oldest = ".".join(map(str, INTERPRETS))
        return f"the interpreter of triton {_version()} is too old: that of {oldest} or newer is needed"
    return not_compiled()


def release() -> tuple[int, ...]:
    """The first two numbers of Triton's version."""
    return tuple(int(number) for number in _version().split(".")[:2])


@functools.cache
def _version() -> str:
    """Not by importing it: what is imported while tests are collected, each process keeps, and Triton calls it lost."""
    (name, *_) = importlib.metadata.packages_distributions()["triton"]
    return importlib.metadata.version(name)


def kernels() -> ModuleType:
    """A second `backends/triton_kernels.py` over a second one of what it imports, interpreted."""
    return interpreted()[0]


def norm_kernels() -> ModuleType:
    """The same of `backends/triton_norm.py`."""
    return interpreted()[1]


@functools.cache
def interpreted() -> tuple[ModuleType, ModuleType]:
    import triton
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction, interpreter_builder, interpreter_semantic

    from . import replay

    _correct(interpreter_builder)
    replay.prepare()
    before = triton.knobs.runtime.interpret
    triton.knobs.runtime.interpret = True
    try:
        rooms = kernels_again()
    finally:
        triton.knobs.runtime.interpret = before
    rules, policies, _, codes, _, module, norm = rooms
    for room in rooms:
        for name, value in list(vars(room).items()):
            # Called from within a kernel, the interpreter's function prepares Triton's whole language anew each time.
            if isinstance(value, InterpretedFunction):
                setattr(room, name, replay.Kernel(value) if name in LAUNCHED else value.rewrite())
    for told, room in ((module.RULES, rules), (module.POLICIES, policies)):
        for name, constants in told.items():
            functions = {field: f for field, f in constants._asdict().items() if hasattr(f, "__name__")}
            told[name] = constants._replace(**{field: getattr(room, f.__name__) for field, f in functions.items()})
    module.range = replay.counted
    # Nothing but a GPU runs assembly.
    rules.is_in_assembly = lambda: False
    # Triton's own library was imported to be compiled; of its functions one is called, in two places.
    rules.largest = lambda n: tl.tensor(interpreter_semantic.builder.create_largest(n.handle), n.dtype)
    codes.largest_of_blocks = lambda n: tl.tensor(
        interpreter_semantic.builder.create_largest_of_blocks(n.handle), tl.block_type(n.dtype, [n.shape[0]])
    )
    # Of two results of one call the builder's replay knows nothing.
    norm.halves = lambda lanes, half: tl.tensor(
        interpreter_semantic.builder.create_halves(lanes.handle),
        tl.float64 if lanes.shape[0] == 2 else tl.block_type(tl.float64, [lanes.shape[0] // 2]),
    )
    return module, norm


def _correct(builder: Any) -> None:
    """Has the interpreter do as the compiler does, where it differs: it truncates to bfloat16 (what the compiler makes
    of that, `test_triton_code.py` reads) and loses subnormal ones, and of a truth value that it repeats over a block it
    makes a number."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    cast, splat = builder.cast_impl, builder.create_splat

    def cast_impl(value: Any, dtype: Any) -> Any:
        types = value.dtype.scalar, dtype.scalar
        if types == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(value.data).to(torch.bfloat16).view(torch.int16).numpy()
            return TensorHandle(rounded.view("uint16"), tl.bfloat16)
        if types == (tl.bfloat16, tl.float32):
            widened = torch.from_numpy(value.data.view("int16")).view(torch.bfloat16).float().numpy()
            return TensorHandle(widened, tl.float32)
        return cast(value, dtype)

    def create_splat(dtype: Any, value: Any) -> Any:
        made = splat(dtype, value)
        if value.data.dtype == bool:
            made.data = made.data.astype(bool)
        return made

    builder.cast_impl, builder.create_splat = cast_impl, create_splat
    builder.create_halves = lambda value: TensorHandle(
        value.data[: len(value.data) // 2] + value.data[len(value.data) // 2 :], value.dtype
    )
    builder.create_largest = lambda value: TensorHandle(value.data.max(keepdims=True), value.dtype)
    builder.create_largest_of_blocks = lambda value: TensorHandle(value.data.max(1), value.dtype)


@functools.cache
def backend() -> ModuleType:
    """The backend's Python module, a second `backends/triton.py` over the stand-in."""
    module: Any = _again("triton")
    module.NAME, module.DEVICES = NAME, ("cpu",)
    module.kernels = kernels
    module.norm_kernels = norm_kernels
    module.unavailable = lambda device=None: missing()
    module._current = lambda device: nullcontext()
    module._stream = lambda device: 0
    module._pinned = lambda like: like.clone()
    module._used_on_current_stream = lambda tensor: None
    module._warp_size = lambda: 32
    return module


def kernels_again(folder: Path | None = None) -> tuple[ModuleType, ...]:
    """A second one of each file of kernels, which imports second ones; edited ones from a folder."""
    names = [f"lookahead_fused.backends.triton_{room}" for room in ROOMS]
    first = {name: sys.modules.pop(name, None) for name in names}
    try:
        for room, name in zip(ROOMS, names, strict=True):
            sys.modules[name] = _again(f"triton_{room}", folder)
        return tuple(sys.modules[name] for name in names)
    finally:
        for name, module in first.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def _again(name: str, folder: Path | None = None) -> ModuleType:
    spec = importlib.util.find_spec(f"lookahead_fused.backends.{name}")
    assert spec is not None
    assert spec.origin is not None
    path = spec.origin if folder is None else folder / Path(spec.origin).name
    spec = importlib.util.spec_from_file_location(f"lookahead_fused.backends.{name}_again", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
