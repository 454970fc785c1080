# SPDX-License-Identifier: Apache-2.0
"""How well cases are told apart: accuracy, F1, area under the ROC curve and the confusion matrix."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.metrics import compute_roc_auc
from torch import Tensor

from ahm_engines.handlers.scores import CaseScores, Row, known_mean

__all__ = ["ClassificationScores"]

TOTALS = ("accuracy", "balanced_accuracy", "macro_f1", "auroc")
PER_CLASS = ("precision", "recall", "f1", "auroc")
logger = logging.getLogger(__name__)


class ClassificationScores(CaseScores):
    """Scores over all cases, and for each class against the others.

    The decollated output of the evaluator holds ``pred``, logits ``[K]`` without an activation, and ``label``, the
    index of a class. ``case_id`` comes from the batch; without one, cases are numbered.

    - ``accuracy``: share of cases whose largest logit is at their class.
    - ``precision_<class>``, ``recall_<class>``, ``f1_<class>``: from the confusion matrix; NaN where it is 0 / 0, as
      the precision of a class that is never predicted.
    - ``auroc_<class>``: area under the ROC curve of the class's probability, this class against all others; NaN when
      all cases or none are of the class, which is logged.
    - ``balanced_accuracy``, ``macro_f1``, ``auroc``: means of recall, F1 and AUROC over the classes where they are
      known. With two classes both have the same AUROC.

    ``scores.csv`` holds each case's class, the predicted one and the probabilities; ``scores.json`` the numbers and
    the confusion matrix, a row for each true class and a column for each predicted one.

    Args:
        classes: their names, in the order of their indices.
        output_dir: where to write the files; ``None`` writes none.

    Raises:
        ValueError: on running, when ``pred`` or ``label`` does not fit the classes.

    Example:
        >>> scores = ClassificationScores(["benign", "malignant"])
        >>> row = scores.score("case", {"pred": torch.tensor([0.0, 2.0]), "label": torch.tensor(1)})
        >>> row["predicted"], round(row["probability_malignant"], 3)
        ('malignant', 0.881)
    """

    def __init__(self, classes: Sequence[str], output_dir: str | Path | None = None) -> None:
        super().__init__(classes, TOTALS, PER_CLASS, output_dir)
        self._warned: set[str] = set()

    def score(self, case: str, output: Mapping[Any, Any]) -> Row:
        """Class, predicted class and probabilities of one case."""
        logits, label = output["pred"], int(output["label"])
        if tuple(logits.shape) != (len(self.classes),):
            raise ValueError(f"{case}: expected one logit for each of {self.classes}, got shape {[*logits.shape]}.")
        if not logits.isfinite().all():
            raise ValueError(f"{case}: expected logits that are numbers, got {logits.tolist()}.")
        if not 0 <= label < len(self.classes):
            raise ValueError(f"{case}: expected a label from 0 to {len(self.classes) - 1}, got {label}.")
        chances = logits.double().softmax(0).tolist()  # in float32 sure cases would tie at 1
        predicted = self.classes[chances.index(max(chances))]
        probabilities = {f"probability_{name}": chance for name, chance in zip(self.classes, chances, strict=True)}
        return {"label": self.classes[label], "predicted": predicted} | probabilities

    def summarise(self, rows: Sequence[Row]) -> tuple[dict[str, float], dict[str, Any]]:
        """All numbers, and with the confusion matrix for the report."""
        matrix = self._confusion(rows)
        hits, true, predicted = matrix.diag(), matrix.sum(1), matrix.sum(0)
        columns = {"precision": hits / predicted, "recall": hits / true, "f1": 2 * hits / (true + predicted)}
        scores = {f"{key}_{c}": float(v) for key, column in columns.items() for c, v in self._named(column)}
        scores |= {f"auroc_{name}": self._auroc(rows, name) for name in self.classes}
        total = {"accuracy": float(hits.sum() / matrix.sum())} | {
            name: known_mean([scores[f"{key}_{c}"] for c in self.classes])
            for name, key in (("balanced_accuracy", "recall"), ("macro_f1", "f1"), ("auroc", "auroc"))
        }
        return total | scores, {"scores": total | scores, "confusion_matrix": matrix.long().tolist()}

    def _confusion(self, rows: Sequence[Row]) -> Tensor:
        """Counts ``[true, predicted]``, as float."""
        size = len(self.classes)
        places = [self.classes.index(row["label"]) * size + self.classes.index(row["predicted"]) for row in rows]
        return torch.tensor(places, dtype=torch.long).bincount(minlength=size**2).view(size, size).double()

    def _named(self, column: Tensor) -> zip[tuple[str, float]]:
        return zip(self.classes, column.tolist(), strict=True)

    def _auroc(self, rows: Sequence[Row], name: str) -> float:
        """One class against the others."""
        truth = torch.tensor([row["label"] == name for row in rows], dtype=torch.long)
        if truth.unique().numel() == 2:
            chances = torch.tensor([row[f"probability_{name}"] for row in rows], dtype=torch.double)
            return float(compute_roc_auc(chances, truth))
        if name not in self._warned:
            which = "all cases are" if truth.any() else "no case is"
            logger.warning("%s of class %s: its AUROC is unknown and left out of the mean.", which.capitalize(), name)
            self._warned.add(name)
        return math.nan
