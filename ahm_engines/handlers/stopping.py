# SPDX-License-Identifier: Apache-2.0
"""When a training ends early, and what keeps its steps in bounds; for MONAI's ``SupervisedTrainer``."""

from __future__ import annotations

import logging

import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents

from ahm_engines.finite import FiniteCheck, check_weights
from ahm_engines.step import weights_of

__all__ = ["EarlyStop", "FiniteLoss", "GradientClip"]

logger = logging.getLogger(__name__)


class EarlyStop:
    """End the training after ``patience`` validations in a row without a better key metric.

    What counts is the epoch of the best metric, which checkpoints keep, so that a resumed training stops where an
    unbroken one would have, and one that had stopped does not go on. List it behind the handlers of validation and
    checkpoints.

    Args:
        evaluator: its key metric decides.
        patience: validations to wait for a better one; ``None`` or 0 never stops.
        interval: epochs between two validations.

    Raises:
        ValueError: for a negative patience or an interval below 1.
    """

    def __init__(self, evaluator: Engine, patience: int | None, *, interval: int = 1) -> None:
        if (patience or 0) < 0 or interval < 1:
            raise ValueError(f"patience, interval: expected at least 0 and 1, got {patience} and {interval}.")
        self.evaluator = evaluator
        self.epochs = (patience or 0) * interval

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        if self.epochs:
            engine.add_event_handler(Events.STARTED, self)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Stop if the best epoch lies too far back."""
        best, epoch = self.evaluator.state.best_metric_epoch, engine.state.epoch
        if best != -1 and epoch - best >= self.epochs:
            logger.info("Stopped after epoch %d: no better key metric since epoch %d.", epoch, best)
            engine.terminate()


class FiniteLoss:
    """Raise as soon as a loss or the weights are not finite, before anything of it is saved.

    A loss is looked at when the next one is there, so that the device has long finished it, and at the end of every
    epoch, as the weights are. List it ahead of the handlers of validation and checkpoints.

    Raises:
        FloatingPointError: on running, when a loss or a weight is infinite or not a number.
    """

    def __init__(self) -> None:
        self._loss_check = FiniteCheck()

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self._look)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._check)
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: check_weights({"network": engine.network}))

    def _look(self, engine: Engine) -> None:
        self._check(engine)
        self._loss_check.note([engine.state.output["loss"]])

    def _check(self, engine: Engine) -> None:
        if not self._loss_check.finite():
            (loss,) = self._loss_check.losses
            raise FloatingPointError(
                f"loss: expected a finite number, got {float(loss)} by epoch {engine.state.epoch}, iteration "
                f"{engine.state.iteration}; nothing was saved since. Lower the learning rate, clip gradients, or take "
                "bfloat16 instead of float16."
            )


class GradientClip:
    """Scale all gradients down to a common norm ahead of each step of the optimizer.

    Gradients that a scaler had enlarged for float16 are divided by its scale first. With ``accumulation_steps`` only
    the sum is clipped.

    Args:
        max_norm: largest Euclidean norm of all gradients together; ``None`` never clips.

    Raises:
        ValueError: when ``max_norm`` is not positive.
    """

    def __init__(self, max_norm: float | None) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm: expected more than 0, got {max_norm}.")
        self.max_norm = max_norm

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        if self.max_norm is not None:
            engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Clip, if the optimizer's step comes next."""
        if self.max_norm is None or not _steps_next(engine):
            return
        if engine.scaler is not None:
            engine.scaler.unscale_(engine.optimizer)
        torch.nn.utils.clip_grad_norm_(weights_of(engine.optimizer), self.max_norm)


def _steps_next(engine: Engine) -> bool:
    """Whether this iteration ends a group of accumulated ones, as ``SupervisedTrainer`` counts them."""
    iteration, length, steps = engine.state.iteration, engine.state.epoch_length, engine.accumulation_steps
    place = iteration if length is None else (iteration - 1) % length + 1
    return bool(place % steps == 0 or place == length)
