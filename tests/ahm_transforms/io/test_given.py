# SPDX-License-Identifier: Apache-2.0
"""Cases are looked for when they are needed, and those that others bring are checked as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from ahm_transforms.io import BadCasesError, CaseFinder, Cases, load_cases, load_segmentation_cases
from tests.fixtures_data import write_nifti

GIVEN = list[dict[str, str]]


def write_pair(folder: Path, name: str, *values: int, shape: tuple[int, ...] = (6, 7, 8)) -> dict[str, str]:
    """Write an image and a label that holds the values; return the case as MONAI Label gives it."""
    write_nifti(folder / f"{name}.nii.gz", (6, 7, 8))
    label = np.zeros(shape, np.uint8)
    label.flat[: len(values)] = values
    (folder / "final").mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(label, np.eye(4)), folder / f"final/{name}.nii.gz")
    return {"image": str(folder / f"{name}.nii.gz"), "label": str(folder / f"final/{name}.nii.gz")}


def finder(**options: Any) -> CaseFinder:
    """Return one whose own search would fail."""
    given = {"classes": ["a", "b"], "dataset_dir": "nowhere", "labels_dir": "nowhere", "val_fraction": 0.2}
    return CaseFinder(load_segmentation_cases, **given | options)


def test_cases_are_found_once_and_when_asked_for(tmp_path: Path) -> None:
    calls: list[dict[str, Any]] = []

    def load(**options: Any) -> Cases:
        calls.append(options)
        return Cases([{"image": "a", "case_id": "a"}], [])

    found = CaseFinder(load, dataset_dir=tmp_path, seed=3)
    assert calls == []
    assert found.used(found.cases.training, found.cases.validation) is found.cases
    assert calls == [{"dataset_dir": tmp_path, "seed": 3}]


def test_test_cases_belong_to_what_was_found_alone() -> None:
    """Beside the lists of others nothing is looked for, not even the default data."""
    found = CaseFinder(lambda: Cases([{"image": "a", "case_id": "a"}], [], [{"image": "b", "case_id": "b"}]))
    assert found.held_out(found.cases.training) == found.cases.test != []
    for training in ([], [{"image": "a", "label": "c"}]):
        other = CaseFinder(lambda: pytest.fail("cases were looked for"))
        assert other.held_out(training) == []


def test_lists_of_others_are_checked_and_described(tmp_path: Path) -> None:
    training = [write_pair(tmp_path, "one", 1, 2), write_pair(tmp_path, "two", 2)]
    validation = [write_pair(tmp_path, "three", 1)]
    used = finder().used(training, validation)
    assert [case["image"] for case in used.training] == [case["image"] for case in training]
    assert [case["case_id"] for case in used.validation] == ["three"] and used.test == []
    assert used.summary()["training_cases_by_class"] == {"a": 1, "b": 2}
    assert finder().used(training, []).validation == []


def test_images_alone_need_no_label(tmp_path: Path) -> None:
    given = [{"image": write_pair(tmp_path, name)["image"]} for name in ("one", "two")]
    pretraining = CaseFinder(load_cases, dataset_dir="nowhere", val_fraction=0.2, min_size=4, split_classes=["a"])
    assert pretraining.used(given, []).summary()["training_cases"] == 2
    with pytest.raises(BadCasesError, match="smaller than one patch"):
        CaseFinder(load_cases, dataset_dir="nowhere", min_size=7).used(given, [])


def test_nothing_to_train_on() -> None:
    with pytest.raises(ValueError, match=r"there is no case to train on: .* label an image first"):
        finder().used([], [])


def test_what_is_wrong_with_the_lists_of_others(tmp_path: Path) -> None:
    good = write_pair(tmp_path, "good", 1, 2)
    with pytest.raises(ValueError, match=r"class 'b' \(label value 2\) occurs in none of the 1 training case"):
        finder().used([write_pair(tmp_path, "half", 1)], [good])
    bad = [
        write_pair(tmp_path, "empty"),
        write_pair(tmp_path, "unknown", 3),
        write_pair(tmp_path, "elsewhere", 1, shape=(6, 7, 9)),
        {**good, "image": str(tmp_path / "absent.nii.gz")},
    ]
    with pytest.raises(BadCasesError) as error:
        finder(skip_bad=True).used([good, *bad[:3]], bad[3:])
    for told in ("is all background", "holds the value(s) 3", "has size (6, 7, 9)", "absent.nii.gz"):
        assert told in str(error.value), told
    assert str(tmp_path) not in str(error.value)
