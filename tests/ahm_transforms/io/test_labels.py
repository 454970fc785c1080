# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import EnsureChannelFirst
from PIL import Image
from torch.overrides import TorchFunctionMode

from ahm_transforms.io import LoadLabeld

TURNED = np.array([[0, -2.0, 0, 3], [1, 0, 0, 4], [0, 0, 3, 5], [0, 0, 0, 1]])


def write(path: Path, values: np.ndarray, affine: np.ndarray = TURNED) -> str:
    nib.save(nib.Nifti1Image(values, affine), path)
    return str(path)


def load(label: object, num_classes: int, label_values: list[int] | None = None) -> MetaTensor:
    return LoadLabeld("label", num_classes=num_classes, label_values=label_values)({"label": label})["label"]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 7), (5, 6, 7, 1)])
def test_values_become_class_indices_on_the_same_grid(tmp_path: Path, dtype: type, shape: tuple[int, ...]) -> None:
    stored = np.random.default_rng(0).choice([0, 4, 200], shape).astype(dtype)
    label = load(write(tmp_path / "a.nii.gz", stored), 2, [200, 4])
    assert label.dtype == torch.uint8
    expected = np.where(stored == 200, 1, np.where(stored == 4, 2, 0)).reshape(shape[:3])
    np.testing.assert_array_equal(label.numpy(), expected)
    np.testing.assert_allclose(label.affine, TURNED)
    assert EnsureChannelFirst()(label).shape == (1, *expected.shape)


class Calls(TorchFunctionMode):
    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_many_classes_are_no_more_work_than_one(tmp_path: Path) -> None:
    path, counts = write(tmp_path / "a.nii", np.ones((5, 6, 7), np.uint8)), set()
    for num_classes in (1, 200):
        with Calls() as calls:
            load(path, num_classes)
        counts.add(calls.count)
    assert len(counts) == 1


def test_label_values_may_lie_far_apart(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii", np.array([[-4000, 0, 7, 614454272]], np.int32))
    assert load(path, 3, [614454272, -4000, 7]).tolist() == [[2, 0, 3, 1]]


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_pictures_keep_their_numbers(tmp_path: Path, mode: str) -> None:
    values = np.zeros((4, 6), np.uint8)
    values[1, 2] = 1 if mode == "P" else 255
    picture = Image.fromarray(values, mode="P") if mode == "P" else Image.fromarray(values).convert(mode)
    if mode == "P":
        picture.putpalette([0, 0, 0, 200, 10, 10])
    picture.save(tmp_path / "a.png")
    label = load(str(tmp_path / "a.png"), 1, [1 if mode == "P" else 255])
    assert label.shape == (6, 4)  # width first, as the images
    assert label[2, 1] == 1 and label.sum() == 1


@pytest.mark.parametrize("scale", [1, 255])
def test_of_several_maps_the_largest_wins_if_it_reaches_one_half(tmp_path: Path, scale: int) -> None:
    first = np.array([[0.9, 0.4, 0.51, 0.0, 1.0]]) * scale
    second = np.array([[0.1, 0.45, 0.52, 0.6, 0.2]]) * scale
    maps = [write(tmp_path / f"{i}.nii", each.astype(np.float32)) for i, each in enumerate((first, second))]
    assert load(maps, 2).tolist() == [[1, 0, 2, 2, 1]]
    assert load(tuple(maps), 2).dtype == torch.uint8


def test_one_half_is_enough(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii", np.array([[0.5, 0.49, 1.0]], np.float32))
    assert load([path], 1).tolist() == [[1, 0, 1]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, 1, 3], r"a\.nii holds the value\(s\) 3, expected 0, 1, 2"),
        ([3, 4, 5, 6, 7, 8, 9], r"holds the value\(s\) 3, 4, 5, 6, 7 and 2 more, expected 0, 1, 2"),
        ([0, 1, 0.25], r"0\.25, which are not all integers, expected 0, 1, 2"),
        ([0, 1, np.nan], r"nan, which are not all integers, expected 0, 1, 2"),
        ([0, 1, -1], r"-1, expected 0, 1, 2"),
        ([0, 1, 0.9999999], r"the value\(s\) 0\.9999999, which are not all integers"),
        ([0, 1, 16777216, 0.1], r"the value\(s\) 0\.1, 16777216, which are not all integers"),
        ([np.nan, 1, 3, np.nan, np.nan], r"the value\(s\) 3, nan, which are not all integers"),
    ],
)
def test_other_values_are_named(tmp_path: Path, values: list[float], message: str) -> None:
    path = write(tmp_path / "a.nii", np.array([values], np.float32))
    with pytest.raises(ValueError, match=message):
        load(path, 2)


def test_maps_that_do_not_fit_are_named(tmp_path: Path) -> None:
    good = write(tmp_path / "good.nii", np.zeros((3, 4), np.float32))
    with pytest.raises(ValueError, match=r"good\.nii: 1 map\(s\), expected one for each of 2 class\(es\)"):
        load([good], 2)
    small = write(tmp_path / "small.nii", np.zeros((3, 3), np.float32))
    with pytest.raises(ValueError, match=r"small\.nii has size \(3, 3\), expected \(3, 4\) as good\.nii"):
        load([good, small], 2)
    for value in (-0.5, 256, np.nan):
        wrong = write(tmp_path / "wrong.nii", np.full((3, 4), value, np.float32))
        with pytest.raises(ValueError, match=r"good\.nii, wrong\.nii: values from .* expected probabilities"):
            load([good, wrong], 2)


def test_channels_and_damaged_files_are_named(tmp_path: Path) -> None:
    Image.new("RGB", (4, 6)).save(tmp_path / "colour.png")
    with pytest.raises(ValueError, match=r"colour\.png has 3 channels, expected a map of one"):
        load(str(tmp_path / "colour.png"), 1)
    (tmp_path / "text.nii.gz").write_text("no label")
    with pytest.raises(OSError, match=r"text\.nii\.gz cannot be read"):
        load(str(tmp_path / "text.nii.gz"), 1)


@pytest.mark.parametrize("values", [[1], [1, 1], [0, 1], [1, 2, 3], [1, 2.5]])
def test_label_values_are_one_for_each_class(values: list[int]) -> None:
    with pytest.raises(ValueError, match=r"label_values must be 2 different integer\(s\)"):
        LoadLabeld("label", num_classes=2, label_values=values)
    for count in (0, 256):
        with pytest.raises(ValueError, match=f"1 to 255 foreground classes, got {count}"):
            LoadLabeld("label", num_classes=count)


def test_the_input_and_other_entries_stay(tmp_path: Path) -> None:
    case = {"label": write(tmp_path / "a.nii", np.ones((3, 3), np.uint8)), "case_id": "a"}
    loaded = LoadLabeld(["label", "other"], num_classes=1, allow_missing_keys=True)(case)
    assert loaded["case_id"] == "a" and isinstance(case["label"], str)
    with pytest.raises(KeyError, match="other"):
        LoadLabeld("other", num_classes=1)(case)
