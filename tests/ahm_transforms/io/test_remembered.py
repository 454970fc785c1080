# SPDX-License-Identifier: Apache-2.0
"""What a folder remembers of the cases that were checked."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest

from ahm_transforms.io import (
    BadCasesError,
    Cases,
    check,
    dicom_headers,
    find_cases,
    load_cases,
    load_image,
    load_segmentation_cases,
)
from ahm_transforms.io.dicom_headers import read_header
from tests.fixtures_data import PATIENT_ID, PATIENT_NAME, write_nifti, write_series

SHAPE = (20, 18, 16)


def write_label(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.full(SHAPE, value, np.uint8), np.eye(4)), path)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the images that a check reads from now on."""
    read: list[str] = []

    def load(image: str, **options: Any) -> object:
        read.append(Path(image).name)
        return load_image(image, **options)

    monkeypatch.setattr(check, "load_image", load)
    return read


def test_what_was_checked_is_remembered_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "abc":
        write_nifti(tmp_path / f"images/{name}.nii.gz", SHAPE)
        write_label(tmp_path / f"labels/{name}.nii.gz", 1)
    nib.save(nib.Nifti1Image(np.ones(SHAPE, np.float32), np.eye(4)), tmp_path / "images/b.nii.gz")
    read = counted(monkeypatch)

    def load(**options: Any) -> Cases:
        given = {"classes": ["one"], "val_fraction": 0, "test_fraction": 0} | options
        return load_segmentation_cases(tmp_path / "images", cache_dir=tmp_path / "cache", **given)

    first = load()
    assert sorted(read) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
    read.clear()
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert load() == first and not read
    assert "3 of 3 images are as they were last checked" in caplog.text
    assert "1 image(s) hold NaN, infinite or constant values: b.nii.gz (constant)" in caplog.text
    assert not any(".nii" in path.name + path.read_text() for path in (tmp_path / "cache").iterdir())

    write_label(tmp_path / "labels/a.nii.gz", 0)  # it holds nothing any more
    with pytest.raises(BadCasesError, match="all background"):
        load()
    with pytest.raises(BadCasesError, match="all background"):  # what is bad is read whenever it is asked about
        load()
    assert read == ["a.nii.gz", "a.nii.gz"]
    read.clear()
    assert load(allow_empty_labels=True).present["a"] == frozenset()
    assert sorted(read) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]  # another question


def test_other_images_and_other_demands_are_checked_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nifti(tmp_path / "images/a.nii.gz")
    cache = tmp_path / "cache"
    read = counted(monkeypatch)
    load_cases(tmp_path / "images", cache_dir=cache, val_fraction=0)
    with pytest.raises(BadCasesError, match="smaller than one patch"):
        load_cases(tmp_path / "images", cache_dir=cache, val_fraction=0, min_size=99)
    write_nifti(tmp_path / "images/a.nii.gz", (9, 9, 9))
    assert load_cases(tmp_path / "images", cache_dir=cache, val_fraction=0).geometry["a"].shape == (9, 9, 9)
    for path in cache.iterdir():
        path.write_text(path.read_text()[:-1])
    load_cases(tmp_path / "images", cache_dir=cache, val_fraction=0)
    assert len(read) == 4
    load_cases(tmp_path / "images", cache_dir=cache, val_fraction=0)
    assert len(read) == 4


def test_a_cache_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    write_nifti(tmp_path / "images/a.nii.gz")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cache_dir: expected a folder to write to, got .*file"):
        load_cases(tmp_path / "images", cache_dir=tmp_path / "file")


def test_headers_are_remembered_by_folder_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        write_series(tmp_path / f"scans/{name}", slices=3)
    (tmp_path / "scans/a/notes.txt").write_text("no DICOM")
    (tmp_path / "scans/b/without.dcm").write_text("no DICOM either")
    read: list[str] = []

    def count(path: Path) -> object:
        read.append(f"{path.parent.name}/{path.name}")
        return read_header(path)

    monkeypatch.setattr(dicom_headers, "read_header", count)
    cache = tmp_path / "cache"
    without = find_cases(tmp_path / "scans")
    assert [len(case["image"]) for case in without.cases] == [3, 3] and len(without.bad) == 1
    for expected in (8, 0):
        read.clear()
        assert find_cases(tmp_path / "scans", cache_dir=cache) == without and len(read) == expected
    kept = "".join(path.name + path.read_text() for path in cache.iterdir())
    header = pydicom.dcmread(tmp_path / "scans/a/IM0000")
    told = (PATIENT_ID, PATIENT_NAME, header.SOPInstanceUID, header.SeriesInstanceUID, header.StudyInstanceUID)
    assert not any(str(text) in kept for text in (*told, "IM0000", "scans"))

    header.PatientID = "another"
    header.save_as(tmp_path / "scans/a/IM0000")
    read.clear()
    found = find_cases(tmp_path / "scans", cache_dir=cache)
    assert "slices of 2 patients" in found.bad[0].reason and len(read) == 4

    damaged = tmp_path / "scans/a/IM0001"
    damaged.write_bytes(damaged.read_bytes().replace(b"0.8\\1.1", b"0.x\\1.1"))
    for _ in range(2):  # what is damaged is read whenever it is asked about
        read.clear()
        assert any("unreadable" in left.reason for left in find_cases(tmp_path / "scans", cache_dir=cache).bad)
        assert len(read) == 4


def test_headers_of_a_datalist_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_series(tmp_path / "scan", slices=3)
    entries = ["scan", [f"scan/IM{index:04d}" for index in range(3)]]
    for entry in entries:
        datalist = {"training": [{"image": entry}]}
        first = load_cases(tmp_path, datalist=datalist, val_fraction=0, cache_dir=tmp_path / "cache")
        with monkeypatch.context() as patch:
            patch.setattr(dicom_headers, "read_header", None)
            again = load_cases(tmp_path, datalist=datalist, val_fraction=0, cache_dir=tmp_path / "cache")
        assert again == first
