"""The measurement for a GPU, on a CPU: published shapes and forms, what is refused, and a run that is cut off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bench.evidence import gpu, gpu_data, gpu_train, results
from bench.evidence.gpu import DRY_SIZES, Lines, Measurement, Run
from bench.evidence.gpu_data import Cifar, DataError, Images, Tokens
from bench.evidence.gpu_models import GPT, ResNet
from bench.evidence.gpu_train import Classify, Point, Size, Write

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    gpu_data.generate(tmp_path / "data")
    return tmp_path / "data"


def small_cifar(images: int = 40) -> Cifar:
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (images,), generator=random)
    whole = Images(torch.randint(256, (images, 3, 32, 32), generator=random, dtype=torch.uint8), labels)
    return Cifar(10, whole, whole[slice(0, 10)])


def classify(epochs: int = 2) -> Classify:
    return Classify("cifar10", small_cifar(), Size(epochs, 16, 2), CPU, (0.1,))


def write(epochs: int = 2) -> Write:
    tokens = (np.arange(3000) * 7 % 11).astype(np.uint16)
    size = Size(epochs, 4, 16, steps=3, layers=1, heads=2, context=8, parts=2, held_out=4)
    return Write("gpt", Tokens(tokens[:2000], tokens[2000:], 256, "text"), size, CPU, (1e-2, 1e-3))


def test_networks_have_the_published_sizes() -> None:
    """The Cutout code's ResNet-18 and GPT-2 small, whose embeddings are tied."""
    with torch.device("meta"):
        networks = (ResNet(10), ResNet(100), GPT(50257))
    counts = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert counts == [11_173_962, 11_220_132, 124_439_808]
    assert ResNet(10, 4)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_a_gpt_sees_no_later_token() -> None:
    torch.manual_seed(0)
    model = GPT(50, context=8, layers=2, heads=2, width=16)
    tokens = torch.randint(50, (1, 8))
    other = tokens.clone()
    other[0, 5] = (other[0, 5] + 1) % 50
    differs = (model(tokens) != model(other)).any(-1)[0]
    assert differs.tolist() == [False] * 5 + [True] * 3


@pytest.mark.parametrize(("classes", "labels"), [(10, 1), (100, 2)])
def test_images_are_read_as_published(tmp_path: Path, classes: int, labels: int) -> None:
    """The last label of each record counts; channels, then rows, then columns; files in their order."""
    folder = tmp_path / ("cifar-10-batches-bin" if classes == 10 else "cifar-100-binary")
    folder.mkdir()
    names = {f"data_batch_{i}.bin": 2 for i in range(1, 6)} if classes == 10 else {"train.bin": 10}
    names["test_batch.bin" if classes == 10 else "test.bin"] = 2
    number = 0
    for name, count in names.items():
        whole = bytearray()
        for _ in range(count):
            whole += bytes([99] * (labels - 1) + [number % classes])
            whole += bytes([number]) * 1024 + bytes(range(32)) * 32 + bytes(row for row in range(32) for _ in range(32))
            number += 1
        (folder / name).write_bytes(whole)
    found = gpu_data.read_cifar(tmp_path, classes, images=2)
    assert found is not None
    assert found.train.labels.tolist() == [i % classes for i in range(10)]
    assert found.test.labels.tolist() == [10 % classes, 11 % classes]
    assert found.train.images.shape == (10, 3, 32, 32)
    assert found.train.images[7, 0, 3, 4] == 7
    assert found.train.images[7, 1:, 3, 4].tolist() == [4, 3]


def test_what_is_not_in_a_published_form_is_refused(folder: Path, tmp_path: Path) -> None:
    """In words that name the file and say what is wrong."""
    with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
        gpu_data.find(tmp_path / "nowhere")
    with pytest.raises(DataError, match="has none of cifar-10-batches-bin/"):
        gpu_data.find(tmp_path)
    with pytest.raises(DataError, match=r"data_batch_1.bin has 49168 bytes, and 10000 images of 3073 are 30730000"):
        gpu_data.find(folder)
    assert set(gpu_data.find(folder, dry=True)) == {"cifar10", "cifar100", "gpt"}
    file = folder / "cifar-10-batches-bin" / "data_batch_2.bin"
    whole = bytearray(file.read_bytes())
    whole[3073] = 10
    file.write_bytes(whole)
    with pytest.raises(DataError, match=r"data_batch_2.bin has a label 10, and there are 10 classes"):
        gpu_data.find(folder, dry=True)
    file.unlink()
    with pytest.raises(DataError, match=r"there is no file .*data_batch_2.bin"):
        gpu_data.find(folder, dry=True)
    (folder / "cifar-10-batches-bin").rename(folder / "cifar-10-batches-py")
    with pytest.raises(DataError, match="pickles, which run whatever code is in them"):
        gpu_data.find(folder, dry=True)


def test_tokens_and_texts(tmp_path: Path) -> None:
    """Bare, after llm.c's header, and as bytes of a text."""
    tokens = (np.arange(600) * 83 % 50257).astype(np.uint16)
    tokens.tofile(tmp_path / "val.bin")
    with pytest.raises(DataError, match=r"there is no file .*train.bin"):
        gpu_data.read_tokens(tmp_path)
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, 600
    (tmp_path / "train.bin").write_bytes(header.tobytes() + tokens.tobytes())
    found = gpu_data.read_tokens(tmp_path)
    assert found is not None
    assert (found.train == tokens).all()
    assert (found.held_out == tokens).all()
    assert found.vocabulary == 50257
    (tmp_path / "train.bin").write_bytes(header.tobytes() + tokens.tobytes()[:-2])
    with pytest.raises(DataError, match="its header tells of 600 tokens"):
        gpu_data.read_tokens(tmp_path)
    (tmp_path / "train.bin").write_bytes(tokens.tobytes() + b"1")
    with pytest.raises(DataError, match="no whole number of 16-bit tokens"):
        gpu_data.read_tokens(tmp_path)
    tokens[5] = 60000
    tokens.tofile(tmp_path / "train.bin")
    with pytest.raises(DataError, match="a token 60000"):
        gpu_data.read_tokens(tmp_path)
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).unlink()
    (tmp_path / "a.txt").write_bytes(bytes(range(100)) * 2)
    text = gpu_data.read_tokens(tmp_path)
    assert text is not None
    assert (len(text.train), len(text.held_out), text.vocabulary) == (190, 10, 256)
    assert text.held_out.tolist() == list(range(90, 100))
    (tmp_path / "b.txt").write_bytes(b"b")
    with pytest.raises(DataError, match=r"several texts, a.txt, b.txt"):
        gpu_data.read_tokens(tmp_path)


def test_crops_are_windows_of_the_padded_image_or_its_mirror() -> None:
    """Every one of the 81 places, both ways, of each image its own; and the same by the same generator."""
    images = torch.arange(1, 3 * 32 * 32 + 1).view(1, 3, 32, 32).repeat(600, 1, 1, 1)
    images = images + 10_000 * torch.arange(600).view(-1, 1, 1, 1)
    made = gpu_data.augment(images, torch.Generator().manual_seed(0))
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    seen = set()
    for i in range(600):
        for mirrored in (False, True):
            whole = made[i].flip(2) if mirrored else made[i]
            # Which window it is tells any pixel that is not of the padding.
            row, column = divmod(int(whole[0, 16, 16]) - 1 - 10_000 * i, 32)
            top, left = row + 4 - 16, column + 4 - 16
            if torch.equal(whole, padded[i, :, top : top + 32, left : left + 32]):
                seen.add((top, left, mirrored))
                break
        else:
            pytest.fail(f"image {i} is no window")
    assert {place[0] for place in seen} == {place[1] for place in seen} == set(range(9))
    assert len(seen) > 140
    assert torch.equal(made, gpu_data.augment(images, torch.Generator().manual_seed(0)))


def test_learning_rates_fall_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """By 5 at 60, 120 and 160 of 200 epochs; a GPT's rises over a twentieth and falls to a tenth."""
    rates: list[float] = []
    monkeypatch.setattr(gpu_train, "set_lr", lambda optimizer, lr: rates.append(lr))
    task = Classify("cifar10", small_cifar(4), Size(200, 16, 1), CPU, (0.1,))
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    for epoch in (0, 59, 60, 119, 120, 159, 160, 199):
        task.train(model, torch.optim.SGD(model.parameters(), 0.0), 0.1, epoch, 0, True)
    assert rates == pytest.approx([0.1, 0.1, 0.02, 0.02, 0.004, 0.004, 0.0008, 0.0008])
    rates.clear()
    gpt = write(epochs=40)
    network = gpt.model()
    for epoch in (0, 1, 2, 39):
        gpt.train(network, torch.optim.SGD(network.parameters(), 0.0), 1.0, epoch, 0, True)
    assert rates[:6] == pytest.approx([i / 6 for i in range(1, 7)], rel=2e-2)
    assert rates[-1] == pytest.approx(0.1, rel=1e-2)


@pytest.mark.parametrize("arm", ["lookahead-sgd", "ema-sgd", "gpa"])
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not(arm: str, tmp_path: Path) -> None:
    """After each epoch: weights, moments, slow weights, phase, statistics and what is random come to the same line."""
    task: Any = write() if arm == "gpa" else classify()
    point = task.arms[arm].points[0]
    whole: list[dict[str, Any]] = []
    gpu_train.train(task, arm, point, 3, True, tmp_path / "whole.pt", whole.append)

    def cut(line: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    for _ in range(task.epochs):
        with pytest.raises(KeyboardInterrupt):
            gpu_train.train(task, arm, point, 3, True, tmp_path / "cut.pt", cut)
    rest: list[dict[str, Any]] = []
    assert gpu_train.train(task, arm, point, 3, True, tmp_path / "cut.pt", rest.append) == whole[-1]
    assert (len(whole), rest) == (2, [])
    states = [torch.load(tmp_path / name, weights_only=True)["model"] for name in ("whole.pt", "cut.pt")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_evaluation_is_on_slow_weights_with_statistics_of_their_own() -> None:
    """And leaves weights and running statistics as training had them."""
    torch.manual_seed(0)
    task = classify()
    model = task.model()
    optimizer = task.arms["ema-sgd"].make(list(model.parameters()), Point(0.5, 0.0))
    task.train(model, optimizer, 0.5, 0, 0, True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ours = task.evaluate(model, optimizer, True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    fast = task.evaluate(model, torch.optim.SGD(model.parameters(), 0.1), True)
    assert ours != fast
    with optimizer.slow_weights():
        stale = task.evaluate(model, torch.optim.SGD(model.parameters(), 0.1), True)
        norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
        with task._statistics(model, optimizer, True):
            own = norm.running_var.clone()  # type: ignore[operator,union-attr]
    assert ours != stale
    with optimizer.slow_weights(), task._statistics(model, optimizer, True):
        assert task.evaluate(model, torch.optim.SGD(model.parameters(), 0.1), True) == pytest.approx(ours)
    with task._statistics(model, optimizer, True):
        assert task.evaluate(model, torch.optim.SGD(model.parameters(), 0.1), True) != pytest.approx(ours)
    assert not torch.equal(own, before["stem.1.running_var"])


def test_tuning_never_sees_what_is_tested() -> None:
    """Images to validate on are left out of tuning's training; final runs train on all, and test on the test set."""
    task = classify()
    seen: dict[bool, set[bytes]] = {}
    for final in (False, True):
        seen[final] = {image.numpy().tobytes() for image in task._seen(final).images}
    every = {image.numpy().tobytes() for image in task._train.images}
    assert (len(seen[False]), seen[True]) == (36, every)
    gpt = write()
    model = gpt.model()
    plain = torch.optim.SGD(model.parameters(), 0.1)
    assert gpt.evaluate(model, plain, False) != gpt.evaluate(model, plain, True)


def test_the_best_point_is_the_one_that_validated_best(tmp_path: Path) -> None:
    """The smaller loss, the larger accuracy, of the last epoch; and never that of a run that diverged."""
    for task, metric, values, best in (
        (write(), "loss", (3.0, 2.0), 1),
        (write(), "loss", (3.0, float("nan")), 0),
        (classify(), "accuracy", (50.0, 70.0, 60.0), 1),
    ):
        measurement = Measurement([task], tmp_path / f"{metric}{best}", 2, CPU, None)
        arm = next(iter(task.arms))
        for run, value in zip(measurement.tuning(task, arm), values, strict=True):
            measurement.lines.add(run, {"epoch": 1, metric: 100 - value})
            measurement.lines.add(run, {"epoch": 2, metric: value})
        assert measurement.best(task, arm) == task.arms[arm].points[best]
        again = Lines(tmp_path / f"{metric}{best}" / "lines.jsonl")
        assert [again.finished(run, 2) is not None for run in measurement.tuning(task, arm)] == [True] * len(values)


def test_a_line_that_was_cut_off_is_no_line(tmp_path: Path) -> None:
    run = Run("gpt", "adamw", Point(1e-3, 0.1), 0, False)
    Lines(tmp_path / "lines.jsonl").add(run, {"epoch": 1, "loss": 2.0})
    with (tmp_path / "lines.jsonl").open("a") as file:
        file.write('{"task": "gpt", "ar')
    lines = Lines(tmp_path / "lines.jsonl")
    assert lines.finished(run, 2) is None
    lines.add(run, {"epoch": 2, "loss": 1.0})
    assert [json.loads(line)["epoch"] for line in (tmp_path / "lines.jsonl").read_text().splitlines()] == [1, 2]


def test_arms_are_compared_over_the_same_grid() -> None:
    for arms in (gpu_train.cifar_arms((0.1,)), gpu_train.gpt_arms((1e-3, 2e-3))):
        for arm in arms.values():
            assert arm.points == arms[arm.against].points
            optimizer = arm.make([nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))], arm.points[0])
            assert optimizer.param_groups[0]["weight_decay"] == arm.points[0].weight_decay


def test_a_dry_run_does_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files, tuning, final runs, table, comparisons; a second time nothing is left to run, and it says the same."""
    arguments = ["--dry-run", "--only", "gpt", "--seeds", "2", "--out", str(tmp_path)]
    assert gpu.main(arguments) == 0
    first = capsys.readouterr().out
    assert first.count("epoch 2/2") == 5 * 3
    figures = {figure.name: figure for figure in results.load(tmp_path / "figures.json").figures}
    assert set(figures) == {f"gpu.gpt.{arm}-adamw.loss" for arm in ("snoo", "gpa", "ema", "lookahead")}
    assert all(figure.n == 2 for figure in figures.values())
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert len(lines) == 5 * 3 * DRY_SIZES["gpt"].epochs
    assert all(line["seconds"] > 0 and line["memory_mib"] > 0 for line in lines)
    assert not list((tmp_path / "checkpoints").iterdir())
    assert gpu.main(arguments) == 0
    second = capsys.readouterr().out
    assert "epoch" not in second
    assert second.splitlines()[1:] == [line for line in first.splitlines() if "epoch" not in line][1:]


def test_cifar_is_measured_by_its_own_arms(tmp_path: Path) -> None:
    """One of them, as a dry run does it: tuned on validation, tested on the test set, by both baselines' names."""
    gpu_data.generate(tmp_path)
    size = {**DRY_SIZES, "cifar": Size(1, 64, 1)}
    (task,) = gpu.make_tasks(gpu.chosen(tmp_path, ["cifar10"], dry=True), size, CPU, {"cifar": (0.1,), "gpt": (1e-3,)})
    measurement = Measurement([task], tmp_path / "out", 1, CPU, points=1)
    measurement.run()
    assert {figure.name for figure in measurement.figures()} == {
        "gpu.cifar10.sgd-small-lr-sgd.accuracy",
        "gpu.cifar10.lookahead-sgd-sgd.accuracy",
        "gpu.cifar10.ema-sgd-sgd.accuracy",
        "gpu.cifar10.lookahead-adamw-adamw.accuracy",
    }


def test_what_cannot_run_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With status 2: no folder named, no GPU, no such folder, nothing for what is asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as left:
        gpu.main([])
    assert left.value.code == 2
    assert "--data FOLDER (nothing is downloaded)" in capsys.readouterr().err
    assert gpu.main(["--data", str(tmp_path)]) == 2
    assert "no GPU: torch" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu.main(["--data", str(tmp_path / "nowhere")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    (tmp_path / "a.txt").write_bytes(b"a" * 500)
    assert gpu.main(["--data", str(tmp_path), "--only", "cifar10"]) == 2
    assert "has no data for cifar10, but for gpt" in capsys.readouterr().err
    assert gpu.main(["--data", str(tmp_path)]) == 2
    assert "a.txt: 12 tokens are too few for a context of 1024" in capsys.readouterr().err
    assert gpu.main(["--data", str(tmp_path), "--dry-run"]) == 2
    assert "leave --data out" in capsys.readouterr().err
