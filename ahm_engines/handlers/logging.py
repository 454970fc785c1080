# SPDX-License-Identifier: Apache-2.0
"""Show how a training goes: a progress bar, and curves in TensorBoard.

One readable log line per validation is what MONAI's ``StatsHandler(iteration_log=False)`` writes on an evaluator.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator
from monai.handlers import TensorBoardHandler
from monai.utils import is_scalar
from tqdm.auto import tqdm

from ahm_engines.events import MaskedKeys

__all__ = ["TensorBoardScalars", "TrainingBar", "epoch_scalars", "losses"]


class TrainingBar:
    """One progress bar per epoch, with loss and masker loss.

    Losses are read from the device every few iterations only, as reading waits for it.

    Args:
        every: iterations between two readings of the losses; the last of an epoch is always read.
        leave: whether the bar of a finished epoch stays on the screen.
    """

    def __init__(self, *, every: int = 10, leave: bool = True) -> None:
        self.every = every
        self.leave = leave
        self._bar: tqdm | None = None

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._advance)
        engine.add_event_handler(Events.COMPLETED, self._close)

    def _start(self, engine: Engine) -> None:
        self._close()
        if idist.get_rank() != 0:
            return
        state = engine.state
        self._bar = tqdm(
            total=state.epoch_length,
            initial=state.iteration % state.epoch_length if state.epoch_length else 0,
            desc=f"Epoch {state.epoch}/{state.max_epochs}",
            leave=self.leave,
            dynamic_ncols=True,
        )

    def _advance(self, engine: Engine) -> None:
        """The bar ends with the last iteration: what other handlers log after the epoch comes below it."""
        if self._bar is None:
            return
        iteration, length = engine.state.iteration, engine.state.epoch_length
        last = bool(length) and iteration % length == 0
        self._bar.update()
        if last or (iteration - 1) % self.every == 0:
            numbers = losses(engine.state.output).items()
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in numbers}, refresh=last)
        if last:
            self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class TensorBoardScalars(TensorBoardHandler):
    """Write losses, the masker's own numbers and metrics to TensorBoard.

    On a trainer: ``train/loss``, ``train/masker_loss`` and ``masking/<diagnostic>`` against the iteration, and
    ``train/<metric>`` against the epoch. On an evaluator: ``validation/<metric>`` against the trainer's epoch, which
    the validation handler tells the evaluator. MONAI's ``TensorBoardStatsHandler`` has no diagnostics and gives the
    metrics of both engines the same names.

    Args:
        summary_writer: an open writer, or ``None`` to open one.
        log_dir: where to open it.
        every: iterations between two points, as reading a loss waits for the device.
    """

    def __init__(self, summary_writer: Any = None, log_dir: str | Path = "./runs", *, every: int = 10) -> None:
        super().__init__(summary_writer=summary_writer, log_dir=str(log_dir))
        self.every = every

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer or an evaluator."""
        if not isinstance(engine, Evaluator):
            engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.every), self._write_iteration)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._write_epoch)

    def _write_iteration(self, engine: Engine) -> None:
        output, step = engine.state.output, engine.state.iteration
        for name, value in losses(output).items():
            self._writer.add_scalar(f"train/{name}", value, step)
        if MaskedKeys.DECISION in output:
            for name, value in engine.masker.diagnostics(output[MaskedKeys.DECISION]).items():
                self._writer.add_scalar(f"masking/{name}", float(value), step)

    def _write_epoch(self, engine: Engine) -> None:
        group = "validation" if isinstance(engine, Evaluator) else "train"
        for name, value in epoch_scalars(engine, group).items():
            self._writer.add_scalar(name, value, engine.state.epoch)
        self._writer.flush()


def epoch_scalars(engine: Engine, group: str) -> dict[str, float]:
    """The metrics that are single numbers, as ``<group>/<metric>``."""
    metrics = engine.state.metrics.items()
    return {f"{group}/{name}": float(value) for name, value in metrics if is_scalar(value)}


def losses(output: Mapping[str, Any]) -> dict[str, float]:
    """The losses that the iteration had, as numbers."""
    found = {str(key): output.get(key) for key in (MaskedKeys.LOSS, MaskedKeys.MASKER_LOSS)}
    return {
        name: float(loss.detach() if isinstance(loss, torch.Tensor) else loss)
        for name, loss in found.items()
        if loss is not None
    }
