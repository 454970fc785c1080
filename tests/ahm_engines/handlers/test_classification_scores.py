# SPDX-License-Identifier: Apache-2.0
"""Scores of a classification are those of pencil and paper."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch

from ahm_engines.handlers import ClassificationScores

CLASSES = ["a", "b", "c"]


def summary(
    cases: list[tuple[int, list[float]]], classes: list[str] = CLASSES
) -> tuple[dict[str, float], dict[str, Any]]:
    """Numbers and report of cases, each a label and its logits."""
    scores = ClassificationScores(classes)
    rows = [scores.score(str(n), {"pred": torch.tensor(p), "label": torch.tensor(y)}) for n, (y, p) in enumerate(cases)]
    return scores.summarise(rows)


def sure(index: int, size: int = 3) -> list[float]:
    return [5.0 if place == index else 0.0 for place in range(size)]


def test_confusion_matrix_and_what_follows_from_it_by_hand() -> None:
    pairs = [(0, 0), (0, 0), (0, 1), (1, 1), (1, 2), (2, 2), (2, 2), (2, 2)]
    numbers, report = summary([(label, sure(predicted)) for label, predicted in pairs])
    assert report["confusion_matrix"] == [[2, 1, 0], [0, 1, 1], [0, 0, 3]]
    assert numbers["accuracy"] == pytest.approx(6 / 8)
    assert numbers["recall_a"] == pytest.approx(2 / 3) and numbers["precision_a"] == 1.0
    assert numbers["precision_b"] == 0.5 and numbers["precision_c"] == 0.75
    assert [numbers[f"f1_{name}"] for name in CLASSES] == pytest.approx([0.8, 0.5, 6 / 7])
    assert numbers["macro_f1"] == pytest.approx((0.8 + 0.5 + 6 / 7) / 3)
    assert numbers["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)


def test_area_under_the_curve_counts_well_ordered_pairs_and_half_of_the_ties() -> None:
    positive, negative = [0.9, 0.4, 0.4], [0.4, 0.1]  # 6 pairs: 4 in order, 2 tied
    cases = [(1, [0.0, z]) for z in positive] + [(0, [0.0, z]) for z in negative]
    numbers, _ = summary(cases, ["no", "yes"])
    assert numbers["auroc_yes"] == pytest.approx(5 / 6)
    assert numbers["auroc"] == numbers["auroc_no"] == pytest.approx(5 / 6)


def test_area_under_the_curve_is_each_class_against_all_others() -> None:
    cases = [(0, [3.0, 0.0, 0.0]), (1, [4.0, 0.0, 0.0]), (2, [0.0, 0.0, 9.0])]
    numbers, _ = summary(cases)
    assert numbers["auroc_a"] == 0.5  # the second case looks more like it than the first, the third less
    assert numbers["auroc_b"] == 0.5  # its only case is above the third and below the first
    assert numbers["auroc_c"] == 1.0
    assert numbers["auroc"] == pytest.approx(2 / 3)


def test_sure_cases_do_not_tie() -> None:
    numbers, _ = summary([(1, [0.0, 30.0]), (0, [0.0, 20.0])], ["no", "yes"])
    assert numbers["auroc"] == 1.0


def test_an_absent_class_is_left_out_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    scores = ClassificationScores(CLASSES)
    cases = [(0, sure(0)), (1, sure(1)), (1, sure(0))]
    rows = [scores.score("x", {"pred": torch.tensor(p), "label": torch.tensor(y)}) for y, p in cases]
    with caplog.at_level(logging.WARNING):
        numbers, _ = scores.summarise(rows)
        scores.summarise(rows)
    assert all(math.isnan(numbers[f"{measure}_c"]) for measure in ("auroc", "recall", "precision", "f1"))
    assert numbers["auroc"] == pytest.approx(numbers["auroc_a"])
    assert numbers["balanced_accuracy"] == pytest.approx((1 + 0.5) / 2)
    assert [record.getMessage() for record in caplog.records] == [
        "No case is of class c: its AUROC is unknown and left out of the mean."
    ]


def test_a_class_predicted_but_not_there_spoils_the_f1() -> None:
    numbers, _ = summary([(0, sure(0)), (1, sure(2))])
    assert numbers["f1_c"] == 0.0 and numbers["f1_b"] == 0.0
    assert numbers["macro_f1"] == pytest.approx(1 / 3)
    assert math.isnan(numbers["precision_b"])


def test_the_row_of_a_case_names_classes_and_holds_probabilities() -> None:
    logits = torch.tensor([0.0, math.log(2.0), 0.0])
    row = ClassificationScores(CLASSES).score("x", {"pred": logits, "label": 2})
    assert (row["label"], row["predicted"]) == ("c", "b")
    assert [row[f"probability_{name}"] for name in CLASSES] == pytest.approx([0.25, 0.5, 0.25])


def test_what_does_not_fit_the_classes_is_refused_with_the_case() -> None:
    scores = ClassificationScores(CLASSES)
    with pytest.raises(ValueError, match=r"x7: expected one logit for each of \['a', 'b', 'c'\], got shape \[2\]"):
        scores.score("x7", {"pred": torch.zeros(2), "label": 0})
    with pytest.raises(ValueError, match="x7: expected a label from 0 to 2, got 3"):
        scores.score("x7", {"pred": torch.zeros(3), "label": 3})
    with pytest.raises(ValueError, match=r"x7: expected logits that are numbers, got \[nan, 0.0, 1.0\]"):
        scores.score("x7", {"pred": torch.tensor([float("nan"), 0.0, 1.0]), "label": 1})
