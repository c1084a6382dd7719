"""The norm of a table's gradients in Triton: a program for each block, and what a clip comes to.

It stands here as in `csrc/cuda/norm.cu` and `csrc/table/norm.h`, in the same order of operations, and where a plan's
fields stand is asked of the compiled module.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_prologue import read
from .triton_rules import LAYOUT, divide, multiply, square_root

globals().update(LAYOUT)

# How many elements of a lane are read before any is added.
AT_ONCE = tl.constexpr(16)


@triton.jit
def halves(lanes, half: tl.constexpr):
    """The first half of the lanes and the second, added."""
    if half > 1:
        lanes = tl.trans(tl.reshape(lanes, (2, half)))
    low, high = tl.split(lanes)
    return low + high


@triton.jit
def sum_of_lanes(lanes):
    for i in tl.static_range(6):
        lanes = halves(lanes, NORM_LANES >> (i + 1))
    return lanes


@triton.jit
def sum_in_lanes(values, count):
    """Of fp64 numbers that other programs may just have written."""
    lane = tl.arange(0, NORM_LANES)
    lanes = tl.full([NORM_LANES], 0.0, tl.float64)
    for begin in range(0, count, NORM_LANES):
        i = begin + lane
        lanes += tl.load(values + i, mask=i < count, other=0.0, cache_modifier=".cg")
    return sum_of_lanes(lanes)


@triton.jit(do_not_specialize=["gradients_at", "first_block_at", "done_at", "partial_at"])
def squares(plan, moving, gradients_at, first_block_at, done_at, partial_at, places, sums, G: tl.constexpr):
    """The sum of the squares of one block; the program that comes last of a row adds what all of them have left."""
    number = tl.program_id(0).to(tl.int64)
    block = plan + number * CHUNK
    offset = read(block, CHUNK_OFFSET, tl.int64)
    count = read(block, CHUNK_COUNT, tl.int32)
    row = read(block, CHUNK_ROW, tl.int32).to(tl.int64)
    gradient = read(moving + gradients_at + row * 8, 0, tl.int64)
    place = sums + tl.load(places + row)
    if gradient == 0:
        if offset == 0:
            tl.store(place, 0.0)
    else:
        elements = gradient.to(tl.pointer_type(G)) + offset
        lane = tl.arange(0, NORM_LANES)
        lanes = tl.full([NORM_LANES], 0.0, tl.float64)
        for begin in range(0, count, NORM_LANES * AT_ONCE):
            for j in tl.static_range(AT_ONCE):
                i = begin + j * NORM_LANES + lane
                value = tl.load(elements + i, mask=i < count, other=0.0).to(tl.float64)
                lanes += multiply(value, value)
        total = sum_of_lanes(lanes)
        first = read(plan + first_block_at + row * 8, 0, tl.int64)
        blocks = read(plan + first_block_at + row * 8 + 8, 0, tl.int64) - first
        if blocks == 1:
            tl.store(place, total)
        else:
            partial = (plan + partial_at).to(tl.pointer_type(tl.float64))
            done = (plan + done_at).to(tl.pointer_type(tl.int32)) + row
            tl.store(partial + number, total)
            # What all threads of the program have written, before another program is told of it.
            tl.debug_barrier()
            if tl.atomic_add(done, 1) + 1 == blocks:
                tl.store(place, sum_in_lanes(partial + first, blocks))
                tl.store(done, 0)


@triton.jit(do_not_specialize=["count", "skips"])
def clip(sums, count, grad_scale, found_inf, clip, skip, skipped, skips):
    """What all sums come to; see `write_clip` in `csrc/table/norm.h`."""
    total = sum_in_lanes(sums, count)
    norm = divide(square_root(total), tl.load(grad_scale).to(tl.float64))
    ratio = divide(tl.load(clip + 2), norm + 1e-6)
    tl.store(clip, norm)
    tl.store(clip + 1, tl.where(ratio > 1.0, 1.0, ratio))
    if skips != 0:
        bad = norm - norm != 0.0
        tl.store(skip, tl.where(bad | (tl.load(found_inf) != 0), 1.0, 0.0))
        if bad:
            tl.store(skipped, tl.load(skipped) + 1)
