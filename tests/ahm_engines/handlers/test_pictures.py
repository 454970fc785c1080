# SPDX-License-Identifier: Apache-2.0
"""TensorBoard shows what a validation predicted, of the first case alone and without its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from monai.engines import SupervisedEvaluator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from ahm_engines.handlers import PredictionPictures, pictures

PATIENT = "Doe^Jane"


class Thresholds(nn.Module):
    """Finds in every image what is brighter than one half."""

    def forward(self, image: Tensor) -> Tensor:
        return (image > 0.5).float()


class Sums(nn.Module):
    """The first class where an image is dark."""

    def forward(self, image: Tensor) -> Tensor:
        bright = image.mean((1, 2, 3)) > 0.5
        return torch.stack([~bright, bright], 1).float()


def evaluator(network: nn.Module, handler: PredictionPictures, labels: list[Any]) -> SupervisedEvaluator:
    """Two cases: a bright square on the left, and one of everything."""
    images = torch.zeros(2, 1, 16, 20)
    images[0, 0, :6, 4:12] = images[1] = 1.0
    batches = [
        {"image": image[None], "label": label, "case_id": [PATIENT]}
        for image, label in zip(images, labels, strict=True)
    ]
    return SupervisedEvaluator(torch.device("cpu"), batches, network, val_handlers=[handler])


def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    drawn: list[Figure] = []
    real = pictures.figure_pixels

    def keep(figure: Figure) -> np.ndarray:
        drawn.append(figure)
        return real(figure)

    monkeypatch.setattr(pictures, "figure_pixels", keep)
    return drawn


def texts(figure: Figure) -> str:
    return " ".join(
        text.get_text() for text in (*figure.texts, *(t for legend in figure.legends for t in legend.texts))
    )


def test_a_segmentation_is_drawn_beside_its_label_against_the_trainers_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = figures(monkeypatch)
    nothing = torch.zeros(1, 1, 16, 20)
    with SummaryWriter(str(tmp_path)) as writer:
        engine = evaluator(Thresholds(), PredictionPictures(writer, ["square"]), [nothing, nothing])
        for epoch in (5, 10):
            engine.run(epoch)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["images"] == ["validation/prediction", "validation/label"]
    assert all([event.step for event in events.Images(tag)] == [5, 10] for tag in events.Tags()["images"])
    said = [texts(figure) for figure in drawn]
    assert len(said) == 4 and not any(PATIENT in text for text in said)
    assert "square" in said[0] and "nothing found" not in said[0]  # the prediction
    assert "nothing found" in said[1]  # the label


def test_a_classification_says_what_was_predicted_and_what_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = figures(monkeypatch)
    with SummaryWriter(str(tmp_path)) as writer:
        handler = PredictionPictures(writer, ["dark", "bright"])
        evaluator(Sums(), handler, [torch.tensor([1]), torch.tensor([1])]).run(3)
    assert [texts(figure) for figure in drawn] == [" epoch 3: dark, right is bright"]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Images("validation/prediction")] == [3]


def test_without_a_writer_and_in_further_processes_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = figures(monkeypatch)
    labels = [torch.zeros(1, 1, 16, 20)] * 2
    evaluator(Thresholds(), PredictionPictures(None, ["square"]), labels).run()
    monkeypatch.setattr(idist, "get_rank", lambda: 1)
    evaluator(Thresholds(), PredictionPictures(object(), ["square"]), labels).run()
    assert not drawn
