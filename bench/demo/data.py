"""The two data sets of the demo, both real and both on the machine already: nothing is downloaded.

Text: the source of the Python standard library that runs the demo, as bytes. Images: scikit-learn's
handwritten digits. The text is that of the Python that runs, so losses compare only where that is the same.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]

# Tests are dull repetition, and site-packages is whatever happens to be installed.
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})
HELD_OUT_EVERY = 10


@dataclass(frozen=True)
class Data:
    """What a task trains and is judged on.

    Attributes:
        train: endless batches (inputs, targets); two calls of ``batches`` with one seed give the same ones.
        held_out: batches of examples that no training batch holds.
        source: one line for the report: what it is and how much of it.
    """

    train: Iterator[Batch]
    held_out: list[Batch]
    source: str


def stdlib_text(*, context: int, batch: int, seed: int, held_out_batches: int, max_bytes: int = 6 << 20) -> Data:
    """The standard library's own source as bytes, cut into windows at random places.

    Every tenth file is held out whole: windows held out of a file would share names and idioms with the
    training windows beside them.

    Args:
        context: bytes a window feeds to the model; the targets are the same bytes one further on.
        batch: windows of a batch.
        seed: of the windows' places.
        held_out_batches: how many held-out batches, evenly spread over the held-out text.
        max_bytes: cap on the text taken, in the order of the files' relative paths.

    Raises:
        FileNotFoundError: the interpreter keeps no source (an embedded Python with a zipped library).
    """
    train, held_out, files = read_stdlib(Path(sysconfig.get_paths()["stdlib"]), max_bytes)
    window = context + 1
    spread = torch.linspace(0, len(held_out) - window, held_out_batches * batch).long().view(-1, batch)
    size = (len(train) + len(held_out)) / 1e6
    source = f"{files} files of the standard library, {size:.1f} MB, every {HELD_OUT_EVERY}th file held out"
    return Data(_random_windows(train, window, batch, seed), [_windows(held_out, at, window) for at in spread], source)


def read_stdlib(root: Path, max_bytes: int) -> tuple[Tensor, Tensor, int]:
    """Training bytes, held-out bytes (uint8, 1-D) and the number of files, in order of the relative paths."""
    paths = sorted(
        (path.relative_to(root).as_posix(), path)
        for path in root.rglob("*.py")
        if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    )
    train, held_out = bytearray(), bytearray()
    files = 0
    for _, path in paths:
        text = path.read_bytes()
        if len(train) + len(held_out) + len(text) > max_bytes:
            break
        (held_out if files % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else train).extend(text)
        files += 1
    if not held_out:
        raise FileNotFoundError(
            f"the standard library at {root} should hold at least {HELD_OUT_EVERY} .py files, found {files}"
        )
    return torch.frombuffer(train, dtype=torch.uint8), torch.frombuffer(held_out, dtype=torch.uint8), files


def digits(*, batch: int, seed: int, held_out: int = 360) -> Data:
    """scikit-learn's 1797 digits: images float32 (batch, 1, 8, 8) in [0, 1], classes int64 (batch,).

    Args:
        batch: images of a batch.
        seed: of the order of the training images; which images are held out never changes.
        held_out: how many images are held out, in one batch.
    """
    # Not above: it takes seconds, and the text needs none of it.
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    raw = load_digits()
    images = torch.from_numpy(raw.images).float().div_(16).unsqueeze(1)
    classes = torch.from_numpy(raw.target).long()
    # The set goes writer by writer: its last fifth alone would be another distribution.
    shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, classes = images[shuffled], classes[shuffled]
    source = f"{len(images)} handwritten digits of 8x8 pixels, {held_out} held out"
    train = _epochs(images[held_out:], classes[held_out:], batch, seed)
    return Data(train, [(images[:held_out], classes[:held_out])], source)


def _random_windows(text: Tensor, window: int, batch: int, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield _windows(text, torch.randint(len(text) - window + 1, (batch,), generator=generator), window)


def _windows(text: Tensor, starts: Tensor, window: int) -> Batch:
    cut = torch.stack([text[start : start + window] for start in starts.tolist()]).long()
    return cut[:, :-1], cut[:, 1:]


def _epochs(images: Tensor, classes: Tensor, batch: int, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(images), generator=generator)
        # The rest of an epoch that fills no batch is left out of it.
        for at in range(0, len(order) - batch + 1, batch):
            chosen = order[at : at + batch]
            yield images[chosen], classes[chosen]
