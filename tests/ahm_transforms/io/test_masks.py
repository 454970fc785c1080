# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from ahm_transforms.io import find_inputs, with_masks
from tests.fixtures_data import PATIENT_NAME, write_nifti, write_series


def test_masks_are_found_by_the_names_of_the_images(tmp_path: Path) -> None:
    for name in ("data/ward/a", "data/b", "drawn/ward/a"):
        write_nifti(tmp_path / f"{name}.nii.gz")
    write_series(tmp_path / "data/series")
    write_nifti(tmp_path / "drawn/series.nii.gz")
    found = with_masks(find_inputs(tmp_path / "data"), tmp_path / "data", tmp_path / "drawn", wanted=True)
    masks = [Path(case["mask"]).relative_to(tmp_path).as_posix() for case in found.cases]
    assert sorted(masks) == ["drawn/series.nii.gz", "drawn/ward/a.nii.gz"]
    assert found.bad == [("b.nii.gz", "no mask")]


def test_a_series_without_a_mask_keeps_its_pseudonym(tmp_path: Path) -> None:
    write_series(tmp_path / "data" / PATIENT_NAME)
    (tmp_path / "drawn").mkdir()
    case_id = find_inputs(tmp_path / "data").cases[0]["case_id"]
    (bad,) = with_masks(find_inputs(tmp_path / "data"), tmp_path / "data", tmp_path / "drawn", wanted=True).bad
    assert bad == (f"{case_id} in {PATIENT_NAME}", "no mask")
    assert bad.case_id == case_id


def test_masks_among_the_images_are_no_images(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii.gz")
    write_nifti(tmp_path / "drawn/a.nii.gz")
    found = with_masks(find_inputs(tmp_path), tmp_path, tmp_path / "drawn", wanted=True)
    assert [case["case_id"] for case in found.cases] == ["a"] and not found.bad


def test_mask_of_one_file(tmp_path: Path) -> None:
    for folder in ("data", "drawn"):
        write_nifti(tmp_path / folder / "a.nii.gz")
    path = tmp_path / "data/a.nii.gz"
    (case,) = with_masks(find_inputs(path), path, tmp_path / "drawn", wanted=True).cases
    assert case["mask"] == str(tmp_path / "drawn/a.nii.gz")


def test_masks_wanted_and_masks_given_must_agree(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii.gz")
    found = find_inputs(tmp_path)
    with pytest.raises(ValueError, match="trained with masks: pass --masks_dir"):
        with_masks(found, tmp_path, None, wanted=True)
    with pytest.raises(ValueError, match="trained without masks: do not pass masks_dir, got drawn"):
        with_masks(found, tmp_path, "drawn", wanted=False)
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        with_masks(found, tmp_path, tmp_path / "nowhere", wanted=True)
    assert "mask" not in with_masks(find_inputs(tmp_path), tmp_path, None, wanted=False).cases[0]
