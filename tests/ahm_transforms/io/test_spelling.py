# SPDX-License-Identifier: Apache-2.0
"""Names with accents are the same name in one character or in two, and files keep theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unicodedata import normalize

import nibabel as nib
import numpy as np
import pytest

from ahm_transforms.io import load_cases, load_classification_cases, load_segmentation_cases
from ahm_transforms.io.spelling import on_disk
from tests.fixtures_data import write_nifti, write_series

ONE, TWO = normalize("NFC", "Müller"), normalize("NFD", "Müller")
WHOLE: dict[str, Any] = {"val_fraction": 0, "test_fraction": 0}
forms = pytest.mark.parametrize(("disk", "told"), [(ONE, TWO), (TWO, ONE)])


def write_label(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.ones((12, 13, 14), np.uint8), np.eye(4)), path)
    return path


@forms
def test_image_and_label_are_a_pair(tmp_path: Path, disk: str, told: str) -> None:
    write_nifti(tmp_path / f"images/{disk}/{disk}_0000.nii.gz")
    label = write_label(tmp_path / f"truth/{told}/{told}.nii.gz")
    options: dict[str, Any] = {"labels_dir": tmp_path / "truth"}
    (case,) = load_segmentation_cases(tmp_path / "images", classes=["a"], **options, **WHOLE).training
    assert case["label"] == str(label) and case["image"].endswith(f"{disk}/{disk}_0000.nii.gz")
    assert case["case_id"] == case["patient_id"] == f"{ONE}_{ONE}_0000"
    assert len(load_cases(tmp_path / "images", **options, **WHOLE).training) == 1


@forms
def test_datalist_names_files(tmp_path: Path, disk: str, told: str) -> None:
    write_nifti(tmp_path / f"{disk}/{ONE}1.nii.gz")
    write_nifti(tmp_path / f"{disk}/{TWO}2.nii.gz")
    label = write_label(tmp_path / f"{disk}.nii.gz")
    write_series(tmp_path / f"{disk}_dicom")
    entries = [
        {"image": f"{told}/{told}1.nii.gz", "label": f"{told}.nii.gz", "patient_id": disk},
        {"image": f"{told}/{told}2.nii.gz", "label": f"{told}.nii.gz", "patient_id": told},
    ]
    options: dict[str, Any] = {"dataset_dir": tmp_path, **WHOLE}
    cases = load_segmentation_cases(datalist={"training": entries}, classes=["a"], **options).training
    assert [case["patient_id"] for case in cases] == [ONE, ONE]
    assert {case["label"] for case in cases} == {str(label)}
    assert len(load_cases(datalist={"training": [f"{told}_dicom"]}, **options).training) == 1


@forms
@pytest.mark.parametrize("by", ["path", "class_pattern", "image", "case_id"])
def test_classes_and_patients_are_known(tmp_path: Path, disk: str, told: str, by: str) -> None:
    for name in ("a", "b"):
        write_nifti(tmp_path / f"data/{disk}_{name}.nii.gz")
    options: dict[str, Any] = {"class_pattern": f"({told})"} if by == "class_pattern" else {}
    if by in ("image", "case_id"):
        suffix = ".nii.gz" if by == "image" else ""
        rows = [f"{by},label", *(f"{told}_{name}{suffix},{disk}" for name in "ab")]
        (tmp_path / "table.csv").write_text("\n".join(rows), encoding="utf-8")
        options = {"labels_csv": tmp_path / "table.csv"}
    options |= {"patient_pattern": rf"({told})_\w", **WHOLE}
    cases = load_classification_cases(tmp_path / "data", classes=[told], **options).training
    assert [(case["label"], case["patient_id"]) for case in cases] == [(0, ONE)] * 2


def test_what_is_not_there_keeps_its_name(tmp_path: Path) -> None:
    for name in (ONE, TWO, "a"):
        assert on_disk(tmp_path / name) == tmp_path / name
