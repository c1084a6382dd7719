"""How moments lie in codes of 8 bits in Triton, as in `csrc/state/int8.h`: under the same names and in the same order
of operations, so that the two can be read side by side. A word is an unsigned integer of 32 bits.

Elements come in rows of a block each. A block's largest is found along an axis, between the threads of a warp, and its
scale stands in a vector of the blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_rules import LAYOUT, multiply

constexpr = tl.constexpr
globals().update(LAYOUT)
# Their type, and no other moment's.
CODE = constexpr(tl.uint8)
# How many of an fp32 number's lower bits a code lacks, of first moments and of squares.
SHIFT, SHIFT_OF_SQUARES = constexpr(20), constexpr(20)
TOP, TOP_OF_SQUARES = constexpr(126), constexpr(254)
# Octaves from the least of fp32's normal numbers to the least that the codes of a block tell.
FIRST_OCTAVE = constexpr(20)
# The bits of infinity.
INFINITE = constexpr(0x7F800000)
# Of 16 random bits, as a share of 1.
UNIT = constexpr(2.0**-16)


@triton.jit
def without_sign(value):
    """A number's bits but the first. With a mask in its place, the LLVM in Triton 3.9 gives up over gfx942."""
    return tl.abs(value).to(tl.uint32, bitcast=True)


@triton.jit
def magnitude(value):
    magnitude = without_sign(value)
    return tl.where(magnitude < INFINITE, magnitude, 0)


@triton.jit
def largest_of_blocks(magnitudes):
    return tl.max(magnitudes, 1)


@triton.jit
def top_of(largest, squares: constexpr):
    shift: constexpr = SHIFT_OF_SQUARES if squares else SHIFT
    first: constexpr = (TOP_OF_SQUARES if squares else TOP) + (FIRST_OCTAVE << (23 - shift))
    last: constexpr = (INFINITE >> shift) - 1
    top = (largest >> shift) + 1
    top = tl.where(top > last, last, top)
    return tl.where(top < first, first, top).to(tl.uint32)


@triton.jit
def top_in(scale, squares: constexpr):
    shift: constexpr = SHIFT_OF_SQUARES if squares else SHIFT
    return scale.to(tl.uint32, bitcast=True) >> shift


@triton.jit
def scale_with(top, squares: constexpr):
    shift: constexpr = SHIFT_OF_SQUARES if squares else SHIFT
    return (top << shift).to(tl.float32, bitcast=True)


@triton.jit
def decoded(code, top, squares: constexpr):
    """The fp32 numbers of codes; the code is a word."""
    shift: constexpr = SHIFT_OF_SQUARES if squares else SHIFT
    most: constexpr = TOP_OF_SQUARES if squares else TOP
    magnitude = code if squares else code & 0x7F
    bits = tl.where(magnitude == most + 1, 0x7FFF0000, (magnitude + (top - most)) << shift).to(tl.uint32)
    bits = tl.where(magnitude == 0, 0, bits).to(tl.uint32)
    if not squares:
        bits = bits | ((code & 0x80) << 24)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def encoded(value, random, top, squares: constexpr):
    """The codes of fp32 numbers, with 16 random bits for each."""
    shift: constexpr = SHIFT_OF_SQUARES if squares else SHIFT
    most: constexpr = TOP_OF_SQUARES if squares else TOP
    largest: constexpr = ((INFINITE >> shift) - 1) << shift
    magnitude = without_sign(value)
    offset = top - most
    least = (offset + 1) << shift
    up = tl.where(magnitude < largest, magnitude + (random << (shift - 16)), magnitude)
    code = (up >> shift) - offset
    if squares:
        code = tl.where(magnitude < least, 1, code)
        code = tl.where(magnitude == 0, 0, code)
    else:
        # Upwards as often as the number is near to the least.
        step = multiply(least.to(tl.float32, bitcast=True), UNIT)
        number = magnitude.to(tl.float32, bitcast=True)
        drawn = tl.where(multiply(random.to(tl.float32), step) < number, 1, 0)
        code = tl.where(magnitude < least, drawn, code)
    code = tl.where(magnitude < INFINITE, code, most + 1).to(tl.uint32)
    if not squares:
        code = code | ((value.to(tl.uint32, bitcast=True) >> 24) & 0x80)
    return code.to(tl.uint8)


@triton.jit
def codes_of(value, random, inside, squares: constexpr):
    """The codes of blocks, one in each row, and their scales."""
    largest = largest_of_blocks(tl.where(inside, magnitude(value), 0))
    top = top_of(largest, squares)
    return encoded(value, random, top[:, None], squares), scale_with(top, squares)
