"""The rules in Triton, as in `csrc/rules`: under the same names and in the same order of operations, so that the two
can be read side by side. What the hyperparameters of a rule are called is asked of the compiled module.

The same bits as everywhere: launched with enable_fp_fusion=False, and in fp32 with the division and the root that round
correctly, since Triton's plain ones approximate.

For NVIDIA that does not do before Triton 3.7. Of products that 3.6 packs in pairs its assembler fuses each with the sum
that follows, whatever it is told; and the division and the root of 3.4 and 3.5 lose subnormal numbers. So there these
three operations are written in assembly, and an element's products, in a rule's update and in what a policy does, are
`multiply(a, b)` and not `a * b`. A row's coefficients are computed in fp64, which nothing packs. From 3.7 on assembly
would cost what it saves nobody: products in pairs, and registers.
"""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import triton
import triton.language as tl

from .. import _build as build

constexpr = tl.constexpr

native = build.module("_cpu")
# ROW_STEP and the like: where a field stands in a struct, in bytes.
LAYOUT = {name: constexpr(value) for name, value in native.layout().items()}
globals().update(LAYOUT)
# All that compiled code comes from: this file, those beside it, and what they ask of the compiled module.
_FILES = [
    Path(__file__).with_name(f"triton_{name}.py").read_bytes()
    for name in ("rules", "policies", "state", "codes", "prologue", "kernels", "norm")
]
SOURCE = f"{_FILES} {native.layout()} {native.rules()} {native.policies()}"

BEFORE_3_7 = tuple(int(number) for number in triton.__version__.split(".")[:2]) < (3, 7)

# Rows of a program that prepares coefficients.
ROWS = constexpr(32)

# ---- csrc/rules/numeric.h


@tl.core.builtin
def is_in_assembly(_semantic=None):
    """Asked of what is being compiled, whatever GPU this machine has."""
    return constexpr(BEFORE_3_7 and getattr(_semantic.builder.options, "backend_name", "") == "cuda")


@tl.core.builtin
def ptx(operation, *operands, _semantic=None):
    """An operation of NVIDIA's, element by element and rounded to nearest, as an instruction of its own."""
    dtype = operands[0].dtype
    kind = {"fp32": "f", "fp64": "d"}[dtype.name]
    constraints = ",".join([f"={kind}", *kind * len(operands)])
    places = ", ".join(f"${i}" for i in range(len(operands) + 1))
    assembly = f"{operation.value}.rn.f{dtype.primitive_bitwidth} {places};"
    return tl.inline_asm_elementwise(assembly, constraints, operands, dtype, True, 1, _semantic=_semantic)


@triton.jit
def multiply(a, b):
    return ptx("mul", a, b) if is_in_assembly() else a * b


@triton.jit
def divide(a, b):
    if is_in_assembly():
        return ptx("div", a, b)
    else:
        return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def square_root(x):
    if is_in_assembly():
        return ptx("sqrt", x)
    else:
        return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def maximum(a, b):
    return tl.where(a <= b, b, a)


@triton.jit
def sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x + 0.0))


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
    return tl.where(from_a != 0, a, b) + multiply(factor, b - a)


# ---- csrc/rules/rule.h


@triton.jit
def gradient_factor(maximize, factor):
    return tl.where(maximize != 0, -factor, factor)


# By this Triton finds compiled code on disk. Of functions in a tuple it would take the names alone, and serve a rule or
# a policy as it was before it was edited.
compiled_key = property(lambda self: f"{SOURCE} {tuple(self)}")


# What a walk is told of a rule. The last four are numbers: how many hyperparameters, coefficients and moments it has,
# and a bit for each moment that is a mean of squares.
class Rule(namedtuple("Rule", "prepare update reads_gradient hypers coefficients moments squares")):
    cache_key = compiled_key


# ---- csrc/rules/adam.h

AdamHyper = namedtuple("AdamHyper", native.rules()["adam"][0])
AdamCoefficients = namedtuple(
    "AdamCoefficients",
    "gradient_factor decay weight_decay exp_avg_factor exp_avg_from_a beta2 one_minus_beta2 step_size "
    "inverse_sqrt_correction2 eps l2 decoupled amsgrad",
)


@triton.jit
def adam_prepare(hyper, step, lr, factor, first):
    hyper = AdamHyper(*hyper)
    correction1 = 1.0 - power(hyper.beta1, step)
    correction2 = 1.0 - power(hyper.beta2, step)
    decays = hyper.weight_decay != 0
    exp_avg = lerp_with(1.0 - hyper.beta1)
    return AdamCoefficients(
        gradient_factor=gradient_factor(hyper.maximize, factor),
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
    g = multiply(c.gradient_factor, g)
    if c.decoupled != 0:
        p = multiply(p, c.decay)
    if c.l2 != 0:
        g = g + multiply(c.weight_decay, p)
    m = lerp(c.exp_avg_factor, c.exp_avg_from_a, moments[0], g)
    v = multiply(c.beta2, moments[1]) + multiply(c.one_minus_beta2, multiply(g, g))
    max_v = moments[2]
    second = v
    if c.amsgrad != 0:
        max_v = maximum(v, max_v)
        second = max_v
    p = p - divide(multiply(c.step_size, m), multiply(square_root(second), c.inverse_sqrt_correction2) + c.eps)
    return p, (m, v, max_v)


# ---- csrc/rules/sgd.h

SgdHyper = namedtuple("SgdHyper", native.rules()["sgd"][0])
SgdCoefficients = namedtuple(
    "SgdCoefficients", "gradient_factor weight_decay momentum one_minus_dampening lr decays accelerated nesterov first"
)


@triton.jit
def sgd_prepare(hyper, step, lr, factor, first):
    hyper = SgdHyper(*hyper)
    return SgdCoefficients(
        gradient_factor=gradient_factor(hyper.maximize, factor),
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
    g = multiply(c.gradient_factor, g)
    if c.decays != 0:
        g = g + multiply(c.weight_decay, p)
    if c.accelerated != 0:
        buffer = tl.where(c.first != 0, g, multiply(c.momentum, buffer) + multiply(c.one_minus_dampening, g))
        g = tl.where(c.nesterov != 0, g + multiply(c.momentum, buffer), buffer)
    p = p - multiply(c.lr, g)
    return p, (buffer,)


# ---- csrc/rules/rmsprop.h

RMSpropHyper = namedtuple("RMSpropHyper", native.rules()["rmsprop"][0])
RMSpropCoefficients = namedtuple(
    "RMSpropCoefficients",
    "gradient_factor weight_decay alpha one_minus_alpha grad_avg_factor grad_avg_from_a eps momentum lr "
    "decays centered accelerated",
)


@triton.jit
def rmsprop_prepare(hyper, step, lr, factor, first):
    hyper = RMSpropHyper(*hyper)
    grad_avg = lerp_with(1.0 - hyper.alpha)
    return RMSpropCoefficients(
        gradient_factor=gradient_factor(hyper.maximize, factor),
        weight_decay=hyper.weight_decay,
        alpha=hyper.alpha,
        one_minus_alpha=1.0 - hyper.alpha,
        grad_avg_factor=grad_avg.factor,
        grad_avg_from_a=grad_avg.from_a,
        eps=hyper.eps,
        momentum=hyper.momentum,
        lr=lr,
        decays=hyper.weight_decay != 0,
        centered=hyper.centered != 0,
        accelerated=hyper.momentum > 0,
    )


@triton.jit
def rmsprop_update(c, p, g, moments):
    c = RMSpropCoefficients(*c)
    buffer = moments[0]
    mean = moments[2]
    g = multiply(c.gradient_factor, g)
    if c.decays != 0:
        g = g + multiply(c.weight_decay, p)
    square_avg = multiply(c.alpha, moments[1]) + multiply(c.one_minus_alpha, multiply(g, g))
    second = square_avg
    if c.centered != 0:
        mean = lerp(c.grad_avg_factor, c.grad_avg_from_a, mean, g)
        second = second - multiply(mean, mean)
    if c.accelerated == 0:
        g = multiply(c.lr, g)
    step = divide(g, square_root(second) + c.eps)
    if c.accelerated != 0:
        buffer = multiply(c.momentum, buffer) + step
        step = multiply(c.lr, buffer)
    p = p - step
    return p, (buffer, square_avg, mean)


# ---- csrc/rules/radam.h

RAdamHyper = namedtuple("RAdamHyper", native.rules()["radam"][0])
RAdamCoefficients = namedtuple(
    "RAdamCoefficients",
    "gradient_factor decay weight_decay exp_avg_factor exp_avg_from_a beta2 one_minus_beta2 step_size eps "
    "l2 decoupled rectified",
)


@triton.jit
def radam_prepare(hyper, step, lr, factor, first):
    hyper = RAdamHyper(*hyper)
    power2 = power(hyper.beta2, step)
    correction2 = 1.0 - power2
    rho_inf = 2.0 / (1.0 - hyper.beta2) - 1.0
    rho = rho_inf - 2.0 * step.to(tl.float64) * power2 / correction2
    rectified = rho > 5.0
    rectification = (rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho)
    adaptive = tl.where(rectified, square_root(rectification * correction2), 1.0)
    correction1 = 1.0 - power(hyper.beta1, step)
    decays = hyper.weight_decay != 0
    exp_avg = lerp_with(1.0 - hyper.beta1)
    return RAdamCoefficients(
        gradient_factor=gradient_factor(hyper.maximize, factor),
        decay=1.0 - lr * hyper.weight_decay,
        weight_decay=hyper.weight_decay,
        exp_avg_factor=exp_avg.factor,
        exp_avg_from_a=exp_avg.from_a,
        beta2=hyper.beta2,
        one_minus_beta2=1.0 - hyper.beta2,
        step_size=lr / correction1 * adaptive,
        eps=hyper.eps,
        l2=decays & (hyper.decoupled_weight_decay == 0),
        decoupled=decays & (hyper.decoupled_weight_decay != 0),
        rectified=rectified,
    )


@triton.jit
def radam_update(c, p, g, moments):
    c = RAdamCoefficients(*c)
    g = multiply(c.gradient_factor, g)
    if c.decoupled != 0:
        p = multiply(p, c.decay)
    if c.l2 != 0:
        g = g + multiply(c.weight_decay, p)
    m = lerp(c.exp_avg_factor, c.exp_avg_from_a, moments[0], g)
    v = multiply(c.beta2, moments[1]) + multiply(c.one_minus_beta2, multiply(g, g))
    step = multiply(c.step_size, m)
    if c.rectified != 0:
        step = divide(step, square_root(v) + c.eps)
    p = p - step
    return p, (m, v)


# ---- csrc/rules/lion.h

LionHyper = namedtuple("LionHyper", native.rules()["lion"][0])
LionCoefficients = namedtuple(
    "LionCoefficients", "gradient_factor decay lr beta1 one_minus_beta1 beta2 one_minus_beta2"
)


@triton.jit
def lion_prepare(hyper, step, lr, factor, first):
    hyper = LionHyper(*hyper)
    return LionCoefficients(
        gradient_factor=gradient_factor(hyper.maximize, factor),
        decay=1.0 - lr * hyper.weight_decay,
        lr=lr,
        beta1=hyper.beta1,
        one_minus_beta1=1.0 - hyper.beta1,
        beta2=hyper.beta2,
        one_minus_beta2=1.0 - hyper.beta2,
    )


@triton.jit
def lion_update(c, p, g, moments):
    c = LionCoefficients(*c)
    m = moments[0]
    g = multiply(c.gradient_factor, g)
    p = multiply(p, c.decay) - multiply(c.lr, sign(multiply(c.beta1, m) + multiply(c.one_minus_beta1, g)))
    m = multiply(c.beta2, m) + multiply(c.one_minus_beta2, g)
    return p, (m,)


# ---- csrc/rules/external.h


@triton.jit
def external_prepare(hyper, step, lr, factor, first):
    return ()


@triton.jit
def external_update(c, p, g, moments):
    return p, moments


def _rule(name: str, prepare: Any, update: Any, coefficients: tuple[str, ...]) -> Rule:
    hypers, moments, squares = native.rules()[name]
    bits = sum(is_one << place for place, is_one in enumerate(squares))
    numbers = bool(coefficients), len(hypers), len(coefficients), len(moments), bits
    # Constants each: out of a tuple that is a constant, Triton 3.7 takes plain numbers, and loops over none.
    return Rule(prepare, update, *map(constexpr, numbers))


RULES = {
    "adam": _rule("adam", adam_prepare, adam_update, AdamCoefficients._fields),
    "sgd": _rule("sgd", sgd_prepare, sgd_update, SgdCoefficients._fields),
    "rmsprop": _rule("rmsprop", rmsprop_prepare, rmsprop_update, RMSpropCoefficients._fields),
    "radam": _rule("radam", radam_prepare, radam_update, RAdamCoefficients._fields),
    "lion": _rule("lion", lion_prepare, lion_update, LionCoefficients._fields),
    "external": _rule("external", external_prepare, external_update, ()),
}
