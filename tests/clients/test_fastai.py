"""fastai: `OptimWrapper` around the class."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from plain import SETTINGS, by_hand, make_batches, make_model, same_weights, weights
from torch import nn

from lookahead_fused import LookaheadAdamW

learner = pytest.importorskip("fastai.learner")
optimizer = pytest.importorskip("fastai.optimizer")
data = pytest.importorskip("fastai.data.core")
progress = pytest.importorskip("fastai.callback.progress")  # gives learners no_bar()


def test_a_learner_fits_and_validates_on_the_slow_weights() -> None:
    loader: Any = torch.utils.data.DataLoader(make_batches(), batch_size=None)
    model = make_model()
    learn = learner.Learner(
        data.DataLoaders(loader, loader),
        model,
        loss_func=nn.MSELoss(),
        opt_func=partial(optimizer.OptimWrapper, opt=LookaheadAdamW, k=SETTINGS["k"]),
        lr=SETTINGS["lr"],
    )
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, wd=0.01)
    trained, slow = by_hand()
    assert type(learn.opt.opt) is LookaheadAdamW
    assert same_weights(weights(model), trained)
    with learn.opt.opt.slow_weights(), learn.no_bar(), learn.no_logging():
        assert same_weights(weights(model), slow)
        on_slow = learn.validate()[0]
    with learn.no_bar(), learn.no_logging():
        assert learn.validate()[0] != on_slow
