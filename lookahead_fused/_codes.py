"""Moments in codes of 8 bits, as `csrc/state/int8.h` states them: what they stand for, and how they are made.

A moment lies in a uint8 tensor like its parameter, in blocks of so many elements in the order of its memory, and beside
it in the state lies a tensor with an fp32 scale for each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._tensors import check_memory, is_dense, local_tensor
from ._torch import is_plain

BLOCK = 128
DTYPE = torch.uint8


@dataclass(frozen=True)
class Kind:
    """How the moments of a kind are kept: the largest finite magnitude of a code, its bit for a sign, and how many of
    an fp32 number's lower bits it lacks."""

    top: int
    sign: int
    shift: int = 20

    @property
    def not_finite(self) -> int:
        return self.top + 1

    @property
    def first_top(self) -> int:
        return self.top + (20 << (23 - self.shift))

    @property
    def largest_top(self) -> int:
        return (0x7F800000 >> self.shift) - 1


SIGNED, SQUARES = Kind(126, 0x80), Kind(254, 0)


def scale_name(moment: str) -> str:
    """Under which name the scales of a moment's blocks stand in the state."""
    return f"{moment}_scale"


def blocks(numel: int) -> int:
    return -(-numel // BLOCK)


def new_scale(param: Tensor) -> Tensor:
    """Of a moment that begins with zeros."""
    return torch.zeros(blocks(param.numel()), dtype=torch.float32, device=param.device)


def decoded(codes: Tensor, scale: Tensor, kind: Kind) -> Tensor:
    """What dense codes stand for, in their layout: every code is exactly a number in bf16."""
    flat = _flat(codes)
    # Of the fp32 numbers' bits the upper 16. A scale that is none makes numbers that mean nothing, everywhere the same.
    offset = (scale.view(torch.int32) >> kind.shift).to(torch.int16) - kind.top
    magnitude = (flat & (0xFF ^ kind.sign)).to(torch.int16)
    bits = (magnitude + _spread(offset, flat.numel())) << (kind.shift - 16)
    bits = bits.masked_fill(magnitude == kind.not_finite, 0x7FFF).masked_fill(magnitude == 0, 0)
    if kind.sign:
        bits = bits | ((flat & kind.sign).to(torch.int16) << 8)
    made = torch.empty_like(codes, dtype=torch.bfloat16)
    _flat(made).copy_(bits.view(torch.bfloat16))
    return made


def encoded(values: Tensor, like: Tensor, kind: Kind, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Numbers as codes, in the layout of a dense tensor, and the scales of its blocks.

    Args:
        values: The numbers; they are taken in fp32.
        like: The parameter.
        random: 16 random bits for each element in the order of memory, by which it is rounded up or down. None: they
            are rounded to the nearest, and numbers that codes stood for come back.
    """
    flat = _flat(torch.empty_like(like, dtype=torch.float32, requires_grad=False).copy_(values))
    shift, last = kind.shift, kind.largest_top << kind.shift
    bits = flat.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    finite = magnitude < 0x7F800000
    to_even = (1 << (shift - 1)) - 1 + (magnitude >> shift & 1)
    added = to_even if random is None else random.to(torch.int32) << (shift - 16)
    up = torch.where(magnitude < last, magnitude + added, magnitude)
    # At random the largest may be rounded up or not: its block has room for both.
    largest = _largest(torch.where(finite, up if random is None else magnitude, 0)) >> shift
    top = (largest if random is None else largest + 1).clamp(kind.first_top, kind.largest_top)
    offset = _spread(top - kind.top, flat.numel())
    code = (up >> shift) - offset
    least = (offset + 1) << shift
    if kind.sign:
        if random is None:
            reached = flat.abs() > least.view(torch.float32) * 0.5
        else:
            reached = random.to(torch.float32) * (least.view(torch.float32) * 2.0**-16) < flat.abs()
        code = torch.where(magnitude < least, reached.to(torch.int32), code)
    else:
        code = torch.where(magnitude == 0, 0, code.clamp(min=1))
    code = torch.where(finite, code, kind.not_finite)
    if kind.sign:
        code = code | (bits >> 24 & kind.sign)
    made = torch.empty_like(like, dtype=DTYPE, requires_grad=False)
    _flat(made).copy_(code)
    return made, (top << shift).view(torch.float32)


def check_codes(param: Tensor, codes: Tensor, state: Mapping[str, Any], key: str, name: str) -> None:
    """Raises TypeError or ValueError for a moment in codes that lacks its scales, or has others' ones."""
    scale, told = state.get(scale_name(key)), f"state {scale_name(key)!r} of {name}"
    local = local_tensor(codes)
    if scale is None:
        raise ValueError(f"{told} must stand beside {key!r}, which is in {DTYPE}, got none")
    if not isinstance(scale, Tensor) or not is_plain(scale):
        raise TypeError(f"{told} must be a plain Tensor, got {type(scale).__name__}")
    if scale.dtype != torch.float32 or scale.layout != torch.strided:
        raise TypeError(f"{told} must be a dense tensor in {torch.float32}, got {scale.dtype} of {scale.layout}")
    count = blocks(local_tensor(param).numel())
    if scale.shape != (count,) or not scale.is_contiguous():
        raise ValueError(
            f"{told} must have the shape ({count},), a number for each {BLOCK} elements, and be contiguous, got "
            f"{tuple(scale.shape)} with strides {scale.stride()}"
        )
    if scale.device != local.device:
        raise ValueError(f"{told} must be on the device of {key!r}, {local.device}, got {scale.device}")
    if not is_plain(local) or not is_dense(local):
        raise TypeError(f"state {key!r} of {name} must be a plain tensor without gaps, in {DTYPE}")
    check_memory(scale, told)


def _flat(dense: Tensor) -> Tensor:
    """The elements in the order of memory."""
    return dense.as_strided((dense.numel(),), (1,))


def _spread(of_blocks: Tensor, numel: int) -> Tensor:
    """A block's number for each of its elements."""
    return of_blocks[:, None].expand(-1, BLOCK).reshape(-1)[:numel]


def _largest(flat: Tensor) -> Tensor:
    """Of each block."""
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK))
    return padded.view(-1, BLOCK).amax(dim=1)
