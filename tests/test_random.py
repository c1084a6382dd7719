"""Hyperparameters, shapes and gradients that nobody chose, to the bit."""

from __future__ import annotations

import hypothesis
import pytest
from helpers import DTYPE_NAMES, BackendCase, Lockstep, make_grads
from hypothesis import strategies as st

unit = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1))
beta = st.one_of(st.sampled_from([0.0, 0.5, 0.9, 0.999]), st.floats(0, 1, exclude_max=True))
small = st.one_of(st.just(0.0), st.floats(1e-10, 1.0))
shapes = st.lists(
    st.one_of(st.integers(0, 70).map(lambda n: (n,)), st.tuples(st.integers(0, 9), st.integers(0, 9)), st.just(())),
    min_size=1,
    max_size=4,
)
lookahead = {
    "lr": st.floats(0, 1),
    "weight_decay": small,
    "maximize": st.booleans(),
    "k": st.integers(1, 6),
    "alpha": unit,
    "pullback_momentum": st.sampled_from(["none", "pullback", "reset"]),
    "outer_momentum": st.one_of(st.just(0.0), st.floats(0, 1, exclude_max=True)),
    "outer_nesterov": st.booleans(),
    "master_weights": st.booleans(),
}
adam_hyper = st.fixed_dictionaries(
    {**lookahead, "betas": st.tuples(beta, beta), "eps": small, "amsgrad": st.booleans()}
)
sgd_hyper = st.one_of(
    st.fixed_dictionaries({**lookahead, "momentum": unit, "dampening": unit}),
    st.fixed_dictionaries({**lookahead, "momentum": st.floats(0.01, 1), "nesterov": st.just(True)}),
)


def run_random(backend: BackendCase, rule: str, data: st.DataObject, hyper: st.SearchStrategy) -> None:
    groups = [(data.draw(shapes), data.draw(hyper)) for _ in range(data.draw(st.integers(1, 2)))]
    dtype = data.draw(st.sampled_from(list(DTYPE_NAMES)))
    pair = Lockstep(backend, rule, *groups, dtype=dtype, seed=data.draw(st.integers(0, 9)))
    for _ in range(data.draw(st.integers(1, 5))):
        grads = make_grads(pair.params, generator=pair.generator, scale=10.0 ** data.draw(st.integers(-6, 6)))
        pair.step([None if data.draw(st.integers(0, 9)) == 0 else g for g in grads])


@pytest.mark.parametrize("rule", ["adamw", "adam"])
@hypothesis.given(data=st.data())
def test_any_adam(backend: BackendCase, rule: str, data: st.DataObject) -> None:
    run_random(backend, rule, data, adam_hyper)


@hypothesis.given(data=st.data())
def test_any_sgd(backend: BackendCase, data: st.DataObject) -> None:
    run_random(backend, "sgd", data, sgd_hyper)
