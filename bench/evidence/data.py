"""Data for small networks, all of it on the machine already: nothing is downloaded.

Every source has three fixed parts: training, validation (curves and tuning) and test (what is reported). Batches are
stacked, [R, B, ...]: those of a seed come from a generator of its own, so that all arms see the same ones.
"""

from __future__ import annotations

import gzip
import shutil
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Generator, Tensor

from bench.demo.data import read_stdlib
from bench.evidence.networks.stack import Batch

DATASETS = Path("/usr/share/datasets")  # where Debian's dataset-* packages put their files
VOCABULARY = 64
OTHER, HIDDEN = VOCABULARY - 2, VOCABULARY - 1  # any rarer character; one that is hidden from a masked model
TEXT_LIMIT = 2 << 20
TEXT_BLOCK = 1 << 16
PATCH = 16

Part = Literal["validation", "test"]


class NotHere(Exception):
    """The machine does not have these data; the message says what would bring them."""


class Source(Protocol):
    """Where a task's batches come from."""

    @property
    def name(self) -> str:
        """What data they are, in a few words."""
        ...

    def batches(self, seeds: Sequence[int], size: int) -> Iterator[Batch]:
        """Endless training batches [R, size, ...], of each seed its own."""
        ...

    def held_out(self, part: Part, size: int, limit: int) -> list[Batch]:
        """At most `limit` examples in batches [1, B, ...] of at most `size`, the same ones in each call."""
        ...


@dataclass(frozen=True)
class Images:
    """Grey images [N, 1, H, W] from 0 to 1 with classes [N], of each part."""

    name: str
    parts: dict[str, tuple[Tensor, Tensor]]

    def batches(self, seeds: Sequence[int], size: int) -> Iterator[Batch]:
        images, classes = self.parts["train"]
        for chosen in _epochs(len(images), seeds, size):
            yield images[chosen], classes[chosen]

    def held_out(self, part: Part, size: int, limit: int) -> list[Batch]:
        images, classes = (whole[:limit].unsqueeze(0) for whole in self.parts[part])
        return list(zip(_pieces(images, size), _pieces(classes, size), strict=True))


@dataclass(frozen=True)
class Patches:
    """Colour patches [N, 3, PATCH, PATCH] from 0 to 1; with `code`, beside each as many normal numbers."""

    name: str
    parts: dict[str, Tensor]
    code: int = 0

    def batches(self, seeds: Sequence[int], size: int) -> Iterator[Batch]:
        patches, generators = self.parts["train"], _generators(seeds, stream=2)
        for chosen in _epochs(len(patches), seeds, size):
            yield self._with_noise(patches[chosen], generators)

    def held_out(self, part: Part, size: int, limit: int) -> list[Batch]:
        generators = [torch.Generator().manual_seed(0)]
        return [self._with_noise(some, generators) for some in _pieces(self.parts[part][:limit].unsqueeze(0), size)]

    def _with_noise(self, patches: Tensor, generators: Sequence[Generator]) -> Batch:
        if not self.code:
            return (patches,)
        shape = (patches.shape[1], self.code)
        return patches, torch.stack([torch.randn(shape, generator=generator) for generator in generators])


@dataclass(frozen=True)
class Windows:
    """Windows of text, [N, length + 1] characters; for a masked model [N, length], with `hide` of them hidden."""

    name: str
    parts: dict[str, Tensor]
    length: int
    hide: int = 0

    def batches(self, seeds: Sequence[int], size: int) -> Iterator[Batch]:
        text, generators = self.parts["train"], _generators(seeds, stream=1)
        while True:
            drawn = [torch.randint(self._starts(text), (size,), generator=generator) for generator in generators]
            yield self._cut(text, torch.stack(drawn), generators)

    def held_out(self, part: Part, size: int, limit: int) -> list[Batch]:
        text, generators = self.parts[part], [torch.Generator().manual_seed(0)]
        spread = torch.linspace(0, self._starts(text) - 1, limit).long().unsqueeze(0)
        return [self._cut(text, some, generators) for some in _pieces(spread, size)]

    def _starts(self, text: Tensor) -> int:
        return len(text) - self.length

    def _cut(self, text: Tensor, starts: Tensor, generators: Sequence[Generator]) -> Batch:
        length = self.length if self.hide else self.length + 1
        windows = text[starts.unsqueeze(-1) + torch.arange(length)]
        if not self.hide:
            return (windows,)
        order = [torch.rand(windows.shape[1:], generator=generator).argsort(-1) for generator in generators]
        places = torch.stack(order)[..., : self.hide]
        return windows.scatter(2, places, HIDDEN), places, windows.gather(2, places)


@cache
def digits() -> Images:
    """scikit-learn's 1797 digits of 8x8 pixels: 1197 to train, 300 for validation, 300 for the test."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    raw = load_digits()
    images = torch.from_numpy(raw.images).float().div_(16).unsqueeze(1)
    classes = torch.from_numpy(raw.target).long()
    # The set goes writer by writer: its end alone would be another distribution.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    places = {"test": order[:300], "validation": order[300:600], "train": order[600:]}
    return Images("1797 digits (scikit-learn)", {part: (images[at], classes[at]) for part, at in places.items()})


@cache
def fashion(root: Path = DATASETS) -> Images:
    """Fashion-MNIST: 55,000 images of 28x28 pixels to train, 5,000 more for validation, and its own test of 10,000.

    Raises:
        NotHere: The files are not under `root`.
    """
    folder = root / "fashion-mnist"
    if not (folder / "train-images-idx3-ubyte.gz").exists():
        raise NotHere("Fashion-MNIST is not here; Debian has it in the package dataset-fashion-mnist")
    images, classes = _idx(folder, "train")
    return Images(
        "Fashion-MNIST (Debian)",
        {
            "train": (images[:-5_000], classes[:-5_000]),
            "validation": (images[-5_000:], classes[-5_000:]),
            "test": _idx(folder, "t10k"),
        },
    )


@cache
def text(command: str = "bible") -> tuple[str, dict[str, Tensor]]:
    """What text it is, and its parts as codes [N]: the King James Bible by Debian's `bible`, else Python's own library.

    The codes are those of the 62 most frequent characters of the training part, OTHER for the rest.
    """
    program = shutil.which(command)
    if program:
        # Without pretty-printing a line is a verse, after its reference.
        printed = subprocess.run([program, "-f", "gen1:1-rev22:21"], capture_output=True, check=True, timeout=60)
        lines = printed.stdout.decode("ascii", "replace").splitlines()
        whole = "\n".join(line.partition(" ")[2] for line in lines).encode()
        if len(whole) < TEXT_LIMIT:
            raise RuntimeError(f"{program} prints {len(whole)} characters, which are not the Bible's 4 million")
        blocks = [whole[at : at + TEXT_BLOCK] for at in range(0, len(whole), TEXT_BLOCK)]
        name = "King James Bible (Debian)"
        raw = {
            "train": b"".join(block for i, block in enumerate(blocks) if i % 10 < 8),
            "validation": b"".join(blocks[8::10]),
            "test": b"".join(blocks[9::10]),
        }
    else:
        train, held_out, _ = read_stdlib(Path(sysconfig.get_paths()["stdlib"]), TEXT_LIMIT)
        name = "source of Python's standard library"
        half = len(held_out) // 2
        raw = {"train": _bytes(train), "validation": _bytes(held_out[:half]), "test": _bytes(held_out[half:])}
    frequent = [byte for byte, _ in Counter(raw["train"]).most_common(OTHER)]
    codes = np.full(256, OTHER)
    codes[frequent] = np.arange(len(frequent))
    return name, {part: torch.from_numpy(codes[np.frombuffer(raw[part], np.uint8)]) for part in raw}


def windows(length: int, hide: int = 0) -> Windows:
    """Windows of `text`."""
    name, parts = text()
    return Windows(name, parts, length, hide)


@cache
def patches(code: int = 0) -> Patches:
    """Patches of photographs, of scikit-image where it is installed and else of scikit-learn alone.

    Squares of 4x4 patches are in one part each: a patch's neighbours are mostly in its own.
    """
    name, photographs = _photographs()
    squares: list[Tensor] = []
    for photograph in photographs:
        square = 4 * PATCH
        high, wide = (size // square for size in photograph.shape[1:])
        whole = photograph[:, : high * square, : wide * square]
        cut = whole.reshape(3, high, 4, PATCH, wide, 4, PATCH).permute(1, 4, 2, 5, 0, 3, 6)
        squares += cut.reshape(high * wide, 16, 3, PATCH, PATCH).unbind()
    order = torch.randperm(len(squares), generator=torch.Generator().manual_seed(0)).tolist()
    tenth = len(squares) // 10
    places = {"test": order[:tenth], "validation": order[tenth : 2 * tenth], "train": order[2 * tenth :]}
    parts = {}
    for part, at in places.items():
        found = torch.cat([squares[i] for i in at])
        found = found[found.flatten(1).std(1) > 0]  # black skies are alike, and teach nothing
        # The first ones of a part are to be a sample of it.
        parts[part] = found[torch.randperm(len(found), generator=torch.Generator().manual_seed(1))]
    return Patches(name, parts, code)


def _photographs() -> tuple[str, list[Tensor]]:
    from sklearn.datasets import load_sample_images

    pictures = list(load_sample_images().images)
    name = "photographs (scikit-learn)"
    try:
        from skimage import data  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        pass
    else:
        pictures += [getattr(data, picture)() for picture in ("astronaut", "chelsea", "coffee")]
        name = "photographs (scikit-image, scikit-learn)"
    return name, [torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255 for picture in pictures]


def _idx(folder: Path, prefix: str) -> tuple[Tensor, Tensor]:
    """Images and classes of two files in the idx format: a head of 16 and of 8 bytes, then a byte a value."""
    images = np.frombuffer(gzip.decompress((folder / f"{prefix}-images-idx3-ubyte.gz").read_bytes()), np.uint8, -1, 16)
    classes = np.frombuffer(gzip.decompress((folder / f"{prefix}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, -1, 8)
    return (
        torch.from_numpy(images.astype(np.float32) / 255).view(-1, 1, 28, 28),
        torch.from_numpy(classes.astype(np.int64)),
    )


def _epochs(count: int, seeds: Sequence[int], size: int) -> Iterator[Tensor]:
    """Places [R, size] below `count`, of each seed in an order of its own; the rest of an epoch is left out."""
    generators = _generators(seeds, stream=1)
    while True:
        orders = torch.stack([torch.randperm(count, generator=generator) for generator in generators])
        yield from _pieces(orders[:, : count // size * size], size)


def _pieces(whole: Tensor, size: int) -> list[Tensor]:
    """[R, N, ...] in parts of `size` of the N."""
    return [whole[:, at : at + size] for at in range(0, whole.shape[1], size)]


def _generators(seeds: Sequence[int], stream: int) -> list[Generator]:
    """Others than those that a network starts from."""
    return [torch.Generator().manual_seed(stream * 1_000_000_007 + seed) for seed in seeds]


def _bytes(part: Tensor) -> bytes:
    return part.numpy().tobytes()
