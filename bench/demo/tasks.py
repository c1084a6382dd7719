"""The two tasks of the demo: which networks, on which data, for how long."""

from __future__ import annotations

from functools import partial

from bench.demo import data
from bench.demo.models import GPT, ConvNet
from bench.demo.runs import SEED, Task

CONTEXT = 64


def tasks(quick: bool, seed: int = SEED) -> list[Task]:
    """The two tasks; ``quick`` shortens the training and nothing else, so that times stay comparable.

    Args:
        seed: of the order of the training data.
    """
    return [
        Task(
            key="gpt",
            title="GPT over the bytes of Python's standard library",
            model=partial(GPT, width=256, layers=6, heads=8, context=CONTEXT),
            data=partial(data.stdlib_text, context=CONTEXT, batch=8, seed=seed, held_out_batches=8),
            steps=44 if quick else 199,
            lr=1e-3,
            weight_decay=0.1,
        ),
        Task(
            key="digits",
            title="Convolutional network on handwritten digits",
            model=ConvNet,
            data=partial(data.digits, batch=64, seed=seed),
            steps=104 if quick else 329,
            lr=2e-3,
            weight_decay=0.01,
            classifies=True,
        ),
    ]
