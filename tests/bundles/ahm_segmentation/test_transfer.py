# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint of ahm_pretrain into the network that segments."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from tests.bundles.ahm_segmentation.segmenting import TINY, message_of, train, write_labelled
from tests.bundles.running import assert_same_state, checkpoint
from tests.bundles.running import train as pretrain

HEAD = "model.2."  # of the tiny UNet: its topmost decoder block, whose outputs are classes instead of intensities


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("volumes"))


@pytest.fixture(scope="module")
def pretrained(volumes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("pretrained")
    pretrain(volumes, output, max_epochs=1, learning_rate=0.01)
    return output / "models/model.pt"


def start(volumes: Path, output: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Return the weights with which a training starts: those it ends with where nothing is learned."""
    train(volumes, output, learning_rate=0.0, **options)
    state: dict[str, torch.Tensor] = checkpoint(output / "models/last.pt")["model"]
    return state


def pretrained_state(path: Path) -> dict[str, torch.Tensor]:
    """Return the network's weights of a pretraining, by the keys of the plain network."""
    state = checkpoint(path)["model"]
    return {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}


def test_all_that_fits_arrives_and_the_rest_starts_anew(
    volumes: Path, pretrained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    scratch = start(volumes, tmp_path / "scratch")
    assert "No pretrained weights: training from scratch" in caplog.text
    tuned = start(volumes, tmp_path / "tuned", pretrained=str(pretrained))
    source = pretrained_state(pretrained)
    for key, value in tuned.items():
        if source[key].shape == value.shape:
            assert torch.equal(value, source[key]), key
        else:
            assert key.startswith(HEAD) and torch.equal(value, scratch[key]), key
    assert not any(
        torch.equal(tuned[key], scratch[key]) for key in ("model.0.conv.weight", "model.1.submodule.conv.weight")
    )
    assert f"Weights of {pretrained}" in caplog.text
    for row in ("matched", "of other shape", "missing", "unused", "of its numbers filled"):
        assert row in caplog.text


def test_encoder_alone_can_be_asked_for(volumes: Path, pretrained: Path, tmp_path: Path) -> None:
    options = {"backbone_args": {"channels": [4, 8, 8], "strides": [2, 2], "num_res_units": 0}}
    pretrain(volumes, tmp_path / "pretrained", max_epochs=1, **options)
    path = tmp_path / "pretrained/models/model.pt"
    runs = {
        part: start(volumes, tmp_path / part, pretrained=str(path), pretrained_part=part, **options)
        for part in ("encoder", "all")
    }
    source, inner = pretrained_state(path), "model.1.submodule.2.conv.weight"  # of the decoder
    assert torch.equal(runs["all"][inner], source[inner]) and not torch.equal(runs["encoder"][inner], source[inner])
    assert torch.equal(runs["encoder"]["model.0.conv.weight"], source["model.0.conv.weight"])


def test_two_channels_from_one(tmp_path: Path, pretrained: Path) -> None:
    """The kernel that reads one channel is shared out, so that twice the same image gives the same features."""
    data = write_labelled(tmp_path / "data", 4)
    for path in data.glob("*.nii.gz"):
        image = nib.load(path)
        values = np.asarray(image.dataobj)
        nib.save(nib.Nifti1Image(np.stack([values, values], -1), image.affine), path)
    tuned = start(data, tmp_path / "run", pretrained=str(pretrained), in_channels=2)
    first, source = tuned["model.0.conv.weight"], pretrained_state(pretrained)["model.0.conv.weight"]
    assert first.shape[1] == 2
    torch.testing.assert_close(first.sum(1, keepdim=True), source)


def test_resumed_run_keeps_its_own_weights(volumes: Path, pretrained: Path, tmp_path: Path) -> None:
    gone = tmp_path / "pretrained.pt"
    shutil.copy(pretrained, gone)
    options = {"pretrained": str(gone), "learning_rate": 0.01}
    train(volumes, tmp_path, **options)
    gone.unlink()
    before = checkpoint(tmp_path / "models/last.pt")["model"]
    resumed = train(volumes, tmp_path, **options, resume=True)  # its only epoch is done already
    assert_same_state(before, resumed.parser.get_parsed_content("network").state_dict())


def test_missing_file_of_weights(volumes: Path, tmp_path: Path) -> None:
    message = message_of(train, volumes, tmp_path / "run", pretrained=str(tmp_path / "nowhere.pt"))
    assert "nowhere.pt: no such file of weights" in message
    assert not list((tmp_path / "run/models").glob("*.pt"))


def test_weights_of_which_nothing_fits(volumes: Path, pretrained: Path, tmp_path: Path) -> None:
    other = {**TINY, "backbone": "segresnet", "backbone_args": {"init_filters": 8, "blocks_down": [1], "blocks_up": []}}
    message = message_of(train, volumes, tmp_path / "run", **{**other, "pretrained": str(pretrained)})
    for part in (f"{pretrained}: weights: nothing fits the network's part 'all'", "model.0.conv.weight"):
        assert part in message
    assert not list((tmp_path / "run/models").glob("*.pt"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"pretrained_part": "half"}, ["part: expected one of encoder, all", "half"]),
        ({"freeze_epochs": -2}, ["epochs: expected -1", "-2"]),
        ({"layer_decay": 1.5}, ["decay: expected a factor in (0, 1]", "1.5"]),
    ],
)
def test_option_of_the_transfer_that_does_not_fit(
    volumes: Path, pretrained: Path, tmp_path: Path, options: dict[str, Any], told: list[str]
) -> None:
    message = message_of(train, volumes, tmp_path, pretrained=str(pretrained), **options)
    assert [part for part in told if part not in message] == []
