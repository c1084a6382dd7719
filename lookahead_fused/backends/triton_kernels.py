"""The walk over a table in Triton: a program for each chunk, after the launch for the rows in `triton_prologue.py`.

It stands here as in `csrc/cuda/walk.cuh`, under the same names and in the same order of operations, so that the two can
be read side by side; rules stand in `triton_rules.py`, policies in `triton_policies.py`. Where a table's fields stand
is asked of the compiled module.

A condition on which an array depends is a mask, the same for a whole block: the accesses stay as wide and need no jump,
so that all of an element's loads are under way at once.
"""

from __future__ import annotations

from collections import namedtuple

import torch
import triton
import triton.language as tl

from .._tensors import PARAM_DTYPES
from .triton_codes import CODE, codes_of, decoded, top_in
from .triton_policies import (
    POLICIES,
    RECOVERY,
    SLOW_COEFFICIENTS,
    SlowStep,
    slow_average,
    slow_averaged,
    slow_moment,
    slow_weights,
)
from .triton_prologue import KEY, gradient_of, read, rows
from .triton_rules import LAYOUT, ROWS, RULES
from .triton_state import mixed, random_half, rounded_without_bias

__all__ = ["DTYPES", "KEY", "POLICIES", "ROWS", "RULES", "SLOW_COEFFICIENTS", "THREADS", "chunks", "rows"]

constexpr = tl.constexpr
globals().update(LAYOUT)

# Of a program of `chunks` the elements that it takes at a time, and its threads: eight elements each, 16 bytes of the
# smallest dtype.
BLOCK = constexpr(1024)
# The same where moments are codes: four elements for each thread, 16 bytes of fp32, and a block of codes for each warp.
CODED = constexpr(512)
# At the end of a chunk, and where it is not aligned, of a row whose policy averages or whose moments are codes.
TAIL = constexpr(256)
THREADS = BLOCK.value // 8

# ---- csrc/table/master.h


@triton.jit
def is_nan_bits(bits):
    return (bits & 0x7FFFFFFF) > 0x7F800000


@triton.jit
def join_halves(param, low):
    """The master of a bf16 parameter; its low half is int16."""
    alone = param.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    both = alone + low.to(tl.int32).to(tl.uint32, bitcast=True)
    return tl.where(is_nan_bits(both), alone, both).to(tl.float32, bitcast=True)


@triton.jit
def halve(master):
    """The bf16 parameter of a master, and its low half."""
    bits = master.to(tl.uint32, bitcast=True)
    low = tl.where(is_nan_bits(bits), 0x7FFF0000, bits).to(tl.uint32)
    param = ((low + 0x8000) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return param, low.to(tl.uint16).to(tl.int16, bitcast=True)


# ---- csrc/cuda/walk.cuh

# A chunk's own part of its row's arrays, near null where it has none; and whether it has, and this pass moves it.
Arrays = namedtuple(
    "Arrays",
    "param grad master slow cached companion moments has_master has_cached has_companion has_moment row first_block",
)
# Elements of a chunk that are taken together, and which of them there are. Where moments are codes they come in rows of
# a block each, beside the blocks.
Lanes = namedtuple("Lanes", "i inside block has_block")


@triton.jit
def lanes_from(begin, few: constexpr, S: constexpr, count=None):
    """So many lanes from an element on; without a count, all of them are inside."""
    if S == CODE:
        first = begin + tl.arange(0, few // CODE_BLOCK) * CODE_BLOCK
        i = first[:, None] + tl.arange(0, CODE_BLOCK)[None, :]
        block = first // CODE_BLOCK
        has_block = tl.full(first.shape, True, tl.int1) if count is None else first < count
    else:
        i = begin + tl.arange(0, few)
        # Of which nothing asks.
        block, has_block = begin, True
    inside = tl.full(i.shape, True, tl.int1) if count is None else i < count
    return Lanes(i=i, inside=inside, block=block, has_block=has_block)


@triton.jit
def part(address, dtype: constexpr, offset, aligned: constexpr):
    pointer = address.to(tl.pointer_type(dtype)) + offset
    return tl.multiple_of(pointer, 16) if aligned else pointer


@triton.jit
def arrays(
    row,
    gradient,
    offset,
    acts_on_moment,
    rule: constexpr,
    P: constexpr,
    G: constexpr,
    S: constexpr,
    T: constexpr,
    aligned: constexpr,
):
    moments = ()
    has_moment = ()
    for m in tl.static_range(rule.moments):
        address = read(row, ROW_MOMENT + m * 8, tl.int64)
        moments += (part(address, S, offset, aligned),)
        has_moment += ((address != 0) & (rule.reads_gradient | (acts_on_moment != 0)),)
    param = part(read(row, ROW_PARAM, tl.int64), P, offset, aligned)
    has_master = read(row, ROW_MASTER, tl.int64) != 0
    if param.dtype.element_ty == tl.bfloat16:
        master = part(read(row, ROW_MASTER, tl.int64), tl.int16, offset, aligned)
    else:
        master = part(read(row, ROW_MASTER, tl.int64), T, offset, aligned)
    cached = read(row, ROW_CACHED_MOMENTUM, tl.int64)
    companion = read(row, ROW_COMPANION, tl.int64)
    return Arrays(
        param=param,
        grad=part(gradient, G, offset, aligned),
        master=master,
        slow=part(read(row, ROW_SLOW, tl.int64), T, offset, aligned),
        cached=part(cached, S, offset, aligned),
        companion=part(companion, T, offset, aligned),
        moments=moments,
        has_master=has_master,
        has_cached=cached != 0,
        has_companion=companion != 0,
        has_moment=has_moment,
        row=row,
        first_block=offset // CODE_BLOCK,
    )


@triton.jit
def load(array, i, mask):
    return tl.load(array + i, mask=mask, other=0.0)


@triton.jit
def store(array, i, value, mask):
    tl.store(array + i, value.to(array.dtype.element_ty), mask=mask)


@triton.jit
def scales_of(at, lanes, column: constexpr):
    """Where the scales of a moment's blocks are: read where it is asked for, as what a policy decided is."""
    return read(at.row, column, tl.int64).to(tl.pointer_type(tl.float32)) + at.first_block + lanes.block


@triton.jit
def has_cached(at, S: constexpr):
    """Where moments are codes it is asked in every block: held over them, it would spill from sm_100's predicates."""
    return read(at.row, ROW_CACHED_MOMENTUM, tl.int64) != 0 if S == CODE else at.has_cached


@triton.jit
def load_moment(at, array, scale: constexpr, lanes, has, squares: constexpr, S: constexpr, T: constexpr):
    """`scale` is the column of a row that has them, where moments are codes."""
    mask = has & lanes.inside
    if S == CODE:
        scales = tl.load(scales_of(at, lanes, scale), mask=has & lanes.has_block, other=0.0)
        code = tl.load(array + lanes.i, mask=mask, other=0)
        return decoded(code.to(tl.uint32), top_in(scales, squares)[:, None], squares)
    else:
        return load(array, lanes.i, mask).to(T)


@triton.jit
def load_moments(at, lanes, rule: constexpr, S: constexpr, T: constexpr):
    moments = ()
    for m in tl.static_range(rule.moments):
        array, has = at.moments[m], at.has_moment[m]
        moments += (load_moment(at, array, ROW_MOMENT_SCALE + m * 8, lanes, has, (rule.squares >> m) & 1, S, T),)
    return moments


@triton.jit
def drawn(place, i, S: constexpr, T: constexpr):
    """What a block's moments are rounded by, where they are kept in fewer bits than they are computed in."""
    return i if S == T else mixed(place + i.to(tl.uint32))


@triton.jit
def store_moment(array, i, value, mask, random, m: constexpr, S: constexpr, T: constexpr):
    if S == T:
        store(array, i, value, mask)
    else:
        tl.store(array + i, rounded_without_bias(value, random_half(random, m)), mask=mask)


@triton.jit
def store_codes(at, array, scale: constexpr, lanes, code, scales):
    tl.store(array + lanes.i, code, mask=lanes.inside)
    tl.store(scales_of(at, lanes, scale), scales, mask=lanes.has_block)


@triton.jit
def store_moments(at, own, lanes, moments, random, averages: constexpr, rule: constexpr, S: constexpr, T: constexpr):
    """Of codes the cached copy, too, where there was an event: it is the first moment."""
    for m in tl.static_range(rule.moments):
        if S != CODE:
            store_moment(at.moments[m], lanes.i, moments[m], at.has_moment[m] & lanes.inside, random, m, S, T)
        elif at.has_moment[m]:
            # No mask: what a row has not would take as long to encode, and all loads are under way.
            code, scales = codes_of(moments[m], random_half(random, m), lanes.inside, (rule.squares >> m) & 1)
            store_codes(at, at.moments[m], ROW_MOMENT_SCALE + m * 8, lanes, code, scales)
            if m == 0 and not averages and has_cached(at, S) & (tl.load(own) != 0):
                store_codes(at, at.cached, ROW_CACHED_MOMENTUM_SCALE, lanes, code, scales)


@triton.jit
def load_weights(at, i, inside, averages: constexpr, P: constexpr, T: constexpr):
    """Theta in the compute type. Where a policy averages, a parameter in 16 bits always has a master: to ask whether
    would take more scalar registers than an AMD processor has."""
    if P == T:
        p = load(at.param, i, inside)
    elif averages and at.param.dtype.element_ty == tl.bfloat16:
        p = join_halves(load(at.param, i, inside), load(at.master, i, inside))
    elif at.param.dtype.element_ty == tl.bfloat16:
        # Without a master beside zeros: then it is the parameter.
        p = join_halves(load(at.param, i, inside), load(at.master, i, at.has_master & inside))
    else:
        stored = load(at.param, i, ~at.has_master & inside).to(T)
        p = tl.where(at.has_master, load(at.master, i, at.has_master & inside), stored)
    return p


@triton.jit
def store_weights(at, i, p, inside, averages: constexpr, P: constexpr, T: constexpr):
    if P == T:
        store(at.param, i, p, inside)
    elif averages and at.param.dtype.element_ty == tl.bfloat16:
        param, low = halve(p)
        store(at.master, i, low, inside)
        store(at.param, i, param, inside)
    elif at.param.dtype.element_ty == tl.bfloat16:
        param, low = halve(p)
        store(at.master, i, low, at.has_master & inside)
        store(at.param, i, tl.where(at.has_master, param, p.to(P)), inside)
    else:
        store(at.master, i, p, at.has_master & inside)
        store(at.param, i, p, inside)


@triton.jit
def numbers(at, begin: constexpr, end: constexpr):
    values = ()
    for j in tl.static_range(begin, end):
        values += (tl.load(at + j),)
    return values


@triton.jit
def elements(at, own, c, lanes, place, rule: constexpr, P: constexpr, S: constexpr, T: constexpr):
    """One block of a chunk.

    What a policy decided is read where it is asked for: held over the blocks it would take more scalar registers than
    an AMD processor has, and in an event vector registers from every step.
    """
    i = lanes.i
    inside = lanes.inside
    p = load_weights(at, i, inside, False, P, T)
    g = p
    if rule.reads_gradient:
        g = load(at.grad, i, inside).to(T)
        capture = tl.load(own + 1)
        store(at.slow, i, p, (capture != 0) & inside)
    moments = load_moments(at, lanes, rule, S, T)
    if S == CODE:
        # Held over the blocks, beside what codes are made by, AMD's scalar registers spill.
        c = numbers(own, SLOW_COEFFICIENTS, SLOW_COEFFICIENTS + rule.coefficients)
    p, moments = rule.update(c, p, g, moments)
    random = drawn(place, i, S, T)
    moment = moments[0]
    changes = inside
    due = 1.0
    if rule.reads_gradient:
        due = tl.load(own)
    if due != 0:
        s = numbers(own, 0, SLOW_COEFFICIENTS)
        mask = at.has_companion & inside
        p, slow, outer = slow_weights(s, p, load(at.slow, i, inside), load(at.companion, i, mask))
        store(at.slow, i, slow, inside)
        store(at.companion, i, outer, mask)
        has_copy = at.has_moment[0] & has_cached(at, S)
        cached = load_moment(at, at.cached, ROW_CACHED_MOMENTUM_SCALE, lanes, has_copy, False, S, T)
        moment, cached = slow_moment(s, moment, cached)
        if S != CODE:
            # By the first moment's draw: the two are equal.
            store_moment(at.cached, i, cached, has_copy & inside, random, 0, S, T)
        if not rule.reads_gradient:
            # What is not computed here and not changed here stays as it is, also where it was rounded.
            changes = inside & (SlowStep(*s).restarts != 0)
    left = (moment,)
    for m in tl.static_range(1, rule.moments):
        left += (moments[m],)
    store_moments(at, own, lanes, left, random, False, rule, S, T)
    store_weights(at, i, p, changes, False, P, T)


@triton.jit
def averaged_elements(at, own, lanes, place, rule: constexpr, P: constexpr, S: constexpr, T: constexpr):
    """The same of a row whose policy averages. Its parameter has a master where it is kept in fewer bits."""
    i = lanes.i
    inside = lanes.inside
    y = load_weights(at, i, inside, True, P, T)
    if rule.reads_gradient:
        g = load(at.grad, i, inside).to(T)
        capture = tl.load(own + 1)
        z = tl.where(capture != 0, y, load(at.slow, i, (capture == 0) & inside))
        x = slow_average(tl.load(own + RECOVERY), y, z)
        moments = load_moments(at, lanes, rule, S, T)
        # Read here, as all that is decided: with these held over the blocks, AMD's registers spill.
        c = numbers(own, SLOW_COEFFICIENTS, SLOW_COEFFICIENTS + rule.coefficients)
        z, moments = rule.update(c, z, g, moments)
        store_moments(at, own, lanes, moments, drawn(place, i, S, T), True, rule, S, T)
    else:
        # Theta was put where z is for another optimizer's step, and x is kept.
        z = y
        x = load(at.companion, i, inside)
    store(at.slow, i, z, inside)
    y, x = slow_averaged(tl.load(own + RECOVERY + 1), tl.load(own + RECOVERY + 2), z, x)
    if not rule.reads_gradient:
        store(at.companion, i, x, inside)
    store_weights(at, i, y, inside, True, P, T)


@triton.jit
def walked(at, own, c, lanes, place, rule: constexpr, averages: constexpr, P: constexpr, S: constexpr, T: constexpr):
    if averages:
        averaged_elements(at, own, lanes, place, rule, P, S, T)
    else:
        elements(at, own, c, lanes, place, rule, P, S, T)


@triton.jit(do_not_specialize=["found_inf", "chunks_at", "gradients_at"])
def chunks(
    fixed,
    moving,
    steps,
    found_inf,
    chunks_at,
    gradients_at,
    rule: constexpr,
    averages: constexpr,
    P: constexpr,
    G: constexpr,
    S: constexpr,
):
    """Updates the elements of one chunk."""
    T: constexpr = steps.dtype.element_ty
    chunk = fixed + chunks_at + tl.program_id(0).to(tl.int64) * CHUNK
    offset = read(chunk, CHUNK_OFFSET, tl.int64)
    count = read(chunk, CHUNK_COUNT, tl.int32)
    i = read(chunk, CHUNK_ROW, tl.int32).to(tl.int64)
    row = fixed + i * ROW
    count_of_policy: constexpr = SLOW_COEFFICIENTS
    coefficients: constexpr = count_of_policy + rule.coefficients
    own = steps + i * (coefficients + KEY)
    gradient = gradient_of(moving, gradients_at, found_inf, i)
    if gradient != 0:
        due = tl.load(own)
        acts_on_moment = tl.load(own + 2)
        c = numbers(own, count_of_policy, coefficients)
        # Of the first element in the row, with the row's key for rounding.
        place = offset
        if S != T:
            place = offset.to(tl.uint32) + tl.load(own + coefficients).to(tl.uint32, bitcast=True)
        if rule.reads_gradient | (due != 0):
            # Each array is at least as aligned as this: an offset counts elements, of which each has a byte or more.
            address = offset | read(row, ROW_PARAM, tl.int64) | read(row, ROW_MASTER, tl.int64)
            address = address | read(row, ROW_SLOW, tl.int64) | read(row, ROW_CACHED_MOMENTUM, tl.int64)
            address = address | read(row, ROW_COMPANION, tl.int64)
            for m in tl.static_range(rule.moments):
                address = address | read(row, ROW_MOMENT + m * 8, tl.int64)
            if rule.reads_gradient:
                address = address | gradient
            most: constexpr = CODED if S == CODE else BLOCK
            whole = 0
            if address % 16 == 0:
                whole = count // most * most
            if whole > 0:
                at = arrays(row, gradient, offset, acts_on_moment, rule, P, G, S, T, True)
                for begin in range(0, whole, most):
                    walked(at, own, c, lanes_from(begin, most, S), place, rule, averages, P, S, T)
            if whole < count:
                at = arrays(row, gradient, offset, acts_on_moment, rule, P, G, S, T, False)
                # A mask takes AMD's scalar registers, two for each of a thread's elements.
                few: constexpr = TAIL if averages or S == CODE else BLOCK
                for begin in range(whole, count, few):
                    walked(at, own, c, lanes_from(begin, few, S, count), place, rule, averages, P, S, T)


# What parameters, gradients and moments may be.
DTYPES = {dtype: getattr(tl, str(dtype).removeprefix("torch.")) for dtype in (*PARAM_DTYPES, torch.uint8)}
