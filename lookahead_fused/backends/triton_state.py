"""How moments are rounded to bf16 in Triton, as in `csrc/state/bfloat16.h`: under the same names and in the same order
of operations, so that the two can be read side by side. A word is an unsigned integer of 32 bits."""

from __future__ import annotations

import triton
import triton.language as tl

constexpr = tl.constexpr
WEYL = constexpr(0x9E3779B9)


@triton.jit
def word(number: constexpr):
    return tl.full((), number, tl.uint32)


@triton.jit
def mixed(x):
    x = (x ^ (x >> 16)) * word(0x7FEB352D)
    x = (x ^ (x >> 15)) * word(0x846CA68B)
    return x ^ (x >> 16)


@triton.jit
def rounding_key(updates, own_pass):
    return mixed((2 * updates + own_pass).to(tl.uint32) + word(WEYL))


@triton.jit
def random_half(bits, moment: constexpr):
    if moment == 0:
        return bits & 0xFFFF
    else:
        return (bits if moment == 1 else bits * word(WEYL)) >> 16


@triton.jit
def rounded_without_bias(value, random):
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    rounded = tl.where(magnitude < 0x7F7F0000, bits + random, bits)
    rounded = tl.where(magnitude > 0x7F800000, word(0x7FFF0000), rounded)
    return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
