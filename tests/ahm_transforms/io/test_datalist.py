# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from ahm_transforms.io import BadCasesError, find_cases, load_cases
from tests.fixtures_data import write_nifti, write_series


def write(folder: Path, content: object, names: str = "abcd") -> Path:
    for name in names:
        write_nifti(folder / f"imagesTr/{name}.nii.gz")
    path = folder / "dataset.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_decathlon_form_with_a_drawn_split(tmp_path: Path) -> None:
    entries = [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in "abc"]
    path = write(tmp_path, {"training": [*entries, "imagesTr/d.nii.gz"], "test": ["./imagesTs/z.nii.gz"]})
    cases = load_cases(datalist=path, val_fraction=0.25)
    assert (len(cases.training), len(cases.validation)) == (3, 1)
    assert {case["case_id"] for case in cases.training + cases.validation} == {f"imagesTr_{name}" for name in "abcd"}
    assert set(cases.training[0]) == {"image", "case_id", "patient_id"}


def test_validation_list_is_used_as_it_is(tmp_path: Path) -> None:
    path = write(
        tmp_path, {"training": ["imagesTr/b.nii.gz", "imagesTr/c.nii.gz"], "validation": ["imagesTr/a.nii.gz"]}
    )
    cases = load_cases(datalist=path)
    assert [case["case_id"] for case in cases.validation] == ["imagesTr_a"]
    assert [case["case_id"] for case in cases.training] == ["imagesTr_b", "imagesTr_c"]


def test_test_list_stays_untouched_in_pretraining(tmp_path: Path) -> None:
    path = write(tmp_path, {"training": ["imagesTr/a.nii.gz", "imagesTr/b.nii.gz"], "test": ["imagesTr/c.nii.gz"]})
    cases = load_cases(datalist=path, val_fraction=0, test_fraction=0.5)
    assert [case["case_id"] for case in cases.training + cases.validation + cases.test] == ["imagesTr_a", "imagesTr_b"]


def test_a_folder_in_the_list_is_one_dicom_series(tmp_path: Path) -> None:
    write_series(tmp_path / "one", reverse_names=True)
    path = write(tmp_path, {"training": [{"image": "one", "patient_id": "p"}]}, names="")
    (case,) = load_cases(datalist=path, val_fraction=0).training
    assert [Path(name).name for name in case["image"]] == [f"IM{index:04d}" for index in range(6, 0, -1)]
    assert case["case_id"].startswith("series-") and case["patient_id"] == "p"


def test_folders_without_or_with_several_series_are_bad_cases(tmp_path: Path) -> None:
    write_series(tmp_path / "two/first")
    write_series(tmp_path / "two/second")
    write_series(tmp_path / "gap", slices=8, skip=[3])
    path = write(tmp_path, {"training": ["two", "gap", "imagesTr/a.nii.gz"]}, names="a")
    with pytest.raises(BadCasesError) as caught:
        load_cases(datalist=path)
    reasons = dict(caught.value.bad)
    assert reasons["two"].startswith("expected one DICOM series in it, found 2")
    assert "slices are missing" in reasons["gap"]


def test_the_files_of_a_series_are_sorted_and_tell_what_they_are(tmp_path: Path) -> None:
    for name in "ab":
        write_series(tmp_path / name, PatientID=name)
    names = [f"IM000{index}" for index in (2, 0, 4, 1, 5, 3)]
    entries: list = [{"image": [f"{folder}/{name}" for name in names]} for folder in "ab"]
    entries[1]["patient_id"] = "p"
    found = {case["case_id"]: case for case in find_cases(tmp_path).cases}
    first, second = load_cases(datalist={"training": entries}, dataset_dir=tmp_path, val_fraction=0).training
    if first["patient_id"] == "p":
        first, second = second, first
    assert first == found[first["case_id"]]
    assert second == found[second["case_id"]] | {"patient_id": "p"}


@pytest.mark.parametrize("reverse", [False, True])
def test_files_that_are_not_one_series_are_bad_cases(tmp_path: Path, reverse: bool) -> None:
    write_series(tmp_path / "data/a", slices=8, SeriesNumber=1)
    write_series(tmp_path / "data/b", SeriesNumber=2)
    write_series(tmp_path / "away/c", SeriesNumber=3)
    write_nifti(tmp_path / "data/other.nii.gz")
    a, b = ([f"{name}/IM000{index}" for index in range(6)] for name in "ab")
    c = [str(tmp_path / f"away/c/IM000{index}") for index in range(6)]
    wanted = {
        "gap": ([*a[:3], *a[4:]], r"found 0\. series 1 in a: slices are missing"),
        "two series": (a + b, r"found 2\. "),
        "one of another": (
            [*a, b[2]],
            r"found 1\. IM0002: one of 1 file\(s\) that are none of its slices; series 2",
        ),
        "no DICOM": ([*a, "other.nii.gz"], r"found 1\. other\.nii\.gz: one of 1 file"),
        "not there": ([*a, "gone"], r"found 1\. gone: unreadable DICOM header: [^;]*$"),
        "elsewhere": ([*c[:3], *c[4:]], r"found 0\. series 3 in c: slices are missing"),
    }
    for files, reason in wanted.values():
        image = files[::-1] if reverse else files
        content: dict = {"training": [{"image": image}]}
        told = rf"{Path(image[0]).name} and {len(image) - 1} more: expected one DICOM series in it, {reason}"
        with pytest.raises(BadCasesError, match=told):
            load_cases(datalist=content, dataset_dir=tmp_path / "data", val_fraction=0)


def test_a_list_of_other_files_stays_as_it_is(tmp_path: Path) -> None:
    entry = {"image": ["imagesTr/b.nii.gz", "imagesTr/a.nii.gz"]}
    (case,) = load_cases(datalist=write(tmp_path, {"training": [entry]}), val_fraction=0).training
    assert case["image"] == [str(tmp_path / name) for name in entry["image"]]
    assert case["case_id"] == "imagesTr_b"


def test_patients_come_from_the_entry_or_the_pattern(tmp_path: Path) -> None:
    entries = [
        {"image": "imagesTr/a.nii.gz", "subject": 7},
        {"image": "imagesTr/b.nii.gz", "patient_id": "p"},
        {"image": "imagesTr/c.nii.gz"},
        {"image": "imagesTr/d.nii.gz", "patient_id": None},
    ]
    path = write(tmp_path, {"training": entries})
    cases = load_cases(datalist=path, val_fraction=0, patient_pattern="([cd])\\.nii")
    assert [case["patient_id"] for case in cases.training] == ["7", "p", "c", "d"]


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    path = write(tmp_path, {"training": ["imagesTr/a.nii.gz"]})
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert len(load_cases(datalist=path, val_fraction=0).training) == 1


def test_paths_are_relative_to_the_folder_if_one_is_given(tmp_path: Path) -> None:
    write(tmp_path / "data", {"training": []})
    path = write(tmp_path, {"training": ["imagesTr/a.nii.gz"]}, names="")
    assert len(load_cases(tmp_path / "data", datalist=path, val_fraction=0).training) == 1


def test_a_patient_in_both_lists_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = ({"image": f"imagesTr/{name}.nii.gz", "patient_id": "p"} for name in "ab")
    path = write(tmp_path, {"training": [first], "validation": [second]})
    with caplog.at_level(logging.WARNING):
        load_cases(datalist=path)
    assert "1 patient(s) are in both training and validation" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{not json", "not valid JSON"),
        ([], 'needs a list "training"'),
        ({"training": []}, 'needs a list "training"'),
        ({"training": [{"label": "x"}]}, r"training\[0\] must be a path"),
        ({"training": ["imagesTr/a.nii.gz"], "validation": [3]}, r"validation\[0\] must be a path"),
        ({"training": ["imagesTr/a.nii.gz", "imagesTr/a.nii.gz"]}, "same case_id"),
        ({"training": ["imagesTr/a.nii.gz", "imagesTr/gone.nii.gz"]}, "gone.nii.gz: the file does not exist"),
    ],
)
def test_wrong_datalists_are_clear_errors(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_cases(datalist=write(tmp_path, content))


def test_absent_datalist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"datalist .*none\.json does not exist"):
        load_cases(datalist=tmp_path / "none.json")
