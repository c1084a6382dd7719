"""Every rule with its hyperparameters away from their defaults, to the bit: one arithmetic everywhere."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    DTYPE_NAMES,
    TORCH_CLASSES,
    BackendCase,
    Lockstep,
    can_set_grad_dtype,
    composed,
    make_grads,
    make_optimizer,
    make_params,
    oracle_settings,
    seeded,
    to_numpy,
)
from oracle import Textbook

ADAM: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.03, "weight_decay": 0.0},
    "betas": {"lr": 0.03, "betas": (0.6, 0.7), "k": 3},
    "small beta1": {"lr": 0.03, "betas": (0.3, 0.99), "k": 2},  # lerp's other branch
    "betas zero": {"lr": 0.03, "betas": (0.0, 0.0)},
    "eps": {"lr": 0.03, "eps": 0.1, "k": 3},
    "weight decay": {"lr": 0.1, "weight_decay": 0.3, "k": 3},
    "amsgrad": {"lr": 0.05, "amsgrad": True, "betas": (0.9, 0.5), "k": 4},
    "maximize": {"lr": 0.05, "maximize": True, "weight_decay": 0.2, "k": 3},
    "pullback": {"lr": 0.05, "pullback_momentum": "pullback", "k": 2, "alpha": 0.3},
    "reset": {"lr": 0.05, "pullback_momentum": "reset", "k": 3, "alpha": 0.8},
    "outer momentum": {"lr": 0.05, "k": 2, "alpha": 0.7, "outer_momentum": 0.6},
    "outer momentum above alpha 1": {
        "lr": 0.05,
        "k": 1,
        "alpha": 1.3,
        "outer_momentum": 0.3,
        "outer_nesterov": False,
        "pullback_momentum": "pullback",
    },
    "all": {
        "lr": 0.07,
        "betas": (0.8, 0.6),
        "eps": 1e-4,
        "weight_decay": 0.1,
        "amsgrad": True,
        "maximize": True,
        "pullback_momentum": "pullback",
        "k": 2,
        "alpha": 0.7,
    },
    "k 1": {"lr": 0.05, "k": 1, "alpha": 0.25},
    "alpha below a half": {"lr": 0.05, "k": 2, "alpha": 0.49},
    "alpha 1": {"lr": 0.05, "k": 2, "alpha": 1.0, "pullback_momentum": "pullback"},
    "alpha 0": {"lr": 0.05, "k": 3, "alpha": 0.0, "pullback_momentum": "pullback"},
    "betas list": {"lr": 0.03, "betas": [0.8, 0.9], "k": 2},
    "lr 0": {"lr": 0.0, "weight_decay": 0.1, "k": 2},
    "lr tensor": {"lr": torch.tensor(0.03), "weight_decay": 0.1},
    "lr fp64 tensor": {"lr": torch.tensor(0.03, dtype=torch.float64), "k": 2},
    "numpy": {
        "lr": np.float32(0.03),
        "betas": (np.float64(0.8), np.float64(0.9)),
        "weight_decay": np.float64(0.1),
        "k": np.int64(2),
        "alpha": np.float32(0.3),
    },
    "int": {"lr": 1, "eps": 1, "weight_decay": 0, "alpha": 1, "k": 2},
}
SGD: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.1, "k": 3},
    "weight decay": {"lr": 0.1, "weight_decay": 0.3, "k": 2},
    "momentum": {"lr": 0.1, "momentum": 0.9, "k": 3},
    "dampening": {"lr": 0.1, "momentum": 0.9, "dampening": 0.4, "k": 4},
    "nesterov": {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1, "k": 3},
    "maximize": {"lr": 0.1, "momentum": 0.8, "maximize": True, "weight_decay": 0.2},
    "plain maximize": {"lr": 0.1, "maximize": True, "weight_decay": 0.2, "k": 2},
    "pullback": {"lr": 0.1, "momentum": 0.9, "pullback_momentum": "pullback", "k": 2, "alpha": 0.3},
    "pullback without momentum": {"lr": 0.1, "pullback_momentum": "pullback", "k": 2},
    "reset": {"lr": 0.1, "momentum": 0.9, "pullback_momentum": "reset", "dampening": 0.3, "k": 2},
    "outer momentum": {"lr": 0.1, "momentum": 0.5, "k": 2, "alpha": 0.7, "outer_momentum": 0.6},
    "outer momentum, not Nesterov's": {"lr": 0.1, "k": 1, "alpha": 1.0, "outer_momentum": 0.9, "outer_nesterov": False},
    "all": {
        "lr": 0.07,
        "momentum": 0.7,
        "dampening": 0.2,
        "weight_decay": 0.1,
        "maximize": True,
        "pullback_momentum": "pullback",
        "k": 2,
        "alpha": 0.8,
    },
    "alpha 1": {"lr": 0.1, "momentum": 0.9, "k": 2, "alpha": 1.0, "pullback_momentum": "pullback"},
    "alpha 0": {"lr": 0.1, "momentum": 0.9, "k": 2, "alpha": 0.0, "pullback_momentum": "pullback"},
    "lr tensor": {"lr": torch.tensor(0.03), "momentum": 0.5, "weight_decay": 0.1},
    "int": {"lr": 1, "momentum": 0, "alpha": 0, "k": 2},
}
RMSPROP: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.03, "k": 3},
    "momentum": {"lr": 0.03, "alpha": 0.4, "momentum": 0.9, "pullback_momentum": "pullback", "k": 2},
    "centered": {"lr": torch.tensor(0.03), "alpha": 0.8, "eps": 0.1, "centered": True, "k": 2, "lookahead_alpha": 0.3},
    "all": {
        "lr": 0.07,
        "alpha": 0.7,
        "eps": 1e-4,
        "weight_decay": 0.1,
        "momentum": 0.6,
        "centered": True,
        "maximize": True,
        "pullback_momentum": "reset",
        "k": 2,
        "lookahead_alpha": 0.7,
    },
}
# The sixth step is the first that is rectified; with a beta2 of 0.8 it is the seventh, with 0.6 none is.
RADAM: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.003, "k": 3},  # rho is a small difference of large numbers
    "betas": {"lr": 0.03, "betas": (0.4, 0.9), "eps": 0.1, "k": 2},
    "weight decay": {"lr": torch.tensor(0.03), "betas": (0.8, 0.8), "weight_decay": 0.3, "k": 3},
    "never rectified": {"lr": 0.03, "betas": (0.0, 0.6)},
    "all": {
        "lr": 0.07,
        "betas": (0.8, 0.85),
        "eps": 1e-4,
        "weight_decay": 0.1,
        "decoupled_weight_decay": True,
        "maximize": True,
        "pullback_momentum": "pullback",
        "k": 2,
        "alpha": 0.7,
    },
}
LION: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.03, "k": 3},
    "betas": {"lr": torch.tensor(0.03), "betas": (0.4, 0.7), "pullback_momentum": "pullback", "k": 2, "alpha": 0.3},
    "all": {
        "lr": 0.07,
        "betas": (0.7, 0.2),
        "weight_decay": 0.3,
        "maximize": True,
        "pullback_momentum": "reset",
        "k": 2,
        "alpha": 0.8,
    },
}
HYPER = {"adamw": ADAM, "adam": ADAM, "sgd": SGD, "rmsprop": RMSPROP, "radam": RADAM, "lion": LION}
# What has a rule's optional state made, and what else each may differ in by group.
WHOLE: dict[str, dict[str, Any]] = {
    "adamw": {"amsgrad": True},
    "adam": {"amsgrad": True},
    "sgd": {"momentum": 0.9},
    "rmsprop": {"momentum": 0.9, "centered": True},
    "radam": {"betas": (0.9, 0.6)},
    "lion": {},
}
CASES = [
    pytest.param(rule, hyper, id=f"{rule}-{name}") for rule, cases in HYPER.items() for name, hyper in cases.items()
]
DTYPES = [
    pytest.param(torch.float32, False, id="fp32"),
    pytest.param(torch.float64, False, id="fp64"),
    pytest.param(torch.bfloat16, False, id="bf16"),
    pytest.param(torch.float16, False, id="fp16"),
    pytest.param(torch.bfloat16, True, id="bf16-master"),
    pytest.param(torch.float16, True, id="fp16-master"),
]
STEPS = 6


@pytest.mark.parametrize(("rule", "hyper"), CASES)
@pytest.mark.parametrize(("dtype", "master"), DTYPES)
def test_bits(backend: BackendCase, rule: str, hyper: dict, dtype: torch.dtype, master: bool) -> None:
    """All of the state after every step: names, dtypes, values."""
    pair = Lockstep(backend, rule, dtype=dtype, master_weights=master, **hyper)
    for _ in range(STEPS):
        pair.step()


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_bits_with_decoupled_and_coupled_weight_decay(backend: BackendCase, rule: str) -> None:
    """LookaheadAdam takes either kind, per group too; LookaheadAdamW is the same with the other default."""
    if rule == "adamw":
        groups = (
            ([(9,)], {"decoupled_weight_decay": True}),
            ([(9,)], {"decoupled_weight_decay": False}),
            ([(9,)], {}),
        )
        pair = Lockstep(backend, "adam", *groups, lr=0.1, weight_decay=0.3, k=2)
    else:
        pair = Lockstep(backend, "sgd", lr=0.1, weight_decay=0.3, k=2)
    for _ in range(STEPS):
        pair.step()


@pytest.mark.parametrize("rule", HYPER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_keep_their_own_hyperparameters(backend: BackendCase, rule: str, dtype: torch.dtype) -> None:
    """Every keyword per group; the last group has none of its own."""
    shapes = [(5,), (2, 3)]
    own: list[dict[str, Any]] = [
        {"lr": 0.2},
        {"lr": torch.tensor(0.07)},
        {"weight_decay": 0.5},
        {"maximize": True},
        {"k": 1},
        {"k": 3, "lookahead_alpha" if rule == "rmsprop" else "alpha": 0.9},
        {"pullback_momentum": "reset"},
        {"pullback_momentum": "pullback", "k": 2},
        {"master_weights": True},
    ]
    if rule == "rmsprop":
        own += [{"momentum": 0.0}, {"alpha": 0.5}, {"eps": 0.1}, {"centered": True}]
        hyper: dict[str, Any] = {"momentum": 0.9, "alpha": 0.8}
    elif rule in ("radam", "lion"):
        own += [{"betas": (0.5, 0.6)}, *([{"eps": 0.1}, {"decoupled_weight_decay": True}] if rule == "radam" else [])]
        hyper = {"betas": (0.8, 0.7)}
    elif rule == "sgd":
        own += [{"momentum": 0.0}, {"momentum": 0.5, "dampening": 0.3}, {"momentum": 0.8, "nesterov": True}]
        hyper = {"momentum": 0.9}
    else:
        own += [{"betas": (0.5, 0.6)}, {"eps": 0.1}, {"amsgrad": True}]
        hyper = {"betas": (0.8, 0.95)}
    pair = Lockstep(backend, rule, *[(shapes, o) for o in [*own, {}]], dtype=dtype, lr=0.1, k=4, **hyper)
    for _ in range(STEPS):
        pair.step()


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_groups_of_different_dtypes_and_a_mix_in_one(backend: BackendCase, rule: str) -> None:
    dtypes = list(DTYPE_NAMES)
    mixed = [make_params([(6,)], dtype, seed=i, device=backend.device)[0] for i, dtype in enumerate(dtypes * 2)]
    last = make_params([(3, 3)], torch.float64, device=backend.device)
    pair = Lockstep(backend, rule, (mixed, {}), (last, {"lr": 0.2, "master_weights": False}), k=2, master_weights=True)
    for _ in range(STEPS):
        pair.step()


@pytest.mark.parametrize("rule", TORCH_CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["none", "pullback", "reset"])
def test_bits_of_the_wrapper(backend: BackendCase, rule: str, dtype: torch.dtype, mode: str) -> None:
    """`Lookahead` over torch's classes takes the fused step: the bits are those of the classes of our own."""
    own = WHOLE[rule] | ({"momentum": 0.5, "nesterov": True} if rule == "sgd" else {})
    hyper = {name: value for name, value in WHOLE[rule].items() if name == "momentum"}
    groups = (([(7,), ()], {}), ([(4, 3)], {"lr": 0.2, "weight_decay": 0.3, "maximize": True}), ([(5,)], own))
    pair = Lockstep(
        backend,
        f"wrapped-{rule}",
        *groups,
        dtype=dtype,
        lr=0.1,
        k=2,
        pullback_momentum=mode,
        **{"lookahead_alpha" if rule == "rmsprop" else "alpha": 0.7},
        **hyper,
    )
    for _ in range(STEPS):
        pair.step()


@pytest.mark.skipif(not can_set_grad_dtype(), reason="this torch keeps gradients in their parameter's dtype")
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
@pytest.mark.parametrize(("dtype", "master"), DTYPES[2:])
def test_fp32_gradients_of_16_bit_parameters(backend: BackendCase, rule: str, dtype: torch.dtype, master: bool) -> None:
    """Read as they are, not rounded to the parameter's dtype; and the dtype may change between steps."""
    pair = Lockstep(backend, rule, dtype=dtype, grad_dtype=torch.float32, lr=0.1, k=2, master_weights=master)
    for grad_dtype in (torch.float32, torch.float32, dtype, torch.float32, dtype):
        pair.grad_dtype = grad_dtype
        pair.step()


@pytest.mark.parametrize("rule", HYPER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values_at_the_edge(backend: BackendCase, rule: str, dtype: torch.dtype) -> None:
    """Signed zeros, subnormals, the largest numbers, infinities, NaN: in parameters and gradients, all pairs.
    Catches flushed subnormals, a max that drops NaN, an approximate division or root, fast-math."""
    info = torch.finfo(dtype)
    edge = torch.tensor(
        [
            0.0,
            -0.0,
            1.0,
            -1.5,
            info.tiny,
            -info.tiny,
            info.smallest_normal / 4,
            info.max,
            -info.max,
            info.eps,
            3e-05,
            1e-20,
            1e20,
            float("inf"),
            -float("inf"),
            float("nan"),
        ],
        dtype=torch.float64,
    ).to(dtype)
    p = torch.nn.Parameter(edge.repeat_interleave(len(edge)).to(backend.device))
    grad = edge.repeat(len(edge)).to(backend.device)
    own, alpha = WHOLE[rule], "lookahead_alpha" if rule == "rmsprop" else "alpha"
    for hyper in (own, {**own, "maximize": True, "weight_decay": 0.1, alpha: 0.3}):
        q = torch.nn.Parameter(p.detach().clone())
        pair = Lockstep(backend, rule, ([q], {}), lr=0.1, k=2, **hyper)
        for g in (grad, grad.flip(0), grad * 0, grad):
            pair.step([g.clone()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_zero_has_a_sign(backend: BackendCase, dtype: torch.dtype) -> None:
    """A momentum below zero that an update forgets makes -0 of it: Lion takes +0 off there, and -0 stays -0."""
    p = torch.nn.Parameter(torch.zeros(20, dtype=dtype, device=backend.device))
    pair = Lockstep(backend, "lion", ([p], {}), betas=(0.0, 0.5), lr=0.1, k=100)
    pair.step([torch.ones_like(p)])
    with torch.no_grad():
        p.fill_(-0.0)
        pair.optimizer.state[p]["exp_avg"].fill_(-1.0)
    pair.adopt()
    pair.step([torch.full_like(p, -0.0)])
    assert p.signbit().all()


@pytest.mark.skipif(not can_set_grad_dtype(), reason="this torch keeps gradients in their parameter's dtype")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_every_nan_stays_one(backend: BackendCase, rule: str, dtype: torch.dtype) -> None:
    """Rounding by adding to the bits makes -0 of a NaN whose bits are all set."""
    bits = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1, -0x400000, 0x7FC00001, 0x7FFF8000], dtype=torch.int32)
    grad = bits.view(torch.float32).repeat(7)
    p = torch.nn.Parameter(torch.ones(grad.shape, dtype=dtype, device=backend.device))
    pair = Lockstep(backend, rule, ([p], {}), lr=0.1, k=2)
    for _ in range(2):
        pair.step([grad.to(backend.device)])
        assert p.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_many_elements(backend: BackendCase, rule: str, dtype: torch.dtype) -> None:
    """Tensors of more than a chunk and of every tail: what a chunk or a vector loop leaves out shows here."""
    shapes = [(300_007,), *[(n,) for n in range(1, 40)], (65_536,), (1025, 3)]
    hyper = {"momentum": 0.9} if rule == "sgd" else {"weight_decay": 0.1}
    pair = Lockstep(backend, rule, (shapes, {}), dtype=dtype, lr=0.1, k=2, **hyper)
    for _ in range(3):
        pair.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        ("adamw", {"amsgrad": True}),
        ("adamw", {"decoupled_weight_decay": False}),
        ("adamw", {"betas": (0.2, 0.5), "eps": 0.1}),
        ("adamw", {"betas": [0.2, 0.5]}),
        ("adamw", {"maximize": True, "weight_decay": 0.0}),
        ("adamw", {"master_weights": True}),
        ("sgd", {"master_weights": True}),
        ("sgd", {"nesterov": True}),
        ("sgd", {"dampening": 0.5, "momentum": 0.3}),
        ("sgd", {"maximize": True, "weight_decay": 0.0}),
        ("sgd", {"pullback_momentum": "reset"}),
        ("adamw", {"pullback_momentum": "reset"}),
        ("rmsprop", {"centered": True, "momentum": 0.9}),
        ("rmsprop", {"pullback_momentum": "pullback"}),
        ("radam", {"decoupled_weight_decay": True, "betas": (0.8, 0.5)}),
        ("lion", {"betas": (0.5, 0.6), "maximize": True}),
    ],
)
def test_switched_in_the_run(backend: BackendCase, rule: str, changes: dict, dtype: torch.dtype) -> None:
    """In a group's dict, after state was made without it and with half of the groups as before: what is
    missing then is made then."""
    hyper = {"momentum": 0.9} if rule == "sgd" else {}
    pair = Lockstep(
        backend, rule, ([(7,), (3, 4)], {}), ([(9,)], {}), dtype=dtype, lr=0.1, k=2, weight_decay=0.1, **hyper
    )
    for _ in range(3):
        pair.step()
    pair.optimizer.param_groups[1].update(changes)
    pair.oracles[2].settings = dataclasses.replace(pair.oracles[2].settings, **changes)
    for _ in range(3):
        pair.step()


def test_pullback_switched_on_in_the_run(backend: BackendCase) -> None:
    """Its buffer is made then, and is a buffer of its own."""
    pair = Lockstep(backend, "adamw", ([(7,)], {}), lr=0.1, k=2)
    for _ in range(3):
        pair.step()
    (group,), (p,) = pair.optimizer.param_groups, pair.params
    group["pullback_momentum"] = "pullback"
    for _ in range(3):
        p.grad = torch.ones_like(p)
        pair.optimizer.step()
    state = pair.optimizer.state[p]
    assert state["cached_momentum"].data_ptr() != state["exp_avg"].data_ptr()
    assert torch.equal(state["cached_momentum"], state["exp_avg"])  # after a sync
    assert torch.isfinite(p).all()


@pytest.mark.parametrize("momentum_first", [True, False])
def test_momentum_may_be_switched(backend: BackendCase, momentum_first: bool) -> None:
    """A buffer that comes late starts as torch's SGD's does, and one that rests is taken up where it was."""
    values = (0.9, 0.0, 0.9) if momentum_first else (0.0, 0.9, 0.5)
    ours, theirs = (make_params([(6,)], torch.float64, device=backend.device) for _ in range(2))
    optimizer = make_optimizer("sgd", ours, backend, lr=0.1, momentum=values[0], k=3)
    reference = composed("sgd", theirs, lr=0.1, momentum=values[0], k=3)
    generator = seeded(1)
    for momentum in values:
        optimizer.param_groups[0]["momentum"] = reference.optimizer.param_groups[0]["momentum"] = momentum
        for _ in range(4):
            (g,) = make_grads(ours, generator=generator)
            ours[0].grad, theirs[0].grad = g, g.clone()
            optimizer.step()
            reference.step()
            np.testing.assert_allclose(to_numpy(ours[0]), to_numpy(theirs[0]), rtol=1e-14, atol=1e-14)


# ------------------------------------------------------------------------------------------------------------
# against the papers and against torch


@pytest.mark.parametrize(("rule", "hyper"), CASES)
def test_fp64_is_the_textbook(backend: BackendCase, rule: str, hyper: dict) -> None:
    params = make_params(dtype=torch.float64, device=backend.device)
    textbooks = [Textbook(to_numpy(p), oracle_settings(rule, **hyper)) for p in params]
    optimizer = make_optimizer(rule, params, backend, **hyper)
    generator = seeded(1)
    for _ in range(STEPS):
        for p, g, textbook in zip(params, make_grads(params, generator=generator), textbooks, strict=True):
            p.grad = g
            textbook.step(to_numpy(g))
        optimizer.step()
        for p, textbook in zip(params, textbooks, strict=True):
            np.testing.assert_allclose(to_numpy(p), textbook.theta, rtol=3e-15, atol=3e-15)
            slow = to_numpy(optimizer.state[p]["slow_param"])
            np.testing.assert_allclose(slow, textbook.phi, rtol=3e-15, atol=3e-15)


@pytest.mark.parametrize(("rule", "hyper"), [case for case in CASES if case.values[0] in TORCH_CLASSES])
def test_fp32_is_torch_with_a_manual_sync(backend: BackendCase, rule: str, hyper: dict) -> None:
    ours, theirs = (make_params([(40,), (3, 7)], device=backend.device) for _ in range(2))
    optimizer = make_optimizer(rule, ours, backend, **hyper)
    reference = composed(rule, theirs, **hyper)
    generator = seeded(1)
    for _ in range(STEPS):
        for p, q, g in zip(ours, theirs, make_grads(ours, generator=generator), strict=True):
            p.grad, q.grad = g, g.clone()
        optimizer.step()
        reference.step()
    for p, q in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(to_numpy(p), to_numpy(q), rtol=2e-5, atol=2e-5)
