# SPDX-License-Identifier: Apache-2.0
"""Predictions of a validation as pictures in TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from matplotlib.figure import Figure

from ahm_engines.handlers.panel import figure_pixels
from ahm_engines.handlers.quick_look import draw_quick_look

__all__ = ["PredictionPictures"]


class PredictionPictures:
    """Draw the first case of every validation into TensorBoard.

    A segmentation is drawn twice, ``validation/prediction`` and ``validation/label``, by
    :func:`~ahm_engines.handlers.quick_look.draw_quick_look`; of a classification there is one picture, whose title says
    what was predicted and what is right. No name of a case goes into either.

    Args:
        summary_writer: TensorBoard writer; ``None`` draws nothing.
        classes: names of classes 1, 2, ... of a segmentation, or of all classes of a classification.
        y_up: as in ``draw_quick_look``.
    """

    def __init__(self, summary_writer: Any, classes: Sequence[str], *, y_up: bool | None = None) -> None:
        self.summary_writer = summary_writer
        self.classes = list(classes)
        self.y_up = y_up

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator with decollated output."""
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), self)

    def __call__(self, engine: Engine) -> None:
        """Draw what the first iteration left in the output."""
        if self.summary_writer is None or idist.get_rank() != 0:
            return
        epoch = engine.state.epoch
        for name, figure in self._figures(engine.state.output[0], f"epoch {epoch}").items():
            self.summary_writer.add_image(f"validation/{name}", figure_pixels(figure), epoch, dataformats="HWC")

    def _figures(self, case: Mapping[str, Any], title: str) -> dict[str, Figure]:
        image, pred, label = case["image"], case["pred"], case["label"]
        if pred.ndim == 1:
            title = f"{title}: {self.classes[int(pred.argmax())]}, right is {self.classes[int(label)]}"
            return {"prediction": draw_quick_look(image, None, [], y_up=self.y_up, title=title)}
        return {
            name: draw_quick_look(image, labels, self.classes, y_up=self.y_up, title=f"{title}: {name}")
            for name, labels in (("prediction", pred), ("label", label))
        }
