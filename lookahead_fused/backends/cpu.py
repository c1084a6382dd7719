"""The SIMD CPU backend: `csrc/cpu` walks the table in one parallel region."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _build as build
from .._norm import ClipOnDevice
from .._parts import CompiledPart, Part, Spec

NAME = "cpu"
DEVICES = ("cpu",)


def unavailable(device: torch.device | None = None) -> str:
    return build.reason("_cpu")


def part(spec: Spec) -> Part:
    module = build.module("_cpu")
    assert module is not None
    return CompiledPart(spec, module, Stepper)


class Stepper:
    """A table's kernels and the room that they work in."""

    in_one_call = True

    def __init__(self, part: CompiledPart) -> None:
        tuning = part.spec.tuning
        self.own_threads = tuning.own_threads
        self.module = part.module
        instruction_set = tuning.instruction_set or part.module.instruction_sets()[-1]
        self.native = part.module.Stepper(part.table, instruction_set)

    def sum_squares(self, part: CompiledPart, places: Tensor, sums: Tensor) -> None:
        """The sum of the squares of each row's gradient, to its parameter's place in `sums`."""
        threads = torch.get_num_threads()
        self.native.sum_squares(part.table, places.data_ptr(), sums.data_ptr(), threads, self.own_threads)

    def make_clip(self, part: CompiledPart, sums: Tensor, clip: ClipOnDevice) -> None:
        """What all sums come to."""
        self.module.make_clip(sums.data_ptr(), sums.numel(), *clip.addresses())

    def run(self, part: CompiledPart, grad_scale: Tensor | None, found_inf: Tensor | None, clip: Tensor | None) -> None:
        """One pass over the part's table, on as many threads as torch uses."""
        if found_inf is not None and found_inf.item() != 0:
            return
        scale = None if grad_scale is None else float(grad_scale)
        factor = None if clip is None else float(clip)
        self.native.run(part.table, scale, factor, torch.get_num_threads(), self.own_threads)
