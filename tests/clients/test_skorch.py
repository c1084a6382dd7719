"""skorch: the class as `optimizer`, its arguments as `optimizer__...`."""

from __future__ import annotations

import pytest
import torch
from plain import SETTINGS, by_hand, make_batches, make_model, same_weights, weights
from torch import nn

from lookahead_fused import LookaheadAdamW

skorch = pytest.importorskip("skorch")


def test_a_net_fits_and_predicts_on_the_slow_weights() -> None:
    x, y = (torch.cat(parts) for parts in zip(*make_batches(), strict=True))
    net = skorch.NeuralNetRegressor(
        make_model(),
        criterion=nn.MSELoss,
        optimizer=LookaheadAdamW,
        lr=SETTINGS["lr"],
        optimizer__k=SETTINGS["k"],
        max_epochs=1,
        batch_size=8,
        iterator_train__shuffle=False,
        train_split=None,
        verbose=0,
    )
    net.fit(x, y)
    trained, slow = by_hand()
    assert type(net.optimizer_) is LookaheadAdamW
    assert same_weights(weights(net.module_), trained)
    with net.optimizer_.slow_weights():
        assert same_weights(weights(net.module_), slow)
        on_slow = net.predict(x)
    assert (on_slow != net.predict(x)).any()
