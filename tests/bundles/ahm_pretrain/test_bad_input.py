# SPDX-License-Identifier: Apache-2.0
"""What a user is told when something does not fit."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from tests.bundles.running import checkpoint, error_chain, infer, kept, train, write_cases

OTHER_NET = {"backbone_args": {"channels": [4, 16], "strides": [2], "num_res_units": 0}}


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cases(tmp_path_factory.mktemp("volumes"))


@pytest.fixture(scope="module")
def trained(volumes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    train(volumes, output, max_epochs=1, min_epoch_length=1)
    return output


def message_of(call: Callable[..., Any], *args: Any, **options: Any) -> str:
    with pytest.raises(Exception) as error:  # MONAI wraps each error in its own
        call(*args, **options)
    return error_chain(error.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"masker": "nope"}, ["masker: expected one of a3c", "nope"]),
        ({"mask_ratio": 1.2}, ["mask_ratio", "between 0 and 1", "1.2"]),
        ({"mask_ratio": 0}, ["mask_ratio", "between 0 and 1"]),
        ({"patch_size": 32}, ["scan0.nii.gz", "smaller than one patch", "patch_size"]),
        ({"crop_size": 2}, ["patch_size", "image size (2, 2, 2)", "smaller patches"]),
        ({"in_channels": 2}, ["scan0.nii.gz", "1 channel(s), expected 2"]),
        ({"modality": "xray"}, ["modality", "mr, ct, image2d", "xray"]),
        ({"spatial_dims": 4}, ["spatial_dims", "2 or 3", "4"]),
        ({"backbone": "vnet"}, ["backbone", "unet", "vnet"]),
        ({"val_fraction": 1.5}, ["val_fraction", "1.5"]),
        ({"patient_pattern": "(ward)"}, ["patient_pattern", "ward", "scan0"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_option_that_does_not_fit(volumes: Path, tmp_path: Path, options: dict[str, Any], told: list[str]) -> None:
    message = message_of(train, volumes, tmp_path, **options)
    assert [part for part in told if part not in message] == []


def test_missing_folder(tmp_path: Path) -> None:
    message = message_of(train, tmp_path / "nowhere", tmp_path / "out")
    assert "dataset_dir" in message and "nowhere is not a folder" in message


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    message = message_of(train, tmp_path / "data", tmp_path / "out")
    assert "holds no image" in message and "NIfTI" in message


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    folder = write_cases(tmp_path / "data", 3)
    content = (folder / "scan0.nii.gz").read_bytes()
    (folder / "half.nii.gz").write_bytes(content[: len(content) // 2])
    (folder / "text.nii.gz").write_text("this is no image")
    return folder


def test_damaged_files_stop_the_run_and_are_all_named(damaged: Path, tmp_path: Path) -> None:
    message = message_of(train, damaged, tmp_path / "out")
    for part in ("2 case(s)", "half.nii.gz", "text.nii.gz", "--skip_bad true"):
        assert part in message
    assert not (tmp_path / "out/models/last.pt").exists()


def test_damaged_files_can_be_skipped(damaged: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(damaged, tmp_path / "out", skip_bad=True)
    assert "half.nii.gz" in caplog.text and "text.nii.gz" in caplog.text
    data = checkpoint(tmp_path / "out/models/last.pt")["provenance"]["data"]
    assert (data["training_cases"] + data["validation_cases"], data["left_out"]) == (3, 2)


def test_nan_and_constant_volumes_are_reported_and_train(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    noise = np.random.default_rng(0).random((20, 24, 18), dtype=np.float32)
    half = noise.copy()
    half[:10] = np.nan
    (tmp_path / "data").mkdir()
    for name, values in {
        "noise": noise,
        "half": half,
        "nan": np.full_like(noise, np.nan),
        "seven": np.full_like(noise, 7),
        "inf": np.where(noise > 0.9, np.inf, noise),
    }.items():
        nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "data" / f"{name}.nii.gz")
    train(tmp_path / "data", tmp_path / "out", cases_per_batch=4, val_fraction=0.4)
    for name in ("half", "nan", "seven", "inf"):
        assert f"{name}.nii.gz" in caplog.text
    assert "noise.nii.gz" not in caplog.text
    content = checkpoint(tmp_path / "out/models/last.pt")
    assert all(bool(torch.isfinite(weights).all()) for weights in content["model"].values())
    assert math.isfinite(content["best"]["metric"])


def test_unwritable_output_folder(volumes: Path, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # a folder without rights would not stop root
    output = tmp_path / "file" / "out"
    for message in (
        message_of(train, volumes, output),
        message_of(infer, volumes, output, trained / "models/model.pt"),
    ):
        assert f"{output}: cannot write to this output folder" in message and "choose another" in message


def test_resuming_with_other_patients(tmp_path: Path) -> None:
    data = write_cases(tmp_path / "data")
    train(data, tmp_path / "run", max_epochs=1)
    before = kept(tmp_path / "run")
    write_cases(tmp_path / "data", 6)
    message = message_of(train, data, tmp_path / "run", resume=True)
    assert "last.pt: trained on 3 patients, now there are 5 to train on" in message
    assert kept(tmp_path / "run") == before


def test_resuming_with_another_network(volumes: Path, tmp_path: Path) -> None:
    train(volumes, tmp_path, max_epochs=1, min_epoch_length=1)
    before = kept(tmp_path)
    message = message_of(train, volumes, tmp_path, resume=True, min_epoch_length=1, **OTHER_NET)
    assert "last.pt: 'model' was saved from another architecture" in message and "provenance" in message
    assert kept(tmp_path) == before


def test_inference_with_another_network(volumes: Path, trained: Path, tmp_path: Path) -> None:
    message = message_of(infer, volumes, tmp_path, trained / "models/model.pt", **OTHER_NET)
    assert "model.pt: 'model' was saved from another architecture" in message


def test_inference_with_another_masker(volumes: Path, trained: Path, tmp_path: Path) -> None:
    message = message_of(infer, volumes, tmp_path, trained / "models/model.pt", masker="%maskers::uniform")
    assert "model.pt: 'masker' was saved from another architecture" in message


def test_inference_without_a_checkpoint(volumes: Path, tmp_path: Path) -> None:
    assert "nowhere.pt: no such checkpoint" in message_of(infer, volumes, tmp_path, tmp_path / "nowhere.pt")


def test_inference_with_a_damaged_checkpoint(volumes: Path, trained: Path, tmp_path: Path) -> None:
    content = (trained / "models/model.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(content[: len(content) // 2])
    assert "half.pt: not a readable checkpoint" in message_of(infer, volumes, tmp_path / "out", tmp_path / "half.pt")


@pytest.mark.parametrize(("typed", "skipped"), [("true", True), ("True", True), ("false", False), (False, False)])
def test_switches_are_read_as_they_are_typed(volumes: Path, tmp_path: Path, typed: Any, skipped: bool) -> None:
    """The command line hands "true" and "false" on as words, and the word "false" is not empty."""
    data = tmp_path / "data"
    shutil.copytree(volumes, data)
    (data / "broken.nii.gz").write_text("no image")
    options = {"skip_bad": typed, "amp": "false", "resume": "false", "max_epochs": 1, "min_epoch_length": 1}
    if skipped:
        train(data, tmp_path / "run", **options)
    else:
        assert "broken.nii.gz" in message_of(train, data, tmp_path / "run", **options)
