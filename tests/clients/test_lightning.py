"""Lightning: slow weights in the validation hooks, and clipping under 16 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plain import SETTINGS, by_hand, make_batches, make_model, same_weights, weights
from torch import Tensor, nn

from lookahead_fused import LookaheadAdamW

lightning = pytest.importorskip("lightning")
pytestmark = pytest.mark.filterwarnings("ignore")  # of loaders without workers, of a run without a logger


class Unoptimized(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """Validates on the slow weights, and notes on which."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make_model()
        self.validated_on: list[list[Tensor]] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.model(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.validated_on.append(weights(self.model))

    def on_validation_start(self) -> None:
        self.optimizers(use_pl_optimizer=False).eval()

    def on_validation_end(self) -> None:
        self.optimizers(use_pl_optimizer=False).train()


class Module(Unoptimized):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return LookaheadAdamW(self.model.parameters(), **SETTINGS, **self.settings)


def quiet(directory: Path) -> dict[str, Any]:
    return {
        "max_steps": 5,
        "accelerator": "cpu",
        "default_root_dir": str(directory),
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }


def run(trainer: Any, module: Unoptimized) -> None:
    loader = torch.utils.data.DataLoader(make_batches(), batch_size=None)
    trainer.fit(module, loader, loader)


def fit(module: Module, directory: Path, **options: Any) -> None:
    run(lightning.Trainer(**quiet(directory), **options), module)


def test_validation_is_on_the_slow_weights(tmp_path: Path) -> None:
    module = Module()
    fit(module, tmp_path)
    trained, slow = by_hand()
    assert same_weights(weights(module.model), trained)
    assert same_weights(module.validated_on[-1], slow)
    assert not same_weights(trained, slow)


def test_clipping_under_16_bits_wants_a_scaler_that_unscales(tmp_path: Path) -> None:
    from lightning.pytorch.plugins import MixedPrecision

    def precision() -> Any:
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))

    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(Module(), tmp_path, plugins=[precision()], gradient_clip_val=0.5)
    module = Module(fused=False)
    fit(module, tmp_path, plugins=[precision()], gradient_clip_val=0.5)
    assert not same_weights(weights(module.model), weights(make_model()))


def test_the_command_line_makes_the_class_by_its_path(tmp_path: Path) -> None:
    """Its arguments by name, each in its type."""
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    words = {"betas": "[0.8,0.95]", "pullback_momentum": "pullback", "max_grad_norm": 100, "process_group": "null"}
    command = ["--optimizer=lookahead_fused.LookaheadAdamW"]
    command += [f"--optimizer.{name}={word}" for name, word in {**SETTINGS, **words}.items()]
    cli = LightningCLI(
        Unoptimized, args=command, run=False, save_config_callback=None, trainer_defaults=quiet(tmp_path)
    )
    run(cli.trainer, cli.model)
    (optimizer,) = cli.trainer.optimizers
    assert type(optimizer) is LookaheadAdamW
    (group,) = optimizer.param_groups
    expected = {"betas": (0.8, 0.95), "pullback_momentum": "pullback", **SETTINGS}
    assert {name: group[name] for name in expected} == expected

    model = make_model()
    by_hand = LookaheadAdamW(
        model.parameters(), betas=(0.8, 0.95), pullback_momentum="pullback", max_grad_norm=100, **SETTINGS
    )
    for x, y in make_batches():
        by_hand.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        by_hand.step()
    assert torch.equal(optimizer.grad_norm, by_hand.grad_norm)
    assert same_weights(weights(cli.model.model), weights(model))
    with by_hand.slow_weights():
        assert same_weights(cli.model.validated_on[-1], weights(model))
