"""The bandwidth ceiling of a step, over the tensors of a live optimizer.

``ceiling.cpp`` is compiled for this very machine when it is first asked for, into build/bench.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("ceiling.cpp")
BUILD = SOURCE.parent.parent / "build" / "bench"
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
        ctypes.c_int, *[ctypes.c_void_p] * 5, ctypes.c_size_t, ctypes.c_uint32, ctypes.c_size_t
    ]  # fmt: skip
    return loaded


def variants() -> list[str]:
    """The names of the loops. Which is fastest differs between machines; only the fastest is the ceiling."""
    return [library().ceiling_variant_name(i).decode() for i in range(library().ceiling_variants())]


@dataclass
class Ceiling:
    """Passes that move the bytes of AdamW with Lookahead over one parameter.

    Attributes:
        variant: a name of ``variants()``.
        param, grad, exp_avg, exp_avg_sq, slow: contiguous tensors of one size, 32-bit elements. All are read,
            and all but grad written, with the bits they have.
        k: every k-th pass moves ``slow`` too.
        threads: how many threads share a pass; torch's number when None.
        mask: bits of grad that are mixed into the others: 0 keeps all values, tests set more.
    """

    variant: str
    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    slow: Tensor
    k: int
    threads: int | None = None
    mask: int = 0
    passes: int = 0

    def step(self) -> None:
        self.passes += 1
        slow = self.slow.data_ptr() if self.passes % self.k == 0 else None
        others = (self.param, self.grad, self.exp_avg, self.exp_avg_sq)
        result = library().ceiling_pass(
            variants().index(self.variant),
            *(tensor.data_ptr() for tensor in others),
            slow,
            self.param.numel(),
            self.mask,
            self.threads or torch.get_num_threads(),
        )
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
        return not library().ceiling_pass(variants().index(self.variant), None, None, None, None, None, 0, 0, 1)
