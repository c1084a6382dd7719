"""The sides of the benchmarks of GPA compute the same."""

from __future__ import annotations

from typing import Any

import torch

import lookahead_fused
from bench.suites import averaging
from bench.suites.family import adamw
from lookahead_fused.bench import parameters
from lookahead_fused.bench.opponents import HYPERPARAMETERS


def run(step: Any, params: list[torch.nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        for p in params:
            assert p.grad is not None
            p.grad.copy_(torch.randn(p.shape, generator=generator))
        step()


def opponents(
    params: list[torch.nn.Parameter], hyper: dict[str, Any]
) -> tuple[averaging.PublishedGpa, averaging.ForeachGpa]:
    return (
        averaging.PublishedGpa(params, **hyper, **averaging.GPA),
        averaging.ForeachGpa(parameters.twin(params), **averaging.GPA),
    )


def test_both_forms_of_gpa_are_the_definition() -> None:
    """y and z against x, y and z written out in fp64, with AdamW's step on z."""
    params = parameters.make(parameters.Case("", ((3, 4), (5,))))
    published, foreach = opponents(params, HYPERPARAMETERS["adamw"])
    z = [torch.nn.Parameter(p.detach().double()) for p in params]
    x = [p.detach().clone() for p in z]
    base = adamw(z)
    train, evaluate = averaging.GPA["train_interp"], averaging.GPA["eval_interp"]
    y: list[torch.Tensor] = []

    def step() -> None:
        published.step()
        foreach.step()
        for own, p in zip(z, params, strict=True):
            assert p.grad is not None
            own.grad = p.grad.double()
        base.step()
        x[:] = [evaluate * a + (1 - evaluate) * b.detach() for a, b in zip(x, z, strict=True)]
        y[:] = [train * a + (1 - train) * b.detach() for a, b in zip(x, z, strict=True)]

    run(step, params)
    for exact, one, other in zip(y, published.params, foreach.weights, strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other.double(), exact, rtol=1e-5, atol=1e-6)
    for exact, one, other in zip(z, published.z, foreach.z, strict=True):
        torch.testing.assert_close(one.double(), exact.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other.double(), exact.detach(), rtol=1e-5, atol=1e-6)


def test_ours_is_the_published_gpa() -> None:
    params = parameters.make(parameters.Case("", ((3, 4), (5,))))
    published = averaging.PublishedGpa(params, **HYPERPARAMETERS["adamw"], **averaging.GPA)
    own = parameters.twin(params)
    ours = lookahead_fused.GPA(adamw(own), **averaging.GPA)

    def step() -> None:
        published.step()
        ours.step()

    run(step, params)
    for one, other in zip(own, params, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
