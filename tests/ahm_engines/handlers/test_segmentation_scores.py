# SPDX-License-Identifier: Apache-2.0
"""Scores of segmentations are those of pencil and paper, in millimetres, and hide no failure."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from torch import Tensor

from ahm_engines.handlers import SegmentationScores

Box = tuple[slice, ...]
NEAR, SHIFTED = (slice(5, 10), slice(5, 10), slice(5, 10)), (slice(7, 12), slice(5, 10), slice(5, 10))


def volume(*boxes: Box, size: tuple[int, ...] = (20, 20, 20), spacing: tuple[float, ...] = (1, 1, 1)) -> Tensor:
    """Class indices ``[1, *S]``: the first box is of class 1, the second of class 2."""
    values = torch.zeros(1, *size, dtype=torch.uint8)
    for index, box in enumerate(boxes, 1):
        values[(0, *box)] = index
    return MetaTensor(values, affine=torch.diag(torch.tensor([*spacing, *[1.0] * (4 - len(spacing))])))


def score(label: Tensor, pred: Tensor, classes: tuple[str, ...] = ("a",), **options: Any) -> dict[str, float]:
    return SegmentationScores(classes, **options).score("case", {"label": label, "pred": pred})


def test_dice_by_hand() -> None:
    row = score(volume(NEAR), volume(SHIFTED))
    assert row["dice_a"] == pytest.approx(2 * 75 / 250)  # 3 of 5 layers of 25 voxels are common
    assert row["dice"] == row["dice_a"]


@pytest.mark.parametrize(("spacing", "distance"), [((1, 1, 1), 2.0), ((3, 1, 1), 6.0), ((1, 3, 3), 2.0)])
def test_hausdorff_distance_is_in_millimetres_along_the_axis_of_the_shift(
    spacing: tuple[float, ...], distance: float
) -> None:
    label, pred = (volume(box, spacing=spacing) for box in (NEAR, SHIFTED))
    assert score(label, pred)["hd95_mm"] == pytest.approx(distance)


def test_spacing_of_an_oblique_affine_is_the_length_of_its_columns() -> None:
    label = volume(NEAR)
    turn = torch.tensor([[0.6, -0.8, 0.0, 7.0], [0.8, 0.6, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    oblique = MetaTensor(label.as_tensor(), affine=turn @ torch.diag(torch.tensor([3.0, 1.0, 1.0, 1.0])))
    assert score(oblique, volume(SHIFTED))["hd95_mm"] == pytest.approx(6.0)


def test_surface_dice_counts_what_lies_within_the_tolerance_in_millimetres() -> None:
    label, pred = (volume(box, spacing=(3, 1, 1)) for box in (NEAR, SHIFTED))
    assert score(label, pred, surface_tolerance=6.0)["surface_dice"] == 1.0
    assert score(label, pred, surface_tolerance=5.9)["surface_dice"] < 0.95
    assert score(label, label, surface_tolerance=0.0)["surface_dice"] == 1.0


def test_surface_dice_and_distance_of_a_missed_part_by_hand() -> None:
    """Two equal cubes, 10 voxels apart, of which one is found: a third of both surfaces together lies far off."""
    far = (slice(15, 20), slice(5, 10), slice(5, 10))
    label = volume(NEAR)
    label[(0, *far)] = 1
    row = score(label, volume(NEAR))
    assert row["surface_dice"] == pytest.approx(2 / 3)
    assert row["dice"] == pytest.approx(2 * 125 / 375)
    assert row["hd95_mm"] == pytest.approx(10.0)  # its outer side is more than 5 % of the label's edge


@pytest.mark.parametrize("corner", [0, 15])
def test_measuring_in_the_box_around_both_masks_changes_nothing(corner: int) -> None:
    generator = torch.Generator().manual_seed(corner)
    label, pred = (torch.zeros(1, 1, 20, 20, 20) for _ in range(2))
    inside = slice(corner, corner + 5)
    label[..., inside, 3:9, 4:8] = torch.randint(0, 2, (5, 6, 4), generator=generator).float()
    pred[..., inside, 2:8, 4:8] = torch.randint(0, 2, (5, 6, 4), generator=generator).float()
    options = {"include_background": True, "spacing": [2.0, 1.0, 0.5]}
    row = score(*(MetaTensor(x[0], affine=torch.diag(torch.tensor([2.0, 1.0, 0.5, 1.0]))) for x in (label, pred)))
    assert row["hd95_mm"] == float(compute_hausdorff_distance(pred, label, percentile=95, **options))
    assert row["surface_dice"] == float(compute_surface_dice(pred, label, [1.0], use_subvoxels=True, **options))


def test_background_never_counts() -> None:
    assert score(volume(NEAR), volume((slice(15, 20), slice(0, 5), slice(0, 5))))["dice"] == 0.0


def test_a_class_that_nobody_sees_is_unknown_and_left_out_of_the_mean_of_the_case() -> None:
    row = score(volume(NEAR), volume(SHIFTED), classes=("a", "b"))
    assert all(math.isnan(row[f"{name}_b"]) for name in ("dice", "hd95_mm", "surface_dice"))
    assert row["dice"] == row["dice_a"]


@pytest.mark.parametrize("boxes", [((), (NEAR,)), ((NEAR,), ())], ids=["only predicted", "only in the label"])
def test_a_class_that_one_of_both_lacks_has_dice_0_and_no_distance(boxes: tuple[tuple[Box, ...], ...]) -> None:
    row = score(volume(*boxes[0]), volume(*boxes[1]))
    assert row["dice_a"] == row["surface_dice_a"] == 0.0
    assert math.isnan(row["hd95_mm_a"]) and math.isnan(row["hd95_mm"])


def test_sizes_are_in_millilitres() -> None:
    row = score(volume(NEAR, spacing=(2, 2, 3)), volume((slice(10), slice(10), slice(10)), spacing=(2, 2, 3)))
    assert row["label_ml_a"] == pytest.approx(125 * 12 / 1000)
    assert row["pred_ml_a"] == pytest.approx(1000 * 12 / 1000)


def test_two_dimensions_are_measured_in_square_millimetres_or_in_pixels() -> None:
    label, pred = (volume(box[:2], size=(20, 20), spacing=(2, 1)) for box in (NEAR, SHIFTED))
    row = score(label, pred)
    assert (row["hd95_mm"], row["label_mm2_a"]) == (4.0, 50.0)
    row = score(label, pred, unit="px")
    assert (row["hd95_px"], row["label_px_a"], row["pred_px_a"]) == (2.0, 25.0, 25.0)


def test_pictures_need_no_affine_but_millimetres_do() -> None:
    label, pred = (torch.as_tensor(volume(box).as_tensor()) for box in (NEAR, SHIFTED))
    assert score(label, pred, unit="px")["hd95_px"] == 2.0
    with pytest.raises(ValueError, match=r"case: expected a label with an affine .* unit='px'"):
        score(label, pred)


def test_one_channel_per_class_means_the_same_as_class_indices() -> None:
    label, pred = volume(NEAR, SHIFTED), volume(SHIFTED, NEAR)
    onehot = torch.nn.functional.one_hot(pred.as_tensor()[0].long(), 3).movedim(-1, 0).float()
    first, second = (score(label, p, classes=("a", "b")) for p in (pred, MetaTensor(3.0 * onehot - 1.0)))
    assert first == second
    assert first["dice_a"] != first["dice_b"]


def test_without_distances_there_is_dice_alone() -> None:
    assert set(score(volume(NEAR), volume(NEAR), distances=False)) == {"dice", "dice_a", "label_ml_a", "pred_ml_a"}


@pytest.mark.parametrize(
    ("pred", "message"),
    [
        (torch.zeros(4, 20, 20, 20), r"case: expected 1 or 2 channels in pred, got shape \[4, 20, 20, 20\]"),
        (torch.zeros(1, 20, 20, 10), r"case: expected pred on the grid of label, \[20, 20, 20\], got \[20, 20, 10\]"),
        (torch.full((1, 20, 20, 20), 0.3), r"class indices 0 to 1 in pred, got values from 0.3 to 0.3, not all"),
        (torch.full((1, 20, 20, 20), 2), r"class indices 0 to 1 in pred, got values from 2 to 2\."),
        (torch.full((1, 20, 20, 20), -1), r"class indices 0 to 1 in pred, got values from -1 to -1\."),
    ],
)
def test_predictions_that_do_not_fit_are_refused_with_the_case(pred: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(volume(NEAR), pred)


def test_labels_of_unknown_classes_and_with_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="class indices 0 to 1 in label, got values from 0 to 2"):
        score(volume(NEAR, SHIFTED), volume(NEAR))
    with pytest.raises(ValueError, match="expected 1 or 1 channels in label"):
        score(torch.zeros(2, 4, 4, 4), volume(NEAR))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": []}, "at least one name"),
        ({"classes": ["a", "a"]}, "no name twice"),
        ({"unit": "cm"}, "unit: expected one of"),
        ({"surface_tolerance": -1.0}, "surface_tolerance: expected at least 0"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentationScores(**{"classes": ["a"], **options})
