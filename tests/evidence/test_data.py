"""Parts do not overlap, a seed's batches are its own, and the files of Debian's packages are read as they are."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch

from bench.evidence import data
from bench.evidence.data import HIDDEN, OTHER, NotHere, Source


@pytest.mark.parametrize("source", [data.digits, data.patches])
def test_no_example_is_in_two_parts(source: Callable[[], data.Images | data.Patches]) -> None:
    found = source()
    parts = {name: part[0] if isinstance(part, tuple) else part for name, part in found.parts.items()}
    assert set(parts) == {"train", "validation", "test"}
    examples = {name: {example.numpy().tobytes() for example in part} for name, part in parts.items()}
    assert all(len(some) > 100 for some in examples.values())
    assert not examples["train"] & examples["test"]
    assert not examples["train"] & examples["validation"]
    assert not examples["validation"] & examples["test"]
    assert all(part.min() >= 0 and 0.9 < part.max() <= 1 for part in parts.values())


@pytest.mark.parametrize(
    "source", [data.digits, data.patches, lambda: data.patches(4), lambda: data.windows(8), lambda: data.windows(8, 2)]
)
def test_a_seeds_batches_are_the_same_in_any_stack(source: Callable[[], Source]) -> None:
    both = list(islice(source().batches([1, 2], 200), 9))
    alone = list(islice(source().batches([2], 200), 9))
    for together, single in zip(both, alone, strict=True):
        for a, b in zip(together, single, strict=True):
            assert a.shape[:2] == (2, 200)
            assert torch.equal(a[1:], b)
            assert not torch.equal(a[0], a[1])
    assert not torch.equal(both[0][0], both[7][0])
    once, twice = (source().held_out("test", 64, 100) for _ in range(2))
    assert [batch[0].shape[:2] for batch in once] == [(1, 64), (1, 36)]
    assert all(torch.equal(a, b) for p, q in zip(once, twice, strict=True) for a, b in zip(p, q, strict=True))


def test_an_epoch_has_every_example_once() -> None:
    images, _ = data.digits().parts["train"]
    epoch = torch.cat([batch[0][0] for batch in islice(data.digits().batches([1], 19), len(images) // 19)])
    rows = {image.numpy().tobytes() for image in epoch}
    assert len(rows) == len({image.numpy().tobytes() for image in images})


def test_targets_are_the_next_character_and_what_was_hidden() -> None:
    parts = {part: torch.arange(500) % 60 for part in ("train", "validation", "test")}
    (window,) = next(data.Windows("", parts, 6).batches([1], 5))
    assert window.shape == (1, 5, 7)
    assert torch.equal((window[..., 1:] - window[..., :-1]) % 60, torch.ones_like(window[..., 1:]))
    text, places, hidden = next(data.Windows("", parts, 6, hide=2).batches([1], 5))
    assert text.shape == (1, 5, 6)
    assert ((text == HIDDEN).sum(-1) == 2).all()
    whole = text.scatter(2, places, hidden)
    assert torch.equal((whole[..., 1:] - whole[..., :-1]) % 60, torch.ones_like(whole[..., 1:]))


def test_without_the_bible_text_is_pythons_library() -> None:
    name, parts = data.text("no-such-program-is-there")
    assert "Python" in name
    assert all(part.max() <= OTHER for part in parts.values())
    assert (parts["train"] == 0).float().mean() > 0.1  # the most frequent character, a space
    assert len(parts["train"]) > 10 * len(parts["test"]) > 100_000


def test_the_bible_is_read_without_its_references(tmp_path: Path) -> None:
    program = tmp_path / "bible"
    verse = "Ge1:1 In the beginning God created the heaven and the earth.\n"
    program.write_text(f"""#!/bin/sh\n[ "$*" = "-f gen1:1-rev22:21" ] && yes '{verse.strip()}' | head -c 3000000\n""")
    program.chmod(0o755)
    name, parts = data.text(str(program))
    assert "Bible" in name
    assert sum(map(len, parts.values())) == pytest.approx(3_000_000 * (len(verse) - 6) / len(verse), rel=1e-3)
    assert len(set(parts["train"].tolist())) == len(set(verse[6:]))  # no digit and no colon of "Ge1:1"
    program.write_text("#!/bin/sh\necho another program of that name\n")
    data.text.cache_clear()
    with pytest.raises(RuntimeError, match="prints 20 characters"):
        data.text(str(program))


def test_fashion_is_read_from_its_four_files(tmp_path: Path) -> None:
    with pytest.raises(NotHere, match="dataset-fashion-mnist"):
        data.fashion(tmp_path / "nowhere")
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    for prefix, count in (("train", 5_002), ("t10k", 3)):
        pixels = bytearray(count * 784)
        pixels[-784 : -784 + 2] = bytes([255, 51])  # the last image's first row
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + pixels, 1))
        labels = bytes(i % 10 for i in range(count))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels, 1))
    found = data.fashion(tmp_path)
    assert {name: len(images) for name, (images, _) in found.parts.items()} == {
        "train": 2,
        "validation": 5_000,
        "test": 3,
    }
    images, classes = found.parts["test"]
    assert images.shape == (3, 1, 28, 28)
    assert images[2, 0, 0, :3].tolist() == pytest.approx([1.0, 0.2, 0.0])
    assert images[0].max() == 0
    assert classes.tolist() == [0, 1, 2]
    assert found.parts["train"][1].tolist() == [0, 1]
    assert found.parts["validation"][1][:3].tolist() == [2, 3, 4]


@pytest.mark.skipif(
    not os.path.isdir(data.DATASETS / "fashion-mnist"), reason="Debian's dataset-fashion-mnist is not here"
)
def test_fashion_of_debian_has_as_many_of_each_class() -> None:
    _, classes = data.fashion().parts["test"]
    assert classes.bincount().tolist() == [1000] * 10
