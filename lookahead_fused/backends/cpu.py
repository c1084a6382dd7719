"""The SIMD CPU backend: `csrc/cpu` walks the table in one parallel region."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import torch

from .. import build

if TYPE_CHECKING:
    from ..table import Part

NAME = "cpu"
DEVICES = ("cpu",)

# None: the best that this machine has. Set by tests, which compare them.
instruction_set: str | None = None
# False: torch's threads where they serve. Set by tests, which compare both.
own_threads = False


def native() -> ModuleType | None:
    """The compiled module that keeps this backend's tables, or None."""
    return build.module("_cpu")


def unavailable(device: torch.device | None = None) -> str:
    return build.reason("_cpu")


def step(part: Part, grad_scale: torch.Tensor | None, found_inf: torch.Tensor | None) -> None:
    """Advances the part's parameters by one step, on as many threads as torch uses."""
    module = build.module("_cpu")
    assert module is not None
    if found_inf is not None and found_inf.item() != 0:
        return
    if part.stepper is None:
        part.stepper = module.Stepper(part.native, instruction_set or module.instruction_sets()[-1])
    scale = None if grad_scale is None else float(grad_scale)
    part.stepper.step(part.native, scale, torch.get_num_threads(), own_threads)
