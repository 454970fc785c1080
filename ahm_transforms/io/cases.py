# SPDX-License-Identifier: Apache-2.0
"""From a folder or a datalist to checked training and validation cases, in one call."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ahm_transforms.io._types import BadCasesError, Case, Found, Geometry, LeftOut
from ahm_transforms.io.check import case_name, check_cases
from ahm_transforms.io.datalist import read_datalist
from ahm_transforms.io.find import find_cases
from ahm_transforms.io.split import split_by_patient
from ahm_transforms.io.template import template_cases

LOGGER = logging.getLogger(__name__)


@dataclass
class Cases:
    """Cases to train and to validate on, and what was left out.

    Attributes:
        training: dictionaries with ``image``, ``case_id`` and ``patient_id``.
        validation: the same; no patient is in both, unless there is only one.
        left_out: what is not used, with the reason.
        geometry: size and spacing by case id.
    """

    training: list[Case]
    validation: list[Case]
    left_out: list[LeftOut] = field(default_factory=list)
    geometry: dict[str, Geometry] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Return counts and the ranges of size and spacing, ready for JSON; no names, paths or ids."""
        numbers: dict[str, Any] = {}
        for part, cases in (("training", self.training), ("validation", self.validation)):
            numbers[f"{part}_cases"] = len(cases)
            numbers[f"{part}_patients"] = len({case["patient_id"] for case in cases})
        numbers["left_out"] = len(self.left_out)
        return {**numbers, **_ranges(list(self.geometry.values()))}


def load_cases(
    dataset_dir: str | Path | None = None,
    *,
    datalist: str | Path | None = None,
    spatial_dims: int = 3,
    val_fraction: float = 0.2,
    seed: int = 0,
    patient_pattern: str | None = None,
    skip_bad: bool = False,
    min_size: Sequence[int] | int | None = None,
    channels: int | None = None,
) -> Cases:
    r"""Find, check and split the cases; without folder and datalist, take the MNI152 template of nilearn.

    Args:
        dataset_dir: folder with NIfTI files, 2D pictures or DICOM series, in it or below it.
        datalist: JSON file in Decathlon form to use instead of a search; paths in it are relative to ``dataset_dir``,
            or else to itself. Its ``validation`` list is used as it is; without one the split is drawn.
        spatial_dims: 2 or 3.
        val_fraction: share of the patients for validation.
        seed: seed of the split.
        patient_pattern: regular expression that finds the patient in a file's path, such as ``(patient\d+)``.
        skip_bad: leave out what cannot be used, with a warning, where the default is to stop.
        min_size: smallest usable image in voxels, one patch for instance.
        channels: how many channels every image must have; None takes any.

    Raises:
        BadCasesError: some cases cannot be used; it lists them all.
        FileNotFoundError: the folder or datalist is missing or holds no image.
        ImportError: the template is wanted and nilearn is not installed.
        ValueError: the datalist, the split or the pattern is wrong, or two files would have the same id.
    """
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
    found, given = _find(dataset_dir, datalist, spatial_dims, patient_pattern)
    _refuse_equal_ids(found.cases)
    checked = check_cases(found.cases, spatial_dims=spatial_dims, min_size=min_size, channels=channels)
    bad = found.bad + checked.bad
    if bad and not (skip_bad and checked.cases):
        raise BadCasesError(bad)
    if not checked.cases:
        raise FileNotFoundError(f"dataset_dir {dataset_dir} holds no usable image:{_lines(found.left_out)}")
    left_out = found.left_out + bad
    if left_out:
        LOGGER.warning("%d left out:%s", len(left_out), _lines(left_out))
    if given is None:
        training, validation = split_by_patient(checked.cases, val_fraction=val_fraction, seed=seed)
    else:
        training = [case for case in checked.cases if case["case_id"] not in given]
        validation = [case for case in checked.cases if case["case_id"] in given]
    return Cases(training, validation, left_out, checked.geometry)


def _find(
    dataset_dir: str | Path | None, datalist: str | Path | None, spatial_dims: int, patient_pattern: str | None
) -> tuple[Found, set[str] | None]:
    """Return what there is and, where the source says so itself, the ids of the validation cases."""
    if datalist is None and dataset_dir is not None:
        return find_cases(dataset_dir, patient_pattern=patient_pattern), None
    if datalist is None:
        training, validation = template_cases(spatial_dims=spatial_dims)
        return Found(training + validation), {case["case_id"] for case in validation}
    training, listed = read_datalist(datalist, dataset_dir=dataset_dir, patient_pattern=patient_pattern)
    shared = {case["patient_id"] for case in training} & {case["patient_id"] for case in listed or []}
    if shared:
        LOGGER.warning("%s: %d patient(s) are in both training and validation.", datalist, len(shared))
    return Found(training + (listed or [])), None if listed is None else {case["case_id"] for case in listed}


def _refuse_equal_ids(cases: Sequence[Case]) -> None:
    counts = Counter(case["case_id"] for case in cases)
    twice = [case_name(case) for case in cases if counts[case["case_id"]] > 1]
    if twice:
        raise ValueError(f"these images would have the same case_id, keep one of each: {', '.join(twice[:10])}.")


def _lines(items: Sequence[LeftOut]) -> str:
    return "".join(f"\n  {name}: {reason}" for name, reason in items)


def _ranges(geometry: Sequence[Geometry]) -> dict[str, Any]:
    """Return the smallest and largest size and spacing along each axis, for each number of axes that occurs."""
    ranges: dict[str, Any] = {}
    for dims in sorted({len(item.shape) for item in geometry}):
        items = [item for item in geometry if len(item.shape) == dims]
        shapes, spacings = [item.shape for item in items], [item.spacing_mm for item in items]
        ranges[f"images_{dims}d"] = {
            "shape_min": [min(axis) for axis in zip(*shapes, strict=True)],
            "shape_max": [max(axis) for axis in zip(*shapes, strict=True)],
            "spacing_mm_min": [min(axis) for axis in zip(*spacings, strict=True)],
            "spacing_mm_max": [max(axis) for axis in zip(*spacings, strict=True)],
        }
    return ranges
