# SPDX-License-Identifier: Apache-2.0
"""Bundles put into an app of MONAI Label: weights that fit, and files that agree with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from ahm_engines.monai_label import add_bundle
from ahm_engines.monai_label.__main__ import main
from ahm_engines.monai_label.bundles import find_bundles, task_of
from tests.bundles import running
from tests.bundles.ahm_segmentation import segmenting
from tests.bundles.running import CLASSIFICATION, PRETRAIN, SEGMENTATION, TINY_UNET, checkpoint, read_bundle

FILES = ["LICENSE", "configs", "docs"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return segmenting.write_labelled(tmp_path_factory.mktemp("data"), 4)


@pytest.fixture(scope="module")
def pretrained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("pretrained")
    running.train(data, output, max_epochs=1, min_epoch_length=1, spacing_mm=1.5)
    return output / "models/model.pt"


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    segmenting.train(data, output, spacing_mm=1.5, val_fraction=0.25)
    return output / "models/model.pt"


def read(bundle: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((bundle / "configs" / name).read_text())
    return content


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_settings_and_class_names_are_those_of_the_checkpoint(trained: Path, tmp_path: Path) -> None:
    bundle = add_bundle(tmp_path / "app", SEGMENTATION, checkpoint=trained, name="boxes_segmentation")
    assert bundle == tmp_path / "app/model/boxes_segmentation"
    assert names(bundle) == [*FILES, "models"] and names(bundle.parent) == [bundle.name]
    assert (bundle / "models/model.pt").read_bytes() == trained.read_bytes()
    settings, given = read(bundle, "train.json"), checkpoint(trained)["provenance"]["settings"]
    for key in ("classes", "crop_size", "backbone_args", "spacing_mm", "modality"):
        assert settings[key] == given[key], key
    assert settings["val_fraction"] == 0.2 and settings["label_values"] is None  # these are of other data
    pred = read(bundle, "metadata.json")["network_data_format"]["outputs"]["pred"]
    assert pred["channel_def"] == {"0": "background", "1": "box", "2": "slab"} and pred["num_channels"] == 3
    assert pred["spatial_shape"] == [16, 16, 16]
    assert "LabelApp" in (tmp_path / "app/main.py").read_text()


def test_the_bundle_in_the_app_trains_on_from_its_model_or_not_at_all(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    """MONAI Label's own loader would take weights of another architecture for good."""
    bundle = add_bundle(tmp_path, SEGMENTATION, checkpoint=trained)
    options = {"dataset_dir": str(data), "bundle_root": str(bundle), "min_epoch_length": 1, "learning_rate": 0.0}
    running.run_bundle("train.json", bundle=bundle, **options, max_epochs=1)
    before, after = checkpoint(trained)["model"], checkpoint(bundle / "models/last.pt")["model"]
    weights = [name for name in before if "adn" not in name]  # statistics of batches move without a learning rate
    assert weights and all(torch.equal(before[name], after[name]) for name in weights)
    torch.save({"model": {"network.weight": torch.zeros(1)}}, bundle / "models/model.pt")
    message = segmenting.message_of(running.run_bundle, "train.json", bundle=bundle, **options, max_epochs=1)
    assert "Missing key(s) in state_dict" in message


def test_the_first_training_starts_from_the_pretraining_and_the_next_from_the_model(
    data: Path, pretrained: Path, tmp_path: Path
) -> None:
    bundle = add_bundle(tmp_path, SEGMENTATION, pretrained=pretrained, classes=["box", "slab"])
    assert names(bundle) == [*FILES, "pretrained"]
    settings = read(bundle, "train.json")
    assert (settings["crop_size"], settings["backbone_args"], settings["spacing_mm"]) == (16, TINY_UNET, 1.5)
    options = {"dataset_dir": str(data), "bundle_root": str(bundle), "max_epochs": 1, "min_epoch_length": 1}
    running.run_bundle("train.json", bundle=bundle, **options, learning_rate=0.0)
    name, model = "model.0.conv.weight", bundle / "models/model.pt"
    first, content = checkpoint(pretrained)["model"], checkpoint(model)
    (start,) = (value for key, value in first.items() if key.endswith(name))
    assert torch.equal(content["model"][name], start)

    content["model"][name] += 1
    torch.save(content, model)
    running.run_bundle("train.json", bundle=bundle, **options, learning_rate=0.0)
    assert torch.equal(checkpoint(bundle / "models/last.pt")["model"][name], start + 1)


def test_pretraining_takes_its_checkpoint_along(pretrained: Path, tmp_path: Path) -> None:
    bundle = add_bundle(tmp_path, PRETRAIN, checkpoint=pretrained)
    assert (bundle / "runs/pretrain/models/model.pt").read_bytes() == pretrained.read_bytes()
    assert read(bundle, "train.json")["patch_size"] == 4
    assert read(bundle, "metadata.json") == read(PRETRAIN, "metadata.json")
    assert names(add_bundle(tmp_path, PRETRAIN, name="second_pretrain")) == FILES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "a segmentation needs a checkpoint or, to be trained, the names of its classes"),
        ({"classes": ["a", "b", ""]}, "classes: expected a list of different names"),
        ({"classes": ["a", "a"]}, "classes: expected a list of different names"),
        ({"checkpoint": "nowhere.pt"}, "nowhere.pt: no such checkpoint"),
        ({"checkpoint": "pretrained"}, "a checkpoint of pretraining, expected one of segmentation"),
        ({"pretrained": "trained", "classes": ["a"]}, "a checkpoint of segmentation, expected one of pretraining"),
        ({"checkpoint": "trained", "classes": ["a"]}, "pretrained and classes are for a segmentation that is to be"),
        ({"checkpoint": "trained", "name": "boxes"}, "name 'boxes': expected one of the words segmentation"),
        ({"checkpoint": "trained", "name": "box_detection_segmentation"}, "and none of deepedit, deepgrow, detection"),
        ({"checkpoint": "trained", "name": "boxes_classification"}, "is that of a classification"),
        ({"checkpoint": "trained", "changes": {"crop_size": 8}}, "changes crop_size: expected entries of"),
        ({"checkpoint": "trained", "changes": {"crops": 8}}, "changes crops: expected entries of"),
        ({"checkpoint": "foreign"}, "this one tells no settings"),
        ({"checkpoint": "broken"}, "'model' was saved from another architecture"),
    ],
)
def test_what_does_not_fit_leaves_nothing_behind(
    trained: Path, pretrained: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    content = checkpoint(trained)
    torch.save({"model": content["model"]}, tmp_path / "foreign.pt")
    first = next(iter(content["model"]))
    del content["model"][first]
    torch.save(content, tmp_path / "broken.pt")
    known = {"trained": trained, "pretrained": pretrained}
    known |= {name: tmp_path / f"{name}.pt" for name in ("foreign", "broken")}
    given = {key: known.get(value, value) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message.replace("(", r"\(")):
        add_bundle(tmp_path / "app", SEGMENTATION, **given)
    model = tmp_path / "app/model"
    assert not model.exists() or names(model) == []
    assert not (tmp_path / "app/main.py").exists()


def test_an_app_and_a_bundle_that_are_there_stay_as_they_are(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("stock")
    bundle = add_bundle(tmp_path, SEGMENTATION, checkpoint=trained)
    (bundle / "mine").touch()
    with pytest.raises(FileExistsError, match="ahm_segmentation is there already"):
        add_bundle(tmp_path, SEGMENTATION, checkpoint=trained)
    assert (bundle / "mine").exists() and (tmp_path / "main.py").read_text() == "stock"
    with pytest.raises(FileNotFoundError, match="is no bundle: expected configs"):
        add_bundle(tmp_path, tmp_path)


def test_a_classification_comes_trained_and_without_masks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="MONAI Label keeps no classes to train on"):
        add_bundle(tmp_path, CLASSIFICATION)
    settings = {"task": "classification", "classes": ["a", "b"], "mask_channel": True}
    torch.save({"model": {}, "provenance": {"settings": settings}}, tmp_path / "masked.pt")
    with pytest.raises(ValueError, match="wants a mask with each image"):
        add_bundle(tmp_path, CLASSIFICATION, checkpoint=tmp_path / "masked.pt")


def test_what_runs_left_in_the_bundles_folder_stays_behind(trained: Path, tmp_path: Path) -> None:
    """Scores name cases, records name folders; the app goes to a server."""
    bundle = tmp_path / "ahm_segmentation"
    shutil.copytree(SEGMENTATION, bundle)
    for name in ("evaluation/scores.csv", "run_record.json", "mlruns.db", "config_20261129.json", "models/last.pt"):
        (bundle / name).parent.mkdir(exist_ok=True)
        (bundle / name).write_text("Jane Doe")
    added = add_bundle(tmp_path / "app", bundle, checkpoint=trained)
    assert names(added) == [*FILES, "models"] and names(added / "models") == ["model.pt"]


def test_the_bundles_of_an_app_are_found_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no bundle, there are \[\]"):
        find_bundles(tmp_path)
    for name in ("b_segmentation", "a_pretrain", ".half_segmentation"):
        (tmp_path / name / "configs").mkdir(parents=True)
        (tmp_path / name / "configs/metadata.json").write_text("{}")
    assert list(find_bundles(tmp_path)) == ["a_pretrain", "b_segmentation"]
    assert list(find_bundles(tmp_path, "b_segmentation")) == ["b_segmentation"]
    with pytest.raises(FileNotFoundError, match=r"no bundle c, there are \['a_pretrain', 'b_segmentation'\]"):
        find_bundles(tmp_path, "b_segmentation, c")
    assert task_of("Liver_Segmentation_2") == "segmentation"


def test_command(trained: Path, tmp_path: Path) -> None:
    app = Typer()
    app.command()(main)
    words = [str(tmp_path / "app"), str(SEGMENTATION), "--checkpoint", str(trained)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and "monailabel start_server --app" in done.output
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 1 and "FileExistsError" in again.output and "Traceback" not in again.output
    words = [str(tmp_path / "app"), str(SEGMENTATION), "--name", "two_segmentation", "--classes", "a, b"]
    assert CliRunner().invoke(app, [*words, "--set", "crop_size=[8, 16, 8]", "--set", "schedule=cosine"]).exit_code == 0
    bundle = tmp_path / "app/model/two_segmentation"
    settings = read(bundle, "train.json")
    assert [settings[key] for key in ("classes", "crop_size", "schedule")] == [["a", "b"], [8, 16, 8], "cosine"]
    inputs = read(bundle, "metadata.json")["network_data_format"]["inputs"]["image"]
    assert inputs["spatial_shape"] == [8, 16, 8]
    wrong = CliRunner().invoke(app, [*words, "--set", "schedule"])
    assert wrong.exit_code == 1 and "expected name=value, got 'schedule'" in wrong.output


def test_a_2d_network_for_volumes_says_that_it_takes_volumes(data: Path, tmp_path: Path) -> None:
    flat = {"spatial_dims": 2, "crop_size": 16}
    segmenting.train(data, tmp_path / "run", **flat)
    bundle = add_bundle(tmp_path, SEGMENTATION, checkpoint=tmp_path / "run/models/model.pt")
    inputs = read(bundle, "metadata.json")["network_data_format"]["inputs"]["image"]
    assert inputs["spatial_shape"] == [16, 16, 1]
    read_bundle("inference.json", "infer", bundle=bundle, bundle_root=str(bundle), dataset_dir=str(data))
