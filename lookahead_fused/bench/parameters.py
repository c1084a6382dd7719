"""The parameter lists the benchmarks step over: exact shapes, without the models around them.

An optimizer sees a list of tensors and nothing else, so a case is a list of shapes. A new model is one more
entry in ``CASES``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Shape = tuple[int, ...]

# Gradients of this scale are usual, and their squares stay far away from fp32's slow subnormal range.
GRADIENT_SCALE = 0.01
# How many numbers are drawn; longer lists repeat them.
NOISE = 1 << 20


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


def resnet50() -> tuple[Shape, ...]:
    """The parameters of torchvision's ResNet-50, in its order."""

    def convolution(inputs: int, outputs: int, size: int) -> tuple[Shape, ...]:
        return ((outputs, inputs, size, size), (outputs,), (outputs,))  # and its batch norm

    shapes = list(convolution(3, 64, 7))
    inputs = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            shapes += convolution(inputs, width, 1) + convolution(width, width, 3) + convolution(width, 4 * width, 1)
            if block == 0:
                shapes += convolution(inputs, 4 * width, 1)
            inputs = 4 * width
    return (*shapes, (1000, inputs), (1000,))


def bert_large() -> tuple[Shape, ...]:
    """The parameters of BERT-large, in the order of ``BertModel.parameters()``."""
    width, inner = 1024, 4096
    square: tuple[Shape, ...] = ((width, width), (width,))
    norm: tuple[Shape, ...] = ((width,), (width,))
    layer = (*square * 4, *norm, (inner, width), (inner,), (width, inner), (width,), *norm)
    return ((30522, width), (512, width), (2, width), *norm, *(layer * 24), *square)


def llama3_8b() -> tuple[Shape, ...]:
    """The parameters of Llama-3-8B, in the order of ``LlamaForCausalLM.parameters()``."""
    width, inner, keys, vocabulary = 4096, 14336, 1024, 128256
    layer: tuple[Shape, ...] = (
        (width, width), (keys, width), (keys, width), (width, width),  # q, k, v, o
        (inner, width), (inner, width), (width, inner),  # gate, up, down
        (width,), (width,),  # norms
    )  # fmt: skip
    return ((vocabulary, width), *(layer * 32), (width,), (vocabulary, width))


def olmoe() -> tuple[Shape, ...]:
    """The parameters of OLMoE-1B-7B, 16 x 64 experts, in the order of ``OlmoeForCausalLM.parameters()``."""
    width, inner, experts, vocabulary = 2048, 1024, 64, 50304
    expert: tuple[Shape, ...] = ((inner, width), (inner, width), (width, inner))
    norms: tuple[Shape, ...] = ((width,), (width,))
    layer = (*((width, width),) * 4, *norms, (experts, width), *(expert * experts), *norms)
    return ((vocabulary, width), *(layer * 16), (width,), (vocabulary, width))


def shard(shapes: tuple[Shape, ...], ranks: int) -> tuple[Shape, ...]:
    """What the first of ``ranks`` has of each parameter under FSDP2: its part of the first dimension, rounded up."""
    return tuple((-(-shape[0] // ranks), *shape[1:]) for shape in shapes)


def equal(tensors: int, elements: int) -> tuple[Shape, ...]:
    """``tensors`` one-dimensional parameters of ``elements`` each."""
    return ((elements,),) * tensors


CASES = {
    "resnet50": Case("ResNet-50", resnet50()),
    "bert-large": Case("BERT-large", bert_large()),
    "small-gpt": Case("GPT, 6 layers of 256", gpt2(layers=6, width=256, vocabulary=256, context=128)),
    "gpt2-small": Case("GPT-2 small", gpt2(layers=12, width=768)),
    "gpt2-xl": Case("GPT-2 XL", gpt2(layers=48, width=1600)),
    "llama3-8b-8": Case("Llama-3-8B, 1 of 8 ranks", shard(llama3_8b(), 8)),
    "llama3-8b-64": Case("Llama-3-8B, 1 of 64 ranks", shard(llama3_8b(), 64)),
    "llama3-8b-512": Case("Llama-3-8B, 1 of 512 ranks", shard(llama3_8b(), 512)),
    "moe": Case("OLMoE-1B-7B, 1 of 512 ranks", shard(olmoe(), 512)),
    "many-small": Case("1000 tensors of 64", equal(1000, 64)),
    "one-16mi": Case("one tensor of 16 Mi", equal(1, 16 * 2**20)),
    "one-large": Case("one tensor of 64 Mi", equal(1, 64 * 2**20)),
    # Not models: what single measures need.
    "scalars-1": Case("1 tensor of 1", equal(1, 1)),
    "scalars-1000": Case("1000 tensors of 1", equal(1000, 1)),
    "scalars-4000": Case("4000 tensors of 1", equal(4000, 1)),
    "groups-465": Case("465 small tensors", equal(465, 64)),
    # Two tensors, so that a temporary of a tensor's size is far over the size up to which malloc recycles
    # memory it already holds: what a step allocates then shows as resident memory.
    "memory-10m": Case("10 M in 2 tensors", equal(2, 5_000_000)),
    "memory-100m": Case("100 M in 2 tensors", equal(2, 50_000_000)),
}

LAYOUTS = {
    "one": "one group",
    "decay": "two groups, weight decay on matrices alone",
    "each": "one group per tensor",
}


def groups(params: Sequence[nn.Parameter], layout: str) -> list[dict[str, Any]]:
    """The parameters as the groups of a layout; see ``LAYOUTS``."""
    if layout == "one":
        return [{"params": list(params)}]
    if layout == "decay":
        matrices = [p for p in params if p.dim() > 1]
        vectors = [p for p in params if p.dim() <= 1]
        made: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        return [group for group in made if group["params"]]
    if layout == "each":
        return [{"params": [p]} for p in params]
    raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")


def make(case: Case, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> list[nn.Parameter]:
    """A case's parameters with normal random values and gradients of the same dtype."""
    generator = torch.Generator(device).manual_seed(seed)
    # Drawing a billion numbers takes longer than stepping over them, and a step's speed does not depend on them.
    values, slopes = (torch.randn(NOISE, generator=generator, device=device) for _ in range(2))
    slopes.mul_(GRADIENT_SCALE)
    made, start = [], 0
    for shape in case.shapes:
        # Drawn in fp32 whatever the dtype, so that cases of two dtypes start at the same values.
        parameter = nn.Parameter(_repeated(values, start, shape, dtype))
        parameter.grad = _repeated(slopes, start, shape, dtype)
        start = (start + math.prod(shape)) % NOISE
        made.append(parameter)
    return made


def _repeated(noise: torch.Tensor, start: int, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of a shape with the noise from `start` on, over and over."""
    filled = torch.empty(math.prod(shape), dtype=dtype, device=noise.device)
    done = 0
    while done < filled.numel():
        part = noise[start : start + filled.numel() - done]
        filled[done : done + part.numel()] = part
        done, start = done + part.numel(), 0
    return filled.view(shape)


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


class Turns:
    """Called before each step: another eighth of the parameters has no gradient in it, as layers that are dropped.

    Args:
        parameters: all of them with a gradient, which each gets back when its turn is over.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.gradients = [parameter.grad for parameter in self.parameters]
        assert all(gradient is not None for gradient in self.gradients)
        self.step = 0

    def __call__(self) -> None:
        for i in range(self.step % 8, len(self.parameters), 8):
            self.parameters[i].grad = self.gradients[i]
        self.step += 1
        for i in range(self.step % 8, len(self.parameters), 8):
            self.parameters[i].grad = None
