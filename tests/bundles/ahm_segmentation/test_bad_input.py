# SPDX-License-Identifier: Apache-2.0
"""What a user is told when labels, images or options do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from tests.bundles.ahm_segmentation.segmenting import SHAPE, message_of, planted, train, write_labelled
from tests.bundles.running import checkpoint, kept

SEGRESNET = {"init_filters": 8, "blocks_down": [1, 1, 1], "blocks_up": [1, 1]}


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("volumes"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"schedule": "nope"}, ["schedule: expected one of cosine, step", "nope"]),
        ({"backbone": "vnet"}, ["backbone: expected one of unet", "vnet"]),
        ({"backbone_args": {"depth": 3}}, ["backbone_args: unet does not take depth", "channels"]),
        ({"backbone": "unetr", "backbone_args": {}, "crop_size": 24}, ["an img_size of 3 multiples of 16", "24"]),
        ({"modality": "xray"}, ["modality", "mr, ct, image2d", "xray"]),
        ({"spatial_dims": 4}, ["spatial_dims", "2 or 3", "4"]),
        ({"in_channels": 2}, ["scan0.nii.gz", "1 channel(s), expected 2"]),
        ({"classes": []}, ["classes: expected a list of different names", "[]"]),
        ({"classes": ["a", "a"]}, ["classes: expected a list of different names", "['a', 'a']"]),
        ({"label_values": [1]}, ["label_values must be 2 different integer(s)", "[1]"]),
        ({"label_fraction": 0}, ["label_fraction must be in (0, 1]", "0"]),
        ({"test_fraction": 1.0}, ["test_fraction must be in [0, 1)", "1.0"]),
        ({"val_fraction": 0.6, "test_fraction": 0.5}, ["leave nothing for training"]),
        ({"patient_pattern": "(ward)"}, ["patient_pattern", "ward", "scan0"]),
        ({"patience": -1}, ["patience", "-1"]),
        ({"gradient_clip": 0}, ["max_norm", "0"]),
        ({"foreground_share": 2}, ["foreground_share must be in [0, 1]", "2"]),
        ({"crop_size": 15}, ["crop_size: unet needs multiples of (2, 2, 2), got (15, 15, 15)"]),
        ({"crop_size": [32, 16, 18], "backbone": "segresnet", "backbone_args": SEGRESNET}, ["crop_size: segresnet"]),
        ({"labels_dir": "nowhere"}, ["nowhere is not a folder"]),
        ({"datalist": "nowhere.json"}, ["datalist nowhere.json does not exist"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_option_that_does_not_fit(volumes: Path, tmp_path: Path, options: dict[str, Any], told: list[str]) -> None:
    message = message_of(train, volumes, tmp_path, **options)
    assert [part for part in told if part not in message] == []
    assert not list(tmp_path.rglob("*.pt"))


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Six scans of which four have a label that cannot be used."""
    images = write_labelled(tmp_path / "data", 8)
    labels = images.parent / "labels"
    label = planted(0)
    for number, (values, affine) in enumerate(
        [
            (np.where(label == 2, 7, label), np.eye(4)),
            (label[:-2], np.eye(4)),
            (label, np.diag([1.0, 1.0, 2.0, 1.0])),
            (np.zeros(SHAPE, np.uint8), np.eye(4)),
        ]
    ):
        nib.save(nib.Nifti1Image(values.astype(np.float32), affine), labels / f"scan{number}.nii.gz")
    return images


DAMAGE = (
    "scan0.nii.gz holds the value(s) 7, expected 0, 1, 2: check --classes and --label_values",
    "scan1.nii.gz has size (18, 24, 18), expected (20, 24, 18) as the image",
    "scan2.nii.gz has an affine that differs by up to 1, expected that of the image",
    "scan3.nii.gz is all background, expected some of box, slab: pass --allow_empty_labels true",
)


def test_damaged_labels_are_all_named_before_anything_is_trained(damaged: Path, tmp_path: Path) -> None:
    message = message_of(train, damaged, tmp_path / "run")
    for part in ("4 case(s) cannot be used", "--skip_bad true", *DAMAGE):
        assert part in message
    assert not list((tmp_path / "run").rglob("*.pt"))


def test_damaged_labels_can_be_skipped(damaged: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(damaged, tmp_path / "run", skip_bad="true")
    assert not [part for part in DAMAGE if part not in caplog.text]
    data = checkpoint(tmp_path / "run/models/last.pt")["provenance"]["data"]
    assert (data["training_cases"], data["left_out"]) == (2, 4)


def test_empty_labels_can_be_allowed(damaged: Path, tmp_path: Path) -> None:
    options = {"skip_bad": True, "allow_empty_labels": "true", "label_fraction": 1.0}
    train(damaged, tmp_path / "run", **options)
    assert checkpoint(tmp_path / "run/models/last.pt")["provenance"]["data"]["left_out"] == 3


@pytest.mark.parametrize("value", [np.nan, np.inf, -1, 1.5])
def test_label_with_a_value_that_is_no_class(tmp_path: Path, value: float) -> None:
    images = write_labelled(tmp_path / "data", 4)
    label = planted(0).astype(np.float32)
    label[0, 0, 0] = value
    nib.save(nib.Nifti1Image(label, np.eye(4)), images.parent / "labels/scan0.nii.gz")
    message = message_of(train, images, tmp_path / "run")
    assert f"scan0.nii.gz holds the value(s) {value:g}" in message


def test_class_that_no_training_case_has(volumes: Path, tmp_path: Path) -> None:
    message = message_of(train, volumes, tmp_path, classes=["box", "slab", "lesion"])
    assert "class 'lesion' (label value 3) occurs in none of the 4 training case(s)" in message
    assert "--classes" in message


def test_images_without_labels(volumes: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for path in volumes.iterdir():
        (tmp_path / "images" / path.name).symlink_to(path)
    message = message_of(train, tmp_path / "images", tmp_path / "run")
    assert "none of 6 image(s) has a label" in message and "a folder labels" in message


def test_images_among_labels(volumes: Path, tmp_path: Path) -> None:
    message = message_of(train, volumes, tmp_path, labels_dir=str(volumes))
    assert "images and labels must be in different folders" in message


def test_labels_without_images(volumes: Path, tmp_path: Path) -> None:
    message = message_of(train, None, tmp_path, labels_dir=str(volumes.parent / "labels"))
    assert "labels_dir: pass dataset_dir or datalist too" in message


def test_missing_folder(tmp_path: Path) -> None:
    assert "nowhere is not a folder" in message_of(train, tmp_path / "nowhere", tmp_path / "run")


def test_unwritable_output_folder(volumes: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # a folder without rights would not stop root
    message = message_of(train, volumes, tmp_path / "file" / "out")
    assert "cannot write to this output folder" in message and "choose another" in message


def test_resuming_with_other_patients(tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "data", 6)
    train(data, tmp_path / "run")
    before = kept(tmp_path / "run")
    write_labelled(tmp_path / "data", 7)
    message = message_of(train, data, tmp_path / "run", resume=True, max_epochs=2)
    assert "last.pt: trained on 4 patients, now there are 5 to train on" in message and "output_dir" in message
    assert kept(tmp_path / "run") == before


def test_resuming_with_another_network(volumes: Path, tmp_path: Path) -> None:
    train(volumes, tmp_path)
    before = kept(tmp_path)
    other = {"channels": [4, 16], "strides": [2], "num_res_units": 0}
    message = message_of(train, volumes, tmp_path, resume=True, backbone_args=other)
    assert "last.pt: 'model' was saved from another architecture" in message
    assert kept(tmp_path) == before
