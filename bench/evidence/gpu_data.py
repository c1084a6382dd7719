"""The data of the GPU measurement: files of a folder that the user names, read as they are published.

- `cifar-10-batches-bin/` and `cifar-100-binary/`: CIFAR's binary versions. Their Python versions are pickles, which run
  whatever code is in them when they are read, and are refused.
- `train.bin` and `val.bin`: tokens of GPT-2 as 16-bit numbers, bare (nanoGPT) or after a header of 1024 bytes (llm.c);
  or one `*.txt`, whose bytes are the tokens, and whose last twentieth is held out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PIXELS = 3 * 32 * 32
GPT2_TOKENS = 50257
LLMC_MAGIC, LLMC_HEADER = 20240520, 1024
# Of CIFAR's training images, as the Cutout code has them.
MEAN = (125.3, 123.0, 113.9)
DEVIATION = (63.0, 62.1, 66.7)


class DataError(Exception):
    """What is wrong with the folder, in words for its owner."""


@dataclass(frozen=True)
class Images:
    """Images [N, 3, 32, 32] as bytes, and labels [N]."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Images:
        return Images(self.images.to(device), self.labels.to(device))

    def __getitem__(self, part: slice) -> Images:
        return Images(self.images[part], self.labels[part])


@dataclass(frozen=True)
class Cifar:
    """CIFAR-10 or CIFAR-100."""

    classes: int
    train: Images
    test: Images


@dataclass(frozen=True)
class Tokens:
    """A text: tokens of training and held-out part, and how many there may be."""

    train: NDArray[np.uint16]
    held_out: NDArray[np.uint16]
    vocabulary: int
    source: str


def find(folder: Path, dry: bool = False) -> dict[str, Cifar | Tokens]:
    """What there is of "cifar10", "cifar100" and "gpt" in a folder.

    Args:
        dry: the files are `generate`'s, with few images.

    Raises:
        DataError: There is no such folder, nothing of it in the folder, or a file is not what it should be.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    found: dict[str, Cifar | Tokens] = {}
    for name, classes in (("cifar10", 10), ("cifar100", 100)):
        cifar = read_cifar(folder, classes, DRY_IMAGES if dry else 10_000)
        if cifar is not None:
            found[name] = cifar
    tokens = read_tokens(folder)
    if tokens is not None:
        found["gpt"] = tokens
    if not found:
        raise DataError(
            f"{folder} has none of cifar-10-batches-bin/, cifar-100-binary/, train.bin with val.bin, and a *.txt"
        )
    return found


def read_cifar(folder: Path, classes: int, images: int = 10_000) -> Cifar | None:
    """CIFAR's binary version, or None where it is not in the folder.

    Args:
        images: of each of CIFAR-10's files and of CIFAR-100's test file; CIFAR-100's training file has five times that.
    """
    places = {10: ("cifar-10-batches-bin", "cifar-10-batches-py"), 100: ("cifar-100-binary", "cifar-100-python")}
    binary, pickled = places[classes]
    if not (folder / binary).is_dir():
        if (folder / pickled).is_dir():
            raise DataError(
                f"{folder / pickled} is CIFAR's Python version: pickles, which run whatever code is in them when they "
                f"are read. Get the binary version from the same page, whose folder is {binary}"
            )
        return None
    if classes == 10:
        parts = [_records(folder / binary / f"data_batch_{i}.bin", images, 1, classes) for i in range(1, 6)]
        test = _records(folder / binary / "test_batch.bin", images, 1, classes)
    else:
        parts = [_records(folder / binary / "train.bin", 5 * images, 2, classes)]
        test = _records(folder / binary / "test.bin", images, 2, classes)
    return Cifar(
        classes, Images(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])), test
    )


def _records(path: Path, count: int, labels: int, classes: int) -> Images:
    """Records of one or two labels, of which the last counts, and an image: red, green, blue, row by row."""
    record = labels + PIXELS
    size = _size(path)
    if size != count * record:
        raise DataError(f"{path} has {size} bytes, and {count} images of {record} are {count * record}")
    whole = np.fromfile(path, np.uint8).reshape(count, record)
    found = whole[:, labels - 1].astype(np.int64)
    if found.max() >= classes:
        raise DataError(f"{path} has a label {found.max()}, and there are {classes} classes")
    return Images(torch.from_numpy(whole[:, labels:].reshape(count, 3, 32, 32).copy()), torch.from_numpy(found))


def read_tokens(folder: Path) -> Tokens | None:
    """Tokens or text, or None where neither is in the folder."""
    train, held_out = folder / "train.bin", folder / "val.bin"
    if train.exists() or held_out.exists():
        return Tokens(_tokens(train), _tokens(held_out), GPT2_TOKENS, f"{train.name}, {held_out.name}")
    texts = sorted(folder.glob("*.txt"))
    if len(texts) > 1:
        raise DataError(f"{folder} has several texts, {', '.join(text.name for text in texts)}: leave one")
    if not texts:
        return None
    whole = np.fromfile(texts[0], np.uint8).astype(np.uint16)
    cut = len(whole) - len(whole) // 20
    return Tokens(whole[:cut], whole[cut:], 256, texts[0].name)


def _tokens(path: Path) -> NDArray[np.uint16]:
    size = _size(path)
    if size < LLMC_HEADER or size % 2:
        raise DataError(f"{path} has {size} bytes: too few, or no whole number of 16-bit tokens")
    header = np.fromfile(path, np.int32, count=3)
    begin = 0
    if header[0] == LLMC_MAGIC:
        begin = LLMC_HEADER
        if size != begin + 2 * int(header[2]):
            raise DataError(f"{path} has {size} bytes, and its header tells of {header[2]} tokens after {begin} bytes")
    found = np.memmap(path, np.uint16, mode="r", offset=begin)
    # In parts: it may be larger than memory.
    for start in range(0, len(found), 1 << 24):
        largest = int(found[start : start + (1 << 24)].max())
        if largest >= GPT2_TOKENS:
            raise DataError(f"{path} has a token {largest}, and GPT-2 has {GPT2_TOKENS}")
    return found


def _size(path: Path) -> int:
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    return path.stat().st_size


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops of images that are padded by 4, half of them mirrored: [B, 3, 32, 32], on the images' device."""
    count, device = len(images), images.device
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(0, 9, (2, count), generator=generator, device=device)
    windows = padded.unfold(2, 32, 1).unfold(3, 32, 1)
    cropped = windows[torch.arange(count, device=device), :, top, left]
    mirrored = torch.rand(count, generator=generator, device=device) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), cropped.flip(3), cropped)


def normalise(images: Tensor) -> Tensor:
    """Bytes to numbers of about mean 0 and deviation 1."""
    mean, deviation = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))
    return (images.float() - mean) / deviation


def windows(tokens: NDArray[np.uint16], count: int, length: int, rng: np.random.Generator) -> Tensor:
    """Random windows of a text, [count, length], int64."""
    starts = rng.integers(0, len(tokens) - length, count, endpoint=True)
    return torch.from_numpy(np.stack([tokens[start : start + length] for start in starts]).astype(np.int64))


DRY_IMAGES = 16


def generate(folder: Path) -> None:
    """Files in the published forms for a dry run: images whose colour tells their label, and a text that repeats."""
    rng = np.random.default_rng(0)
    for name, labels, classes, files in (
        ("cifar-10-batches-bin", 1, 10, {**{f"data_batch_{i}.bin": 1 for i in range(1, 6)}, "test_batch.bin": 1}),
        ("cifar-100-binary", 2, 100, {"train.bin": 5, "test.bin": 1}),
    ):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file, times in files.items():
            count = times * DRY_IMAGES
            label = rng.integers(0, classes, count)
            noise = rng.integers(0, 100, (count, PIXELS))
            pixels = (noise + (label * 155 // classes)[:, None]).astype(np.uint8)
            whole = np.concatenate([np.repeat(label[:, None], labels, 1).astype(np.uint8), pixels], 1)
            whole.tofile(folder / name / file)
    (folder / "text.txt").write_bytes(b"What repeats can be learned. " * 200)
