"""Optimizers whose moments are narrow, of every rule and policy, and what their tests share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import coded
import pytest
import torch
from helpers import LOOKAHEAD_CLASSES, BackendCase, make_grads, make_params, same_tensor_bits, seeded, set_grad
from torch import Tensor

from lookahead_fused import EMA, GPA, Lion, Lookahead, ScheduleFree

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
REFERENCE = BackendCase("reference", "cpu", 0.0)
narrow_ones = pytest.mark.parametrize("narrow", ["bfloat16", "int8"])
SHAPES = ((7,), (3, 5), (), (260,), (0,), (2, 3, 4, 5))
# Of parameters, a backend's name and where it is not bf16 the moments' dtype.
Make = Callable[..., torch.optim.Optimizer]


def of_class(rule: str, **hyper: Any) -> Make:
    hyper = {"lr": 0.05, "k": 3, **hyper}
    return lambda params, backend, state_dtype="bfloat16": LOOKAHEAD_CLASSES[rule](
        params, **hyper, state_dtype=state_dtype, backend=backend
    )


def around(wrapper: Any, base: Any, of_base: dict[str, Any], **settings: Any) -> Make:
    return lambda params, backend, state_dtype="bfloat16": wrapper(
        base(params, **of_base), **settings, state_dtype=state_dtype, backend=backend
    )


ADAMW, SGD = {"lr": 0.05, "weight_decay": 0.1}, {"lr": 0.05, "momentum": 0.9}
OPTIMIZERS: dict[str, Make] = {
    "adamw": of_class("adamw", weight_decay=0.1, outer_momentum=0.5),
    "adam amsgrad pullback": of_class("adam", amsgrad=True, pullback_momentum="pullback", alpha=0.3),
    "sgd reset": of_class("sgd", momentum=0.9, nesterov=True, pullback_momentum="reset"),
    "sgd without state": of_class("sgd"),
    "rmsprop pullback": of_class("rmsprop", momentum=0.9, pullback_momentum="pullback"),
    "radam": of_class("radam", betas=(0.9, 0.8)),
    "lion pullback": of_class("lion", pullback_momentum="pullback", weight_decay=0.1),
    "lion alone": lambda params, backend, state_dtype="bfloat16": Lion(
        params, lr=0.05, state_dtype=state_dtype, backend=backend
    ),
    "lookahead": around(Lookahead, torch.optim.AdamW, ADAMW, k=2, pullback_momentum="pullback"),
    "ema": around(EMA, torch.optim.SGD, SGD, decay=0.9),
    "ema of rmsprop": around(EMA, torch.optim.RMSprop, {"lr": 0.05, "momentum": 0.9}, decay="uniform", every=2),
    "gpa": around(GPA, torch.optim.AdamW, ADAMW | {"amsgrad": True}, master_weights=True),
    "gpa of rmsprop": around(GPA, torch.optim.RMSprop, {"lr": 0.05, "momentum": 0.9}, master_weights=True),
    "schedule free": around(ScheduleFree, torch.optim.RAdam, {"lr": 0.05}, master_weights=True),
}
MASTERS = [name for name in OPTIMIZERS if name.startswith(("gpa", "schedule"))]
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "cached_momentum")


SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg")


def wide(own: Mapping[str, Any], moment: str) -> Tensor:
    """What a narrow moment stands for, in fp32; of codes by the oracle."""
    codes = own[moment]
    if codes.dtype == BF16:
        return codes.float().cpu()
    scale = own[f"{moment}_scale"].cpu().numpy()
    flat = codes.as_strided((codes.numel(),), (1,)).cpu().numpy()
    kind = coded.SQUARES if moment in SQUARES else coded.SIGNED
    found = torch.empty_like(codes, dtype=FP32, device="cpu")
    found.as_strided((codes.numel(),), (1,)).copy_(torch.from_numpy(coded.decode(flat, coded.tops_of(scale), kind)))
    return found


def run(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor], steps: range, grad_dtype: torch.dtype | None = None
) -> None:
    for t in steps:
        for p, g in zip(params, make_grads(params, generator=seeded(t), dtype=grad_dtype), strict=True):
            set_grad(p, g)
        optimizer.step()


def assert_same(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor], other: torch.optim.Optimizer, others: Sequence[Tensor]
) -> None:
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        own, its = optimizer.state[p], other.state[q]
        assert own.keys() == its.keys()
        for name, a, b in (("param", p, q), *((n, own[n], its[n]) for n in own)):
            assert same_tensor_bits(a, b), f"{name} of parameter {i}"


def assert_same_numbers(optimizer: Any, params: Sequence[Tensor], other: Any, others: Sequence[Tensor]) -> None:
    """Parameters and states are the same, whatever codes and scales moments have."""
    assert all(same_tensor_bits(p, q) for p, q in zip(params, others, strict=True))
    a, b = optimizer.state_dict()["state"], other.state_dict()["state"]
    assert a.keys() == b.keys()
    for i in a:
        assert a[i].keys() == b[i].keys()
        for name, value in a[i].items():
            assert same_tensor_bits(value, b[i][name]), f"{name} of parameter {i}"


def made(
    make: Make, backend: BackendCase, dtype: torch.dtype = FP32, state_dtype: str = "bfloat16"
) -> tuple[torch.optim.Optimizer, list[Any]]:
    params = make_params(SHAPES, dtype, device=backend.device)
    # In an order of its own, by which its elements are counted.
    params[-1].data = params[-1].data.contiguous(memory_format=torch.channels_last)
    return make(params, backend.name, state_dtype), params
