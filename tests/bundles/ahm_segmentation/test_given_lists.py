# SPDX-License-Identifier: Apache-2.0
"""A program such as MONAI Label puts lists of its own in the place of the bundle's: images and labels, and no ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.bundles.ahm_segmentation.segmenting import message_of, planted, train, write_case
from tests.bundles.running import checkpoint


def pairs(folder: Path, count: int) -> list[dict[str, str]]:
    for number in range(count):
        write_case(folder, f"scan{number}", planted(number))
    return [{kind[:-1]: str(folder / kind / f"scan{i}.nii.gz") for kind in ("images", "labels")} for i in range(count)]


def train_on(training: list[dict[str, str]], validation: list[dict[str, str]], output: Path, **overrides: Any) -> Any:
    """Train without a folder, where the template would be taken, which has other classes."""
    given = {"train#dataset#data": training, "validate#dataset#data": validation}
    return train(None, output, **given, **overrides)


def test_it_trains_on_them_and_says_so(tmp_path: Path) -> None:
    given = pairs(tmp_path / "data", 3)
    train_on(given[:2], given[2:], tmp_path)
    content = checkpoint(tmp_path / "models/model.pt")
    data = content["provenance"]["data"]
    assert (data["training_cases"], data["validation_cases"], data["test_cases"]) == (2, 1, 0)
    assert data["training_cases_by_class"] == {"box": 2, "slab": 2}
    assert content["best"]["name"] == "dice" and content["best"]["epoch"] == 1


def test_one_labelled_image_is_enough_to_train(tmp_path: Path) -> None:
    """Then there is nothing to validate on, and the last weights are the best known."""
    train_on(pairs(tmp_path / "data", 1), [], tmp_path, max_epochs=2)
    content = checkpoint(tmp_path / "models/model.pt")
    assert (content["trainer"]["epoch"], content["best"]["epoch"]) == (2, -1)


@pytest.mark.parametrize(
    ("count", "overrides", "message"),
    [
        (0, {}, "there is no case to train on"),
        (1, {"classes": ["box", "slab", "rod"]}, "class 'rod' (label value 3) occurs in none of the 1 training case"),
        (2, {"classes": ["box"]}, "scan0.nii.gz holds the value(s) 2, expected 0, 1"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path: Path, count: int, overrides: dict[str, Any], message: str) -> None:
    assert message in message_of(train_on, pairs(tmp_path / "data", count), [], tmp_path, **overrides)
    assert not (tmp_path / "models/model.pt").exists()
