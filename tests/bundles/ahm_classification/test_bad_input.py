# SPDX-License-Identifier: Apache-2.0
"""What a user is told when something does not fit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bundles.ahm_classification.classifying import (
    CLASSES,
    PICTURES,
    evaluate,
    infer,
    message_of,
    train,
    write_pictures,
)
from tests.bundles.running import TINY_INFERENCE, checkpoint, run_bundle


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    train(pictures, output, **PICTURES)
    return output


def evaluate_with(data: Path, output: Path, model: Path, **options: Any) -> None:
    """Call ``evaluate`` as ``infer`` is called."""
    evaluate(data, output, checkpoint=str(model), **options)


def refused(data: Path | None, output: Path, **options: Any) -> str:
    """Return the message of a training that must not start."""
    message = message_of(train, data, output, **{**PICTURES, **options})
    assert not (output / "models/last.pt").exists()
    return message


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"architecture": "resnet"}, ["encoder, vgg16, densenet121", "resnet"]),
        ({"architecture_args": {"head": "mlp"}}, ["head", "linear, conv, stages", "mlp"]),
        ({"architecture_args": {"backbone": "vnet"}}, ["backbone", "vnet"]),
        ({"architecture_args": {}, "backbone": "vnet"}, ["backbone", "vnet"]),
        (
            {"architecture": "vgg16", "architecture_args": {}, "backbone": "unetr"},
            ["backbone: vgg16 has none", "unetr"],
        ),
        ({"key_metric": "dice"}, ["key metric", "macro_f1", "dice"]),
        ({"schedule": "poly"}, ["schedule", "cosine, step", "poly"]),
        ({"classes": ["rows", "squares"]}, ["columns_0.png", "no class", "rows, squares"]),
        ({"classes": ["rows", "columns", "rows"]}, ["different names"]),
        ({"class_pattern": "^[a-z]"}, ["columns_0.png", "class 'c'", "rows, columns"]),
        ({"class_pattern": "("}, ["class_pattern", "regular expression"]),
        ({"labels_csv": "nowhere.csv"}, ["nowhere.csv does not exist"]),
        ({"masks_dir": "nowhere"}, ["nowhere is not a folder"]),
        ({"label_fraction": 0}, ["label_fraction", "(0, 1]"]),
        ({"label_fraction": 0.01}, ["occurs in none of the 1 training case(s)", "--label_fraction"]),
        ({"val_fraction": 1.5}, ["val_fraction", "1.5"]),
        ({"in_channels": 3}, ["1 channel(s), expected 3"]),
        ({"modality": "mr"}, ["expected a volume for modality mr or ct: pass --modality image2d"]),
        ({"spatial_dims": 3, "modality": "mr"}, ["expected a volume for modality mr or ct"]),
        ({"pretrained": "nowhere.pt"}, ["nowhere.pt", "no such file"]),
        ({"freeze_epochs": -2}, ["-1 (for good)", "-2"]),
        ({"freeze_epochs": 1, "architecture": "vgg16", "architecture_args": {}}, ["network: expected one of", "VGG16"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_option_that_does_not_fit(pictures: Path, tmp_path: Path, options: dict[str, Any], told: list[str]) -> None:
    message = refused(pictures, tmp_path, **options)
    assert [part for part in told if part not in message] == []


def test_unknown_class_and_missing_row_in_the_table_are_named(pictures: Path, tmp_path: Path) -> None:
    rows = [f"{path.stem},{path.stem.split('_')[0]}" for path in sorted(pictures.iterdir())[1:]]
    (tmp_path / "labels.csv").write_text("\n".join(["case_id,label", *rows[:-1], "rows_4,diagonals"]))
    message = refused(pictures, tmp_path / "out", labels_csv=str(tmp_path / "labels.csv"))
    assert "2 case(s) cannot be used" in message and "--skip_bad true" in message
    assert "rows_4.png: is of class 'diagonals', expected one of rows, columns" in message
    assert "columns_0.png: has no row in labels.csv" in message


def test_bad_cases_can_be_skipped(pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "data")
    (tmp_path / "data/rows_0.png").write_text("this is no picture")
    (tmp_path / "data/scan.png").write_text("and has no class")
    message = refused(tmp_path / "data", tmp_path / "out")
    assert "rows_0.png: cannot be read" in message and "no class in 'scan.png'" in message
    train(tmp_path / "data", tmp_path / "out", **PICTURES, skip_bad="true")
    data = checkpoint(tmp_path / "out/models/last.pt")["provenance"]["data"]
    assert (data["left_out"], sum(data[f"{part}_cases"] for part in ("training", "validation", "test"))) == (2, 9)


def test_image_without_a_mask_is_named(pictures: Path, tmp_path: Path) -> None:
    masks = shutil.copytree(pictures, tmp_path / "masks")
    (masks / "rows_3.png").unlink()
    message = refused(pictures, tmp_path / "out", masks_dir=str(masks))
    assert "rows_3.png: no mask" in message and "1 case(s)" in message
    assert "10 case(s)" in refused(pictures, tmp_path / "out", with_mask="true")


def test_default_data_take_no_pictures_and_no_other_classes(tmp_path: Path) -> None:
    pytest.importorskip("nilearn")
    assert "classes anterior, posterior" in message_of(train, None, tmp_path)
    assert "pass dataset_dir" in refused(None, tmp_path, classes=["anterior", "posterior"])
    assert "pass dataset_dir or datalist too" in refused(None, tmp_path, class_pattern="x")


def test_evaluation_without_test_cases(pictures: Path, trained: Path) -> None:
    message = message_of(evaluate, pictures, trained, test_fraction=0)
    assert "there are no test cases: set test_fraction above 0" in message
    message = message_of(evaluate, pictures, trained, evaluate_cases="tests")
    assert "expected one of training, validation, test, got 'tests'" in message


def test_checkpoint_of_another_task_is_refused(pictures: Path, trained: Path, tmp_path: Path) -> None:
    content = checkpoint(trained / "models/model.pt")
    content["provenance"]["settings"]["task"] = "segmentation"
    torch.save(content, tmp_path / "model.pt")
    for call in (infer, evaluate_with):
        message = message_of(call, pictures, tmp_path / "out", tmp_path / "model.pt")
        assert "a checkpoint of segmentation, expected one of classification" in message


def test_checkpoint_of_pretraining_is_refused(pictures: Path, tmp_path: Path) -> None:
    tiny = {**TINY_INFERENCE, **PICTURES, "masker": "uniform", "max_epochs": 1, "min_epoch_length": 1}
    run_bundle("train.json", dataset_dir=str(pictures), output_dir=str(tmp_path), **tiny)
    for call in (infer, evaluate_with):
        message = message_of(call, pictures, tmp_path / "out", tmp_path / "models/model.pt")
        assert "a checkpoint of pretraining, expected one of classification" in message
    assert not (tmp_path / "out/predictions.json").exists()


def test_checkpoint_of_other_classes_is_refused(pictures: Path, trained: Path, tmp_path: Path) -> None:
    model = trained / "models/model.pt"
    other = CLASSES[::-1]
    for call in (infer, evaluate_with):
        message = message_of(call, pictures, tmp_path, model, classes=other)
        assert "trained for the classes ['rows', 'columns'], got classes ['columns', 'rows']" in message


def test_missing_checkpoint_is_named(pictures: Path, tmp_path: Path) -> None:
    assert "nowhere.pt: no such checkpoint" in message_of(infer, pictures, tmp_path, tmp_path / "nowhere.pt")
