# SPDX-License-Identifier: Apache-2.0
"""How well segmentations fit their labels: overlap, and distances of surfaces in millimetres."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from monai.transforms.utils import generate_spatial_bounding_box
from torch import Tensor

from ahm_engines.handlers.scores import CaseScores, Row, known_mean, statistics

__all__ = ["SegmentationScores"]

SIZE_UNITS = ("ml", "mm2", "px")
UNITS = ("mm", "px")


class SegmentationScores(CaseScores):
    """Dice, 95th percentile of the Hausdorff distance and surface Dice, per case and foreground class.

    The decollated output of the evaluator holds ``label`` ``[1, *S]``, class indices with 0 = background, and
    ``pred`` on the same grid: class indices ``[1, *S]``, or one channel per class, background first, of which the
    largest counts (logits, probabilities, one-hot). ``case_id`` comes from the batch; without one, cases are numbered.

    - ``dice``: twice the common voxels over the voxels of both masks.
    - ``hd95_mm``: the larger of the two directed 95th percentiles of the distances between edge voxels.
    - ``surface_dice``: share of both surfaces, by area, within the tolerance of the other (Nikolov et al. 2018).

    A class that is in neither label nor prediction is NaN and does not count, as in nnU-Net. If one of them lacks it,
    Dice and surface Dice are 0, and there is no Hausdorff distance. ``hd95_missing`` counts the cases where the label
    has a class and the prediction does not: the mean distance is then one over fewer cases than it could be.
    A case's number is the mean over its counted classes; ``dice``, ``hd95_mm`` and ``surface_dice`` are means over
    cases of that number, ``dice_<class>`` and so on are means over the cases in which the class counts.

    ``scores.csv`` holds these per case, and the size of each class in label and prediction (``label_ml_<class>``,
    ``pred_ml_<class>``); ``scores.json`` mean, standard deviation, median and count of each column.

    Args:
        classes: names of the foreground classes, in the order of their indices.
        output_dir: where to write the files; ``None`` writes none.
        unit: ``mm`` takes spacings from the label's affine, and sizes are in ml (in 2D mm2). ``px`` is for pictures,
            which have no spacing: distances and sizes are in pixels, and named so (``hd95_px``, ``label_px_<class>``).
        surface_tolerance: of the surface Dice, in ``unit``.
        distances: whether to measure surfaces; without them a validation during training is quick.

    Raises:
        ValueError: for another unit or a negative tolerance; on running, when ``pred`` and ``label`` are not as above,
            or when the label has no affine to take millimetres from.

    Example:
        >>> import torch
        >>> scores = SegmentationScores(["tumour"], unit="px")
        >>> label = torch.zeros(1, 8, 8)
        >>> label[:, :4] = 1
        >>> row = scores.score("case", {"label": label, "pred": label})
        >>> row["dice"], row["hd95_px"], row["label_px_tumour"]
        (1.0, 0.0, 32.0)
    """

    def __init__(
        self,
        classes: Sequence[str],
        output_dir: str | Path | None = None,
        *,
        unit: str = "mm",
        surface_tolerance: float = 1.0,
        distances: bool = True,
    ) -> None:
        if unit not in UNITS:
            raise ValueError(f"unit: expected one of {UNITS}, got {unit!r}.")
        if not 0 <= surface_tolerance < math.inf:
            raise ValueError(f"surface_tolerance: expected at least 0, got {surface_tolerance}.")
        self.unit = unit
        self.surface_tolerance = surface_tolerance
        self.distance = f"hd95_{unit}" if distances else None
        self.measures = ["dice", *([self.distance, "surface_dice"] if self.distance else [])]
        super().__init__(classes, self.measures, self.measures, output_dir)

    def score(self, case: str, output: Mapping[Any, Any]) -> Row:
        """Measures of one case: foreground means, then those of every class, then sizes."""
        label = _class_map(case, "label", output["label"], 1, len(self.classes))
        pred = _class_map(case, "pred", output["pred"], len(self.classes) + 1, len(self.classes))
        if pred.shape != label.shape:
            raise ValueError(f"{case}: expected pred on the grid of label, {[*label.shape]}, got {[*pred.shape]}.")
        spacing = self._spacing(case, output["label"])
        measures: Row = {}
        sizes: Row = {}
        for index, name in enumerate(self.classes, 1):
            masks = {"label": label == index, "pred": pred == index}
            measures |= {f"{key}_{name}": value for key, value in self._measure(masks, spacing).items()}
            sizes |= {f"{key}_{name}": value for key, value in self._sizes(masks, spacing).items()}
        means = {m: known_mean([measures[f"{m}_{name}"] for name in self.classes]) for m in self.measures}
        return means | measures | sizes

    def summarise(self, rows: Sequence[Row]) -> tuple[dict[str, float], dict[str, Any]]:
        """Means of the columns, and their statistics for the report."""
        scores = {name: statistics([row[name] for row in rows]) for name in self.names}
        metrics = {name: scores[name]["mean"] for name in self.names}
        report: dict[str, Any] = {"scores": scores}
        if self.distance:
            missing = {name: sum(self._is_missing(row, name) for row in rows) for name in self.classes}
            metrics["hd95_missing"] = float(sum(missing.values()))
            report |= {"hd95_missing": missing, "unit": self.unit, "surface_tolerance": self.surface_tolerance}
        return metrics, report

    def _is_missing(self, row: Row, name: str) -> bool:
        there = any(row.get(f"label_{unit}_{name}") for unit in SIZE_UNITS)
        return there and math.isnan(row[f"{self.distance}_{name}"])

    def _measure(self, masks: Mapping[str, Tensor], spacing: Sequence[float]) -> dict[str, float]:
        both, total = (masks["label"] & masks["pred"]).sum(), masks["label"].sum() + masks["pred"].sum()
        scores = {"dice": float(2 * both / total)}  # 0 / 0 is NaN
        if self.distance is None:
            return scores
        if masks["label"].any() and masks["pred"].any():
            distance, share = _surface_scores(masks["pred"], masks["label"], spacing, self.surface_tolerance)
            return scores | {self.distance: distance, "surface_dice": share}
        return scores | {self.distance: math.nan, "surface_dice": scores["dice"]}

    def _sizes(self, masks: Mapping[str, Tensor], spacing: Sequence[float]) -> dict[str, float]:
        unit, voxel = "px", 1.0
        if self.unit == "mm":
            unit, voxel = ("ml", math.prod(spacing) / 1000) if len(spacing) == 3 else ("mm2", math.prod(spacing))
        return {f"{key}_{unit}": float(mask.sum()) * voxel for key, mask in masks.items()}

    def _spacing(self, case: str, label: Tensor) -> list[float]:
        dims = label.ndim - 1
        if self.unit == "px":
            return [1.0] * dims
        if not isinstance(label, MetaTensor):
            raise ValueError(f"{case}: expected a label with an affine (MetaTensor); for pictures set unit='px'.")
        return [float(size) for size in affine_to_spacing(label.affine, r=dims)]


def _class_map(case: str, name: str, values: Tensor, channels: int, highest: int) -> Tensor:
    """Class indices ``[*S]`` of ``[1, *S]``, or of one channel per class."""
    values = values.as_tensor() if isinstance(values, MetaTensor) else values
    if values.shape[0] not in (1, channels):
        raise ValueError(f"{case}: expected 1 or {channels} channels in {name}, got shape {[*values.shape]}.")
    if values.shape[0] > 1:
        if not values.isfinite().all():
            raise ValueError(f"{case}: expected numbers in {name}, got NaN or infinite values.")
        return values.argmax(0)
    indices = values[0]
    fractions = indices.is_floating_point() and bool((indices != indices.round()).any())
    if fractions or not 0 <= int(indices.min()) <= int(indices.max()) <= highest:
        raise ValueError(
            f"{case}: expected class indices 0 to {highest} in {name}, got values from {float(indices.min()):.3g} to "
            f"{float(indices.max()):.3g}{', not all of them whole' if fractions else ''}."
        )
    return indices


def _surface_scores(pred: Tensor, label: Tensor, spacing: Sequence[float], tolerance: float) -> tuple[float, float]:
    """HD95 and surface Dice of two masks that are not empty; what lies outside of both makes no difference."""
    start, end = generate_spatial_bounding_box((pred | label)[None])
    box = tuple(slice(first, last) for first, last in zip(start, end, strict=True))
    pair = [mask[box][None, None].cpu() for mask in (pred, label)]
    options: dict[str, Any] = {"include_background": True, "spacing": list(spacing)}
    distance = compute_hausdorff_distance(*pair, percentile=95, **options)
    share = compute_surface_dice(*pair, [tolerance], use_subvoxels=True, **options)
    return float(distance), float(share)
