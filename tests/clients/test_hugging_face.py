"""Hugging Face: `transformers.Trainer`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import same_weights, weights

from lookahead_fused import LookaheadAdamW

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import: no hub is asked
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")


class Line(torch.nn.Module):
    """Called by the names of its data, with its loss in the output, as the Trainer's models are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": torch.nn.functional.mse_loss(self.inner(x), labels)}


def make_trainer(
    directory: Path, max_steps: int, evaluated: list[list[torch.Tensor]] | None = None, **options: Any
) -> Any:
    torch.manual_seed(1)
    data = [{"x": (x := torch.randn(4)), "labels": x.sum(0, keepdim=True)} for _ in range(20)]

    class Trainer(transformers.Trainer):
        def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
            if evaluated is not None:
                evaluated.append(weights(self.model))
            return super().prediction_step(*args, **kwargs)

    arguments = transformers.TrainingArguments(
        output_dir=str(directory),
        max_steps=max_steps,
        per_device_train_batch_size=4,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return Trainer(
        Line(),
        arguments,
        train_dataset=data,
        eval_dataset=data,
        optimizer_cls_and_kwargs=(LookaheadAdamW, {"lr": 1e-2, "k": 2}),
    )


def slow_weights_of(trainer: Any) -> list[torch.Tensor]:
    return [trainer.optimizer.optimizer.state[p]["slow_param"].clone() for p in trainer.model.parameters()]


def test_evaluation_is_on_the_slow_weights_until_train_is_called(tmp_path: Path) -> None:
    """The Trainer calls `eval()` before it evaluates, and `train()` only before the next training step."""
    evaluated: list[list[torch.Tensor]] = []
    trainer = make_trainer(tmp_path, 5, evaluated)
    trainer.train()
    trained, slow = weights(trainer.model), slow_weights_of(trainer)
    assert type(trainer.optimizer.optimizer) is LookaheadAdamW
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [1e-2, 1e-2]
    assert not same_weights(slow, trained)
    trainer.evaluate()
    assert same_weights(evaluated[-1], slow)
    assert same_weights(weights(trainer.model), slow)
    trainer.optimizer.train()
    assert same_weights(weights(trainer.model), trained)


def test_the_slow_weights_are_saved(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, 5)
    trainer.train()
    trained, slow = weights(trainer.model), slow_weights_of(trainer)
    with trainer.optimizer.optimizer.slow_weights():
        trainer.save_model(tmp_path / "slow")
    saved = safetensors.load_file(tmp_path / "slow/model.safetensors")
    assert same_weights([saved[name] for name, _ in trainer.model.named_parameters()], slow)
    assert same_weights(weights(trainer.model), trained)


def test_without_lr_among_the_arguments_the_class_has_its_own(tmp_path: Path) -> None:
    """`TrainingArguments.learning_rate` is not handed to it."""
    trainer = make_trainer(tmp_path, 1)
    trainer.args.learning_rate = 0.5
    trainer.optimizer_cls_and_kwargs = (LookaheadAdamW, {"k": 2})
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("evaluates", [False, True])
def test_a_resumed_run_ends_with_the_same_bits(evaluates: bool, tmp_path: Path) -> None:
    """Also where the Trainer had evaluated before it saved, so that the model's file holds the slow weights."""
    strategy = {"eval_strategy": "steps", "eval_steps": 3} if evaluates else {}
    whole = make_trainer(tmp_path, 5, **strategy)
    whole.train()
    resumed = make_trainer(tmp_path, 5, **strategy)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same_weights(weights(resumed.model), weights(whole.model))
    assert same_weights(slow_weights_of(resumed), slow_weights_of(whole))


def test_evaluations_leave_the_run_alone(tmp_path: Path) -> None:
    evaluated: list[list[torch.Tensor]] = []
    alone, evaluating = (
        make_trainer(tmp_path, 5),
        make_trainer(tmp_path, 5, evaluated, eval_strategy="steps", eval_steps=1, save_strategy="no"),
    )
    for trainer in (alone, evaluating):
        trainer.train()
    assert len(evaluated) >= 5
    assert same_weights(evaluated[-1], slow_weights_of(alone))
    evaluating.optimizer.train()
    assert same_weights(weights(evaluating.model), weights(alone.model))
    assert same_weights(slow_weights_of(evaluating), slow_weights_of(alone))


def test_the_best_model_is_the_slow_weights_that_were_evaluated(tmp_path: Path) -> None:
    """As the Trainer loads it at the end; the training weights stand by until `train()`."""
    evaluated: list[list[torch.Tensor]] = []
    alone = make_trainer(tmp_path / "alone", 3)
    alone.train()
    best = make_trainer(tmp_path, 3, evaluated, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True)
    best.train()
    saved = safetensors.load_file(tmp_path / "checkpoint-3/model.safetensors")
    assert same_weights(evaluated[-1], slow_weights_of(alone))
    assert same_weights([saved[name] for name, _ in best.model.named_parameters()], evaluated[-1])
    assert same_weights(weights(best.model), evaluated[-1])
    best.optimizer.train()
    assert same_weights(weights(best.model), weights(alone.model))
