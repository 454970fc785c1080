# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from ahm_transforms.io import Case, load_cases, load_classification_cases, load_segmentation_cases
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


def write_partly_labelled(folder: Path, labels: str = "labels") -> Path:
    """Write two scans each of twelve patients; of the first eight, one scan has a label map."""
    for patient in range(12):
        for scan in "ab":
            write_nifti(folder / f"images/p{patient:02d}{scan}.nii.gz")
        if patient < 8:
            (folder / labels).mkdir(exist_ok=True, parents=True)
            label = nib.Nifti1Image(np.ones((12, 13, 14), np.uint8), np.eye(4))
            nib.save(label, folder / labels / f"p{patient:02d}a.nii.gz")
    return folder


def patients(cases: Sequence[Case]) -> set[str]:
    return {case["patient_id"] for case in cases}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("labels", ["labels", "images/annotations"])
def test_with_labels_of_some_scans_the_split_is_that_of_finetuning(tmp_path: Path, labels: str, seed: int) -> None:
    folder = write_partly_labelled(tmp_path, labels)
    options: dict[str, Any] = {"labels_dir": folder / labels, "patient_pattern": r"p\d\d"}
    options |= {"val_fraction": 0.25, "test_fraction": 0.25}
    pretraining = load_cases(folder / "images", seed=seed, **options)
    finetuning = load_segmentation_cases(folder / "images", classes=["a"], split_seed=seed, **options)
    parts = [getattr(pretraining, part) for part in ("training", "validation", "test")]
    assert [len(part) for part in parts] == [2 * 4 + 2 * 4, 2 * 2, 2 * 2]  # the second scans go with the first
    assert patients(parts[0]) == patients(finetuning.training) | {"p08", "p09", "p10", "p11"}
    assert (patients(parts[1]), patients(parts[2])) == (patients(finetuning.validation), patients(finetuning.test))
    assert not any("label" in case for part in parts for case in part)
    assert all([case["case_id"] for case in part] == sorted(case["case_id"] for case in part) for part in parts)
    without = load_cases(folder / "images", seed=seed, **options | {"labels_dir": None})
    assert patients(without.test) != patients(finetuning.test)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("skip_bad", [True, False])
def test_what_one_of_them_skips_moves_no_patient_to_another_part(tmp_path: Path, skip_bad: bool, seed: int) -> None:
    folder = write_partly_labelled(tmp_path)
    for patient, value in ((1, 0), (5, 7)):  # all background, no class
        label = nib.Nifti1Image(np.full((12, 13, 14), value, np.uint8), np.eye(4))
        nib.save(label, folder / f"labels/p{patient:02d}a.nii.gz")
    for name in ("p02b", "p09a"):
        write_nifti(folder / f"images/{name}.nii.gz", (4, 4, 4))  # less than a patch
    options: dict[str, Any] = {"labels_dir": folder / "labels", "patient_pattern": r"p\d\d"}
    options |= {"val_fraction": 0.4, "test_fraction": 0.3}
    pretraining = load_cases(folder / "images", seed=seed, skip_bad=skip_bad, min_size=8 if skip_bad else 1, **options)
    assert len(pretraining.left_out) == (2 if skip_bad else 0)
    for allow_empty, bad in ((False, 2), (True, 1)):
        finetuning = load_segmentation_cases(
            folder / "images", classes=["a"], split_seed=seed, skip_bad=True, allow_empty_labels=allow_empty, **options
        )
        assert len(finetuning.left_out) == 16 + bad
        for part in ("training", "validation", "test"):
            assert patients(getattr(finetuning, part)) <= patients(getattr(pretraining, part))


def test_a_part_of_which_nothing_can_be_used_is_refused(tmp_path: Path) -> None:
    for name in "abcd":
        write_nifti(tmp_path / f"{name}.nii.gz")
    (case,) = load_cases(tmp_path, val_fraction=0.25).validation
    write_nifti(Path(case["image"]), (4, 4, 4))
    with pytest.raises(ValueError, match=r"none of the 1 validation case\(s\) can be used: .* another --split_seed"):
        load_cases(tmp_path, val_fraction=0.25, min_size=8, skip_bad=True)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("told", ["class_pattern", "labels_csv", None])
def test_with_classes_of_some_scans_the_split_is_that_of_classification(
    tmp_path: Path, told: str | None, seed: int
) -> None:
    names = [f"p{patient:02d}{scan}" for patient in range(16) for scan in "ab"]
    kinds = dict(zip((name for name in names[:20] if name.endswith("a")), ["high", "low", "low"] * 4, strict=False))
    folders = {None: "{kind}/", "class_pattern": "x_{kind}_y/", "labels_csv": ""}
    for name in names:
        write_nifti(tmp_path / f"images/{folders[told].format(kind=kinds.get(name, 'unknown'))}{name}.nii.gz")
    rows = ["image,label", *(f"{name}.nii.gz,{kind}" for name, kind in kinds.items()), "p15b.nii.gz,odd"]
    (tmp_path / "table.csv").write_text("\n".join(rows))
    options: dict[str, Any] = {"patient_pattern": r"p\d\d", "val_fraction": 0.3, "test_fraction": 0.3}
    options |= {"labels_csv": tmp_path / "table.csv"} if told == "labels_csv" else {}
    options |= {"class_pattern": "x_([a-z]+)"} if told == "class_pattern" else {}
    classes, folder = ["low", "high"], tmp_path / "images"
    pretraining = load_cases(folder, seed=seed, split_classes=classes, **options)
    finetuning = load_classification_cases(folder, classes=classes, split_seed=seed, skip_bad=True, **options)
    assert [len(getattr(finetuning, part)) for part in ("training", "validation", "test")] == [4, 3, 3]
    others = {f"p{patient}" for patient in range(10, 16)}
    for part, more in (("training", others), ("validation", set()), ("test", set())):
        assert patients(getattr(pretraining, part)) == patients(getattr(finetuning, part)) | more
    assert sum(pretraining.summary()[f"{part}_cases"] for part in ("training", "validation", "test")) == len(names)
    assert not any("label" in case for case in pretraining.training + pretraining.validation + pretraining.test)


def test_classes_to_split_by_must_be_there(tmp_path: Path) -> None:
    for name in ("low_1", "low_2", "3"):
        write_nifti(tmp_path / f"{name}.nii.gz")
    with pytest.raises(ValueError, match=r"in one image at least, got none of hihg among 3 image\(s\)"):
        load_cases(tmp_path, split_classes=["low", "hihg"])
    for options in ({"labels_dir": tmp_path, "split_classes": ["low"]}, {"labels_csv": tmp_path / "table.csv"}):
        with pytest.raises(ValueError, match="expected labels_dir alone, or classes with class_pattern or labels_csv"):
            load_cases(tmp_path, **options)
    with pytest.raises(ValueError, match="classes and labels_csv: expected dataset_dir beside it, and no datalist"):
        load_cases(datalist={"training": ["low_1.nii.gz"]}, split_classes=["low"], labels_csv="table.csv")


def test_labels_dir_needs_a_folder_of_images_and_labels_of_some(tmp_path: Path) -> None:
    folder = write_partly_labelled(tmp_path)
    for options in ({}, {"dataset_dir": folder / "images", "datalist": {"training": ["p00a.nii.gz"]}}):
        with pytest.raises(ValueError, match="labels_dir: expected dataset_dir beside it, and no datalist"):
            load_cases(**options, labels_dir=folder / "labels")
    with pytest.raises(FileNotFoundError, match=r"none of 24 image\(s\) has a label: .* in labels_dir .*elsewhere"):
        (tmp_path / "elsewhere").mkdir()
        load_cases(folder / "images", labels_dir=tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        load_cases(folder / "images", labels_dir=tmp_path / "nowhere")
