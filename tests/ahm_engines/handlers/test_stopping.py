# SPDX-License-Identifier: Apache-2.0
"""Training ends when it should, with MONAI's trainer, and no step is larger than allowed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import ValidationHandler
from torch import Tensor, nn

from ahm_engines.finite import FiniteCheck
from ahm_engines.handlers import Checkpoints, EarlyStop, FiniteLoss, GradientClip, load_checkpoint

BATCHES = [{"image": torch.ones(1, 1), "label": torch.ones(1, 1)}] * 4


def trainer_with(
    handlers: Sequence[Any],
    *,
    epochs: int = 10,
    network: nn.Module | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    decollate: bool = False,
    **options: Any,
) -> SupervisedTrainer:
    network = nn.Linear(1, 1) if network is None else network
    return SupervisedTrainer(
        "cpu",
        epochs,
        BATCHES,
        network,
        torch.optim.SGD(network.parameters(), 0.1),
        loss or nn.MSELoss(),
        train_handlers=handlers,
        decollate=decollate,
        **options,
    )


class Given:
    """A key metric that is the next of some given numbers."""

    def __init__(self, numbers: Sequence[float]) -> None:
        self.numbers = numbers

    def attach(self, engine: Engine, name: str) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self, name)

    def __call__(self, engine: Engine, name: str) -> None:
        engine.state.metrics[name] = self.numbers[engine.state.epoch - 1]


def train(
    scores: Sequence[float],
    folder: Path,
    patience: int | None,
    *,
    interval: int = 1,
    epochs: int = 10,
    resume: bool = False,
) -> tuple[int, list[int]]:
    """Train with a key metric of ``scores[epoch - 1]``: the last epoch, and those that were trained."""
    network = nn.Linear(1, 1)
    metric: dict[str, Any] = {"score": Given(scores)}
    evaluator = SupervisedEvaluator("cpu", BATCHES, network, key_val_metric=metric)
    trainer = trainer_with(
        [
            ValidationHandler(interval, evaluator),
            Checkpoints(folder, {"model": network}, evaluator=evaluator, resume=resume),
            EarlyStop(evaluator, patience, interval=interval),
        ],
        epochs=epochs,
        network=network,
    )
    trained: list[int] = []
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: trained.append(engine.state.epoch))
    trainer.run()
    return trainer.state.epoch, trained


SCORES = [0.1, 0.5, 0.4, 0.3, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]


@pytest.mark.parametrize(("patience", "last"), [(2, 4), (3, 8), (5, 10), (None, 10), (0, 10)])
def test_training_ends_after_so_many_validations_without_a_better_one(
    tmp_path: Path, patience: int | None, last: int
) -> None:
    assert train(SCORES, tmp_path, patience)[0] == last


def test_patience_counts_validations_and_not_epochs(tmp_path: Path) -> None:
    assert train([0.0, 0.5, 0.0, 0.4, 0.0, 0.3, 0.0, 0.2, 0.0, 0.9], tmp_path, 2, interval=2)[0] == 6


def test_a_resumed_training_stops_where_an_unbroken_one_does(tmp_path: Path) -> None:
    train(SCORES, tmp_path, 3, epochs=6)
    assert train(SCORES, tmp_path, 3, resume=True) == (8, [7, 8])


def test_a_training_that_had_stopped_does_not_go_on(tmp_path: Path) -> None:
    assert train(SCORES, tmp_path, 2)[0] == 4
    assert train(SCORES, tmp_path, 2, resume=True) == (4, [])


@pytest.mark.parametrize(("patience", "interval"), [(-1, 1), (3, 0)])
def test_impossible_patience_is_named(patience: int, interval: int) -> None:
    with pytest.raises(ValueError, match=f"got {patience} and {interval}"):
        EarlyStop(Engine(lambda engine, batch: None), patience, interval=interval)


def spoilt_at(step: int, value: float) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss that is not finite in one iteration, and well in those that follow."""
    calls = iter(range(1, 1000))
    return lambda pred, label: (pred - label).square() * (value if next(calls) == step else 1.0)


@pytest.mark.parametrize("decollate", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_raised_one_iteration_later(value: float, decollate: bool) -> None:
    trainer = trainer_with([FiniteLoss()], loss=spoilt_at(6, value), decollate=decollate)
    with pytest.raises(FloatingPointError, match=rf"got {value} by epoch 2, iteration 7; .*[Ll]ower the learning rate"):
        trainer.run()


def test_a_loss_that_is_not_finite_at_the_end_of_an_epoch_is_raised_before_anything_is_saved(tmp_path: Path) -> None:
    network = nn.Linear(1, 1)
    evaluator = SupervisedEvaluator("cpu", BATCHES, network, key_val_metric={"score": Given([1.0] * 9)})
    handlers = [
        FiniteLoss(),
        ValidationHandler(1, evaluator),
        Checkpoints(tmp_path, {"model": network}, evaluator=evaluator),
    ]
    trainer = trainer_with(handlers, network=network, loss=spoilt_at(4, math.nan))
    with pytest.raises(FloatingPointError, match="epoch 1, iteration 4"):
        trainer.run()
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("handlers", [[], [FiniteLoss()]], ids=["checkpoints alone", "with FiniteLoss"])
def test_weights_that_the_last_step_of_an_epoch_spoilt_are_not_saved(tmp_path: Path, handlers: list[Any]) -> None:
    network = nn.Linear(1, 1)
    factors = iter([1.0] * 7 + [math.nan])  # of the gradients; losses are finite
    network.weight.register_hook(lambda gradient: gradient * next(factors))
    evaluator = SupervisedEvaluator("cpu", BATCHES, network, key_val_metric={"score": Given(range(1, 9))})
    handlers = [
        *handlers,
        ValidationHandler(1, evaluator),
        Checkpoints(tmp_path, {"model": network}, evaluator=evaluator),
    ]
    trainer = trainer_with(handlers, network=network)
    with pytest.raises(FloatingPointError, match=r"expected finite weights, 1 are not: weight;"):
        trainer.run()
    assert evaluator.state.epoch == (1 if isinstance(handlers[0], FiniteLoss) else 2)  # what was validated
    for name in ("last.pt", "model.pt"):
        content = load_checkpoint(tmp_path / name)
        assert content["trainer"]["epoch"] == 1 and content["model"]["weight"].isfinite().all()


def test_a_loss_is_looked_at_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FiniteCheck, "finite", lambda check: not check.losses)
    with pytest.raises(FloatingPointError, match="epoch 1, iteration 2"):
        trainer_with([FiniteLoss()]).run()


def test_finite_losses_train_to_the_end() -> None:
    trainer = trainer_with([FiniteLoss()])
    trainer.run()
    assert trainer.state.epoch == 10


def steps_taken(max_norm: float | None, factors: Sequence[float] = (1, 1, 1, 1), **options: Any) -> list[float]:
    """Changes of the weights in every step, at a learning rate of 1; a batch's gradient is 30 times its factor."""
    network, given = nn.Linear(1, 1, bias=False), iter(factors)
    trainer = trainer_with(
        [GradientClip(max_norm)],
        epochs=1,
        network=network,
        loss=lambda pred, label: -30.0 * next(given) * pred.mean(),
        **options,
    )
    trainer.optimizer.param_groups[0]["lr"] = 1.0
    weights = [float(network.weight.detach())]
    trainer.optimizer.register_step_post_hook(lambda *_: weights.append(float(network.weight.detach())))
    trainer.run()
    return [after - before for before, after in pairwise(weights)]


@pytest.mark.parametrize(("max_norm", "expected"), [(None, 30.0), (1.0, 1.0), (90.0, 30.0)])
def test_gradients_are_clipped_before_the_step(max_norm: float | None, expected: float) -> None:
    assert steps_taken(max_norm) == pytest.approx([expected] * 4)


@pytest.mark.parametrize(
    ("steps", "factors", "expected"),
    [(2, (3, -1, 0.2, 0.2), [20.0, 6.0]), (3, (3, -1, 1, 3), [20.0, 20.0])],
    ids=["two and two", "three and one"],
)
def test_the_sum_of_accumulated_gradients_is_clipped_and_not_its_parts(
    steps: int, factors: Sequence[float], expected: list[float]
) -> None:
    assert steps_taken(20.0, factors, accumulation_steps=steps) == pytest.approx(expected, rel=1e-5)


def test_enlarged_gradients_are_divided_by_the_scale_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """MONAI's mixed precision step, with a scaler that works without CUDA."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    monkeypatch.setattr(torch.cuda.amp, "GradScaler", lambda: scaler)
    assert scaler.is_enabled()
    assert steps_taken(0.5, amp=True) == pytest.approx([0.5] * 4, rel=1e-4)


def test_a_norm_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="max_norm: expected more than 0, got 0"):
        GradientClip(0)
