# SPDX-License-Identifier: Apache-2.0
"""Inference with a trained classifier, and its exports."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ckpt_export, onnx_export
from PIL import Image

from tests.bundles.ahm_classification.classifying import (
    CLASSES,
    LEARNING,
    PICTURES,
    evaluate,
    infer,
    message_of,
    predictions,
    stripes,
    train,
    write_masked,
    write_picture,
    write_pictures,
    write_volumes,
)
from tests.bundles.running import CLASSIFICATION, read_bundle, run_bundle
from tests.fixtures_data import PATIENT_ID, PATIENT_NAME, write_series


@pytest.fixture(scope="module")
def of_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint that knows stripes in pictures; its settings are not the defaults."""
    folder = tmp_path_factory.mktemp("pictures")
    train(write_pictures(folder / "data"), folder, **PICTURES, **LEARNING)
    return folder / "models/model.pt"


@pytest.fixture(scope="module")
def of_volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint that knows stripes in volumes."""
    folder = tmp_path_factory.mktemp("volumes")
    train(write_volumes(folder / "data"), folder, **LEARNING)
    return folder / "models/model.pt"


@pytest.fixture(scope="module")
def of_masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint that looks at masks."""
    folder = tmp_path_factory.mktemp("masks")
    images, masks = write_masked(folder / "data")
    train(images, folder, **PICTURES, **LEARNING, masks_dir=str(masks))
    return folder / "models/model.pt"


def truth(name: str) -> str:
    return next(each for each in CLASSES if each in name)


@pytest.mark.parametrize("dims", [2, 3])
def test_new_images_get_their_class_with_the_settings_of_the_checkpoint(
    of_pictures: Path, of_volumes: Path, tmp_path: Path, dims: int
) -> None:
    write, model = (write_pictures, of_pictures) if dims == 2 else (write_volumes, of_volumes)
    write(tmp_path / "data/ward", 2)
    infer(tmp_path / "data", tmp_path / "out", model)

    names = [f"ward_{kind}_{number}" for kind in sorted(CLASSES) for number in range(2)]
    found = predictions(tmp_path / "out")
    assert found == {name: truth(name) for name in names}
    rows = list(csv.DictReader((tmp_path / "out/predictions.csv").open()))
    assert {row["case_id"]: row["predicted"] for row in rows} == found
    for row in rows:
        assert float(row["rows"]) + float(row["columns"]) == pytest.approx(1, abs=1e-5)
        assert (tmp_path / f"out/{row['case_id']}/{row['case_id']}_quicklook.png").stat().st_size > 1000
    assert json.loads((tmp_path / "out/results.json").read_text())["failed"] == 0


def test_transformer_after_a_masked_autoencoder_is_built_as_its_checkpoint_says(tmp_path: Path) -> None:
    """Its options are those of the other bundles; its size is that of the images."""
    data = write_pictures(tmp_path / "data")
    vit = {"backbone_args": {"hidden_size": 24, "mlp_dim": 48, "num_heads": 2}}
    tokens = {"crop_size": 32, "patch_size": 16, "max_epochs": 1, "min_epoch_length": 1}
    run_bundle(
        "train.json",
        dataset_dir=str(data),
        output_dir=str(tmp_path),
        architecture="mae",
        masker="uniform",
        **PICTURES,
        **vit,
        **tokens,
    )
    options = {"architecture_args": {"head": "linear"}, "backbone": "unetr", "image_size": 32, **vit}
    train(data, tmp_path / "classifier", **PICTURES, **options, pretrained=str(tmp_path / "models/model.pt"))
    model = tmp_path / "classifier/models/model.pt"
    settings = torch.load(model, weights_only=True)["provenance"]["settings"]
    assert (settings["backbone"], settings["backbone_args"]) == ("unetr", vit["backbone_args"])

    infer(data, tmp_path / "out", model)
    assert len(predictions(tmp_path / "out")) == len(list(data.rglob("*.png")))
    assert evaluate(data, tmp_path / "classifier")["cases"] == 2


def test_one_file_is_enough(of_pictures: Path, tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "data", 2)
    infer(data / "rows_1.png", tmp_path / "out", of_pictures)
    assert predictions(tmp_path / "out") == {"rows_1": "rows"}


def test_series_are_classified_and_nothing_names_the_patient(of_volumes: Path, tmp_path: Path) -> None:
    for number in range(2):
        write_series(tmp_path / "data" / PATIENT_ID / str(number), slices=16, size=(18, 20))
    write_series(tmp_path / "data" / PATIENT_ID / "scout", slices=1)
    infer(tmp_path / "data", tmp_path / "out", of_volumes)
    report = json.loads((tmp_path / "out/results.json").read_text())
    assert [case["status"] for case in report["cases"]] == ["skipped", "ok", "ok"]
    found = predictions(tmp_path / "out")
    assert len(found) == 2 and all(name.startswith("series-") for name in found)
    for path in (tmp_path / "out").rglob("*"):
        text = str(path.relative_to(tmp_path)).encode() + (path.read_bytes() if path.is_file() else b"")
        assert PATIENT_ID.encode() not in text and PATIENT_NAME.encode() not in text


def test_others_go_on_after_a_bad_case(of_pictures: Path, tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "data", 2)
    (data / "columns_0.png").write_text("this is no picture")
    colour = np.zeros((24, 20, 3), np.uint8)
    Image.fromarray(colour).save(data / "columns_colour.png")
    message = message_of(infer, data, tmp_path / "out", of_pictures)

    assert "2 of 5 case(s) failed" in message and "columns_0 " in message
    assert "columns_colour.png has 3 channel(s), expected channels=1" in message
    assert predictions(tmp_path / "out") == {"rows_0": "rows", "rows_1": "rows", "columns_1": "columns"}
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert (results["done"], results["failed"]) == (3, 2)


def test_masks_are_looked_at_and_a_missing_one_is_a_bad_case(of_masks: Path, tmp_path: Path) -> None:
    images, masks = write_masked(tmp_path / "data", 3)
    (masks / "rows_0.png").unlink()
    write_picture(masks / "rows_1.png", stripes("rows", (20, 24)))
    message = message_of(infer, images, tmp_path / "out", of_masks, masks_dir=str(masks))
    assert "2 of 6 case(s) failed" in message and "no mask" in message
    assert "mask" in message and "has size (24, 20), expected (20, 24)" in message
    names = ["columns_0", "columns_1", "columns_2", "rows_2"]
    assert predictions(tmp_path / "out") == {name: truth(name) for name in names}


def test_masks_must_be_given_where_training_had_them_and_nowhere_else(
    of_masks: Path, of_pictures: Path, tmp_path: Path
) -> None:
    images, masks = write_masked(tmp_path / "data", 1)
    assert "trained with masks: pass --masks_dir" in message_of(infer, images, tmp_path / "out", of_masks)
    message = message_of(infer, images, tmp_path / "out", of_pictures, masks_dir=str(masks))
    assert "trained without masks: do not pass masks_dir" in message


def exported(checkpoint: Path, path: Path, export: Any, **options: Any) -> Path:
    export(
        net_id="network_def",
        filepath=str(path),
        ckpt_file=str(checkpoint),
        meta_file=str(CLASSIFICATION / "configs/metadata.json"),
        config_file=str(CLASSIFICATION / "configs/inference.json"),
        key_in_ckpt="model",
        checkpoint=str(checkpoint),
        **options,
    )
    return path


@pytest.fixture(scope="module")
def eager(of_volumes: Path) -> torch.nn.Module:
    workflow = read_bundle("inference.json", "infer", bundle=CLASSIFICATION, checkpoint=str(of_volumes))
    network: torch.nn.Module = workflow.parser.get_parsed_content("network_def").eval()
    return network


def test_torchscript_gives_what_the_network_gives(of_volumes: Path, eager: torch.nn.Module, tmp_path: Path) -> None:
    network = torch.jit.load(exported(of_volumes, tmp_path / "model.ts", ckpt_export)).eval()
    for size in ((16, 16, 16), (17, 20, 15)):
        image = torch.rand(2, 1, *size)
        torch.testing.assert_close(network(image), eager(image))


def test_onnx_gives_what_the_network_gives(of_volumes: Path, eager: torch.nn.Module, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    path = exported(of_volumes, tmp_path / "model.onnx", onnx_export, input_shape=[1, 1, 16, 16, 16])
    session = runtime.InferenceSession(str(path))
    image = torch.rand(1, 1, 16, 16, 16)
    (found,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), eager(image).detach(), rtol=1e-4, atol=1e-4)
