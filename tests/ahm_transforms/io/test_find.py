# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ahm_transforms.io import BadCasesError, find_cases, find_inputs, load_cases, load_image
from tests.fixtures_data import PATIENT_ID, write_nifti, write_series, write_slice


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
    assert found.left_out[0].case_id.startswith("folder-")


@pytest.mark.parametrize(
    "name",
    ["label", "labelsTs", "Mask", "masksTr", "seg", "segs", "segmentation", "Annotations", "gt", "GroundTruth", "gtTr"],
)
def test_folders_of_labels_have_many_names(tmp_path: Path, name: str) -> None:
    write_nifti(tmp_path / "images/x.nii.gz")
    write_nifti(tmp_path / name / "x.nii.gz")
    write_nifti(tmp_path / "masked/x.nii.gz")
    assert ids(tmp_path) == ["images_x", "masked_x"]
    assert [left.name for left in find_cases(tmp_path).left_out] == [f"{name}/"]


def test_links_in_circles_and_to_one_folder_bring_every_scan_once(tmp_path: Path) -> None:
    write_nifti(tmp_path / "scans/site/a.nii.gz")
    write_nifti(tmp_path / "elsewhere/b.nii.gz")
    (tmp_path / "scans/loop").symlink_to(".")
    (tmp_path / "scans/again").symlink_to("site")
    for name in ("one", "two"):
        (tmp_path / "scans" / name).symlink_to(tmp_path / "elsewhere")
    assert ids(tmp_path / "scans") == ["one_b", "site_a"]


def test_a_folder_that_cannot_be_read_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nifti(tmp_path / "a.nii.gz")
    write_nifti(tmp_path / "site/locked/b.nii.gz")
    scan = os.scandir

    def refuse(folder: str) -> object:  # what root, who may run the tests, never meets
        if Path(folder).name == "locked":
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr("os.scandir", refuse)
    found = find_cases(tmp_path)
    assert [case["case_id"] for case in found.cases] == ["a"]
    assert found.bad == [("site/locked/", "cannot be read: Permission denied")]
    with pytest.raises(BadCasesError, match="site/locked/: cannot be read: Permission denied"):
        load_cases(tmp_path)


def test_patients_are_found_by_pattern(tmp_path: Path) -> None:
    for name in ("patient002_frame01", "patient002_frame12", "patient007_frame01"):
        write_nifti(tmp_path / f"{name}.nii.gz")
    assert {case["patient_id"] for case in find_cases(tmp_path).cases} == set(ids(tmp_path))
    patients = [case["patient_id"] for case in find_cases(tmp_path, patient_pattern=r"(patient\d+)").cases]
    assert sorted(patients) == ["patient002", "patient002", "patient007"]
    with pytest.raises(ValueError, match=r"patient_pattern '\^sub' finds no patient in 'patient002_frame01.nii.gz'"):
        find_cases(tmp_path, patient_pattern="^sub")
    with pytest.raises(ValueError, match=r"patient_pattern '\(' is no regular expression: missing \)"):
        find_cases(tmp_path, patient_pattern="(")


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


def test_volumes_in_other_formats_are_one_line_of_what_is_left_out(tmp_path: Path) -> None:
    for name in ("a.nrrd", "b.NRRD", "sub/c.mha", "d.hdr", "d.img", "labels/e.nrrd", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("some header")
    line = "1 .hdr, 1 .mha, 2 .nrrd: not read here; convert to NIfTI"
    with pytest.raises(FileNotFoundError, match=rf"(?s)holds no image.*\n  {line}"):
        find_cases(tmp_path)
    write_nifti(tmp_path / "a.nii.gz")
    assert line in [f"{name}: {reason}" for name, reason in find_cases(tmp_path).left_out]


def test_one_nifti_file_or_picture_is_an_input(tmp_path: Path) -> None:
    write_nifti(tmp_path / "sub-01/scan.nii.gz")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "picture.png")
    (case,) = find_inputs(tmp_path / "sub-01/scan.nii.gz").cases
    assert case == {"image": str(tmp_path / "sub-01/scan.nii.gz"), "case_id": "scan", "patient_id": "scan"}
    assert find_inputs(tmp_path / "picture.png").cases[0]["case_id"] == "picture"
    assert find_inputs(str(tmp_path / "sub-01/scan.nii.gz"), patient_pattern="sc").cases[0]["patient_id"] == "sc"


def test_one_dicom_file_is_an_input(tmp_path: Path) -> None:
    stored = write_series(tmp_path, slices=3)
    (case,) = find_inputs(tmp_path / "IM0001").cases
    assert case["image"] == [str(tmp_path / "IM0001")]
    assert case["case_id"].startswith("image-") and PATIENT_ID not in str(case)
    assert case["patient_id"] == find_inputs(tmp_path).cases[0]["patient_id"]
    assert case["case_id"] != find_inputs(tmp_path / "IM0002").cases[0]["case_id"]
    np.testing.assert_array_equal(load_image(case["image"]).squeeze().numpy(), stored[1].T)


def test_folder_of_inputs_goes_on_with_what_is_good(tmp_path: Path) -> None:
    write_series(tmp_path / "good")
    write_series(tmp_path / "gap", slices=8, skip=[3])
    write_nifti(tmp_path / "a.nii")
    write_nifti(tmp_path / "a.nii.gz")
    (tmp_path / "damaged.nii.gz").write_text("is not opened here")
    found = find_inputs(tmp_path)
    assert [case["case_id"] for case in found.cases][1:] == ["a", "damaged"]
    assert {bad.name: bad.reason[:18] for bad in found.bad} == {
        "series 3 in gap": "slices are missing",
        "a.nii.gz": "another image has ",
    }


def test_useless_inputs_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        find_inputs(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"notes\.txt cannot be read: expected NIfTI, PNG, TIFF, JPEG or DICOM"):
        find_inputs(tmp_path / "notes.txt")
    frames = np.zeros((8, 8), np.int16)
    write_slice(tmp_path / "frames.dcm", frames, NumberOfFrames=2)
    with pytest.raises(ValueError, match=r"frames\.dcm cannot be used: multi-frame \(enhanced\) DICOM; convert it"):
        find_inputs(tmp_path / "frames.dcm")
    write_slice(tmp_path / "report.dcm", frames, Rows=None, Modality="SR")
    with pytest.raises(ValueError, match=r"report\.dcm cannot be used: holds no image slices \(modality SR\)"):
        find_inputs(tmp_path / "report.dcm")
    write_slice(tmp_path / "short.dcm", np.zeros((64, 64), np.int16))
    (tmp_path / "short.dcm").write_bytes((tmp_path / "short.dcm").read_bytes()[:-4000])
    with pytest.raises(ValueError, match=r"short\.dcm cannot be used: the file ends early"):
        find_inputs(tmp_path / "short.dcm")
