# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pickle
import tarfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import CacheDataset, DataLoader, MetaTensor
from monai.transforms import Invertd, Randomizable
from PIL import Image

from ahm_transforms import recipes
from ahm_transforms.io import load_cases
from tests.fixtures_data import CORONAL, real_data, write_nifti, write_series

LPS = np.diag([-1.0, -1.0, 2.0, 1.0])


def one_batch(cases: list[dict], chain: Any, batch_size: int = 2, workers: int = 0) -> dict:
    dataset = CacheDataset(cases, chain, progress=False, copy_cache=False)
    return next(iter(DataLoader(dataset, batch_size=batch_size, num_workers=workers)))


@pytest.mark.parametrize(
    ("folder", "modality", "dims", "crop", "options"),
    [
        ("hippocampus_mr/images", "mr", 3, (32, 32, 40), {}),
        ("hippocampus_mr/images", "mr", 2, 48, {"spacing_mm": 1.5}),
        ("busi_ultrasound/images", "image2d", 2, (96, 128), {}),
        ("acdc_cine_mr/images", "mr", 2, 160, {"spacing_mm": (1.5, 1.5)}),
        ("totalseg_samples", "ct", 3, 48, {"spacing_mm": 4.0}),
    ],
)
def test_real_folders_become_batches(folder: str, modality: str, dims: int, crop: Any, options: dict) -> None:
    cases = load_cases(real_data(folder), spatial_dims=dims).training[:2]
    chain = recipes.preprocessing(modality, spatial_dims=dims, crop_size=crop, samples_per_case=2, **options)
    batch = one_batch(cases, chain)
    size = (crop,) * dims if isinstance(crop, int) else crop
    assert batch["image"].shape == (4, 1, *size)
    assert batch["image"].dtype == torch.float32 and type(batch["image"]) is torch.Tensor
    assert batch["image"].min() >= 0 and batch["image"].max() <= 1 and batch["image"].std() > 0.05
    assert set(batch) == {"image", "case_id", "patient_id"}


def test_real_dicom_becomes_a_batch(tmp_path: Path) -> None:
    with tarfile.open(real_data("dicom/mr_t1_mprage_192slices.tgz")) as tar:
        tar.extractall(tmp_path, filter="data")
    chain = recipes.preprocessing("mr", spatial_dims=3, crop_size=64, samples_per_case=2, spacing_mm=1.0)
    assert one_batch(load_cases(tmp_path).training, chain)["image"].shape == (2, 1, 64, 64, 64)


@pytest.mark.skipif(find_spec("nilearn") is None, reason="needs the extra demo: nilearn")
@pytest.mark.parametrize(("dims", "crop"), [(2, 128), (3, 64)])
def test_default_data_become_batches(dims: int, crop: int) -> None:
    cases = load_cases(spatial_dims=dims)
    chain = recipes.preprocessing("mr", spatial_dims=dims, crop_size=crop, samples_per_case=2)
    batch = one_batch(cases.training, chain)
    assert batch["image"].shape == (4, 1, *(crop,) * dims)
    assert (batch["image"] > 0).float().mean() > 0.1


def test_volumes_are_turned_to_ras_and_resampled(tmp_path: Path) -> None:
    stored = write_nifti(tmp_path / "a.nii.gz", (12, 14, 10), LPS)
    case = {"image": str(tmp_path / "a.nii.gz"), "image_path": "x", "image_id": 1}
    image = recipes.deterministic("ct", spatial_dims=3, window_hu=(0, 999))(case)["image"]
    np.testing.assert_allclose(image[0], stored[::-1, ::-1] / 999, atol=1e-6)
    assert nib.aff2axcodes(image.affine.numpy()) == ("R", "A", "S")
    fine = recipes.deterministic("ct", spatial_dims=3, spacing_mm=1.0)(case)
    assert fine["image"].shape == (1, 12, 14, 20) and fine["image_id"] == 1


def test_a_dicom_series_and_its_nifti_twin_give_the_same(tmp_path: Path) -> None:
    stored = write_series(tmp_path / "series", orientation=CORONAL)
    chain = recipes.deterministic("mr", spatial_dims=3)
    (case,) = load_cases(tmp_path / "series", val_fraction=0).training
    dicom = chain(case)["image"]
    affine = recipes.LoadCased("image")(case)["image"].affine.numpy()
    nib.save(nib.Nifti1Image(stored.transpose(2, 1, 0), affine), tmp_path / "twin.nii.gz")
    nifti = chain({"image": str(tmp_path / "twin.nii.gz")})["image"]
    torch.testing.assert_close(dicom.as_tensor(), nifti.as_tensor())
    torch.testing.assert_close(dicom.affine, nifti.affine)


def test_results_can_be_brought_back_to_the_scan(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii.gz", (12, 14, 10), LPS)
    chain = recipes.deterministic("mr", spatial_dims=3, spacing_mm=0.8)
    data = chain({"image": str(tmp_path / "a.nii.gz"), "block": [[2, 12], [0, 14], [0, 10]]})
    data["mask"] = MetaTensor(torch.ones_like(data["image"].as_tensor()))
    back = Invertd("mask", transform=chain, orig_keys="image", nearest_interp=True)(data)["mask"]
    assert back.shape == (1, 12, 14, 10)
    np.testing.assert_allclose(back.affine, LPS, atol=1e-9)
    assert back[:, :2].max() == 0 and back[:, 2:].min() == 1


def test_slice_distance_stays_in_2d(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii.gz", (12, 14, 10), LPS)
    image = recipes.deterministic("mr", spatial_dims=2, spacing_mm=2.0)({"image": str(tmp_path / "a.nii.gz")})["image"]
    assert image.shape == (1, 6, 7, 10)


@pytest.mark.parametrize("kind", ["nan", "constant", "all nan"])
@pytest.mark.parametrize("modality", ["mr", "ct"])
def test_nan_and_constant_volumes_come_out_finite(tmp_path: Path, kind: str, modality: str) -> None:
    values = np.random.default_rng(0).random((16, 16, 16)).astype(np.float32) * 200
    values[{"nan": np.s_[:2], "constant": np.s_[:0], "all nan": np.s_[:]}[kind]] = np.nan
    if kind == "constant":
        values[:] = 42
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "a.nii.gz")
    cases = load_cases(tmp_path, val_fraction=0).training
    image = one_batch(cases, recipes.preprocessing(modality, spatial_dims=3, crop_size=8, spacing_mm=0.7))["image"]
    assert image.isfinite().all() and image.min() >= 0 and image.max() <= 1


def test_a_spacing_of_another_number_of_axes_is_named() -> None:
    with pytest.raises(ValueError, match=r"spacing_mm: expected 1 or 2 numbers, got \[1, 1, 3\]"):
        recipes.deterministic("mr", spatial_dims=2, spacing_mm=[1, 1, 3])


def test_text_in_place_of_numbers_is_named() -> None:
    with pytest.raises(ValueError, match="spacing_mm: expected 1 or 3 numbers, got 'fine'"):
        recipes.deterministic("mr", spatial_dims=3, spacing_mm="fine")
    for crops in (recipes.random_crops, recipes.fixed_crops):
        with pytest.raises(ValueError, match="crop_size: expected 1 or 3 sizes, got 'large'"):
            crops(spatial_dims=3, crop_size="large")


def test_channel_count_that_does_not_fit_names_the_file(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "colour.png")
    data = {"image": str(tmp_path / "colour.png")}
    assert recipes.deterministic("image2d", spatial_dims=2, channels=3)(data)["image"].shape == (3, 8, 8)
    with pytest.raises(RuntimeError) as caught:  # Compose wraps what its steps raise
        recipes.deterministic("image2d", spatial_dims=2)(data)
    assert "colour.png has 3 channel(s), expected channels=1" in str(caught.value.__cause__)


def test_images_smaller_than_the_crop_are_padded(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii.gz", (10, 40, 10))
    chain = recipes.validation_preprocessing("mr", spatial_dims=3, crop_size=(16, 16, 12))
    assert chain({"image": str(tmp_path / "a.nii.gz")})[0]["image"].shape == (1, 16, 16, 12)


def test_validation_is_the_same_every_time_and_training_is_not(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii.gz", (40, 40, 40))
    case = {"image": str(tmp_path / "a.nii.gz")}
    options = {"spatial_dims": 3, "crop_size": 8, "samples_per_case": 3}
    fixed = [recipes.validation_preprocessing("mr", **options)(case) for _ in range(2)]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(*fixed, strict=True))
    chain = recipes.preprocessing("mr", **options)
    chain.set_random_state(seed=0)
    first, second = chain(case), chain(case)
    assert not torch.equal(first[0]["image"], second[0]["image"])
    chain.set_random_state(seed=0)
    assert torch.equal(chain(case)[0]["image"], first[0]["image"])


def test_cache_keeps_all_but_the_random_part_and_is_never_written_to(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii.gz", (20, 20, 20))
    chain = recipes.preprocessing("mr", spatial_dims=3, crop_size=20, spacing_mm=0.9)
    random = [isinstance(step, Randomizable) for step in chain.transforms]
    assert random.index(True) == len(recipes.deterministic("mr", spatial_dims=3, spacing_mm=1).transforms)
    dataset = CacheDataset([{"image": str(tmp_path / "a.nii.gz")}], chain, progress=False, copy_cache=False)
    cached = dataset._cache[0]["image"]
    before = cached.clone()
    for _ in range(4):
        dataset[0][0]["image"].zero_()
    assert isinstance(cached, MetaTensor) and torch.equal(cached, before)


def test_flips_can_be_left_out(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii.gz", (8, 8, 8))
    case = {"image": str(tmp_path / "a.nii.gz")}
    plain = recipes.deterministic("mr", spatial_dims=3)(case)["image"].as_tensor()
    chain = recipes.preprocessing("mr", spatial_dims=3, crop_size=8, flip_prob=0.0)
    assert torch.equal(chain(case)[0]["image"], plain)
    flipped = recipes.preprocessing("mr", spatial_dims=3, crop_size=8, flip_prob=1.0)
    assert torch.equal(flipped(case)[0]["image"], plain.flip(1, 2, 3))


def test_chain_can_be_sent_to_worker_processes(tmp_path: Path) -> None:
    for name in "ab":
        write_nifti(tmp_path / f"{name}.nii.gz", (20, 20, 20))
    chain = recipes.preprocessing("mr", spatial_dims=3, crop_size=8)
    assert len(pickle.loads(pickle.dumps(chain)).transforms) == len(chain.transforms)
    batch = one_batch(load_cases(tmp_path, val_fraction=0).training, chain, workers=1)
    assert batch["image"].shape == (2, 1, 8, 8, 8)


def test_a_pixel_of_a_picture_counts_as_a_millimetre(tmp_path: Path) -> None:
    Image.fromarray(np.tile(np.arange(40, dtype=np.uint8), (30, 1))).save(tmp_path / "scan.png")
    chain = recipes.deterministic("image2d", spatial_dims=2, spacing_mm=2)
    small = chain({"image": str(tmp_path / "scan.png")})
    assert small["image"].shape == (1, 20, 15)
    whole = Invertd("pred", chain, "image", nearest_interp=False)({**small, "pred": small["image"].clone()})["pred"]
    assert whole.shape == (1, 40, 30)
    assert (whole[0, 1:-1] - torch.linspace(0, 1, 40)[1:-1, None]).abs().max() < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modality": "pet"}, "modality must be one of mr, ct, image2d, got 'pet'"),
        ({"modality": "mr", "spatial_dims": 4}, "spatial_dims must be 2 or 3, got 4"),
        ({"modality": "image2d"}, "image2d goes with spatial_dims=2"),
        ({"modality": "ct", "window_hu": (100, -100)}, "low < high"),
    ],
)
def test_options_that_do_not_go_together(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipes.deterministic(**({"spatial_dims": 3} | arguments))


@pytest.mark.parametrize("modality", ["mr", "ct"])
def test_a_picture_is_no_slice_of_a_volume(tmp_path: Path, modality: str) -> None:
    Image.fromarray(np.arange(80, dtype=np.uint8).reshape(8, 10)).save(tmp_path / "a.png")
    with pytest.raises(RuntimeError) as error:
        recipes.deterministic(modality, spatial_dims=2)({"image": str(tmp_path / "a.png")})
    assert str(error.value.__cause__).startswith("a.png has size (10, 8), expected a volume for modality mr or ct")


@pytest.mark.parametrize("modality", ["mr", "ct"])
def test_a_single_slice_is_no_volume(tmp_path: Path, modality: str) -> None:
    write_nifti(tmp_path / "scout.nii.gz", (12, 1, 14))
    with pytest.raises(RuntimeError) as error:
        recipes.deterministic(modality, spatial_dims=3)({"image": str(tmp_path / "scout.nii.gz")})
    assert str(error.value.__cause__).startswith("scout.nii.gz has size (12, 1, 14), a single slice: expected a volume")
    assert recipes.deterministic(modality, spatial_dims=2)({"image": str(tmp_path / "scout.nii.gz")})["image"].ndim == 4
