# SPDX-License-Identifier: Apache-2.0
"""Cut volumes with label maps into axial slices that show something or not: cases for a 2D classifier."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.transforms import EnsureChannelFirst, Orientation

from ahm_transforms.io._types import Case
from ahm_transforms.io.classes import class_names
from ahm_transforms.io.labelled import load_segmentation_cases
from ahm_transforms.io.labels import load_label
from ahm_transforms.io.reader import load_image

LOGGER = logging.getLogger(__name__)


def write_slices(
    output_dir: str | Path,
    dataset_dir: str | Path,
    *,
    classes: Sequence[str] = ("without", "with"),
    labels_dir: str | Path | None = None,
    label_values: Sequence[int] = (1,),
    patient_pattern: str | None = None,
    skip_bad: bool = False,
) -> dict[str, Any]:
    r"""Write the axial slices of all volumes that have a label map, and a table of what they show.

    ``images/<patient_id>/<case_id>_slice012.nii.gz`` is a 2D NIfTI file with the volume's intensities and spacing,
    number 0 at the feet. As in pictures, the first axis runs to the patient's left and the second one to the back.
    ``labels.csv``, written last, has the columns ``image`` and ``label``; one voxel of foreground is enough to be with
    it. Constant slices are left out, which the log counts; NaN and infinity count as 0 there.

    Classifiers read slices as ``modality="image2d"``, which scales each by its own percentiles: how bright a slice is
    beside the others of its volume is lost.

    Args:
        output_dir: where to write; it must not hold ``images`` yet.
        dataset_dir: folder with volumes of one channel, as for `load_segmentation_cases`.
        classes: names of slices without foreground and of those with it.
        labels_dir: folder with the label maps, as for `load_segmentation_cases`.
        label_values: the values that label maps hold beside 0; all of them are foreground.
        patient_pattern: regular expression that finds the patient in a file's path, such as ``(patient\d+)``.
        skip_bad: leave out volumes that cannot be used, with a warning, where the default is to stop.

    Returns:
        `slice_options` of ``output_dir``.

    Raises:
        BadCasesError: some images or labels cannot be used; it lists them all.
        FileExistsError: ``output_dir`` holds ``images``.
        FileNotFoundError: a folder is missing, or no image has a label.
        ValueError: there are not two classes, a patient's name cannot name a folder, or another option is wrong.
    """
    names, options = class_names(classes), slice_options(output_dir)
    images = Path(options["dataset_dir"])
    if len(names) != 2:
        raise ValueError(f"classes: expected two names, of slices without foreground and with it, got {names}.")
    if images.exists():
        raise FileExistsError(f"{images} exists: choose another output_dir, or remove that folder.")
    cases = load_segmentation_cases(
        dataset_dir,
        classes=[f"foreground {index}" for index, _ in enumerate(label_values)],
        labels_dir=labels_dir,
        label_values=label_values,
        val_fraction=0.0,
        test_fraction=0.0,
        patient_pattern=patient_pattern,
        skip_bad=skip_bad,
        allow_empty_labels=True,
        channels=1,
    ).training
    _check_folders({case["patient_id"] for case in cases})
    rows = [row for case in cases for row in _write_case(case, images, label_values)]
    constant = sum(name is None for name, _ in rows)
    LOGGER.info("%d slice(s) of %d volume(s), %d constant one(s) left out.", len(rows) - constant, len(cases), constant)
    _write_table(options["labels_csv"], [(name, names[shown]) for name, shown in rows if name is not None])
    return options


def slice_options(output_dir: str | Path) -> dict[str, Any]:
    """Return the options with which `load_classification_cases` and the bundles find what `write_slices` wrote."""
    output_dir = Path(output_dir)
    return {
        "dataset_dir": str(output_dir / "images"),
        "labels_csv": str(output_dir / "labels.csv"),
        "patient_pattern": "[^/]+",
        "spatial_dims": 2,
    }


def _check_folders(patients: set[str]) -> None:
    unfit = sorted(name for name in patients if not re.fullmatch(r"[^./\\][^/\\]*", name))
    if unfit:
        raise ValueError(
            f"patient_pattern finds {unfit[0]!r}, expected a name for a folder, without / and no dot in front: "
            "put the part that names the patient in parentheses."
        )


def _write_case(case: Case, images: Path, label_values: Sequence[int]) -> Iterator[tuple[str | None, bool]]:
    """Write the slices of a volume; for each, give its path below ``images``, if it is not constant, and its class."""
    volume, label, spacing_mm = _load(case, label_values)
    (images / case["patient_id"]).mkdir(parents=True, exist_ok=True)
    affine = np.diag([-spacing_mm[0], -spacing_mm[1], spacing_mm[2], 1.0])
    for index, (plane, shown) in enumerate(zip(volume.unbind(-1), label.any(0).any(0), strict=True)):
        finite = plane.nan_to_num(0.0, 0.0, 0.0)
        if finite.min() == finite.max():
            yield None, bool(shown)
            continue
        name = f"{case['patient_id']}/{case['case_id']}_slice{index:03d}.nii.gz"
        nib.save(nib.Nifti1Image(plane.numpy(), affine), images / name)
        yield name, bool(shown)


def _load(case: Case, label_values: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, tuple[float, ...]]:
    """Return image and foreground [X, Y, Z], turned to left, back and top, and the spacing of these axes."""
    image = EnsureChannelFirst()(load_image(case["image"]))
    label = load_label(case["label"], label_values).as_tensor().unsqueeze(0)
    both = Orientation("LPS", labels=None)(MetaTensor(torch.cat([image.as_tensor(), label]), affine=image.affine))
    volume, turned = both.as_tensor()
    return volume, turned > 0, tuple(affine_to_spacing(both.affine, 3).tolist())


def _write_table(path: str, rows: Sequence[tuple[str, str]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image", "label"), *rows])
