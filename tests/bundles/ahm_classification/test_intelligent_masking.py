# SPDX-License-Identifier: Apache-2.0
"""The downstream settings of Intelligent Masking: a head on an encoder that stays as it was pretrained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow

from ahm_networks.nets import ContextUNet
from tests.bundles.ahm_classification.classifying import (
    CLASSES,
    PICTURES,
    evaluate,
    infer,
    message_of,
    options_for,
    predictions,
    train,
    write_pictures,
)
from tests.bundles.running import CLASSIFICATION, checkpoint, read_bundle, run_bundle

FILES = ("train.json", "intelligent_masking.json")
BACKBONE = {"features": [4, 8], "context_kernel": 3}
NETWORK = {"backbone": "contextunet", "backbone_args": BACKBONE, "head": "conv", "dropout": 0.3}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def pretrained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of the pretraining bundle with the same network."""
    output = tmp_path_factory.mktemp("pretrained")
    tiny = {**PICTURES, "backbone": "contextunet", "backbone_args": BACKBONE, "crop_size": 16, "patch_size": 4}
    options = {**tiny, "masker": "uniform", "max_epochs": 1, "min_epoch_length": 2}
    run_bundle("train.json", dataset_dir=str(pictures), output_dir=str(output), **options)
    return output / "models/model.pt"


@pytest.fixture(scope="module")
def trained(pictures: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a training of eight short epochs with the paper's settings."""
    output = tmp_path_factory.mktemp("trained")
    options = {"architecture_args": NETWORK, "pretrained": str(pretrained), "max_epochs": 8, "val_interval": 8}
    train(pictures, output, files=FILES, **PICTURES, **options)
    return output


def read(data: Path, output: Path, *names: str, **overrides: Any) -> ConfigWorkflow:
    """Read the configuration with the overlay's own values of these options."""
    options = options_for(data, output, **PICTURES, **overrides)
    return read_bundle(FILES, bundle=CLASSIFICATION, **{key: options[key] for key in options.keys() - set(names)})


def test_settings_are_those_of_the_paper(pictures: Path, tmp_path: Path) -> None:
    own = ("architecture_args", "image_size", "cases_per_batch", "max_epochs")
    parser = read(pictures, tmp_path, *own).parser
    network, optimizer, schedule, loader = (
        parser.get_parsed_content(name) for name in ("network", "optimizer", "lr_scheduler", "train#dataloader")
    )
    assert type(network.encoder) is ContextUNet and network.encoder.features == (16, 32, 64, 64, 128, 128)
    assert [layer.p for layer in network.head if isinstance(layer, torch.nn.Dropout)] == [0.3]
    assert type(optimizer) is torch.optim.Adam
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(1e-3, 0.1)]
    assert (dict(schedule.milestones), schedule.gamma) == ({150: 1, 175: 1}, 0.33)
    assert (parser.get_parsed_content("max_epochs"), loader.batch_size) == (200, 16)
    images = [loader.dataset[0]["image"] for _ in range(5)]
    assert images[0].shape == (1, 300, 300) and all(torch.equal(image, images[0]) for image in images)


def test_weights_follow_the_classes_and_not_their_frequency(tmp_path: Path) -> None:
    write_pictures(tmp_path / "data", 3, CLASSES[:1])
    write_pictures(tmp_path / "data/more", 9, CLASSES[1:])
    split = {"test_fraction": 0.0, "val_fraction": 0.34}
    assert read(tmp_path / "data", tmp_path, **split).parser.get_parsed_content("loss").weight.tolist() == [7.5, 2.5]
    without = read(tmp_path / "data", tmp_path, **split, class_weights="false")
    assert without.parser.get_parsed_content("loss").weight is None


def test_encoder_stays_with_the_statistics_of_its_batch_norms(pretrained: Path, trained: Path) -> None:
    source, model = checkpoint(pretrained)["model"], checkpoint(trained / "models/last.pt")["model"]
    encoder = {key: value for key, value in model.items() if key.startswith("encoder.")}
    assert any(key.endswith("running_mean") for key in encoder)
    assert any(key.endswith("num_batches_tracked") for key in encoder)
    for key, value in encoder.items():
        assert torch.equal(value, source[key.replace("encoder.", "backbone.", 1)]), key


def test_head_learns(pictures: Path, pretrained: Path, trained: Path, tmp_path: Path) -> None:
    options = {"architecture_args": NETWORK, "pretrained": str(pretrained), "learning_rate": 0.0}
    train(pictures, tmp_path, files=FILES, **PICTURES, **options)
    start, end = (checkpoint(folder / "models/last.pt")["model"] for folder in (tmp_path, trained))
    assert {key.split(".")[0] for key in end if not torch.equal(start[key], end[key])} == {"head"}


def test_learning_rate_falls_at_three_and_seven_eighths(pictures: Path, pretrained: Path, tmp_path: Path) -> None:
    workflow = read(pictures, tmp_path, architecture_args=NETWORK, pretrained=str(pretrained), max_epochs=8)
    schedule, trainer = (workflow.parser.get_parsed_content(name) for name in ("lr_scheduler", "train#trainer"))
    rates: list[float] = []
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda: rates.append(schedule.get_last_lr()[0]))
    workflow.run()
    assert rates == pytest.approx([1e-3] * 6 + [3.3e-4] + [1.089e-4])


def test_evaluation_and_inference_read_the_checkpoint(pictures: Path, trained: Path, tmp_path: Path) -> None:
    assert evaluate(pictures, trained)["cases"] == 2
    infer(pictures, tmp_path, trained / "models/model.pt")
    assert len(predictions(tmp_path)) == 10


def test_without_a_pretrained_network_it_does_not_start(pictures: Path, tmp_path: Path) -> None:
    """A frozen encoder of random weights would train without a word."""
    bundle = tmp_path / "bundles/ahm_classification"
    options = {**PICTURES, "architecture_args": NETWORK, "bundle_root": str(bundle)}
    message = message_of(train, pictures, tmp_path, files=FILES, **options)
    assert "ahm_pretrain/runs/pretrain/models/model.pt: no such file" in message
