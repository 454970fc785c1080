# SPDX-License-Identifier: Apache-2.0
"""Intelligent Masking's settings: one region of four cells, two Adams whose rates fall at both thirds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow

from ahm_networks.nets import ContextUNet
from tests.bundles.running import CONFIGS, assert_same_state, checkpoint, infer, read_bundle, run_bundle, write_cases

FILES = ("train.json", "intelligent_masking.json")
NETWORK = {"backbone_args": {"features": [4, 8], "context_kernel": 3}}
TINY: dict[str, Any] = {**NETWORK, "crop_size": 18, "max_epochs": 3, "min_epoch_length": 3, "val_interval": 3}

pytestmark = pytest.mark.skipif(
    "q_region" not in json.loads((CONFIGS / "train.json").read_text())["maskers"],
    reason="the shelf of train.json has no q_region",
)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cases(tmp_path_factory.mktemp("volumes"))


def read(data: Path, output: Path, **overrides: Any) -> ConfigWorkflow:
    return read_bundle(FILES, dataset_dir=str(data), output_dir=str(output), **overrides)


def train(data: Path, output: Path, **overrides: Any) -> dict[str, Any]:
    run_bundle(FILES, **{**TINY, "dataset_dir": str(data), "output_dir": str(output), **overrides})
    return checkpoint(output / "models/last.pt")


def test_settings_are_those_of_the_paper(volumes: Path, tmp_path: Path) -> None:
    parser = read(volumes, tmp_path, max_epochs=300).parser
    network, optimizer, masker_optimizer, masker, loader = (
        parser.get_parsed_content(name)
        for name in ("network", "optimizer", "masker_optimizer", "curriculum", "train#dataloader")
    )
    assert type(network.backbone) is ContextUNet and network.backbone.features == (16, 32, 64, 64, 128, 128)
    assert network.fill == "mean"
    for each in (optimizer, masker_optimizer):
        assert type(each) is torch.optim.Adam and [group["lr"] for group in each.param_groups] == [1e-3]
    assert masker.masker.patch_size == (34, 34) and loader.batch_size == 16
    length = parser.get_parsed_content("train#epoch_length")
    assert parser.get_parsed_content("thirds") == [100 * length, 200 * length]
    assert parser.get_parsed_content("max_epochs") == 300


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.5, 1.0])
def test_one_region_of_four_cells_is_hidden(volumes: Path, tmp_path: Path, progress: float) -> None:
    """At random in the first fifth of the training, chosen afterwards: another one in neither."""
    masker = read(volumes, tmp_path).parser.get_parsed_content("curriculum").cpu()
    image = torch.rand(2, 1, 300, 300)
    masker.set_progress(progress)
    for mode in (True, False):
        cells = masker.train(mode)(image).cells
        assert cells.shape == (2, 1, 9, 9)
        for own in cells[:, 0]:
            rows, columns = own.any(1).nonzero().flatten(), own.any(0).nonzero().flatten()
            assert int(own.sum()) == 4 and rows.diff().tolist() == columns.diff().tolist() == [1]


def test_the_first_fifth_is_random_and_the_rest_greedy(volumes: Path, tmp_path: Path) -> None:
    masker = read(volumes, tmp_path).parser.get_parsed_content("curriculum").cpu().train()
    image = torch.rand(4, 1, 300, 300)
    for progress, repeats in ((0.19, False), (0.21, True)):
        masker.set_progress(progress)
        assert torch.equal(masker(image).cells, masker(image).cells) == repeats


def test_both_rates_fall_at_both_thirds(volumes: Path, tmp_path: Path) -> None:
    workflow = read(volumes, tmp_path, **TINY)
    both = [workflow.parser.get_parsed_content(name) for name in ("optimizer", "masker_optimizer")]
    rates: list[list[float]] = []
    trainer = workflow.parser.get_parsed_content("train#trainer")

    def remember() -> None:
        rates.append([each.param_groups[0]["lr"] for each in both])

    trainer.add_event_handler(Events.ITERATION_STARTED, remember)
    workflow.run()
    expected = [rate for rate in (1e-3, 3.3e-4, 1.089e-4) for _ in range(3)]
    assert rates == [pytest.approx([rate] * 2) for rate in expected]


def test_resumed_training_goes_on_with_both_rates(volumes: Path, tmp_path: Path) -> None:
    """The thirds are those of all epochs, so that the training is broken off by hand."""
    unbroken = train(volumes, tmp_path / "unbroken")
    workflow = read(volumes, tmp_path / "broken", **TINY)
    trainer = workflow.parser.get_parsed_content("train#trainer")
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=2), trainer.terminate)
    workflow.run()
    broken = train(volumes, tmp_path / "broken", resume="true")
    for name in ("lr_scheduler", "masker_lr_scheduler"):
        assert broken[name] == unbroken[name] and broken[name]["_last_lr"] == pytest.approx([1.089e-4])
    assert_same_state(broken["model"], unbroken["model"])
    assert_same_state(broken["masker"], unbroken["masker"])


@pytest.mark.parametrize("masker", ["uniform", "teacher_error"])
def test_masks_that_nobody_learns_are_a_control(volumes: Path, tmp_path: Path, masker: str) -> None:
    content = train(volumes, tmp_path, masker=masker)
    assert content["lr_scheduler"]["_last_lr"] == pytest.approx([1.089e-4])
    assert "masker_lr_scheduler" not in content and "masker_optimizer" not in content


def test_network_and_masker_learn_and_inference_runs(volumes: Path, tmp_path: Path) -> None:
    still = train(volumes, tmp_path / "still", learning_rate=0.0, masker_learning_rate=0.0)
    moved = train(volumes, tmp_path / "moved")
    for name in ("model", "masker"):
        assert any(
            key.endswith("weight") and not torch.equal(still[name][key], moved[name][key]) for key in moved[name]
        )
    options = {**NETWORK, "crop_size": 18}
    workflow = infer(volumes, tmp_path / "inferred", tmp_path / "moved/models/model.pt", **options)
    assert workflow.parser.get_parsed_content("network_def").fill == "mean"
    assert list((tmp_path / "inferred").rglob("*reconstruction*"))
