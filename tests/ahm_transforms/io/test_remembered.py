# SPDX-License-Identifier: Apache-2.0
"""What a folder remembers of the cases that were checked."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from ahm_transforms.io import BadCasesError, Cases, check, load_cases, load_image, load_segmentation_cases
from tests.fixtures_data import write_nifti

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
