"""The parameter lists the benchmarks step over: exact shapes, without the models around them.

An optimizer sees a list of tensors and nothing else, so a case is a list of shapes. A new model is one more
entry in ``CASES``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

Shape = tuple[int, ...]

# Gradients of this scale are usual, and their squares stay far away from fp32's slow subnormal range.
GRADIENT_SCALE = 0.01


@dataclass(frozen=True)
class Case:
    """A parameter list.

    Attributes:
        title: what it is, for people.
        shapes: one shape per parameter, in the model's order.
    """

    title: str
    shapes: tuple[Shape, ...]

    @property
    def tensors(self) -> int:
        return len(self.shapes)

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def __str__(self) -> str:
        tensors = f"{self.tensors} tensor" + ("s" if self.tensors != 1 else "")
        return f"{self.title}: {tensors}, {self.elements:,} elements"


def gpt2(*, layers: int, width: int, vocabulary: int = 50257, context: int = 1024) -> tuple[Shape, ...]:
    """The parameters of a GPT-2, in the order of ``GPT2LMHeadModel.parameters()``.

    The output layer shares the token embedding's tensor, so it is not listed. Linear layers are kept as
    (inputs, outputs), as the published checkpoints have them.
    """
    block: tuple[Shape, ...] = (
        (width,), (width,),  # ln_1
        (width, 3 * width), (3 * width,),  # attn.c_attn
        (width, width), (width,),  # attn.c_proj
        (width,), (width,),  # ln_2
        (width, 4 * width), (4 * width,),  # mlp.c_fc
        (4 * width, width), (width,),  # mlp.c_proj
    )  # fmt: skip
    return ((vocabulary, width), (context, width), *(block * layers), (width,), (width,))


def equal(tensors: int, elements: int) -> tuple[Shape, ...]:
    """``tensors`` one-dimensional parameters of ``elements`` each."""
    return ((elements,),) * tensors


CASES = {
    "gpt2-small": Case("GPT-2 small", gpt2(layers=12, width=768)),
    "one-large": Case("one tensor of 64 Mi", equal(1, 64 * 2**20)),
    "many-small": Case("1000 tensors of 64", equal(1000, 64)),
    "scalars-1": Case("1 tensor of 1", equal(1, 1)),
    "scalars-1000": Case("1000 tensors of 1", equal(1000, 1)),
    "scalars-4000": Case("4000 tensors of 1", equal(4000, 1)),
    "groups-465": Case("465 small tensors", equal(465, 64)),
    # Two tensors, so that a temporary of a tensor's size is far over the size up to which malloc recycles
    # memory it already holds: what a step allocates then shows as resident memory.
    "memory-10m": Case("10 M in 2 tensors", equal(2, 5_000_000)),
    "memory-100m": Case("100 M in 2 tensors", equal(2, 50_000_000)),
}


def parameters(case: Case, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    """A case's parameters with normal random values and gradients of the same dtype."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape in case.shapes:
        # Drawn in fp32 whatever the dtype, so that cases of two dtypes start at the same values.
        parameter = nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        parameter.grad = torch.randn(shape, generator=generator).mul_(GRADIENT_SCALE).to(dtype)
        made.append(parameter)
    return made


def twin(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Parameters of their own with the same values, and the very same gradient tensors.

    An optimizer only reads a gradient, so the sides of a comparison can share it: a fifth less memory a side.
    """
    made = []
    for parameter in parameters:
        copy = nn.Parameter(parameter.detach().clone())
        copy.grad = parameter.grad
        made.append(copy)
    return made


def renew_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Give each parameter a new gradient at another address, as a backward pass after ``zero_grad`` does."""
    # The old ones live until all new ones exist: else the allocator hands the same addresses out again.
    old = [parameter.grad for parameter in parameters]
    for parameter, gradient in zip(parameters, old, strict=True):
        assert gradient is not None
        parameter.grad = gradient.clone()
