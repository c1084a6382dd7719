"""The bandwidth ceiling of a step, over the tensors of a live optimizer.

``ceiling.cpp`` is compiled for this very machine when it is first asked for, into build/bench.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lookahead_fused.bench.device import Cuda, Device
from lookahead_fused.bench.measure import Schedule, Side, interleave
from lookahead_fused.bench.samples import fastest


class _Row(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("param", "grad", "first", "second", "slow")),
        ("elements", ctypes.c_size_t),
    ]


SOURCE = Path(__file__).with_name("ceiling.cpp")
BUILD = SOURCE.parents[2] / "build" / "bench"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread")


@cache
def library() -> ctypes.CDLL:
    """The compiled loops.

    Raises:
        RuntimeError: where no C++ compiler is found, or it fails.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("the bandwidth ceiling needs a C++ compiler: set CXX, or install g++ or clang++")
    target = BUILD / "ceiling.so"
    # Compiled in every process: two seconds, and never a stale library or one made for another machine.
    BUILD.mkdir(parents=True, exist_ok=True)
    fresh = BUILD / f"ceiling.{os.getpid()}.so"
    command = [*compiler.split(), *FLAGS, str(SOURCE), "-o", str(fresh)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{built.stderr}")
    fresh.replace(target)
    loaded = ctypes.CDLL(str(target))
    loaded.ceiling_variant_name.restype = ctypes.c_char_p
    loaded.ceiling_pass.argtypes = [
        ctypes.c_int, ctypes.POINTER(_Row), ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint32,
        ctypes.c_size_t,
    ]  # fmt: skip
    return loaded


@cache
def variants() -> list[str]:
    """The names of the loops. Which is fastest differs between machines; only the fastest is the ceiling."""
    return [library().ceiling_variant_name(i).decode() for i in range(library().ceiling_variants())]


class Ceiling:
    """Passes that move the bytes of a step with Lookahead over an optimizer's tensors.

    Args:
        variant: a name of ``variants()``.
        rows: for each parameter param, grad, one or two moments, and slow last: contiguous tensors of one size.
            Param and grad share a dtype of 16 or 32 bits, the others have 32. All are read, and all but grad written,
            with the bits they have.
        k: every k-th pass moves ``slow`` too.
        threads: how many threads share a pass; torch's number when None.
        mask: bits of grad that are mixed into the others: 0 keeps all values, tests set more.
    """

    def __init__(
        self, variant: str, rows: Sequence[Sequence[Tensor]], k: int, threads: int | None = None, mask: int = 0
    ) -> None:
        self.variant = variant
        self.rows = rows  # kept alive: the loops have their addresses
        self.k = k
        self.threads = threads
        self.mask = mask
        self.passes = 0
        self.per_word = 4 // rows[0][0].element_size()
        self.table = (_Row * len(rows))()
        for entry, (param, grad, first, *second, slow) in zip(self.table, rows, strict=True):
            entry.param, entry.grad, entry.first, entry.slow = (x.data_ptr() for x in (param, grad, first, slow))
            entry.second = second[0].data_ptr() if second else None
            entry.elements = param.numel()

    def step(self) -> None:
        self.passes += 1
        result = self._pass(len(self.rows), self.passes % self.k == 0)
        if result:
            reason = (
                "",
                "this machine has no such store instruction",
                "a tensor is not aligned to 64 bytes",
            )[result]
            raise RuntimeError(f"ceiling variant {self.variant!r}: {reason}")

    @property
    def works(self) -> bool:
        """Whether this machine has the instructions the variant needs."""
        return not self._pass(0, False)

    def _pass(self, count: int, slow: bool) -> int:
        threads = self.threads or torch.get_num_threads()
        number = variants().index(self.variant)
        result: int = library().ceiling_pass(number, self.table, count, self.per_word, slow, self.mask, threads)
        return result


def ceilings(device: Device, rows: Sequence[Sequence[Tensor]], k: int) -> list[Side]:
    """On a CPU the two fastest of the loops over an optimizer's own tensors: too near each other to be told apart here.

    A GPU has a ceiling of its own.
    """
    if isinstance(device, Cuda):
        return device.ceilings(rows, k)
    never = 1 << 30  # no pass of a short trial moves the slow weights
    trials = [loop for name in variants() if (loop := Ceiling(name, rows, never)).works]
    tried = interleave([Side(loop.variant, loop.step) for loop in trials], Schedule(rounds=3))
    names = [loop.variant for loop in trials]
    best = fastest(tried, names)
    second = fastest(tried, [name for name in names if name != best])
    return [Side(f"ceiling, {name}", Ceiling(name, rows, k).step) for name in (best, second)]
