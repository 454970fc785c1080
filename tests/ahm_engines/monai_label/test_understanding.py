# SPDX-License-Identifier: Apache-2.0
"""The scan to label next is the one that the pretrained network rebuilds worst; no server is needed to know it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from ahm_engines.monai_label import LeastUnderstood, ReconstructionError, ReconstructionScoring
from tests.bundles.running import PRETRAIN, train
from tests.fixtures_data import write_nifti

SHAPE = (20, 24, 18)


def write_smooth(path: Path, phase: float) -> None:
    """Write what the network is trained on: a slow wave."""
    axes = np.meshgrid(*(np.linspace(0, 3, size) for size in SHAPE), indexing="ij")
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image((500 + 400 * np.sin(sum(axes) + phase)).astype(np.int16), np.eye(4)), path)


class Datastore:
    """The few things that MONAI Label's datastore does for a scoring method and a strategy."""

    def __init__(self, folder: Path) -> None:
        self.paths = {path.name.removesuffix(".nii.gz"): path for path in sorted(folder.glob("*.nii.gz"))}
        self.infos: dict[str, dict[str, Any]] = {image: {} for image in self.paths}
        self.labelled: set[str] = set()

    def get_unlabeled_images(self, label_tag: str | None = None, labels: Any = None) -> list[str]:
        return [image for image in self.paths if image not in self.labelled]

    def get_image_info(self, image: str) -> dict[str, Any]:
        return dict(self.infos[image])

    def get_image_uri(self, image: str) -> str:
        return str(self.paths[image])

    def update_image_info(self, image: str, info: dict[str, Any]) -> None:
        self.infos[image].update(info)


def ask(datastore: Datastore, at: int) -> dict[str, Any]:
    """Ask for the next scan, and note that it was handed out, as the server does."""
    answer = LeastUnderstood()({"strategy": "least_understood"}, datastore)
    assert answer is not None
    datastore.update_image_info(answer["id"], {"strategy": {"least_understood": {"ts": at}}})
    return answer


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pretraining bundle with a network that has learned slow waves."""
    folder = tmp_path_factory.mktemp("pretrained")
    for number in range(4):
        write_smooth(folder / f"data/{number}.nii.gz", number / 2)
    learning = {"masker": "uniform", "mask_ratio": 0.3, "learning_rate": 0.02, "max_epochs": 3, "min_epoch_length": 20}
    train(folder / "data", folder / "run", **learning, val_interval=3)
    shutil.copytree(PRETRAIN / "configs", folder / "bundle/configs")
    shutil.copytree(folder / "run/models", folder / "bundle/runs/pretrain/models")
    return folder / "bundle"


@pytest.fixture
def scans(tmp_path: Path) -> Datastore:
    write_smooth(tmp_path / "a_smooth.nii.gz", 0.3)
    write_nifti(tmp_path / "b_noise.nii.gz", SHAPE)
    write_smooth(tmp_path / "c_smooth.nii.gz", 1.2)
    return Datastore(tmp_path)


def test_what_is_rebuilt_badly_comes_first(bundle: Path, scans: Datastore) -> None:
    assert ReconstructionScoring(bundle)({}, scans) == {"unlabelled": 3, "scored": 3, "failed": 0}
    errors = {image: info["reconstruction_error"] for image, info in scans.infos.items()}
    assert errors["b_noise"] > 1.2 * max(errors["a_smooth"], errors["c_smooth"])
    first, second, third, again = (ask(scans, at) for at in (1, 2, 3, 4))
    assert first == {"id": "b_noise", "reconstruction_error": errors["b_noise"]}
    assert sorted([second["id"], third["id"]]) == ["a_smooth", "c_smooth"]
    assert second["reconstruction_error"] > third["reconstruction_error"]
    assert again["id"] == "b_noise"
    scans.labelled = {"b_noise"}
    assert ask(scans, 5)["id"] == second["id"]
    scans.labelled = set(scans.paths)
    assert LeastUnderstood()({"strategy": "least_understood"}, scans) is None


def test_the_error_is_that_of_hidden_voxels(bundle: Path, scans: Datastore) -> None:
    """Of the network's own output there, and not of what it saw."""
    error = ReconstructionError(bundle, draws=1)
    path = scans.get_image_uri("a_smooth")
    scan = error.preprocessing({"image": path})["image"].as_tensor()[None]
    error.network.masker.set_random_state(0)
    with torch.no_grad():
        _, mask, rebuilt = error.inferer(scan, error.network)
    hidden = mask.bool()
    assert 0.1 < hidden.float().mean() < 0.9
    assert error(path) == pytest.approx(float((rebuilt - scan).abs()[hidden].mean()), rel=1e-5)


def test_every_scan_gets_the_same_masks_again(bundle: Path, scans: Datastore) -> None:
    error, path = ReconstructionError(bundle, draws=2), scans.get_image_uri("b_noise")
    both = error(path)
    assert error(path) == both == ReconstructionError(bundle, draws=2)(path)
    assert ReconstructionError(bundle, draws=1)(path) != both


def test_scores_stay_until_the_checkpoint_is_another(bundle: Path, scans: Datastore) -> None:
    scoring = ReconstructionScoring(bundle)
    scoring({"draws": 1}, scans)
    assert scoring({}, scans) == {"unlabelled": 3, "scored": 0, "failed": 0}
    path = bundle / "runs/pretrain/models/model.pt"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert scoring({"draws": 1}, scans)["scored"] == 3


def test_a_damaged_scan_comes_last(bundle: Path, scans: Datastore, caplog: pytest.LogCaptureFixture) -> None:
    scans.paths["a_smooth"].write_text("no image")
    assert ReconstructionScoring(bundle)({}, scans) == {"unlabelled": 3, "scored": 2, "failed": 1}
    assert "a_smooth has no score" in caplog.text
    assert [ask(scans, at)["id"] for at in (1, 2, 3)] == ["b_noise", "c_smooth", "a_smooth"]
    assert "No scan left that has a score" in caplog.text


def test_without_scores_there_is_a_scan_still(scans: Datastore) -> None:
    assert ask(scans, 1) == {"id": "a_smooth", "reconstruction_error": None}


def test_what_is_missing_is_said(scans: Datastore, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such checkpoint: pretrain first"):
        ReconstructionScoring(tmp_path)({}, scans)
    with pytest.raises(ValueError, match="draws: expected at least one mask, got 0"):
        ReconstructionError(PRETRAIN, draws=0)
