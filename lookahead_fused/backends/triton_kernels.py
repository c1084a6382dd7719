"""The walk over a table in Triton: a lane for each row, then a program for each chunk.

Rules and walk stand here as in `csrc/rules`, `csrc/table/prologue.h` and `csrc/cuda/walk.cuh`, under the same names and
in the same order of operations, so that the two can be read side by side. Where a table's fields stand, and what a
rule's hyperparameters are called, is asked of the compiled module.

The same bits as everywhere: launched with enable_fp_fusion=False, and in fp32 with the division and the root that round
correctly, since Triton's plain ones approximate.

A condition on which an array depends is a mask, the same for a whole block: the accesses stay as wide and need no jump,
so that all of an element's loads are under way at once.
"""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import triton
import triton.language as tl

from .. import build
from ..tensors import PARAM_DTYPES

constexpr = tl.constexpr

_native = build.module("_cpu")
# ROW_STEP and the like: where a field stands in a struct, in bytes.
globals().update({name: constexpr(value) for name, value in _native.layout().items()})
# All that compiled code comes from: this file, and what it asks of the compiled module.
SOURCE = f"{Path(__file__).read_bytes()} {_native.layout()} {_native.rules()}"

# Rows of a program of `rows`. Of a program of `chunks` the elements that it takes at a time, and its threads: eight
# elements each, 16 bytes of the smallest dtype.
ROWS = constexpr(32)
BLOCK = constexpr(1024)
THREADS = BLOCK.value // 8

# ---- csrc/rules/numeric.h


@triton.jit
def divide(a, b):
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def square_root(x):
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def maximum(a, b):
    return tl.where(a <= b, b, a)


@triton.jit
def largest(n):
    return tl.max(n, 0)


@triton.jit
def power(beta, n):
    result = tl.full([ROWS], 1.0, tl.float64)
    left = largest(n)
    while left > 0:
        result = tl.where((n & 1) != 0, result * beta, result)
        beta = beta * beta
        n = n >> 1
        left = left >> 1
    return result


Lerp = namedtuple("Lerp", "factor from_a")


@triton.jit
def lerp_with(weight):
    return Lerp(tl.where(weight < 0.5, weight, -(1.0 - weight)), weight < 0.5)


@triton.jit
def lerp(factor, from_a, a, b):
    return tl.where(from_a != 0, a, b) + factor * (b - a)


# ---- csrc/rules/rule.h


@triton.jit
def gradient_factor(maximize, grad_scale):
    unscale = 1.0 / grad_scale
    return tl.where(maximize != 0, -unscale, unscale)


# What a walk is told of a rule. The last four are numbers: of its hyperparameters, of its coefficients, of its moments,
# and of those moments, from the first on, that every row has.
class Rule(namedtuple("Rule", "prepare update reads_gradient hypers coefficients moments always")):
    # By this Triton finds compiled code on disk. Of functions in a tuple it would take the names alone, and serve a
    # rule as it was before it was edited.
    cache_key = property(lambda self: f"{SOURCE} {tuple(self)}")


# ---- csrc/rules/adam.h

AdamHyper = namedtuple("AdamHyper", _native.rules()["adam"][0])
AdamCoefficients = namedtuple(
    "AdamCoefficients",
    "gradient_factor decay weight_decay exp_avg_factor exp_avg_from_a beta2 one_minus_beta2 step_size "
    "inverse_sqrt_correction2 eps l2 decoupled amsgrad",
)


@triton.jit
def adam_prepare(hyper, step, lr, grad_scale, first):
    hyper = AdamHyper(*hyper)
    correction1 = 1.0 - power(hyper.beta1, step)
    correction2 = 1.0 - power(hyper.beta2, step)
    decays = hyper.weight_decay != 0
    exp_avg = lerp_with(1.0 - hyper.beta1)
    return AdamCoefficients(
        gradient_factor=gradient_factor(hyper.maximize, grad_scale),
        decay=1.0 - lr * hyper.weight_decay,
        weight_decay=hyper.weight_decay,
        exp_avg_factor=exp_avg.factor,
        exp_avg_from_a=exp_avg.from_a,
        beta2=hyper.beta2,
        one_minus_beta2=1.0 - hyper.beta2,
        step_size=lr / correction1,
        inverse_sqrt_correction2=1.0 / square_root(correction2),
        eps=hyper.eps,
        l2=decays & (hyper.decoupled_weight_decay == 0),
        decoupled=decays & (hyper.decoupled_weight_decay != 0),
        amsgrad=hyper.amsgrad != 0,
    )


@triton.jit
def adam_update(c, p, g, moments):
    c = AdamCoefficients(*c)
    g = c.gradient_factor * g
    if c.decoupled != 0:
        p = p * c.decay
    if c.l2 != 0:
        g = g + c.weight_decay * p
    m = lerp(c.exp_avg_factor, c.exp_avg_from_a, moments[0], g)
    v = c.beta2 * moments[1] + c.one_minus_beta2 * (g * g)
    max_v = moments[2]
    second = v
    if c.amsgrad != 0:
        max_v = maximum(v, max_v)
        second = max_v
    p = p - divide(c.step_size * m, square_root(second) * c.inverse_sqrt_correction2 + c.eps)
    return p, (m, v, max_v)


# ---- csrc/rules/sgd.h

SgdHyper = namedtuple("SgdHyper", _native.rules()["sgd"][0])
SgdCoefficients = namedtuple(
    "SgdCoefficients", "gradient_factor weight_decay momentum one_minus_dampening lr decays accelerated nesterov first"
)


@triton.jit
def sgd_prepare(hyper, step, lr, grad_scale, first):
    hyper = SgdHyper(*hyper)
    return SgdCoefficients(
        gradient_factor=gradient_factor(hyper.maximize, grad_scale),
        weight_decay=hyper.weight_decay,
        momentum=hyper.momentum,
        one_minus_dampening=1.0 - hyper.dampening,
        lr=lr,
        decays=hyper.weight_decay != 0,
        accelerated=hyper.momentum != 0,
        nesterov=hyper.nesterov != 0,
        first=first,
    )


@triton.jit
def sgd_update(c, p, g, moments):
    c = SgdCoefficients(*c)
    buffer = moments[0]
    g = c.gradient_factor * g
    if c.decays != 0:
        g = g + c.weight_decay * p
    if c.accelerated != 0:
        buffer = tl.where(c.first != 0, g, c.momentum * buffer + c.one_minus_dampening * g)
        g = tl.where(c.nesterov != 0, g + c.momentum * buffer, buffer)
    p = p - c.lr * g
    return p, (buffer,)


# ---- csrc/rules/sync.h

Sync = namedtuple("Sync", "alpha_factor alpha_from_a due capture pullback")
SYNC = constexpr(len(Sync._fields))


@triton.jit
def sync_only_prepare(hyper, step, lr, grad_scale, first):
    return ()


@triton.jit
def sync_only_update(c, p, g, moments):
    return p, moments


# ---- csrc/table/prologue.h


@triton.jit
def read(struct, offset: constexpr, dtype: constexpr, mask=None, other: constexpr = 0):
    """The field that stands so many bytes into a struct."""
    pointer = (struct + offset).to(tl.pointer_type(dtype), bitcast=True)
    return tl.load(pointer) if mask is None else tl.load(pointer, mask=mask, other=other)


@triton.jit
def gradient_of(moving, gradients_at, found_inf, i, mask=None):
    """The address of row i's gradient; null where it is not updated. Whatever found_inf is but zero holds, NaN too."""
    return tl.where(tl.load(found_inf) == 0, read(moving + gradients_at + i * 8, 0, tl.int64, mask), 0)


@triton.jit(do_not_specialize=["grad_scale", "found_inf", "row_count", "gradients_at"])
def rows(fixed, moving, steps, grad_scale, found_inf, row_count, gradients_at, rule: constexpr):
    """Advances the step counter of every row that takes part, and writes the coefficients of its update."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    active = gradient_of(moving, gradients_at, found_inf, i, i < row_count) != 0
    row = fixed + i * ROW
    group = moving + read(row, ROW_GROUP, tl.int32, active).to(tl.int64) * GROUP
    counter = read(row, ROW_STEP, tl.int64, active).to(tl.pointer_type(tl.float64))
    applied = tl.load(counter, mask=active, other=0.0)
    tl.store(counter, applied + 1.0, mask=active)

    hyper = ()
    for j in tl.static_range(rule.hypers):
        hyper += (read(group, GROUP_HYPER + j * 8, tl.float64, active),)
    step = applied.to(tl.int64) + 1
    lr_tensor = read(group, GROUP_LR, tl.int64, active)
    lr_is_double = read(group, GROUP_LR_IS_DOUBLE, tl.int32, active) != 0
    single = tl.load(lr_tensor.to(tl.pointer_type(tl.float32)), mask=active & (lr_tensor != 0) & ~lr_is_double, other=0)
    double = tl.load(lr_tensor.to(tl.pointer_type(tl.float64)), mask=active & (lr_tensor != 0) & lr_is_double, other=0)
    lr = tl.where(lr_tensor != 0, tl.where(lr_is_double, double, single.to(tl.float64)), hyper[0])
    first = (step == 1) & (read(row, ROW_MOMENTS_LOADED, tl.int32, active) == 0)

    alpha = lerp_with(read(group, GROUP_ALPHA, tl.float64, active))
    values = Sync(
        alpha_factor=alpha.factor,
        alpha_from_a=alpha.from_a,
        due=step % read(group, GROUP_K, tl.int64, active, 1) == 0,
        # Where the inner step was done elsewhere, theta has moved already, and phi was taken before that.
        capture=(step == 1) & rule.reads_gradient,
        pullback=read(group, GROUP_PULLBACK, tl.int32, active),
    ) + rule.prepare(hyper, step, lr, tl.load(grad_scale).to(tl.float64), first)
    for j in tl.static_range(SYNC + rule.coefficients):
        tl.store(steps + i * (SYNC + rule.coefficients) + j, values[j].to(steps.dtype.element_ty), mask=active)


# ---- csrc/cuda/walk.cuh

# A chunk's own part of its row's arrays, near null where it has none; and whether it has.
Arrays = namedtuple("Arrays", "param grad master slow slow_moment moments has_master has_moment")


@triton.jit
def part(address, dtype: constexpr, offset, aligned: constexpr):
    pointer = address.to(tl.pointer_type(dtype)) + offset
    return tl.multiple_of(pointer, 16) if aligned else pointer


@triton.jit
def arrays(row, gradient, offset, rule: constexpr, P: constexpr, G: constexpr, T: constexpr, aligned: constexpr):
    moments = ()
    has_moment = ()
    for m in tl.static_range(rule.moments):
        address = read(row, ROW_MOMENT + m * 8, tl.int64)
        moments += (part(address, T, offset, aligned),)
        has_moment += ((address != 0) | (m < rule.always),)
    master = read(row, ROW_MASTER, tl.int64)
    return Arrays(
        param=part(read(row, ROW_PARAM, tl.int64), P, offset, aligned),
        grad=part(gradient, G, offset, aligned),
        master=part(master, T, offset, aligned),
        slow=part(read(row, ROW_SLOW, tl.int64), T, offset, aligned),
        slow_moment=part(read(row, ROW_SLOW_MOMENT, tl.int64), T, offset, aligned),
        moments=moments,
        has_master=master != 0,
        has_moment=has_moment,
    )


@triton.jit
def load(array, i, mask):
    return tl.load(array + i, mask=mask, other=0.0)


@triton.jit
def store(array, i, value, mask):
    tl.store(array + i, value.to(array.dtype.element_ty), mask=mask)


@triton.jit
def numbers(at, begin: constexpr, end: constexpr):
    values = ()
    for j in tl.static_range(begin, end):
        values += (tl.load(at + j),)
    return values


@triton.jit
def elements(at, own, sync, c, i, inside, rule: constexpr, P: constexpr, T: constexpr):
    """One block of a chunk."""
    if P == T:
        p = load(at.param, i, inside)
    else:
        stored = load(at.param, i, ~at.has_master & inside).to(T)
        p = tl.where(at.has_master, load(at.master, i, at.has_master & inside), stored)
    g = p
    if rule.reads_gradient:
        g = load(at.grad, i, inside).to(T)
        store(at.slow, i, p, (sync.capture != 0) & inside)
    moments = ()
    for m in tl.static_range(rule.moments):
        moments += (load(at.moments[m], i, at.has_moment[m] & inside),)
    p, moments = rule.update(c, p, g, moments)
    moment = moments[0]
    if sync.due != 0:
        # Read anew: held from the start they would take registers from every step.
        sync = Sync(*numbers(own, 0, SYNC))
        p = lerp(sync.alpha_factor, sync.alpha_from_a, load(at.slow, i, inside), p)
        store(at.slow, i, p, inside)
        mask = at.has_moment[0] & (sync.pullback == PULLBACK_INTERPOLATE) & inside
        slow_moment = lerp(sync.alpha_factor, sync.alpha_from_a, load(at.slow_moment, i, mask), moment)
        store(at.slow_moment, i, slow_moment, mask)
        moment = tl.where(sync.pullback == PULLBACK_INTERPOLATE, slow_moment, moment)
        moment = tl.where(sync.pullback == PULLBACK_RESET, 0.0, moment)
    store(at.moments[0], i, moment, at.has_moment[0] & inside)
    for m in tl.static_range(1, rule.moments):
        store(at.moments[m], i, moments[m], at.has_moment[m] & inside)
    if P != T:
        store(at.master, i, p, at.has_master & inside)
    store(at.param, i, p, inside)


@triton.jit(do_not_specialize=["found_inf", "chunks_at", "gradients_at"])
def chunks(fixed, moving, steps, found_inf, chunks_at, gradients_at, rule: constexpr, P: constexpr, G: constexpr):
    """Updates the elements of one chunk."""
    T: constexpr = steps.dtype.element_ty
    chunk = fixed + chunks_at + tl.program_id(0).to(tl.int64) * CHUNK
    offset = read(chunk, CHUNK_OFFSET, tl.int64)
    count = read(chunk, CHUNK_COUNT, tl.int32)
    i = read(chunk, CHUNK_ROW, tl.int32).to(tl.int64)
    row = fixed + i * ROW
    own = steps + i * (SYNC + rule.coefficients)
    gradient = gradient_of(moving, gradients_at, found_inf, i)
    if gradient != 0:
        sync = Sync(*numbers(own, 0, SYNC))
        c = numbers(own, SYNC, SYNC + rule.coefficients)
        if rule.reads_gradient | (sync.due != 0):
            # Each array is at least as aligned as this: an offset counts elements, of which each has two bytes or more.
            address = offset | read(row, ROW_PARAM, tl.int64) | read(row, ROW_MASTER, tl.int64)
            address = address | read(row, ROW_SLOW, tl.int64) | read(row, ROW_SLOW_MOMENT, tl.int64)
            for m in tl.static_range(rule.moments):
                address = address | read(row, ROW_MOMENT + m * 8, tl.int64)
            if rule.reads_gradient:
                address = address | gradient
            whole = 0
            if address % 16 == 0:
                whole = count // BLOCK * BLOCK
            lane = tl.arange(0, BLOCK)
            if whole > 0:
                at = arrays(row, gradient, offset, rule, P, G, T, True)
                for begin in range(0, whole, BLOCK):
                    elements(at, own, sync, c, begin + lane, tl.full([BLOCK], True, tl.int1), rule, P, T)
            if whole < count:
                at = arrays(row, gradient, offset, rule, P, G, T, False)
                for begin in range(whole, count, BLOCK):
                    elements(at, own, sync, c, begin + lane, begin + lane < count, rule, P, T)


def _rule(prepare: Any, update: Any, name: str, coefficients: tuple[str, ...], always: int) -> Rule:
    hypers, moments = _native.rules()[name]
    numbers = bool(coefficients), len(hypers), len(coefficients), len(moments), always
    # Constants each: out of a tuple that is a constant, Triton 3.7 takes plain numbers, and loops over none.
    return Rule(prepare, update, *map(constexpr, numbers))


RULES = {
    "adam": _rule(adam_prepare, adam_update, "adam", AdamCoefficients._fields, always=2),
    "sgd": _rule(sgd_prepare, sgd_update, "sgd", SgdCoefficients._fields, always=0),
    "sync": _rule(sync_only_prepare, sync_only_update, "sync", (), always=0),
}

DTYPES = {dtype: getattr(tl, str(dtype).removeprefix("torch.")) for dtype in PARAM_DTYPES}
