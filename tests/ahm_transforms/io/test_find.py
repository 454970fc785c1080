# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ahm_transforms.io import find_cases
from tests.fixtures_data import write_nifti, write_series


def ids(folder: Path, **options: str) -> list[str]:
    return sorted(case["case_id"] for case in find_cases(folder, **options).cases)


def test_all_kinds_are_found_in_nested_folders(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii.gz")
    write_nifti(tmp_path / "sub-01/anat/T1w.nii")
    for suffix in ("png", "TIF", "jpeg"):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / f"{suffix}.{suffix}", format="PNG")
    write_series(tmp_path / "dicom/deep")
    (tmp_path / "notes.csv").write_text("a,b")
    found = ids(tmp_path)
    assert found[:-1] == ["TIF", "a", "jpeg", "png", "series-" + found[-2][7:]]
    assert found[-1] == "sub-01_anat_T1w"


def test_labels_and_hidden_files_are_not_images(tmp_path: Path) -> None:
    write_nifti(tmp_path / "imagesTr/x.nii.gz")
    write_nifti(tmp_path / "imagesTr/._x.nii.gz")  # what a Mac leaves in the Decathlon archives
    write_nifti(tmp_path / "labelsTr/x.nii.gz")
    found = find_cases(tmp_path)
    assert [case["case_id"] for case in found.cases] == ["imagesTr_x"]
    assert [left.name for left in found.left_out] == ["labelsTr/"]


def test_patients_are_found_by_pattern(tmp_path: Path) -> None:
    for name in ("patient002_frame01", "patient002_frame12", "patient007_frame01"):
        write_nifti(tmp_path / f"{name}.nii.gz")
    assert {case["patient_id"] for case in find_cases(tmp_path).cases} == set(ids(tmp_path))
    patients = [case["patient_id"] for case in find_cases(tmp_path, patient_pattern=r"(patient\d+)").cases]
    assert sorted(patients) == ["patient002", "patient002", "patient007"]
    with pytest.raises(ValueError, match=r"patient_pattern '\^sub' finds no patient in 'patient002_frame01.nii.gz'"):
        find_cases(tmp_path, patient_pattern="^sub")


def test_pattern_sees_the_folders_too(tmp_path: Path) -> None:
    write_nifti(tmp_path / "sub-07/ses-1/T1w.nii.gz")
    assert find_cases(tmp_path, patient_pattern=r"sub-\d+").cases[0]["patient_id"] == "sub-07"


def test_empty_missing_and_useless_folders_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no image: expected NIfTI"):
        find_cases(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        find_cases(tmp_path / "nowhere")
    write_series(tmp_path, slices=1)
    with pytest.raises(FileNotFoundError, match=r"(?s)holds no image.*series 3 in \.: a single slice"):
        find_cases(tmp_path)
