# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from ahm_transforms.io import load_cases
from tests.fixtures_data import write_nifti


def test_summary_tells_counts_and_ranges_and_no_names(tmp_path: Path) -> None:
    write_nifti(tmp_path / "Doe_Jane.nii.gz", (8, 9, 10), np.diag([1.0, 1.0, 3.0, 1.0]))
    write_nifti(tmp_path / "Roe_Rick.nii.gz", (12, 9, 7))
    cases = load_cases(tmp_path, val_fraction=0.5)
    assert cases.summary() == {
        "training_cases": 1,
        "training_patients": 1,
        "validation_cases": 1,
        "validation_patients": 1,
        "test_cases": 0,
        "test_patients": 0,
        "left_out": 0,
        "images_3d": {
            "shape_min": [8, 9, 7],
            "shape_max": [12, 9, 10],
            "spacing_mm_min": [1.0, 1.0, 1.0],
            "spacing_mm_max": [1.0, 1.0, 3.0],
        },
    }
    assert "Doe" not in json.dumps(cases.summary())


def test_test_patients_are_left_out_and_counted(tmp_path: Path) -> None:
    for index in range(10):
        write_nifti(tmp_path / f"p{index // 2}_{index}.nii.gz")
    cases = load_cases(tmp_path, patient_pattern=r"p\d", val_fraction=0.2, test_fraction=0.4)
    summary = cases.summary()
    assert [summary[f"{part}_cases"] for part in ("training", "validation", "test")] == [4, 2, 4]
    assert [summary[f"{part}_patients"] for part in ("training", "validation", "test")] == [2, 1, 2]
    assert not {case["patient_id"] for case in cases.test} & {
        case["patient_id"] for case in cases.training + cases.validation
    }


def test_many_files_left_out_for_one_reason_are_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_nifti(tmp_path / "good.nii.gz", (20, 20, 20))
    for index in range(30):
        write_nifti(tmp_path / f"bad{index}.nii.gz", (4, 4, 4))
    with caplog.at_level(logging.WARNING):
        cases = load_cases(tmp_path, min_size=8, skip_bad=True, val_fraction=0)
    assert len(cases.left_out) == 30
    assert caplog.messages[0].count("\n") == 1 and "30 such as bad0.nii.gz, bad1.nii.gz" in caplog.messages[0]


def test_cases_have_no_entry_that_trips_spacingd(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii.gz")
    (case,) = load_cases(tmp_path, val_fraction=0).training
    assert not [key for key in case if key.startswith("image_")]


def test_the_same_image_twice_is_refused(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii")
    write_nifti(tmp_path / "a.nii.gz")
    with pytest.raises(ValueError, match=r"same case_id, keep one of each: a\.nii, a\.nii\.gz"):
        load_cases(tmp_path)


def test_images_whose_paths_give_one_id_are_told_apart(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a/b_c.nii.gz")
    write_nifti(tmp_path / "a_b/c.nii.gz")
    with pytest.raises(ValueError, match=r"keep one of each: a/b_c\.nii\.gz, a_b/c\.nii\.gz\."):
        load_cases(tmp_path)
    with pytest.raises(ValueError, match=r"keep one of each: c\.nii\.gz, c\.nii\.gz\."):
        load_cases(tmp_path, datalist={"training": ["a_b/c.nii.gz", "a_b/c.nii.gz"]})


def test_spatial_dims_must_be_two_or_three(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="spatial_dims must be 2 or 3, got 4"):
        load_cases(tmp_path, spatial_dims=4)
