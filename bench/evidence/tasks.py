"""The small networks that are trained: what each learns, of which size, and over which rule.

Sizes are such that one run of 20 stacked seeds takes some seconds on one core. Learning rates are where tuning begins,
not what anything is judged at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from bench.evidence import data
from bench.evidence.arms import RULES
from bench.evidence.data import Source
from bench.evidence.networks.autoencoders import Autoencoder, VariationalAutoencoder
from bench.evidence.networks.classifiers import ConvNet
from bench.evidence.networks.lstm import LSTM
from bench.evidence.networks.transformers import GPT, Masked
from bench.evidence.training import Task

WINDOW = 24
CODE = 16

_text: Callable[[], Source] = partial(data.windows, WINDOW)

_DIGITS = Task(
    "digits-cnn-adamw",
    RULES["adamw"],
    ConvNet(8, (8, 16, 32), (1, 2, 2)),
    data.digits,
    batch=32,
    steps=303,
    lr=4e-3,
    metrics=("accuracy",),
    curve=100,
    final=300,
    cost=0.2,
)
_FASHION = Task(
    "fashion-cnn-adamw",
    RULES["adamw"],
    ConvNet(28, (8, 16, 32), (2, 2, 2)),
    data.fashion,
    batch=32,
    steps=303,
    lr=4e-3,
    metrics=("accuracy",),
    curve=100,
    final=2000,
    cost=0.6,
)
_GPT = Task(
    "char-gpt", RULES["adamw"], GPT(data.VOCABULARY, 32, 2, 2, WINDOW), _text, batch=8, steps=303, lr=4e-3, cost=0.5
)

TASKS: tuple[Task, ...] = (
    replace(_DIGITS, name="digits-cnn-sgd", rule=RULES["sgd"], lr=0.05),
    _DIGITS,
    replace(_FASHION, name="fashion-cnn-sgd", rule=RULES["sgd"], lr=0.05),
    _FASHION,
    Task("char-lstm", RULES["adamw"], LSTM(data.VOCABULARY, 16, 40), _text, batch=16, steps=303, lr=8e-3, cost=0.5),
    _GPT,
    # Masked models first learn how frequent characters are, and stay there for a while; 600 steps leave that behind.
    Task(
        "masked-bert",
        RULES["adamw"],
        Masked(data.VOCABULARY, 32, 2, 2, 16),
        partial(data.windows, 16, 2),
        batch=16,
        steps=603,
        lr=4e-3,
        cost=0.9,
    ),
    Task(
        "conv-ae",
        RULES["adamw"],
        Autoencoder(data.PATCH, 8, CODE),
        data.patches,
        batch=16,
        steps=303,
        lr=4e-3,
        metrics=("psnr",),
    ),
    Task(
        "conv-vae",
        RULES["adamw"],
        VariationalAutoencoder(data.PATCH, 8, CODE),
        partial(data.patches, CODE),
        batch=16,
        steps=303,
        lr=4e-3,
        metrics=("psnr",),
    ),
    replace(_GPT, name="char-gpt-radam", rule=RULES["radam"], lr=8e-3),
    replace(_GPT, name="char-gpt-rmsprop", rule=RULES["rmsprop"], lr=4e-4),
    replace(_GPT, name="char-gpt-lion", rule=RULES["lion"], lr=1e-3),
    replace(_GPT, name="char-gpt-muon", rule=RULES["muon"], lr=8e-3, cost=2.0),
)
