# SPDX-License-Identifier: Apache-2.0
"""The contrastive variant of the training config, and what becomes of its encoder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ahm_engines.reports import provenance
from ahm_networks.nets import encoder_stages
from tests.bundles.ahm_classification import classifying
from tests.bundles.ahm_segmentation import segmenting
from tests.bundles.running import (
    TINY,
    assert_same_state,
    checkpoint,
    error_chain,
    run_bundle,
    write_cases,
)

FILES = ("train.json", "contrastive.json")
OBJECTS = {"model", "optimizer", "lr_scheduler", "trainer", "best", "provenance"}
DEEPER = {"backbone_args": {"channels": [4, 8, 12], "strides": [2, 2], "num_res_units": 2}}


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cases(tmp_path_factory.mktemp("volumes"))


def pretrain(data: Path, output: Path, *, files: tuple[str, ...] = FILES, **overrides: Any) -> ConfigWorkflow:
    return run_bundle(files, **{**TINY, "dataset_dir": str(data), "output_dir": str(output), **overrides})


@pytest.mark.parametrize("dims", [2, 3])
def test_run_leaves_checkpoints_record_and_curves(volumes: Path, tmp_path: Path, dims: int) -> None:
    pretrain(volumes, tmp_path, spatial_dims=dims, min_epoch_length=5)
    last, best = checkpoint(tmp_path / "models/last.pt"), checkpoint(tmp_path / "models/model.pt")
    for content in (last, best):
        assert content.keys() == OBJECTS
        assert content["provenance"] == provenance(json.loads((tmp_path / "run_record.json").read_text()))
    assert last["trainer"] == {"epoch": 2, "iteration": 10, "epoch_length": 5, "max_epochs": 2}
    assert best["best"]["name"] == "contrastive_loss" and math.isfinite(best["best"]["metric"])
    settings = last["provenance"]["settings"]
    assert (settings["task"], settings["architecture"], settings["masker"]) == ("pretraining", "contrastive", None)
    assert (settings["spatial_dims"], settings["backbone"]) == (dims, "unet")
    assert settings["backbone_args"] == TINY["backbone_args"]
    assert json.loads((tmp_path / "costs.json").read_text())["steps"] == 10
    scalars = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"]
    assert {"train/loss", "validation/retrieval", "validation/alignment", "validation/contrastive_loss"} <= set(scalars)
    for files in (("inference.json",), ("train.json", "evaluate.json"), (*FILES, "evaluate.json")):
        message = segmenting.message_of(run_bundle, files, checkpoint=str(tmp_path / "models/model.pt"))
        assert f"{tmp_path}/models/model.pt: a checkpoint of contrastive pretraining" in message
        assert "--pretrained of ahm_segmentation" in message


def test_pictures(tmp_path: Path) -> None:
    data = classifying.write_pictures(tmp_path / "data")
    pretrain(data, tmp_path / "run", modality="image2d", spatial_dims=2, cases_per_batch=4, samples_per_case=1)
    best = checkpoint(tmp_path / "run/models/model.pt")
    assert best["provenance"]["data"]["training_cases"] == 8
    assert best["model"]["backbone.model.0.conv.weight"].ndim == 4


def test_resumed_run_equals_one_never_stopped(volumes: Path, tmp_path: Path) -> None:
    whole = {"lr_scheduler": "$torch.optim.lr_scheduler.ExponentialLR(@optimizer, 0.9)", "learning_rate": 0.01}
    pretrain(volumes, tmp_path / "unbroken", max_epochs=4, **whole)
    pretrain(volumes, tmp_path / "resumed", max_epochs=2, **whole)
    pretrain(volumes, tmp_path / "resumed", max_epochs=4, resume="true", **whole)
    ends = [checkpoint(tmp_path / name / "models/last.pt") for name in ("unbroken", "resumed")]
    assert_same_state(ends[0]["model"], ends[1]["model"])
    for part in ("optimizer", "lr_scheduler", "trainer", "best"):
        assert str(ends[0][part]) == str(ends[1][part])


def test_cases_prepared_on_disk_train_alike(volumes: Path, tmp_path: Path) -> None:
    pretrain(volumes, tmp_path / "memory")
    for name in ("written", "read"):
        pretrain(volumes, tmp_path / name, cache_dir=str(tmp_path / "cache"))
    memory, *others = (checkpoint(tmp_path / name / "models/last.pt") for name in ("memory", "written", "read"))
    for other in others:
        assert_same_state(memory["model"], other["model"])
        assert memory["best"] == other["best"]


def test_best_checkpoint_is_that_of_the_lowest_loss(volumes: Path, tmp_path: Path) -> None:
    run = pretrain(volumes, tmp_path, learning_rate=0.0, max_epochs=3)  # three equal losses: none is lower
    assert checkpoint(tmp_path / "models/model.pt")["best"]["epoch"] == 1
    compare = run.parser.get_parsed_content("validate#evaluator").metric_cmp_fn
    assert compare(1.0, 2.0) and not compare(2.0, 1.0)


def test_validation_is_the_same_in_every_epoch_and_run(volumes: Path, tmp_path: Path) -> None:
    runs = [pretrain(volumes, tmp_path / str(seed), seed=seed, learning_rate=0.0) for seed in (0, 7)]
    batches = [next(iter(run.parser.get_parsed_content("validate#dataloader"))) for run in runs]
    assert torch.equal(batches[0]["image"], batches[1]["image"])
    assert torch.equal(batches[0]["view"], batches[1]["view"])
    scores = EventAccumulator(str(tmp_path / "0/tensorboard")).Reload().Scalars("validation/contrastive_loss")
    assert len(scores) == 2 and scores[0].value == scores[1].value


def test_remainder_of_one_crop_is_left_out(tmp_path: Path) -> None:
    data, options = write_cases(tmp_path / "data", 6), {"val_fraction": 0.5, "samples_per_case": 1, "max_epochs": 1}
    run = pretrain(data, tmp_path / "run", cases_per_batch=2, **options)  # 3 to train
    loader = run.parser.get_parsed_content("train#dataloader")
    assert [len(batch["image"]) for batch in loader] == [2]


def test_batch_of_one_crop_is_refused(volumes: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception) as error:  # MONAI wraps each error in its own
        pretrain(volumes, tmp_path, cases_per_batch=1, samples_per_case=1)
    assert "expected the views of at least 2 crops, got 1" in error_chain(error.value)
    assert not list((tmp_path / "models").glob("*.pt"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"backbone": "resnet"}, ["backbone: expected one of unet", "'resnet'"]),
        ({"crop_size": 6}, ["crop_size: views need at least 8 voxels", "(6, 6, 6)"]),
        ({"temperature": 0.0}, ["temperature: expected a positive number", "0.0"]),
        ({"smallest_part": 0.4}, ["smallest_part", "0.4"]),
    ],
)
def test_option_that_does_not_fit(volumes: Path, tmp_path: Path, options: dict[str, Any], told: list[str]) -> None:
    with pytest.raises(Exception) as error:
        pretrain(volumes, tmp_path, **options)
    assert [part for part in told if part not in error_chain(error.value)] == []


class TestFinetuning:
    """Every weight of the encoder arrives: with a learning rate of 0, it is there after training as well."""

    def test_segmentation(self, tmp_path: Path) -> None:
        data = segmenting.write_labelled(tmp_path / "data")
        pretrain(data, tmp_path / "pretrained", max_epochs=1, **DEEPER)
        options = {"pretrained": str(tmp_path / "pretrained/models/model.pt"), "pretrained_part": "encoder", **DEEPER}
        run = segmenting.train(data, tmp_path / "run", learning_rate=0.0, **options)
        assert_encoder_arrived(run, tmp_path / "pretrained")

    def test_classification(self, tmp_path: Path) -> None:
        data = classifying.write_pictures(tmp_path / "data")
        pretrain(data, tmp_path / "pretrained", max_epochs=1, **classifying.PICTURES, **DEEPER)
        options = {"pretrained": str(tmp_path / "pretrained/models/model.pt"), "architecture_args": DEEPER}
        run = classifying.train(data, tmp_path / "run", learning_rate=0.0, **classifying.PICTURES, **options)
        assert_encoder_arrived(run, tmp_path / "pretrained")


def assert_encoder_arrived(run: ConfigWorkflow, pretrained: Path) -> None:
    source = checkpoint(pretrained / "models/model.pt")["model"]
    wanted = [value for key, value in source.items() if key.startswith("backbone.")]
    network = run.parser.get_parsed_content("network")
    found = [value for stage in encoder_stages(network) for module in stage for value in module.state_dict().values()]
    assert len(found) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def write_textures(folder: Path, count: int = 32) -> Path:
    """Write pictures of blobs, coarse ones and fine ones: what survives in every view."""
    for number in range(count):
        cells = (2, 3, 4, 6, 8, 11, 16, 24)[number % 8]
        noise = torch.rand(1, 1, cells, cells, generator=torch.Generator().manual_seed(number))
        values = torch.nn.functional.interpolate(noise, (24, 24), mode="bilinear")[0, 0]
        classifying.write_picture(folder / f"picture{number}.png", (values * 255).numpy().astype(np.uint8))
    return folder


def test_it_learns_to_tell_crops_apart(tmp_path: Path) -> None:
    options = {
        **classifying.PICTURES,
        "crop_size": 24,
        "samples_per_case": 1,
        "val_fraction": 0.5,
        "max_epochs": 2,
        "min_epoch_length": 40,
        "learning_rate": 0.003,
        "lr_scheduler": "$torch.optim.lr_scheduler.ConstantLR(@optimizer, 1.0)",
    }
    pretrain(write_textures(tmp_path / "data"), tmp_path / "run", **options)
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    retrieval, loss = (events.Scalars(f"validation/{name}")[-1].value for name in ("retrieval", "contrastive_loss"))
    assert retrieval > 4 / 31  # four times chance: 32 views of 16 crops
    assert loss < math.log(31) - 0.2
