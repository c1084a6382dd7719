"""What is done once for each row in Triton, the first of a step's two launches: a lane for each row.

It stands here as in `csrc/table/prologue.h`, under the same names and in the same order of operations, so that the two
can be read side by side. Where a table's fields stand is asked of the compiled module.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_policies import SLOW_COEFFICIENTS, PolicyInputs, PolicyNumbers
from .triton_rules import LAYOUT, ROWS
from .triton_state import rounding_key

constexpr = tl.constexpr
globals().update(LAYOUT)
POLICY_NUMBERS = constexpr(len(PolicyNumbers._fields))

# Numbers after a row's coefficients: the key by which its moments are rounded.
KEY = constexpr(1)


@triton.jit
def read(struct, offset: constexpr, dtype: constexpr, mask=None, other: constexpr = 0):
    """The field that stands so many bytes into a struct."""
    pointer = (struct + offset).to(tl.pointer_type(dtype), bitcast=True)
    return tl.load(pointer) if mask is None else tl.load(pointer, mask=mask, other=other)


@triton.jit
def gradient_of(moving, gradients_at, found_inf, i, mask=None):
    """The address of row i's gradient; null where it is not updated. Whatever found_inf is but zero holds, NaN too."""
    return tl.where(tl.load(found_inf) == 0, read(moving + gradients_at + i * 8, 0, tl.int64, mask), 0)


@triton.jit
def lives_of(group, mask):
    """Of each hyperparameter that may be a tensor: its slot, -1 where it is none, and the number in it."""
    lives = ()
    for j in tl.static_range(LIVES):
        at = read(group, GROUP_LIVE + j * LIVE, tl.int64, mask)
        is_double = read(group, GROUP_LIVE + j * LIVE + LIVE_IS_DOUBLE, tl.int32, mask) != 0
        single = tl.load(at.to(tl.pointer_type(tl.float32)), mask=mask & (at != 0) & ~is_double, other=0.0)
        double = tl.load(at.to(tl.pointer_type(tl.float64)), mask=mask & (at != 0) & is_double, other=0.0)
        slot = tl.where(at != 0, read(group, GROUP_LIVE + j * LIVE + LIVE_SLOT, tl.int32, mask), -1)
        lives += ((slot, tl.where(is_double, double, single.to(tl.float64))),)
    return lives


@triton.jit
def hypers_of(group, lives, offset: constexpr, first_slot: constexpr, count: constexpr, mask, other: constexpr):
    values = ()
    for j in tl.static_range(count):
        value = read(group, offset + j * 8, tl.float64, mask, other)
        for k in tl.static_range(LIVES):
            value = tl.where(lives[k][0] == first_slot + j, lives[k][1], value)
        values += (value,)
    return values


@triton.jit
def number_at(row, column: constexpr, active):
    """The address of a scalar column's number, whether the row has one, and the number, or 0."""
    address = read(row, column, tl.int64, active)
    has = active & (address != 0)
    pointer = address.to(tl.pointer_type(tl.float64))
    return pointer, has, tl.load(pointer, mask=has, other=0.0)


@triton.jit(do_not_specialize=["grad_scale", "clip", "found_inf", "row_count", "gradients_at", "pass_"])
def rows(
    fixed,
    moving,
    steps,
    grad_scale,
    clip,
    found_inf,
    row_count,
    gradients_at,
    pass_,
    rule: constexpr,
    policy: constexpr,
):
    """Advances the step counter of every row that takes part, and writes the coefficients of its update.

    `pass_` is 0 in a step, 1 in a sync, in which no counter advances, and 2 in a step whose event comes later.
    """
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    active = gradient_of(moving, gradients_at, found_inf, i, i < row_count) != 0
    row = fixed + i * ROW
    group = moving + read(row, ROW_GROUP, tl.int32, active).to(tl.int64) * GROUP
    counter, has_counter, applied = number_at(row, ROW_STEP, active)
    own = ()
    for j in tl.static_range(POLICY_NUMBERS):
        own += (number_at(row, ROW_AVERAGE_START + j * 8, active)[2],)

    step = applied.to(tl.int64) + 1
    first = (step == 1) & (read(row, ROW_MOMENTS_LOADED, tl.int32, active) == 0)

    # Where the inner step was done elsewhere, theta has moved already, and phi was taken before that.
    captures = (step == 1) & rule.reads_gradient
    now = (pass_ == 1) & (applied > 0)
    # A lane that has no row divides by numbers of its own: a period must not be 0, nor a beta 1.
    lives = lives_of(group, active)
    of_policy = hypers_of(group, lives, GROUP_POLICY, POLICY_SLOT, policy.hypers, active, 1)
    of_rule = hypers_of(group, lives, GROUP_RULE, 0, rule.hypers, active, 0)
    lr = of_rule[0]
    at = PolicyInputs(step=step, captures=captures, by_count=pass_ == 0, now=now, lr=lr)
    slow, after = policy.prepare(of_policy, at, own)
    advances = pass_ != 1
    tl.store(counter, applied + 1.0, mask=has_counter & advances)
    for j in tl.static_range(1, POLICY_NUMBERS):
        pointer, has, _ = number_at(row, ROW_AVERAGE_START + j * 8, active)
        tl.store(pointer, after[j], mask=has & advances)
    factor = 1.0 / tl.load(grad_scale).to(tl.float64) * tl.load(clip)
    values = slow + rule.prepare(of_rule, step, lr, factor, first)
    count: constexpr = SLOW_COEFFICIENTS + rule.coefficients
    to = steps + i * (count + KEY)
    for j in tl.static_range(count):
        tl.store(to + j, values[j].to(steps.dtype.element_ty), mask=active)
    if steps.dtype.element_ty == tl.float32:
        # Where moments are rounded: its bits, whatever number they are.
        key = rounding_key(applied.to(tl.int64) + advances, pass_ == 1)
        tl.store(to + count, key.to(tl.float32, bitcast=True), mask=active)
