"""Moments in 16 and in 8 bits: the time of a step against fp32 moments, against torch's fused AdamW without slow
weights, and against the 8-bit optimizers that people install."""

from __future__ import annotations

import importlib
from functools import partial

from bench.harness.figures import Report
from bench.suites.family import adamw, report
from lookahead_fused import LookaheadAdamW
from lookahead_fused.bench import parameters
from lookahead_fused.bench.device import Device
from lookahead_fused.bench.measure import Effort, Side, Unavailable
from lookahead_fused.bench.opponents import HYPERPARAMETERS, OURS, PLAIN, K, installed_reason

FP32_MOMENTS = "the same with moments in fp32"
# Of the time of torch's fused step over fp32 moments, at most.
SHARES = {"bfloat16": 0.85, "int8": 0.75}
# Where each of the others has its AdamW with moments in 8 bits.
PEERS = {"bitsandbytes": "bitsandbytes.optim", "torchao": "torchao.optim"}


def moments(state_dtype: str, case: str, device: Device, effort: Effort) -> Report:
    """Narrow moments at k = 5, against those in fp32, and against torch's fused step with no slow weights at all.

    Args:
        state_dtype: a key of ``SHARES``.
        case: a key of ``parameters.CASES``.
        device: where.
        effort: how much time it may take.
    """
    listed = parameters.CASES[case]
    params = parameters.make(listed, device=device.name)
    wide = parameters.twin(params)
    sides = [
        Side(OURS, LookaheadAdamW(params, **HYPERPARAMETERS["adamw"], k=K, state_dtype=state_dtype).step),
        Side(FP32_MOMENTS, LookaheadAdamW(wide, **HYPERPARAMETERS["adamw"], k=K).step),
        Side(PLAIN, adamw(parameters.twin(params), fused=True).step),
    ]
    title = f"moments in {state_dtype}, {listed}, fp32, AdamW, k={K}"
    return report(title, sides, K, {PLAIN: 1 / SHARES[state_dtype]}, listed.elements, device, effort)


def peer(name: str, case: str, device: Device, effort: Effort) -> Report:
    """Ours with slow weights and moments in 8 bits, against the 8-bit AdamW of another package, without any.

    Args:
        name: a key of ``PEERS``.
        case: a key of ``parameters.CASES``.
        device: where.
        effort: how much time it may take.

    Raises:
        Unavailable: the package is not installed, or does not run here.
    """
    reason = installed_reason(PEERS[name])
    if reason:
        raise Unavailable(reason)
    listed = parameters.CASES[case]
    params, theirs = parameters.make(listed, device=device.name), parameters.make(listed, device=device.name)
    ours = LookaheadAdamW(params, **HYPERPARAMETERS["adamw"], k=K, state_dtype="int8")
    other = importlib.import_module(PEERS[name]).AdamW8bit(theirs, **HYPERPARAMETERS["adamw"])
    try:
        # What compiles its step does so in the first ones.
        for _ in range(3):
            other.step()
    except Exception as error:
        raise Unavailable(f"{name} does not step here: {type(error).__name__}: {error}") from error
    sides = [
        Side(OURS, ours.step),
        Side(f"{name}'s AdamW8bit, no Lookahead", other.step),
        Side(PLAIN, adamw(parameters.twin(params), fused=True).step),
    ]
    title = f"moments in int8, {listed}, fp32, AdamW, k={K}, beside {name}"
    return report(title, sides, K, {}, listed.elements, device, effort)


LOW_BIT = {
    "bf16-moments-gpt2-small": partial(moments, "bfloat16", "gpt2-small"),
    "int8-moments-gpt2-small": partial(moments, "int8", "gpt2-small"),
}
PEER_ROWS = {f"int8-beside-{name}": partial(peer, name, "small-gpt") for name in PEERS}
