"""The policies in Triton, as in `csrc/slow`: under the same names and in the same order of operations, so that the two
can be read side by side. What the hyperparameters of a policy are called is asked of the compiled module.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import triton
import triton.language as tl

from .triton_rules import LAYOUT, ROWS, compiled_key, lerp, lerp_with, multiply, native, power

constexpr = tl.constexpr
globals().update(LAYOUT)

# ---- csrc/slow/policy.h


# What the kernels are told of a policy: at last how many hyperparameters it has, and whether it averages.
class Policy(namedtuple("Policy", "prepare hypers averages")):
    cache_key = compiled_key


PolicyInputs = namedtuple("PolicyInputs", "step captures by_count now lr")
PolicyNumbers = namedtuple("PolicyNumbers", "average_start y_interp weight_sum lr_max")

# What every policy decides for a row. Of the last three one kind of policies makes use, whose walk is its own.
SlowStep = namedtuple(
    "SlowStep",
    "due capture acts_on_moment restarts weight_factor weight_from_a pullback outer outer_alpha outer_momentum "
    "recovery eval_interp train_interp",
)
SLOW_COEFFICIENTS = constexpr(len(SlowStep._fields))
RECOVERY = constexpr(SlowStep._fields.index("recovery"))


@triton.jit
def slow_weights(c, p, slow, buffer):
    c = SlowStep(*c)
    if c.outer != 0:
        difference = slow - p
        buffer = multiply(c.outer_momentum, buffer) + difference
        ahead = difference + multiply(c.outer_momentum, buffer)
        slow = slow - multiply(c.outer_alpha, tl.where(c.outer == NESTEROV, ahead, buffer))
        p = slow
    else:
        slow = lerp(c.weight_factor, c.weight_from_a, slow, p)
        p = tl.where(c.restarts != 0, slow, p)
    return p, slow, buffer


@triton.jit
def slow_average(recovery, y, z):
    return y + multiply(recovery, y - z)


@triton.jit
def slow_averaged(eval_interp, train_interp, z, x):
    x = z + multiply(eval_interp, x - z)
    return z + multiply(train_interp, x - z), x


@triton.jit
def slow_moment(c, m, cached):
    c = SlowStep(*c)
    pulled = lerp(c.weight_factor, c.weight_from_a, cached, m)
    m = tl.where(c.pullback == PULLBACK_INTERPOLATE, pulled, m)
    m = tl.where(c.pullback == PULLBACK_RESET, 0.0, m)
    return m, tl.where(c.pullback == PULLBACK_INTERPOLATE, pulled, cached)


# ---- csrc/slow/lookahead.h

LookaheadHyper = namedtuple("LookaheadHyper", native.policies()["lookahead"])


@triton.jit
def lookahead_prepare(hyper, at, own):
    hyper = LookaheadHyper(*hyper)
    at = PolicyInputs(*at)
    none = tl.full([ROWS], 0.0, tl.float64)
    weight = lerp_with(tl.minimum(hyper.alpha, 1.0))
    slow = SlowStep(
        due=(at.by_count & (at.step % hyper.k.to(tl.int64) == 0)) | at.now,
        capture=at.captures,
        acts_on_moment=hyper.pullback_momentum != PULLBACK_KEEP,
        restarts=tl.full([ROWS], 1, tl.int32),
        weight_factor=weight.factor,
        weight_from_a=weight.from_a,
        pullback=hyper.pullback_momentum,
        outer=tl.where(hyper.outer_momentum != 0, tl.where(hyper.outer_nesterov != 0, NESTEROV, CLASSICAL), 0),
        outer_alpha=hyper.alpha,
        outer_momentum=hyper.outer_momentum,
        recovery=none,
        eval_interp=none,
        train_interp=none,
    )
    return slow, own


# ---- csrc/slow/ema.h

EmaHyper = namedtuple("EmaHyper", native.policies()["ema"])


@triton.jit
def ema_prepare(hyper, at, own):
    hyper = EmaHyper(*hyper)
    at = PolicyInputs(*at)
    every = hyper.every.to(tl.int64)
    made_after = PolicyNumbers(*own).average_start.to(tl.int64)
    since = at.step - tl.maximum(made_after, hyper.start.to(tl.int64))
    n = tl.maximum(since, 0) // every
    count = n.to(tl.float64)
    weight = tl.where(hyper.decay == EMA_UNIFORM, 1.0 / (count + 1.0), 1.0 - hyper.decay)
    warm = (1.0 + count) / (10.0 + count)
    weight = tl.where((hyper.warmup != 0) & (warm < hyper.decay), 1.0 - warm, weight)
    weight = lerp_with(tl.where(n == 0, 1.0, weight))
    none = tl.full([ROWS], 0.0, tl.float64)
    slow = SlowStep(
        due=at.by_count & (since >= 0) & (since % every == 0),
        capture=at.captures,
        acts_on_moment=none,
        restarts=none,
        weight_factor=weight.factor,
        weight_from_a=weight.from_a,
        pullback=none,
        outer=none,
        outer_alpha=none,
        outer_momentum=none,
        recovery=none,
        eval_interp=none,
        train_interp=none,
    )
    return slow, own


# ---- csrc/slow/averaging.h

GpaHyper = namedtuple("GpaHyper", native.policies()["gpa"])
ScheduleFreeHyper = namedtuple("ScheduleFreeHyper", native.policies()["schedule_free"])


@triton.jit
def averaging(train_interp, eval_interp, at, own):
    at = PolicyInputs(*at)
    own = PolicyNumbers(*own)
    none = tl.full([ROWS], 0.0, tl.float64)
    # A lane whose y_interp is 0 divides by a number of its own.
    place = tl.where(own.y_interp > 0, own.y_interp, 1.0)
    slow = SlowStep(
        due=at.by_count,
        capture=at.captures,
        acts_on_moment=none,
        restarts=tl.full([ROWS], 1, tl.int32),
        weight_factor=none,
        weight_from_a=none,
        pullback=none,
        outer=none,
        outer_alpha=none,
        outer_momentum=none,
        recovery=(1.0 - place) / place,
        eval_interp=eval_interp,
        train_interp=train_interp,
    )
    after = PolicyNumbers(
        average_start=own.average_start, y_interp=train_interp, weight_sum=own.weight_sum, lr_max=own.lr_max
    )
    return slow, after


@triton.jit
def gpa_prepare(hyper, at, own):
    hyper = GpaHyper(*hyper)
    return averaging(hyper.train_interp, hyper.eval_interp, at, own)


@triton.jit
def schedule_free_prepare(hyper, at, own):
    hyper = ScheduleFreeHyper(*hyper)
    step = PolicyInputs(*at).step.to(tl.float64)
    lr = PolicyInputs(*at).lr
    own = PolicyNumbers(*own)
    lr_max = tl.where(own.lr_max < lr, lr, own.lr_max)
    weight = power(step, hyper.r.to(tl.int64)) * power(lr_max, hyper.weight_lr_power.to(tl.int64))
    weight_sum = own.weight_sum + weight
    # A lane whose samples weigh nothing divides by a number of its own.
    share = tl.where(weight_sum > 0, weight / tl.where(weight_sum > 0, weight_sum, 1.0), 0.0)
    weighed = PolicyNumbers(
        average_start=own.average_start, y_interp=own.y_interp, weight_sum=weight_sum, lr_max=lr_max
    )
    return averaging(hyper.interp, 1.0 - share, at, weighed)


# ---- csrc/slow/alone.h


@triton.jit
def alone_prepare(hyper, at, own):
    none = tl.full([ROWS], 0.0, tl.float64)
    slow = SlowStep(
        due=none,
        capture=none,
        acts_on_moment=none,
        restarts=none,
        weight_factor=none,
        weight_from_a=none,
        pullback=none,
        outer=none,
        outer_alpha=none,
        outer_momentum=none,
        recovery=none,
        eval_interp=none,
        train_interp=none,
    )
    return slow, own


def _policy(name: str, prepare: Any, averages: bool = False) -> Policy:
    return Policy(prepare, constexpr(len(native.policies()[name])), constexpr(averages))


POLICIES = {
    "lookahead": _policy("lookahead", lookahead_prepare),
    "ema": _policy("ema", ema_prepare),
    "gpa": _policy("gpa", gpa_prepare, averages=True),
    "schedule_free": _policy("schedule_free", schedule_free_prepare, averages=True),
    "alone": _policy("alone", alone_prepare),
}
