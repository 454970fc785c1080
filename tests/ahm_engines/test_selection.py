# SPDX-License-Identifier: Apache-2.0
"""Scans to label first: those that stand for the others."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from ahm_engines.cli import app
from ahm_engines.selection import ScanFeatures, choose_patients, most_typical, typical_patients
from tests.bundles.running import train

GROUPS = torch.tensor([[0.0, 0], [0.1, 0], [-0.1, 0], [0, 0.1], [0, -0.1], [4, 4], [4.1, 4], [3.9, 4], [-3, 9]])


def cost(features: torch.Tensor, chosen: list[int]) -> float:
    standard = (features - features.mean(0)) / features.std(0, unbiased=False)
    return float(torch.cdist(standard, standard[chosen]).min(1).values.sum())


def test_the_first_is_the_medoid_and_the_next_stand_for_the_other_groups() -> None:
    assert most_typical(GROUPS, 3) == [3, 5, 8]  # of the largest group the one on the side of the others
    assert most_typical(GROUPS, 1) == [3]
    assert sorted(most_typical(GROUPS, len(GROUPS))) == list(range(len(GROUPS)))


def test_each_choice_is_the_best_next_one() -> None:
    features = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    chosen = most_typical(features, 6)
    for place, row in enumerate(chosen):
        others = {other: cost(features, [*chosen[:place], other]) for other in range(30) if other not in chosen[:place]}
        assert others[row] == pytest.approx(min(others.values()))


def test_what_has_labels_is_stood_for_already() -> None:
    assert most_typical(GROUPS, 2, labelled=[1]) == [5, 8]
    assert most_typical(GROUPS, 1, labelled=[5, 8]) == [0]
    assert not {5, 8} & set(most_typical(GROUPS, 7, labelled=[5, 8]))


def test_features_of_all_scales_count_alike() -> None:
    features = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    scaled = features * torch.tensor([1.0, 1e4, 1e-3, 7]) + torch.tensor([0.0, 5, -3, 2])
    constant = torch.cat([scaled, torch.full((20, 1), 3.0)], 1)
    assert most_typical(constant, 5) == most_typical(features, 5)


@pytest.mark.parametrize(("count", "labelled", "left"), [(0, [], 9), (10, [], 9), (8, [0, 1], 7)])
def test_more_than_there_are_cannot_be_chosen(count: int, labelled: list[int], left: int) -> None:
    with pytest.raises(ValueError, match=f"count: expected 1 to {left}, as many have no label, got {count}"):
        most_typical(GROUPS, count, labelled=labelled)


def test_features_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="features: expected finite numbers"):
        most_typical(torch.tensor([[0.0], [torch.nan]]), 1)


def write_wave(path: Path, length: float, shape: tuple[int, ...], seed: int) -> None:
    """A pattern of one wavelength, and a little noise."""
    axes = np.meshgrid(*(np.arange(size) for size in shape), indexing="ij")
    noise = np.random.default_rng(seed).normal(size=shape)
    values = 500 + 300 * np.sin(sum(axes) * 2 * np.pi / length) + 5 * noise
    nib.save(nib.Nifti1Image(values.astype(np.int16), np.eye(4)), path)


@pytest.fixture(scope="module")
def waves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five volumes of short waves, three of long ones."""
    folder = tmp_path_factory.mktemp("waves")
    for number, length in enumerate([4] * 5 + [16] * 3):
        write_wave(folder / f"{number}.nii.gz", length, (24, 32, 16), number)
    return folder


@pytest.mark.parametrize("dims", [2, 3])
def test_scans_that_look_alike_are_near_whichever_way_they_are_read(waves: Path, tmp_path: Path, dims: int) -> None:
    options = {"masker": "uniform", "max_epochs": 1, "spatial_dims": dims}
    train(waves, tmp_path, **options)
    features = ScanFeatures(tmp_path / "models/model.pt")
    rows = torch.stack([features(path) for path in sorted(waves.glob("*.nii.gz"))])
    standard = (rows - rows.mean(0)) / rows.std(0).clamp_min(1e-6)
    distances = torch.cdist(standard, standard)
    assert rows.isfinite().all() and torch.equal(rows[0], features(str(waves / "0.nii.gz")))
    assert distances[:5, :5].max() < distances[:5, 5:].min()
    first, second = most_typical(rows, 2)
    assert first < 5 <= second


def test_pictures_and_transformers_of_one_size(tmp_path: Path) -> None:
    """Images larger than the crops are cut into windows, smaller ones are padded."""
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for number, shape in enumerate([(40, 70), (32, 32), (20, 50), (64, 64)]):
        Image.fromarray(rng.integers(0, 255, shape, np.uint8)).save(images / f"{number}.png")
    unetr = {"hidden_size": 12, "mlp_dim": 24, "num_heads": 2, "feature_size": 4}
    options = {"masker": "uniform", "max_epochs": 1, "spatial_dims": 2, "modality": "image2d", "crop_size": 32}
    train(images, tmp_path / "run", **options, patch_size=16, backbone="unetr", backbone_args=unetr)
    features = ScanFeatures(tmp_path / "run/models/model.pt")
    rows = [features(path) for path in sorted(images.glob("*.png"))]
    assert len({len(row) for row in rows}) == 1 and torch.stack(rows).isfinite().all()


def test_a_patient_counts_as_the_mean_of_its_scans() -> None:
    vectors = {"a1": 0.0, "a2": 10.0, "b": 5.1, "c": 5.2, "d": 0.1, "e": 9.0}
    images = {"a": ["a1", "a2"], "b": ["b"], "c": ["c"], "d": ["d"], "e": ["e"]}
    chosen = typical_patients(images, 3, lambda scan: torch.tensor([vectors[str(scan)]]))
    assert chosen == ["b", "d", "e"]
    left = typical_patients(images, 1, lambda scan: torch.tensor([vectors[str(scan)]]), labelled={"c", "d"})
    assert left == ["e"]


@pytest.fixture(scope="module")
def pretrained(waves: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    train(waves, folder, masker="uniform", max_epochs=1)
    return folder / "models/model.pt"


def test_the_command_lists_whom_to_label(waves: Path, pretrained: Path, tmp_path: Path) -> None:
    words = ["choose", str(pretrained), "--dataset_dir", str(waves), "--count", "2"]
    ran = CliRunner().invoke(app, [*words, "--output", str(tmp_path / "list.csv")])
    assert ran.exit_code == 0, ran.output
    chosen = choose_patients(pretrained, waves, 2)
    lines = [f"{turn}. {patient}: {scans[0]}" for turn, (patient, scans) in enumerate(chosen.items(), 1)]
    assert ran.output.splitlines()[-2:] == lines
    with open(tmp_path / "list.csv", newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [(row["turn"], row["patient_id"], row["image"]) for row in rows] == [
        (str(turn), patient, scans[0]) for turn, (patient, scans) in enumerate(chosen.items(), 1)
    ]
    short, long = (int(patient) for patient in chosen)
    assert short < 5 <= long


def test_whoever_has_labels_is_not_chosen(waves: Path, pretrained: Path, tmp_path: Path) -> None:
    first, second = choose_patients(pretrained, waves, 2)
    shutil.copy(waves / f"{first}.nii.gz", tmp_path / f"{first}.nii.gz")
    assert [*choose_patients(pretrained, waves, 1, labels_dir=tmp_path)] == [second]
    with pytest.raises(ValueError, match="count: expected 1 to 7, as many have no label, got 8"):
        choose_patients(pretrained, waves, 8, labels_dir=tmp_path)


def test_the_command_says_what_is_wrong(waves: Path, pretrained: Path, tmp_path: Path) -> None:
    ran = CliRunner().invoke(app, ["choose", str(tmp_path / "none.pt"), "--dataset_dir", str(waves)])
    assert ran.exit_code == 1 and "FileNotFoundError" in ran.output and "none.pt" in ran.output
    ran = CliRunner().invoke(app, ["choose", str(pretrained), "--dataset_dir", str(waves), "--count", "9"])
    assert ran.exit_code == 1 and "count: expected 1 to 8, as many have no label, got 9" in ran.output


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        ScanFeatures(tmp_path / "none.pt")
    torch.save({"model": {"weight": torch.zeros(1)}}, tmp_path / "plain.pt")
    with pytest.raises(ValueError, match=r"plain\.pt: expected one of the bundle ahm_pretrain, got no settings"):
        ScanFeatures(tmp_path / "plain.pt")
