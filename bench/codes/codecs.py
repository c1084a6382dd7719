"""Codes for moments, by their formulas: what a number is after it was written and read again.

A codec takes numbers in blocks, fp32 [blocks, elements of a block], and for each one 16 random bits, int32, which those
that round to the nearest do not look at. The scale of a block comes from its largest magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Codec: TypeAlias = Callable[[Tensor, Tensor], Tensor]

MAGNITUDE, INFINITE, LARGEST = 0x7FFFFFFF, 0x7F800000, 0x7F700000
# Exponents that are kept free below the smallest code, so that nothing here is subnormal.
FREE = 20


@dataclass(frozen=True)
class Floating:
    """A small floating-point number whose exponents count from the block's largest; read and written by shifts.

    Attributes:
        shift: of fp32's bits; 23 less it are bits of mantissa.
        signed: 7 bits of magnitude and a sign, of which 0 is one; else 8 bits, and what is not 0 does not become 0.
        unbiased: rounded up as often as a number is near to the upper neighbour; else to the nearest, ties to even.
    """

    shift: int
    signed: bool
    unbiased: bool = True

    @property
    def top(self) -> int:
        """The code of the block's largest; one more would not be finite."""
        return 126 if self.signed else 254

    def __call__(self, x: Tensor, draw: Tensor) -> Tensor:
        magnitude = x.view(torch.int32) & MAGNITUDE
        if self.unbiased:
            up, above = draw << (self.shift - 16), 1
        else:
            up, above = (1 << (self.shift - 1)) - 1 + ((magnitude >> self.shift) & 1), 0
        risen = torch.where(magnitude < LARGEST, magnitude + up, magnitude)
        greatest = magnitude if self.unbiased else risen
        finite = torch.where(magnitude < INFINITE, greatest, 0)
        tops = (finite.amax(1, keepdim=True) >> self.shift) + above
        tops = tops.clamp(max=LARGEST >> self.shift).clamp(min=self.top + (FREE << (23 - self.shift)))
        offset = tops - self.top
        code = (risen >> self.shift) - offset
        if self.signed:
            least_bits = (offset + 1) << self.shift
            least = least_bits.view(torch.float32) / 65536
            # Between 0 and the least code: as often the latter as the number is large.
            threshold = draw.float() * least if self.unbiased else least * 32768
            code = torch.where(magnitude < least_bits, (threshold < x.abs()).int(), code)
        else:
            code = torch.where(magnitude == 0, 0, code.clamp(min=1))
        told = torch.where(code == 0, 0, (code + offset) << self.shift)
        number = torch.where(magnitude < INFINITE, told, 0x7FFF0000).view(torch.float32)
        return torch.copysign(number, x) if self.signed else number


@dataclass(frozen=True)
class Distance:
    """Counts how far a magnitude's bits lie below the block's top, and that distance is a small floating-point number.

    So a code has the longest mantissa near the top, 4 bits or 5, and one bit less below 2, 6 and 14 octaves.

    Attributes:
        signed, unbiased: as `Floating` has them; of two neighbours as near as each other the lower is taken.
    """

    signed: bool
    unbiased: bool = True

    def __call__(self, x: Tensor, draw: Tensor) -> Tensor:
        # The largest code; of fp32's bits those that no code has; bits of a distance's mantissa.
        top_code, shift, mantissa = (126, 19, 5) if self.signed else (254, 18, 6)
        base = 1 << mantissa
        magnitude = x.view(torch.int32) & MAGNITUDE
        finite = torch.where(magnitude < INFINITE, magnitude, 0)
        largest = finite.amax(1, keepdim=True)
        # Upwards to a multiple of the widest gap: so the numbers of one top are numbers of a lower one too, and no gap
        # has a power of two within it, on whose sides fp32's bits count differently.
        tops = ((((largest - 1) >> shift) + 8) & ~7).clamp(44 << (23 - shift), 0x7F000000 >> shift)
        distance = (((tops + base) << shift) - torch.minimum(magnitude, tops << shift)) >> 5 & 0x7FFFFFF
        up = draw << (7 - mantissa) if self.unbiased else 1 << (22 - mantissa)
        down = ((distance.float().view(torch.int32) + up) >> (23 - mantissa)) - ((122 + mantissa + shift) << mantissa)
        code = top_code - down
        least_bits = self._bits(torch.ones_like(tops), tops, top_code, shift, mantissa)
        if self.signed:
            least = least_bits.view(torch.float32) / 65536
            threshold = draw.float() * least if self.unbiased else least * 32768
            code = torch.where(magnitude < least_bits, (threshold < x.abs()).int(), code)
        else:
            code = torch.where(magnitude == 0, 0, code.clamp(min=1))
        told = torch.where(code == 0, 0, self._bits(code, tops, top_code, shift, mantissa))
        number = torch.where(magnitude < INFINITE, told, 0x7FFF0000).view(torch.float32)
        return torch.copysign(number, x) if self.signed else number

    @staticmethod
    def _bits(code: Tensor, tops: Tensor, top_code: int, shift: int, mantissa: int) -> Tensor:
        distance = (top_code - code + ((127 + mantissa) << mantissa)) << (23 - mantissa)
        return (tops + (1 << mantissa) - distance.view(torch.float32).int()) << shift


@dataclass(frozen=True)
class Table:
    """The numbers of a table, the largest of which is 1, times a block's largest.

    Attributes:
        values: ascending.
        unbiased: between two neighbours at random, so that the mean is the number; else the nearer.
        keeps: whether what is not 0 does not become 0.
    """

    values: tuple[float, ...]
    unbiased: bool = False
    keeps: bool = False

    def __call__(self, x: Tensor, draw: Tensor) -> Tensor:
        values = torch.tensor(self.values)
        scale = x.abs().amax(1, keepdim=True)
        part = x / torch.where(scale == 0, 1, scale)
        if self.unbiased:
            above = torch.bucketize(part, values).clamp(1, len(values) - 1)
            low, high = values[above - 1], values[above]
            told = torch.where(draw.float() < (part - low) / (high - low) * 65536, high, low)
        else:
            told = values[torch.bucketize(part, (values[1:] + values[:-1]) / 2)]
        if self.keeps:
            told = torch.where((part > 0) & (told <= 0), values[values > 0].min(), told)
        return told * scale


@dataclass(frozen=True)
class Bf16:
    """No code and no block: the upper half of fp32's bits.

    Attributes:
        unbiased: as `Floating` has it.
    """

    unbiased: bool = True

    def __call__(self, x: Tensor, draw: Tensor) -> Tensor:
        if not self.unbiased:
            return x.bfloat16().float()
        bits = x.view(torch.int32)
        return ((bits + draw) & ~0xFFFF).view(torch.float32)


def mirrored(magnitudes: Sequence[float], signed: bool) -> tuple[float, ...]:
    """A table of these and 0, and of their negatives where it is signed; the largest becomes 1."""
    largest = max(magnitudes)
    parts = sorted(magnitude / largest for magnitude in magnitudes)
    return (*(-part for part in reversed(parts) if signed), 0.0, *parts)


def linear(signed: bool) -> tuple[float, ...]:
    """Equal distances."""
    return mirrored(range(1, 128 if signed else 256), signed)


def logarithmic(signed: bool, decades: float) -> tuple[float, ...]:
    """Equal ratios, from 1 down over so many decades."""
    count = 127 if signed else 255
    return mirrored([10 ** (-decades * i / (count - 1)) for i in range(count)], signed)


def eight_bit_float(exponent: int, mantissa: int, special: int, signed: bool) -> tuple[float, ...]:
    """E4M3, E5M2: all finite numbers of a format of 8 bits.

    Args:
        special: how many of the largest bit patterns are not finite (1 in E4M3: a NaN; 4 in E5M2).
    """
    bias = 2 ** (exponent - 1) - 1
    found = []
    for bits in range(1, 2 ** (exponent + mantissa) - special):
        e, fraction = bits >> mantissa, (bits & (2**mantissa - 1)) / 2**mantissa
        found.append(math.ldexp(1 + fraction, e - bias) if e else math.ldexp(fraction, 1 - bias))
    return mirrored(found, signed)


def dynamic(signed: bool) -> tuple[float, ...]:
    """bitsandbytes' dynamic map (Dettmers et al. 2022, arXiv 2110.02861): decades, each with twice the lower's numbers.

    A decade's numbers are the middles of equal parts of (0.1, 1] times its power of ten; beside them are 0 and 1.
    """
    found = []
    for decade in range(7):
        parts = 2 ** (decade if signed else decade + 1)
        middles = [0.1 + 0.9 * (part + 0.5) / parts for part in range(parts)]
        found += [10.0 ** (decade - 6) * middle for middle in middles]
    return (*(-value for value in reversed(found) if signed), 0.0, *found, 1.0)
