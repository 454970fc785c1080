# SPDX-License-Identifier: Apache-2.0
"""Inference and evaluation with a checkpoint of the training config."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import ITKReader
from monai.transforms import LoadImage
from PIL import Image

from ahm_transforms.recipes import deterministic
from tests.bundles.running import OBLIQUE_LIA, SHELF, TINY, checkpoint, infer, run_bundle, train, write_cases
from tests.fixtures_data import OBLIQUE, PATIENT_ID, PATIENT_NAME, write_nifti, write_series

RESULTS = ("policy", "mask", "reconstruction")
Trained = Callable[..., Path]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Function that trains once for each set of options and returns the output folder."""
    done: dict[str, Path] = {}
    data = write_cases(tmp_path_factory.mktemp("data"))

    def get(**options: object) -> Path:
        key = repr(sorted(options.items()))
        if key not in done:
            done[key] = tmp_path_factory.mktemp("trained")
            train(data, done[key], max_epochs=1, min_epoch_length=1, **options)
        return done[key]

    return get


def results(folder: Path, case: str) -> dict[str, nib.Nifti1Image]:
    return {name: nib.load(folder / case / f"{case}_{name}.nii.gz") for name in RESULTS}


def check_mask(image: nib.Nifti1Image) -> np.ndarray:
    assert image.get_data_dtype() == np.uint8
    mask = np.asarray(image.dataobj)
    assert set(np.unique(mask)) == {0, 1}
    return mask


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("affine", [np.diag([1.0, 1.0, 3.0, 1.0]), OBLIQUE_LIA], ids=["anisotropic", "oblique"])
def test_results_lie_on_the_grid_of_the_scan(trained: Trained, tmp_path: Path, affine: np.ndarray, dims: int) -> None:
    write_nifti(tmp_path / "data/scan.nii.gz", (20, 26, 19), affine)
    model = trained(spatial_dims=dims) / "models/model.pt"
    infer(tmp_path / "data", tmp_path / "out", model, spatial_dims=dims)

    for image in results(tmp_path / "out", "scan").values():
        assert image.shape == (20, 26, 19)
        np.testing.assert_allclose(image.affine, affine, atol=1e-4)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("affine", [np.eye(4), OBLIQUE_LIA], ids=["ras", "oblique"])
def test_visible_voxels_stay_and_hidden_ones_are_rebuilt(
    trained: Trained, tmp_path: Path, affine: np.ndarray, dims: int
) -> None:
    write_nifti(tmp_path / "data/scan.nii.gz", (20, 26, 19), affine)
    infer(tmp_path / "data", tmp_path / "out", trained(spatial_dims=dims) / "models/model.pt", spatial_dims=dims)

    made = {name: nib.as_closest_canonical(image) for name, image in results(tmp_path / "out", "scan").items()}
    image = deterministic("mr", spatial_dims=dims)({"image": str(tmp_path / "data/scan.nii.gz")})["image"][0].numpy()
    hidden = np.asarray(made["mask"].dataobj) == 1
    rebuilt = made["reconstruction"].get_fdata()
    np.testing.assert_allclose(rebuilt[~hidden], image[~hidden], atol=1e-6)
    assert np.abs(rebuilt[hidden] - image[hidden]).mean() > 0.01
    assert hidden.mean() == pytest.approx(0.6, abs=0.08)


@pytest.mark.parametrize("affine", [np.diag([1.0, 1.0, 3.0, 1.0]), OBLIQUE_LIA], ids=["anisotropic", "oblique"])
def test_resampled_scan_comes_back_on_its_own_grid(trained: Trained, tmp_path: Path, affine: np.ndarray) -> None:
    values = write_nifti(tmp_path / "data/scan.nii.gz", (20, 26, 19), affine)
    infer(tmp_path / "data", tmp_path / "out", trained() / "models/model.pt", spacing_mm=1.4)

    made = results(tmp_path / "out", "scan")
    for image in made.values():
        assert image.shape == values.shape
        np.testing.assert_allclose(image.affine, affine, atol=1e-4)
    check_mask(made["mask"])


def test_resampling_does_not_move_the_image(trained: Trained, tmp_path: Path) -> None:
    x, y, z = np.meshgrid(np.arange(20), np.arange(26), np.arange(19), indexing="ij")
    blob = np.exp(-((x - 5) ** 2 + (y - 17) ** 2 + (z - 6) ** 2) / 60)
    (tmp_path / "data").mkdir()
    nib.save(nib.Nifti1Image(blob.astype(np.float32), OBLIQUE_LIA), tmp_path / "data/scan.nii.gz")
    infer(tmp_path / "data", tmp_path / "out", trained() / "models/model.pt", spacing_mm=1.2, mask_ratio=0.05)

    made = results(tmp_path / "out", "scan")
    hidden = torch.from_numpy(np.asarray(made["mask"].dataobj, dtype=np.float32))
    # interpolation mixes what lies on both sides of a mask's edge
    far = torch.nn.functional.max_pool3d(hidden[None], 3, stride=1, padding=1)[0].numpy() == 0
    truth = np.clip(blob / np.percentile(blob, 99), 0, 1)
    assert far.mean() > 0.7
    assert np.corrcoef(made["reconstruction"].get_fdata()[far], truth[far])[0, 1] > 0.995


def test_results_of_a_series_lie_where_monai_reads_it(trained: Trained, tmp_path: Path) -> None:
    write_series(tmp_path / "data" / PATIENT_ID, slices=18, size=(20, 24), orientation=OBLIQUE)
    infer(tmp_path / "data", tmp_path / "out", trained() / "models/model.pt", spacing_mm=1.5)

    truth = LoadImage(reader=ITKReader())(tmp_path / "data" / PATIENT_ID)
    (folder,) = (tmp_path / "out").iterdir()
    for image in results(tmp_path / "out", folder.name).values():
        assert image.shape == tuple(truth.shape)
        np.testing.assert_allclose(image.affine, truth.affine.numpy(), atol=1e-3)
    for path in folder.iterdir():
        assert path.name.startswith("series-")
        assert not any(secret in path.name for secret in (PATIENT_ID, PATIENT_NAME))


@pytest.mark.parametrize("masker", SHELF)
def test_every_masker_shows_what_it_hides(trained: Trained, tmp_path: Path, masker: str) -> None:
    write_nifti(tmp_path / "data/ward_7/scan.nii.gz", (20, 24, 18))
    chosen = f"%maskers::{masker}"
    infer(tmp_path / "data", tmp_path / "out", trained(masker=chosen) / "models/model.pt", masker=chosen)

    assert sorted(path.name for path in (tmp_path / "out/ward_7_scan").iterdir()) == [
        "ward_7_scan_mask.nii.gz",
        "ward_7_scan_panel.png",
        "ward_7_scan_policy.nii.gz",
        "ward_7_scan_reconstruction.nii.gz",
    ]
    made = results(tmp_path / "out", "ward_7_scan")
    check_mask(made["mask"])
    policy = made["policy"].get_fdata()
    assert 0 <= policy.min() < policy.max() <= 1


def test_dots_in_names(trained: Trained, tmp_path: Path) -> None:
    for name, depth in (("scan_1.0T", 18), ("scan_1.5T", 19)):
        write_nifti(tmp_path / f"data/{name}.nii.gz", (20, 24, depth))
    infer(tmp_path / "data", tmp_path / "out", trained() / "models/model.pt")
    for name, depth in (("scan_1.0T", 18), ("scan_1.5T", 19)):
        assert {image.shape for image in results(tmp_path / "out", name).values()} == {(20, 24, depth)}
        assert (tmp_path / f"out/{name}/{name}_panel.png").is_file()


def test_scan_smaller_than_the_window(trained: Trained, tmp_path: Path) -> None:
    write_nifti(tmp_path / "data/scan.nii.gz", (9, 11, 7))
    infer(tmp_path / "data", tmp_path / "out", trained() / "models/model.pt")
    assert results(tmp_path / "out", "scan")["mask"].shape == (9, 11, 7)


def test_channels_are_kept_apart(trained: Trained, tmp_path: Path) -> None:
    volume = np.random.default_rng(0).random((20, 24, 18, 2), dtype=np.float32)
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        nib.save(nib.Nifti1Image(volume, OBLIQUE_LIA), tmp_path / f"data/{name}.nii.gz")
    train(tmp_path / "data", tmp_path / "run", in_channels=2, max_epochs=1)
    infer(tmp_path / "data", tmp_path / "out", tmp_path / "run/models/model.pt", in_channels=2)
    made = results(tmp_path / "out", "a")
    assert made["reconstruction"].shape == volume.shape
    assert made["mask"].shape == made["policy"].shape == volume.shape[:3]


def test_settings_of_the_training_need_not_be_repeated(tmp_path: Path) -> None:
    data = write_cases(tmp_path / "data", 2)
    train(data, tmp_path / "run", masker="uniform", mask_ratio=0.25, spacing_mm=1.5, normalise_targets=True)
    given = {"dataset_dir": str(data), "checkpoint": str(tmp_path / "run/models/model.pt")}
    run_bundle("inference.json", "infer", **given, output_dir=str(tmp_path / "out"))
    mask = results(tmp_path / "out", "scan0")["mask"].get_fdata()
    assert mask.mean() == pytest.approx(0.25, abs=0.1)  # the default, with another patch size, would hide 0.6
    # normalised per patch, the reconstruction would not be in the range of the image
    rebuilt = results(tmp_path / "out", "scan0")["reconstruction"].get_fdata()
    assert np.abs(rebuilt[mask > 0]).mean() < 1.0


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures(tmp_path: Path, channels: int) -> None:
    (tmp_path / "data").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 56, channels), dtype=np.uint8)
    for name in ("a", "b"):
        Image.fromarray(pixels.squeeze()).save(tmp_path / f"data/{name}.png")
    pictures = {"modality": "image2d", "spatial_dims": 2, "in_channels": channels}
    train(tmp_path / "data", tmp_path / "run", max_epochs=1, **pictures)
    infer(tmp_path / "data", tmp_path / "out", tmp_path / "run/models/model.pt", **pictures)
    made = results(tmp_path / "out", "a")
    assert np.squeeze(made["mask"].dataobj).shape == (56, 40)
    assert np.squeeze(made["reconstruction"].dataobj).shape == (56, 40) + (channels,) * (channels > 1)
    assert (tmp_path / "out/a/a_panel.png").is_file()


def test_pictures_and_slices_in_nifti_keep_their_shape(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_nifti(tmp_path / f"data/{name}.nii.gz", (40, 56, 1), np.diag([2.0, 3.0, 4.0, 1.0]))
    pictures = {"modality": "image2d", "spatial_dims": 2}
    train(tmp_path / "data", tmp_path / "run", max_epochs=1, **pictures)
    infer(tmp_path / "data", tmp_path / "out", tmp_path / "run/models/model.pt", **pictures)
    infer(tmp_path / "data", tmp_path / "slices", tmp_path / "run/models/model.pt", spatial_dims=2, modality="mr")
    for folder in ("out", "slices"):
        for image in results(tmp_path / folder, "a").values():
            assert image.shape == (40, 56, 1)
            np.testing.assert_allclose(image.affine, np.diag([2.0, 3.0, 4.0, 1.0]))


def test_two_runs_give_one_result(trained: Trained, tmp_path: Path) -> None:
    data = write_cases(tmp_path / "data", 1)
    model = trained(masker="%maskers::uniform") / "models/model.pt"
    for name in ("first", "second"):
        infer(data, tmp_path / name, model, masker="%maskers::uniform")
    first, second = (results(tmp_path / name, "scan0")["mask"] for name in ("first", "second"))
    assert np.array_equal(first.dataobj, second.dataobj)


@pytest.mark.parametrize("masker", ["a3c", "uniform"])
def test_evaluate_repeats_the_validation(trained: Trained, tmp_path: Path, masker: str) -> None:
    write_cases(tmp_path / "data")
    chosen = {"masker": f"%maskers::{masker}"}
    options = {**TINY, "dataset_dir": str(tmp_path / "data"), "output_dir": str(tmp_path / "run"), **chosen}
    run_bundle("train.json", **options)
    run_bundle(["train.json", "evaluate.json"], **options)

    report = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert all(math.isfinite(value) for value in report.values())
    best = checkpoint(tmp_path / "run/models/model.pt")["best"]["metric"]
    assert report["random_psnr"] == pytest.approx(best, abs=1e-4)
    assert list((tmp_path / "run/panels_evaluate").glob("*.png"))


def test_evaluation_takes_its_settings_from_the_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_cases(tmp_path / "data")
    places = {"dataset_dir": str(tmp_path / "data"), "output_dir": str(tmp_path / "run")}
    run_bundle("train.json", **TINY, **places, masker="uniform", mask_ratio=0.3, split_seed=3, samples_per_case=3)
    run_bundle(["train.json", "evaluate.json"], **places)
    report = json.loads((tmp_path / "run/evaluation.json").read_text())
    best = checkpoint(tmp_path / "run/models/model.pt")["best"]["metric"]
    assert report["random_psnr"] == pytest.approx(best, abs=1e-4)
    assert "trained on" not in caplog.text

    run_bundle(["train.json", "evaluate.json"], **places, split_seed=4)
    assert "1 of 1 validation patients have names of patients whom model.pt was trained on" in caplog.text


def test_results_of_all_scans_may_lie_in_one_folder(trained: Trained, tmp_path: Path) -> None:
    data = write_cases(tmp_path / "data", 1)
    infer(data, tmp_path / "out", trained() / "models/model.pt", separate_folder=False)
    assert {f"scan0_{name}.nii.gz" for name in RESULTS} | {"scan0_panel.png"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    assert not (tmp_path / "out/scan0").exists()
