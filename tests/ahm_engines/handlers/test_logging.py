# SPDX-License-Identifier: Apache-2.0
"""The bar and the curves show the numbers of the training, at the right place and without slowing it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.handlers import StatsHandler, ValidationHandler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from ahm_engines.evaluator import MaskedEvaluator
from ahm_engines.events import MaskedKeys
from ahm_engines.handlers.logging import TensorBoardScalars, TrainingBar
from ahm_engines.trainer import MaskedTrainer
from ahm_networks.maskers import ActorCriticMasker, Masker, UniformMasker
from ahm_networks.nets import ReconstructionUNet


class Loss:
    """A loss that counts how often it is read."""

    reads = 0

    def __float__(self) -> float:
        Loss.reads += 1
        return 0.125


@pytest.fixture(autouse=True)
def unread() -> None:
    Loss.reads = 0


def run_bar(bar: TrainingBar, *, iterations: int, epochs: int = 1, masker_loss: Any = None) -> Engine:
    engine = Engine(lambda engine, batch: {MaskedKeys.LOSS: Loss(), MaskedKeys.MASKER_LOSS: masker_loss})
    bar.attach(engine)
    engine.run(range(iterations), max_epochs=epochs)
    return engine


def train(
    masker: Masker,
    *,
    trainer_handlers: list[Any] | None = None,
    evaluator_handlers: list[Any] | None = None,
    epochs: int = 2,
) -> None:
    """Train on three batches and validate after every epoch."""
    generator = torch.Generator().manual_seed(0)
    batches = [{"image": torch.rand(2, 1, 16, 16, generator=generator)} for _ in range(3)]
    network = ReconstructionUNet(2, backbone=nn.Conv2d(1, 1, 3, padding=1))
    evaluator = MaskedEvaluator("cpu", batches, network, masker, val_handlers=evaluator_handlers)
    weights = list(masker.parameters())
    MaskedTrainer(
        "cpu",
        epochs,
        batches,
        network,
        torch.optim.SGD(network.parameters(), 1e-3),
        masker,
        masker_optimizer=torch.optim.SGD(weights, 1e-3) if weights else None,
        train_handlers=[ValidationHandler(1, evaluator), *(trainer_handlers or [])],
    ).run()


def curves(folder: Path) -> dict[str, list[int]]:
    """Steps of every curve in a folder."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [point.step for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_bar_shows_epoch_progress_and_losses(capsys: pytest.CaptureFixture[str]) -> None:
    run_bar(TrainingBar(), iterations=3, epochs=2, masker_loss=torch.tensor(-2.0))
    shown = capsys.readouterr().err
    assert "Epoch 1/2: 100%" in shown and "Epoch 2/2: 100%" in shown and "3/3" in shown
    assert "loss=0.125" in shown and "masker_loss=-2" in shown


def test_bar_leaves_out_a_masker_loss_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    run_bar(TrainingBar(), iterations=3)
    assert "masker_loss" not in capsys.readouterr().err


def test_bar_reads_losses_every_few_iterations_only() -> None:
    run_bar(TrainingBar(every=10), iterations=25)
    assert Loss.reads == 4  # iterations 1, 11, 21 and the last


def test_bar_is_complete_before_the_epochs_other_handlers_log(capsys: pytest.CaptureFixture[str]) -> None:
    engine = Engine(lambda engine, batch: {MaskedKeys.LOSS: Loss()})
    seen: list[str] = []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: seen.append(capsys.readouterr().err))
    TrainingBar().attach(engine)
    engine.run(range(3))
    assert seen[0].rstrip(" \r").endswith("\n") and "3/3" in seen[0]


def test_bar_of_a_resumed_training_goes_on_where_that_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    engine = Engine(lambda engine, batch: {MaskedKeys.LOSS: Loss()})
    TrainingBar().attach(engine)
    engine.load_state_dict({"epoch": 4, "max_epochs": 5, "epoch_length": 3})
    engine.run(range(3))
    shown = capsys.readouterr().err
    assert "Epoch 5/5: 100%" in shown and "Epoch 1/5" not in shown


def test_bar_survives_a_training_that_is_broken_off() -> None:
    engine = Engine(lambda engine, batch: {MaskedKeys.LOSS: Loss()})
    TrainingBar().attach(engine)
    stop = engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.terminate)
    engine.run(range(5), max_epochs=2)
    stop.remove()
    engine.run(range(5), max_epochs=2)
    assert engine.state.epoch == 2


def test_tensorboard_has_losses_diagnostics_and_metrics_against_the_trainers_count(tmp_path: Path) -> None:
    trainer_side = TensorBoardScalars(log_dir=tmp_path / "train", every=2)
    evaluator_side = TensorBoardScalars(log_dir=tmp_path / "val")
    train(ActorCriticMasker(2, 4, 0.5), trainer_handlers=[trainer_side], evaluator_handlers=[evaluator_side])
    written = curves(tmp_path / "train")
    assert set(written) == {"train/loss", "train/masker_loss", "masking/policy_entropy", "masking/advantage_std"}
    assert all(steps == [2, 4, 6] for steps in written.values())
    validated = curves(tmp_path / "val")
    assert {"validation/psnr", "validation/random_psnr", "validation/hardness", "validation/rank_correlation"} < set(
        validated
    )
    assert all(steps == [1, 2] for steps in validated.values())


def test_tensorboard_takes_one_writer_for_both_engines_and_maskers_that_do_not_learn(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        train(
            UniformMasker(2, 4, 0.5),
            trainer_handlers=[TensorBoardScalars(writer, every=1)],
            evaluator_handlers=[TensorBoardScalars(writer)],
        )
    written = curves(tmp_path)
    assert written["train/loss"] == [1, 2, 3, 4, 5, 6] and written["validation/psnr"] == [1, 2]
    assert "train/masker_loss" not in written


def test_monais_stats_handler_writes_the_validations_metrics_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="validation"):
        stats = StatsHandler(iteration_log=False, name="validation")
        logging.getLogger("validation").propagate = True
        train(UniformMasker(2, 4, 0.5), evaluator_handlers=[stats], epochs=2)
    lines = [record.message for record in caplog.records if "Metrics" in record.message]
    assert [line.split(" ")[0] for line in lines] == ["Epoch[1]", "Epoch[2]"]
    assert all("random_psnr: " in line and "hardness: 1.0000" in line for line in lines)
