"""Moments in codes of 8 bits, in NumPy and from the definition: codes are floating-point numbers, told of as numbers.

The u-th number of the grid is (1 + (u mod 8) / 8) 2^(u div 8 - 127), and the next is how far it is rounded. A block's
codes are the numbers up to the `top`-th, counted from the one that 1 is the code of.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BLOCK = 128
# Of the grid: the last finite number, and the first that may be a block's least.
LAST, LEAST = 255 * 8 - 1, 20 * 8 + 1


@dataclass(frozen=True)
class Kind:
    codes: int  # how many magnitudes there are that are finite and not 0
    has_sign: bool


SIGNED, SQUARES = Kind(126, True), Kind(254, False)


def number(u: np.ndarray) -> np.ndarray:
    u = np.asarray(u, dtype=np.int64)
    return np.ldexp(1.0 + (u % 8) / 8.0, u // 8 - 127)


def below(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of finite magnitudes which number of the grid is the last that is not larger, and how much of the way to the next
    one is left over. What is below the grid is on the way to its first."""
    fraction, exponent = np.frexp(x.astype(np.float64))
    fraction, exponent = fraction * 2.0, exponent - 1
    eighths = (fraction - 1.0) * 8.0
    u = (exponent + 127) * 8 + np.floor(eighths).astype(np.int64)
    over = eighths - np.floor(eighths)
    # Subnormal numbers, and zero.
    tiny = x < 2.0**-126
    return np.where(tiny, 0, u), np.where(tiny, 0.0, over)


def in_blocks(x: np.ndarray) -> np.ndarray:
    return np.pad(x, (0, -len(x) % BLOCK)).reshape(-1, BLOCK)


def spread(of_blocks: np.ndarray, count: int) -> np.ndarray:
    return np.repeat(of_blocks, BLOCK)[:count]


def decode(codes: np.ndarray, tops: np.ndarray, kind: Kind) -> np.ndarray:
    """What codes stand for, in fp32: NaN of all that is not finite."""
    magnitude = codes.astype(np.int64) & (127 if kind.has_sign else 255)
    found = number(magnitude + spread(tops, len(codes)) - kind.codes)
    found = np.where(magnitude == 0, 0.0, np.where(magnitude > kind.codes, np.nan, found))
    return np.where(kind.has_sign & (codes >= 128), -found, found).astype(np.float32)


def encode(x: np.ndarray, kind: Kind, draws: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Of fp32 numbers the codes, and the tops of the blocks; draws: 16 bits each, or None for the nearest."""
    finite = np.isfinite(x)
    size = np.where(finite, np.abs(x), 0.0).astype(np.float64)
    u, over = below(size)
    to_even = (over > 0.5) | ((over == 0.5) & (u % 2 == 1))
    rises = to_even if draws is None else over + draws / 65536.0 >= 1.0
    rounded = np.where(u < LAST, u + rises, LAST)
    # Where any may be rounded up, its block has room for that.
    tops = in_blocks(rounded).max(1) if draws is None else np.minimum(in_blocks(u).max(1) + 1, LAST)
    tops = np.maximum(tops, LEAST - 1 + kind.codes)
    first = spread(tops, len(x)) - kind.codes + 1
    code = rounded - first + 1
    least = number(first)
    if not kind.has_sign:
        small = np.where(size > 0, 1, 0)
    elif draws is None:
        small = np.where(size > least / 2, 1, 0)
    else:
        small = np.where(draws / 65536.0 * least < size, 1, 0)
    code = np.where(size < least, small, code)
    code = np.where(finite, code, kind.codes + 1)
    assert (code[finite] <= kind.codes).all()
    return (code + 128 * (kind.has_sign & np.signbit(x))).astype(np.uint8), tops


def scales(tops: np.ndarray) -> np.ndarray:
    """A block's scale is its largest number."""
    return number(tops).astype(np.float32)


def tops_of(scale: np.ndarray) -> np.ndarray:
    u, over = below(scale)
    assert (over == 0).all()
    return u


def draws(count: int, updates: int, own_pass: bool, moment: int) -> np.ndarray:
    """16 bits for each of a row's first elements."""

    def mixed(word: int) -> int:
        word = (word ^ (word >> 16)) * 0x7FEB352D % 2**32
        word = (word ^ (word >> 15)) * 0x846CA68B % 2**32
        return word ^ (word >> 16)

    key = mixed((2 * updates + own_pass + 0x9E3779B9) % 2**32)
    bits = [mixed((place + key) % 2**32) for place in range(count)]
    halves = [(b % 2**16, b // 2**16, b * 0x9E3779B9 % 2**32 // 2**16)[moment] for b in bits]
    return np.array(halves, dtype=np.int64)
