"""The reference backend: plain PyTorch on any device, the algorithm as it is written down.

It is what the other backends are tested against, and what runs where none of them can. Each operation is one torch
operation, in the order in which `csrc/rules` states it, so that on a CPU the results are the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from .. import _masters as masters
from .._hyperparameters import Argument
from .._parts import Part, PlainPart, Spec
from .._policies import CACHED, START, Ema, Gpa, Lookahead
from .._rows import Row
from .reference_state import encoded, rounded

NAME = "reference"
DEVICES = None


def unavailable(device: torch.device | None = None) -> str:
    return ""


def part(spec: Spec) -> Part:
    return PlainPart(spec, step, sync)


def step(row: Row, spec: Spec, grad_scale: float, clip: float, event_later: bool) -> None:
    """Advances one parameter by a step.

    The step counter and the sync decision are read by the host, so that this backend alone cannot be captured in a
    CUDA graph.
    """
    if row.param.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "backend 'reference' cannot be captured in a CUDA graph: it reads the step counter on the host; "
            "lookahead_fused.backends() tells which backends serve here"
        )
    applied = row.step.item()
    steps = int(applied) + 1
    start = p = _weights(row)
    if spec.policy.averages and spec.rule.reads_gradient:
        assert row.slow is not None
        p = start if steps == 1 else row.slow.to(start.device, copy=True)
    moments = dict(row.moments)
    if row.has_narrow_moments:
        moments = {name: row.wide(name, moment) for name, moment in moments.items()}
    if spec.rule.reads_gradient:
        assert row.gradient is not None
        hyper = {
            slot: value
            for argument in spec.rule.arguments
            for slot, value in zip(argument.slots, _values(argument, row.group), strict=True)
        }
        first = not row.moments_loaded and applied == 0
        g = row.gradient.to(row.compute_dtype)
        factor = _quotient(1.0, grad_scale) * clip
        p = RULES[spec.rule.name](hyper, steps, first, -factor if hyper["maximize"] else factor, p, g, moments)
    slow = start if spec.rule.reads_gradient and steps == 1 else row.slow
    after = After(p, slow)
    if not event_later:
        after = POLICIES[spec.policy.name](row, spec, steps, start, p, slow, moments)
    _write(row, spec, after, moments, row.moments, steps, own_pass=False)
    row.step.add_(1)


def sync(row: Row, spec: Spec) -> None:
    """The policy's event of one parameter, now."""
    applied = int(row.step.item())
    if applied == 0:
        return
    before = {name: row.wide(name, moment) for name, moment in row.moments.items()}
    moments = dict(before)
    p = _weights(row)
    after = POLICIES[spec.policy.name](row, spec, None, p, p, row.slow, moments)
    _write(row, spec, after, moments, before, applied, own_pass=True)


@dataclass
class After:
    """What a step leaves: the weights, the slow weights and what stands beside them, and the policy's numbers."""

    p: Tensor
    slow: Tensor | None
    cached: Tensor | None = None
    companion: Tensor | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)


def _lookahead(
    row: Row, spec: Spec, steps: int | None, start: Tensor, p: Tensor, slow: Tensor, moments: dict[str, Tensor]
) -> After:
    """What a sync makes of these after so many steps, or now; see `csrc/slow/lookahead.h`."""
    policy = cast(Lookahead, spec.policy)
    alpha, pullback = float(row.group[policy.alpha]), row.group[policy.pullback_momentum]
    outer, cached = row.companion, row.cached_moment
    if steps is not None and steps % row.group[policy.k] != 0:
        return After(p, slow)
    slow = _beside(p, slow)
    if policy.has_outer_momentum(row.group):
        assert outer is not None
        momentum, difference = float(row.group[policy.outer_momentum]), slow - p
        outer = _beside(p, outer) * momentum + difference
        nesterov = row.group.get(policy.outer_nesterov, True)
        slow = slow - (difference + outer * momentum if nesterov else outer) * alpha
    else:
        slow = _lerp(slow, p, alpha)
    first = spec.rule.moments[0]
    if first in moments and pullback == "pullback":
        assert cached is not None
        cached = moments[first] = _lerp(row.wide(CACHED, cached), moments[first], min(alpha, 1.0))
    if first in moments and pullback == "reset":
        moments[first] = torch.zeros_like(moments[first])
    return After(slow, slow, cached, outer)


def _ema(
    row: Row, spec: Spec, steps: int | None, start: Tensor, p: Tensor, slow: Tensor, moments: dict[str, Tensor]
) -> After:
    """The average after so many steps; see `csrc/slow/ema.h`."""
    policy = cast(Ema, spec.policy)
    assert steps is not None
    decay, every = row.group[policy.decay], row.group[policy.every]
    since = steps - max(int(row.numbers[START].item()), row.group[policy.start])
    if since >= 0 and since % every == 0:
        n = since // every
        if isinstance(decay, str):
            weight = 1.0 / (n + 1)
        else:
            weight = 1.0 - min(float(decay), (1 + n) / (10 + n) if row.group[policy.warmup] else 1.0)
        slow = _lerp(_beside(p, slow), p, weight if n > 0 else 1.0)
    return After(p, slow)


def _averaging(
    row: Row, spec: Spec, steps: int | None, start: Tensor, p: Tensor, slow: Tensor, moments: dict[str, Tensor]
) -> After:
    """The weights, z and x after so many steps, of which `start` were the weights before and `p` is z; see
    `csrc/slow/averaging.h`."""
    assert steps is not None
    policy, group = spec.policy, row.group
    numbers = {name: number.item() for name, number in row.numbers.items()}
    if isinstance(policy, Gpa):
        train, share = (float(argument.value(group)) for argument in policy.arguments)
    else:
        interp, r, exponent = (argument.value(group) for argument in policy.arguments)
        train, lr = float(interp), float(group.get("lr", 1.0))
        numbers["lr_max"] = lr if numbers["lr_max"] < lr else numbers["lr_max"]
        weight = _power(float(steps), r) * _power(numbers["lr_max"], exponent)
        numbers["weight_sum"] += weight
        share = 1.0 - (weight / numbers["weight_sum"] if numbers["weight_sum"] > 0 else 0.0)
    place = numbers["y_interp"]
    if row.companion is not None:
        x = _beside(p, row.companion)
    else:
        x = start + (start - _beside(p, slow)) * ((1.0 - place) / place if place > 0 else 0.0)
    numbers["y_interp"] = train
    x = p + (x - p) * share
    return After(p + (x - p) * train, p, companion=None if row.companion is None else x, numbers=numbers)


def _alone(
    row: Row, spec: Spec, steps: int | None, start: Tensor, p: Tensor, slow: Tensor, moments: dict[str, Tensor]
) -> After:
    return After(p, None)


def _beside(p: Tensor, slow: Tensor) -> Tensor:
    """Slow weights on the weights' device: torch's operators want a copy of those that are offloaded."""
    return slow.to(p.device)


def _weights(row: Row) -> Tensor:
    return masters.read(row.param, row.master).to(row.compute_dtype, copy=True)


def _write(
    row: Row,
    spec: Spec,
    after: After,
    moments: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    updates: int,
    own_pass: bool,
) -> None:
    """All has been computed; nothing was changed before. A moment that is what it was before stays."""

    def write_moment(name: str, kept: Tensor, made: Tensor, place: int) -> None:
        draw = row.param, place, updates, own_pass
        if row.has_codes:
            made, scale = encoded(made, row.kinds[name], *draw)
            row.scales[name].copy_(scale)
        elif row.has_narrow_moments:
            made = rounded(made, *draw)
        kept.copy_(made)

    masters.write(after.p, row.param, row.master)
    for kept, made in ((row.slow, after.slow), (row.companion, after.companion)):
        if made is not None and made is not kept:
            assert kept is not None
            kept.copy_(made)
    if after.cached is not None and row.cached_moment is not None:
        # By the first moment's draw: the two are equal.
        write_moment(CACHED, row.cached_moment, after.cached, 0)
    for name, number in after.numbers.items():
        row.numbers[name].fill_(number)
    for name, moment in moments.items():
        if moment is not before[name]:
            write_moment(name, row.moments[name], moment, spec.rule.moments.index(name))


def _values(argument: Argument, group: Mapping[str, Any]) -> tuple[Any, ...]:
    value = argument.value(group)
    return tuple(value) if len(argument.slots) > 1 else (value,)


def _lerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """a + weight * (b - a), exactly a at weight 0 and exactly b at weight 1; see `csrc/rules/numeric.h`."""
    return a + (b - a) * weight if weight < 0.5 else b + (b - a) * -(1.0 - weight)


def _sign(x: Tensor) -> Tensor:
    """torch's makes 0 of a NaN, and would hide it."""
    return torch.where(x.isnan(), x, x.sign())


def _square_root(x: Tensor) -> Tensor:
    """Rounded correctly, as IEEE-754 and every other backend have it.

    torch's CPU kernel is MKL's, and one ulp off for one fp32 number in five. fp64 has digits to spare for an fp32
    root; an fp64 root is left to libm, number by number.
    """
    if x.device.type != "cpu":
        return x.sqrt()
    if x.dtype == torch.float32:
        return x.double().sqrt().float()
    roots = [_root(value) for value in x.flatten().tolist()]
    return torch.tensor(roots, dtype=x.dtype, device="cpu").view(x.shape)


# A beta of 1, or beyond, makes corrections that Python raises for, where every other backend goes on by IEEE-754.


def _root(x: float) -> float:
    return math.sqrt(x) if x >= 0 else math.nan


def _quotient(a: float, b: float) -> float:
    return a / b if b != 0 else a * math.copysign(math.inf, b)


def _power(beta: float, n: int) -> float:
    """beta ** n by squaring, multiplications alone; see `csrc/rules/numeric.h`."""
    result = 1.0
    while n > 0:
        if n & 1:
            result = result * beta
        beta = beta * beta
        n >>= 1
    return result


def _adam(
    hyper: Mapping[str, Any],
    steps: int,
    first: bool,
    factor: float,
    p: Tensor,
    g: Tensor,
    moments: dict[str, Tensor],
) -> Tensor:
    """Adam (Kingma and Ba 2015), AdamW (Loshchilov and Hutter 2019), AMSGrad (Reddi et al. 2018)."""
    beta1, beta2 = hyper["beta1"], hyper["beta2"]
    lr, weight_decay = float(hyper["lr"]), float(hyper["weight_decay"])
    g = g * factor
    if weight_decay != 0 and hyper["decoupled_weight_decay"]:
        p = p * (1.0 - lr * weight_decay)
    elif weight_decay != 0:
        g = g + p * weight_decay
    m = _lerp(moments["exp_avg"], g, 1.0 - beta1)
    v = moments["exp_avg_sq"] * beta2 + (g * g) * (1.0 - beta2)
    moments["exp_avg"], moments["exp_avg_sq"] = m, v
    if hyper["amsgrad"]:
        v = moments["max_exp_avg_sq"] = torch.maximum(v, moments["max_exp_avg_sq"])
    step_size = _quotient(lr, 1.0 - _power(beta1, steps))
    inverse_sqrt_correction2 = _quotient(1.0, _root(1.0 - _power(beta2, steps)))
    denominator = _square_root(v) * inverse_sqrt_correction2 + float(hyper["eps"])
    return p - (m * step_size) / denominator


def _sgd(
    hyper: Mapping[str, Any],
    steps: int,
    first: bool,
    factor: float,
    p: Tensor,
    g: Tensor,
    moments: dict[str, Tensor],
) -> Tensor:
    """SGD with momentum, dampening and Nesterov's form, as torch.optim.SGD defines them."""
    lr, weight_decay, momentum = float(hyper["lr"]), float(hyper["weight_decay"]), hyper["momentum"]
    g = g * factor
    if weight_decay != 0:
        g = g + p * weight_decay
    if momentum != 0:
        buffer = g if first else moments["momentum_buffer"] * momentum + g * (1.0 - hyper["dampening"])
        moments["momentum_buffer"] = buffer
        g = g + buffer * momentum if hyper["nesterov"] else buffer
    return p - g * lr


def _rmsprop(
    hyper: Mapping[str, Any],
    steps: int,
    first: bool,
    factor: float,
    p: Tensor,
    g: Tensor,
    moments: dict[str, Tensor],
) -> Tensor:
    """RMSprop (Tieleman and Hinton 2012), centered (Graves 2013) and with momentum, as torch.optim.RMSprop has them."""
    lr, weight_decay = float(hyper["lr"]), float(hyper["weight_decay"])
    alpha, momentum = hyper["alpha"], float(hyper["momentum"])
    g = g * factor
    if weight_decay != 0:
        g = g + p * weight_decay
    moments["square_avg"] = second = moments["square_avg"] * alpha + (g * g) * (1.0 - alpha)
    if hyper["centered"]:
        mean = moments["grad_avg"] = _lerp(moments["grad_avg"], g, 1.0 - alpha)
        second = second - mean * mean
    denominator = _square_root(second) + float(hyper["eps"])
    if momentum > 0:
        buffer = moments["momentum_buffer"] = moments["momentum_buffer"] * momentum + g / denominator
        return p - buffer * lr
    return p - (g * lr) / denominator


def _radam(
    hyper: Mapping[str, Any],
    steps: int,
    first: bool,
    factor: float,
    p: Tensor,
    g: Tensor,
    moments: dict[str, Tensor],
) -> Tensor:
    """RAdam (Liu et al. 2020, algorithm 2) with either weight decay, as torch.optim.RAdam defines it."""
    beta1, beta2 = hyper["beta1"], hyper["beta2"]
    lr, weight_decay = float(hyper["lr"]), float(hyper["weight_decay"])
    g = g * factor
    if weight_decay != 0 and hyper["decoupled_weight_decay"]:
        p = p * (1.0 - lr * weight_decay)
    elif weight_decay != 0:
        g = g + p * weight_decay
    m = moments["exp_avg"] = _lerp(moments["exp_avg"], g, 1.0 - beta1)
    v = moments["exp_avg_sq"] = moments["exp_avg_sq"] * beta2 + (g * g) * (1.0 - beta2)
    power2 = _power(beta2, steps)
    rho_inf = _quotient(2.0, 1.0 - beta2) - 1.0
    rho = rho_inf - _quotient(2.0 * steps * power2, 1.0 - power2)
    step_size = _quotient(lr, 1.0 - _power(beta1, steps))
    if not rho > 5.0:
        return p - m * step_size
    rectification = (rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho)
    step_size = step_size * _root(rectification * (1.0 - power2))
    return p - (m * step_size) / (_square_root(v) + float(hyper["eps"]))


def _lion(
    hyper: Mapping[str, Any],
    steps: int,
    first: bool,
    factor: float,
    p: Tensor,
    g: Tensor,
    moments: dict[str, Tensor],
) -> Tensor:
    """Lion (Chen et al. 2023, algorithm 2)."""
    lr, beta1, beta2 = float(hyper["lr"]), hyper["beta1"], hyper["beta2"]
    g = g * factor
    m = moments["exp_avg"]
    p = p * (1.0 - lr * float(hyper["weight_decay"])) - _sign(m * beta1 + g * (1.0 - beta1)) * lr
    moments["exp_avg"] = m * beta2 + g * (1.0 - beta2)
    return p


POLICIES: dict[str, Any] = {
    "lookahead": _lookahead,
    "ema": _ema,
    "gpa": _averaging,
    "schedule_free": _averaging,
    "alone": _alone,
}
RULES = {"adam": _adam, "sgd": _sgd, "rmsprop": _rmsprop, "radam": _radam, "lion": _lion}
