"""Memory: what lies where. Any size, address, stride and gradient dtype gives the numbers that plain tensors
give; nothing is written outside a tensor; tensors may be moved, replaced and dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    DTYPE_NAMES,
    BackendCase,
    Lockstep,
    UnfusedRMSprop,
    assert_unchanged,
    can_set_grad_dtype,
    check_message,
    make_grads,
    make_optimizer,
    make_params,
    make_tensor,
    same_tensor_bits,
    seeded,
    set_grad,
    snapshot,
    to_numpy,
)
from torch import Tensor

import lookahead_fused

LIVELY = {
    "adamw": {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True, "pullback_momentum": "pullback", "k": 2},
    "sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "pullback_momentum": "pullback", "k": 2},
    "wrapped-adamw": {"lr": 0.1, "weight_decay": 0.1, "pullback_momentum": "reset", "k": 2},
}
# The dtypes of a wrapped base's 16-bit state are torch's business.
RULES_AND_DTYPES = [
    pytest.param(rule, dtype, id=f"{rule}-{str(dtype).removeprefix('torch.')}")
    for rule in LIVELY
    for dtype in DTYPE_NAMES
    if dtype.itemsize > 2 or not rule.startswith("wrapped")
]
GUARD = 77.0  # exact in every dtype

# A tensor's place in a larger buffer: the buffer's shape, and the view that the tensor is.
VIEWS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "offset 1": ((40,), lambda b: b[1:34]),
    "offset 3": ((70,), lambda b: b[3:67]),
    "one element": ((9,), lambda b: b[5]),
    "empty": ((9,), lambda b: b[4:4]),
    "every second": ((40,), lambda b: b[1::2]),
    "every third, the last excluded": ((50,), lambda b: b[0:40:3]),
    "a column": ((11, 5), lambda b: b[:, 2]),
    "columns": ((11, 8), lambda b: b[:, 1:6]),
    "rows": ((11, 8), lambda b: b[2:9]),
    "a transpose": ((6, 9), lambda b: b.t()),
    "a transpose of columns": ((6, 9), lambda b: b[:, 2:7].t()),
    "a permutation": ((3, 4, 5), lambda b: b.permute(2, 0, 1)),
    "an inner box": ((6, 7, 8), lambda b: b[1:4, 2:6, 3:7]),
    "a permuted inner box": ((6, 7, 8), lambda b: b[1:4, 2:6, 3:7].permute(1, 2, 0)),
    "channels last": ((2, 5, 6, 3), lambda b: b.permute(0, 3, 1, 2)),
    "channels last, cropped": ((2, 5, 6, 3), lambda b: b.permute(0, 3, 1, 2)[:, :, 1:4, 2:5]),
    "a dimension of size 1": ((4, 1, 6), lambda b: b.transpose(0, 1)),
    "a diagonal": ((7, 7), lambda b: b.diagonal()),
    "a band": ((7, 9), lambda b: b.as_strided((6, 3), (9, 2), 4)),
}


def embedded(name: str, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A buffer full of guards, the view of it that holds the values, and which elements are guards."""
    shape, view = VIEWS[name]
    buffer = torch.full(shape, GUARD, dtype=dtype, device=device)
    inside = torch.zeros(shape, dtype=torch.bool)
    view(inside).fill_(True)
    tensor = view(buffer)
    tensor.copy_(make_tensor(tensor.shape, dtype, generator=seeded(seed)))
    return buffer, tensor, ~inside.to(device)


# What torch has complex numbers of.
COMPLEX_PARTS = (torch.float32, torch.float64)


def gradient_layouts(grad: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same values, laid out otherwise."""
    wide = torch.full((*grad.shape, 2), GUARD, dtype=dtype, device=grad.device)
    wide[..., 1] = grad
    layouts = {
        "contiguous": grad.contiguous().clone(memory_format=torch.contiguous_format),
        "strided": wide[..., 1],
        # The sign is a bit of the tensor, not in its memory; of one element this view is as dense as any.
        "negated": torch.complex(torch.zeros_like(grad), -grad).conj().imag if dtype in COMPLEX_PARTS else grad,
    }
    if grad.dim() > 1:
        dims = tuple(reversed(range(grad.dim())))
        layouts["reversed"] = grad.permute(dims).contiguous().permute(dims)
    if grad.dim() == 4:
        layouts["channels last"] = grad.contiguous(memory_format=torch.channels_last)
    return layouts


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [case for case in RULES_AND_DTYPES if case.values[1] in (torch.float32, torch.bfloat16)],
)
@pytest.mark.parametrize("view", VIEWS)
def test_views(backend: BackendCase, rule: str, view: str, dtype: torch.dtype) -> None:
    """Parameters that are views of a larger buffer, under gradients of every layout: the numbers are right,
    the buffer's other elements are never written, gradients neither."""
    count = len(gradient_layouts(embedded(view, dtype, backend.device)[1], dtype))
    places = [embedded(view, dtype, backend.device, seed=i) for i in range(count)]
    params = [torch.nn.Parameter(tensor) for _, tensor, _ in places]
    for p, (_, tensor, _) in zip(params, places, strict=True):
        same_place = p.data_ptr() == tensor.data_ptr() and p.stride() == tensor.stride()
        assert same_place, "not a view: proves nothing"
    pair = Lockstep(backend, rule, (params, {}), **LIVELY[rule])
    generator = seeded(5)
    for t in range(4):
        if t == 2:
            # Other weights come in between steps: a copy kept from the last step would bring the old ones back.
            for (_, tensor, _), oracle in zip(places, pair.oracles, strict=True):
                tensor.copy_(make_tensor(tensor.shape, dtype, generator=generator))
                oracle.param = to_numpy(tensor)
        (values,) = make_grads(params[:1], generator=generator)
        grads = list(gradient_layouts(values, dtype).values())
        copies = [g.clone() for g in grads]
        pair.step(grads)
        for (buffer, _, guards), g, c in zip(places, grads, copies, strict=True):
            assert (buffer[guards] == GUARD).all(), "written outside the tensor"
            assert same_tensor_bits(g, c), "the gradient was written"
    pair.optimizer.sync()
    for oracle in pair.oracles:
        oracle.sync()
    pair.check()
    for buffer, _, guards in places:
        assert (buffer[guards] == GUARD).all(), "written outside the tensor by sync()"


@pytest.mark.parametrize("rule", LIVELY)
def test_channels_last(backend: BackendCase, rule: str) -> None:
    """As a convolution makes them: parameter or gradient channels_last, the other one contiguous."""
    generator = seeded(0)
    for param_last in (False, True):
        for grad_last in (False, True):
            formats = [torch.channels_last if last else torch.contiguous_format for last in (param_last, grad_last)]
            values = make_tensor((4, 3, 5, 5), generator=generator, device=backend.device)
            p = torch.nn.Parameter(values.contiguous(memory_format=formats[0]))
            pair = Lockstep(backend, rule, ([p], {}), **LIVELY[rule])
            for _ in range(3):
                pair.step([g.contiguous(memory_format=formats[1]) for g in make_grads([p], generator=generator)])
            assert p.is_contiguous(memory_format=formats[0])


@pytest.mark.parametrize("rule", LIVELY)
def test_a_gradient_may_change_its_layout(backend: BackendCase, rule: str) -> None:
    """From step to step: what was found out about the first one does not hold for the next."""
    p = torch.nn.Parameter(make_tensor((2, 3, 4, 5), generator=seeded(0), device=backend.device))
    pair = Lockstep(backend, rule, ([p], {}), **LIVELY[rule])
    generator = seeded(1)
    for name in ("contiguous", "channels last", "strided", "negated", "contiguous", "reversed"):
        (values,) = make_grads([p], generator=generator)
        pair.step([gradient_layouts(values, torch.float32)[name]])


@pytest.mark.parametrize(("rule", "dtype"), RULES_AND_DTYPES)
def test_expanded_gradients(backend: BackendCase, rule: str, dtype: torch.dtype) -> None:
    """`x.sum().backward()` leaves a gradient of one element under all of them."""
    params = make_params([(33,), (4, 6), (3, 1, 5)], dtype, device=backend.device)
    pair = Lockstep(backend, rule, (params, {}), **LIVELY[rule])
    for value in (0.5, -2.0, 1.0):
        grads = [torch.full((), value, dtype=dtype, device=backend.device).expand_as(p) for p in params]
        grads[1] = make_tensor((4, 1), dtype, generator=seeded(3), device=backend.device).expand(4, 6)
        pair.step(grads)


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_neighbours_in_one_storage(backend: BackendCase, rule: str, dtype: torch.dtype) -> None:
    """All parameters, and all gradients, are slices of one flat buffer at odd offsets, as FSDP1 and DDP lay
    them. Every second one has no gradient and must not move, nor may the gaps between them."""
    sizes = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 127, 0, 4]
    flat, flat_grad = (torch.full((sum(sizes) + len(sizes),), GUARD, dtype=dtype) for _ in range(2))
    flat, flat_grad = flat.to(backend.device), flat_grad.to(backend.device)
    params, grads, at = [], [], 0
    gaps = torch.ones_like(flat, dtype=torch.bool)
    for n in sizes:
        at += 1  # a gap of one element
        gaps[at : at + n] = False
        flat[at : at + n] = make_tensor((n,), dtype, generator=seeded(n))
        params.append(torch.nn.Parameter(flat[at : at + n]))
        grads.append(flat_grad[at : at + n])
        at += n
    pair = Lockstep(backend, rule, (params, {}), **LIVELY[rule])
    for t in range(3):
        for g in grads:
            g.copy_(make_tensor(g.shape, dtype, generator=pair.generator))
        pair.step([g if (i + t) % 2 else None for i, g in enumerate(grads)])
        assert (flat[gaps] == GUARD).all()
        assert (flat_grad[gaps] == GUARD).all()


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_many_small_parameters(backend: BackendCase, rule: str) -> None:
    """More tensors than any fixed argument list holds, most of them tiny, some empty."""
    shapes = [(i % 23,) for i in range(700)]
    pair = Lockstep(backend, rule, (shapes[:350], {}), (shapes[350:], {"lr": 0.3}), **LIVELY[rule])
    for _ in range(2):
        pair.step()


@pytest.mark.parametrize("rule", ["adamw", "sgd", "wrapped-adamw", "external"])
@pytest.mark.parametrize("strides", [(0, 0), (0, 1), (3, 0), (1, 1)])
def test_an_empty_parameter_of_any_strides(backend: BackendCase, rule: str, strides: tuple[int, int]) -> None:
    """As NumPy, and an empty shard, may give it: no two of its elements share memory, since there are none."""
    empty = torch.nn.Parameter(torch.empty(1, device=backend.device).as_strided((0, 3), strides))
    p, q = (torch.nn.Parameter(torch.ones(3, device=backend.device)) for _ in range(2))

    def make(params: list[torch.nn.Parameter]) -> Any:
        if rule == "external":
            return lookahead_fused.Lookahead(UnfusedRMSprop(params, lr=0.1), k=2, backend=backend.name)
        return make_optimizer(rule, params, backend, lr=0.1, k=2)

    optimizer, alone = make([empty, p]), make([q])
    for _ in range(3):
        empty.grad = torch.empty(1, device=backend.device).as_strided((0, 3), strides)
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        optimizer.step()
        alone.step()
    for o in (optimizer, alone):
        with o.slow_weights():
            pass
        o.sync()
        o.load_state_dict(o.state_dict())
        o.step()
    assert same_tensor_bits(p, q)
    count = "lookahead_step" if rule == "external" else "step"
    assert optimizer.state[empty][count].item() == 4


def test_nothing_to_do(backend: BackendCase) -> None:
    """Only empty tensors; no gradient at all: a step is a step of nothing."""
    empty = make_params([(0,), (0, 4), (3, 0)], device=backend.device)
    pair = Lockstep(backend, "adamw", (empty, {}), k=2)
    pair.step([None] * 3)
    pair.step()
    pair.step()
    pair.optimizer.sync()


@pytest.mark.skipif(not can_set_grad_dtype(), reason="this torch keeps gradients in their parameter's dtype")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_gradients_of_views(backend: BackendCase, dtype: torch.dtype) -> None:
    """Parameter and gradient differ in dtype and in layout at once."""
    for view in ("columns", "a transpose", "channels last", "offset 1", "every second"):
        buffer, tensor, guards = embedded(view, dtype, backend.device)
        pair = Lockstep(backend, "adamw", ([torch.nn.Parameter(tensor)], {}), **LIVELY["adamw"])
        for _ in range(3):
            (values,) = make_grads(pair.params, generator=pair.generator, dtype=torch.float32)
            for grad in gradient_layouts(values, torch.float32).values():
                pair.step([grad])
        assert (buffer[guards] == GUARD).all()


@pytest.mark.skipif(not can_set_grad_dtype(), reason="this torch keeps gradients in their parameter's dtype")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_any_floating_gradient(backend: BackendCase, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    """A gradient of yet another floating dtype is converted or refused, never misread. The values are exact
    in all of them."""
    pair = Lockstep(backend, "adamw", ([(5,), (3, 4)], {}), dtype=dtype, **LIVELY["adamw"])
    for t in range(3):
        grads = [
            (torch.arange(p.numel()).reshape(p.shape) - t * 3).to(backend.device, grad_dtype) / 4 for p in pair.params
        ]
        for p, g in zip(pair.params, grads, strict=True):
            set_grad(p, g)
        before = snapshot(pair.optimizer)
        try:
            pair.follow(grads)
        except TypeError as error:
            check_message(error, "grad", str(grad_dtype).removeprefix("torch."))
            assert_unchanged(before, snapshot(pair.optimizer))
            assert grad_dtype not in (dtype, torch.float32) or dtype == torch.float64
            break


def test_set_grad_of_another_dtype_is_what_it_says() -> None:
    """The helper that the fp32-gradient tests stand on."""
    if not can_set_grad_dtype():
        pytest.skip("this torch keeps gradients in their parameter's dtype")
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    set_grad(p, torch.full((3,), 1 + 2.0**-20))
    assert p.grad is not None
    assert p.grad.dtype == torch.float32
    assert p.grad[0].item() == 1 + 2.0**-20
