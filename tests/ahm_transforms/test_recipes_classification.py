# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import CacheDataset, DataLoader, MetaTensor
from monai.transforms import Compose
from PIL import Image

from ahm_transforms import recipes
from tests.fixtures_data import real_data
from tests.fixtures_shapes import agreement, blobs, surely

OBLIQUE = np.array([[0, 0, 2.5, 10], [-0.9, 0.2, 0, -20], [0.2, 0.9, 0, 5], [0, 0, 0, 1]])


def write_picture(folder: Path, size: tuple[int, int] = (60, 45), **entries: Any) -> dict[str, Any]:
    """Write a picture that is bright exactly where its mask is."""
    inside = blobs(size).astype(np.uint8)
    Image.fromarray(inside * 200).save(folder / "image.png")
    Image.fromarray(inside * 255).save(folder / "mask.png")
    return {"image": str(folder / "image.png"), "mask": str(folder / "mask.png"), "label": 2, **entries}


def write_volume(folder: Path, shape: Sequence[int] = (40, 30, 20), affine: np.ndarray = OBLIQUE) -> dict[str, Any]:
    inside = blobs(shape).astype(np.int16)
    for name in ("image", "mask"):
        nib.save(nib.Nifti1Image(inside * 100, affine), folder / f"{name}.nii.gz")
    return {"image": str(folder / "image.nii.gz"), "mask": str(folder / "mask.nii.gz"), "label": 0}


def pictures(image_size: Any = 32, **options: Any) -> Compose:
    return recipes.classification_deterministic("image2d", spatial_dims=2, image_size=image_size, **options)


@pytest.mark.parametrize("size", [(32, 48), 96])
def test_pictures_become_one_size_and_other_entries_stay(tmp_path: Path, size: Any) -> None:
    data = pictures(size)(write_picture(tmp_path))
    assert data["image"].shape == (1, *((size, size) if isinstance(size, int) else size))
    assert data["image"].dtype == torch.float32 and data["image"].min() == 0 and data["image"].max() == 1
    assert data["label"] == 2 and set(data) == {"image", "label"}
    wanted = torch.from_numpy(blobs((60, 45)).T.astype(np.float32))[None, None]
    wanted = torch.nn.functional.interpolate(wanted, data["image"].shape[1:], mode="bilinear", antialias=True)
    assert ((data["image"] > 0.5) == (wanted[0] > 0.5)).float().mean() > 0.95


def test_shrinking_takes_means_up_to_the_border(tmp_path: Path) -> None:
    board = np.indices((64, 64)).sum(0) % 2
    Image.fromarray((board * 255).astype(np.uint8)).save(tmp_path / "a.png")
    image = pictures(16)({"image": str(tmp_path / "a.png")})["image"]
    torch.testing.assert_close(image.as_tensor(), torch.full((1, 16, 16), 0.5))


@pytest.mark.parametrize("size", [(50, 40), 33, 90])
def test_the_mask_is_the_last_channel_on_the_images_grid(tmp_path: Path, size: Any) -> None:
    image = pictures(size, mask_channel=True)(write_picture(tmp_path))["image"]
    assert len(image) == 2 and set(image[1].unique().tolist()) == {0, 1}
    assert image.dtype == torch.float32 and agreement(image[0], image[-1]) > 0.95


@pytest.mark.parametrize("spacing", [None, 1.5])
def test_volumes_and_their_masks(tmp_path: Path, spacing: float | None) -> None:
    steps = recipes.classification_deterministic(
        "mr", spatial_dims=3, image_size=(24, 28, 20), mask_channel=True, spacing_mm=spacing
    )
    case = write_volume(tmp_path)
    data = steps(case)
    assert data["image"].shape == (2, 24, 28, 20) and set(data) == {"image", "label"}
    assert set(data["image"][1].unique().tolist()) == {0, 1} and agreement(data["image"][0], data["image"][-1]) > 0.9
    alone = recipes.classification_deterministic("mr", spatial_dims=3, image_size=(24, 28, 20), spacing_mm=spacing)
    assert torch.equal(alone(case)["image"][0], data["image"][0])


def test_colours_and_a_mask(tmp_path: Path) -> None:
    case = write_picture(tmp_path)
    Image.open(case["image"]).convert("RGB").save(case["image"])
    data = pictures(channels=3, mask_channel=True)(case)
    assert data["image"].shape == (4, 32, 32) and agreement(data["image"][0], data["image"][-1]) > 0.95


@pytest.mark.parametrize("modality", ["mr", "ct"])
def test_volumes_have_no_2d_classifier(modality: str) -> None:
    with pytest.raises(ValueError, match=f"{modality} scans are volumes, use spatial_dims=3"):
        recipes.classification_deterministic(modality, spatial_dims=2, image_size=32)


def test_a_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    case = write_picture(tmp_path)
    Image.new("L", (45, 61)).save(case["mask"])
    with pytest.raises(RuntimeError) as caught:  # Compose wraps what its steps raise
        pictures(mask_channel=True)(case)
    assert "mask.png has size (45, 61), expected (45, 60) as its image" in str(caught.value.__cause__)


@pytest.mark.parametrize("dims", [2, 3])
def test_random_steps_leave_masks_as_masks_and_in_step(tmp_path: Path, dims: int) -> None:
    if dims == 2:
        data = pictures(64, mask_channel=True)(write_picture(tmp_path))
    else:
        options = {"spatial_dims": 3, "image_size": 32, "mask_channel": True}
        data = recipes.classification_deterministic("mr", **options)(write_volume(tmp_path))
    steps = surely(recipes.classification_random(spatial_dims=dims, image_channels=1))
    steps.set_random_state(seed=0)
    items = [steps(data) for _ in range(8)]
    for item in items:
        image = item["image"]
        assert type(image) is torch.Tensor and image.dtype == torch.float32 and image.shape == data["image"].shape
        assert set(image[1].unique().tolist()) == {0, 1} and set(item) == {"image", "label"}
        assert image.min() >= 0 and image.max() <= 1 and len(image[0].unique()) > 100
    assert np.mean([agreement(item["image"][0], item["image"][-1]) for item in items]) > 0.93
    assert len({item["image"][1].sum().item() for item in items}) == 8


def test_without_affine_maps_the_mask_keeps_every_voxel(tmp_path: Path) -> None:
    data = pictures(64, mask_channel=True)(write_picture(tmp_path))
    steps = surely(recipes.classification_random(spatial_dims=2, image_channels=1, flip_prob=0.0))
    steps.transforms = tuple(step for step in steps.transforms if type(step).__name__ != "RandAffined")
    steps.set_random_state(seed=0)
    image = steps(data)["image"]
    assert torch.equal(image[1], data["image"][1].as_tensor())
    assert (image[0] - data["image"][0].as_tensor()).abs().mean() > 0.005


@pytest.mark.parametrize("image_channels", [None, 1])
def test_images_without_a_mask(tmp_path: Path, image_channels: int | None) -> None:
    data = pictures()(write_picture(tmp_path))
    item = surely(recipes.classification_random(spatial_dims=2, image_channels=image_channels))(data)
    assert item["image"].shape == (1, 32, 32) and item["label"] == 2


def test_flips_alone(tmp_path: Path) -> None:
    data = pictures(mask_channel=True)(write_picture(tmp_path))
    plain = data["image"].as_tensor()
    for prob, wanted in ((0.0, plain), (1.0, plain.flip(1, 2))):
        steps = recipes.classification_random(spatial_dims=2, augment=False, flip_prob=prob, image_channels=1)
        assert torch.equal(steps(data)["image"], wanted)


def test_the_same_seed_gives_the_same_image(tmp_path: Path) -> None:
    data = pictures()(write_picture(tmp_path))
    steps = surely(recipes.classification_random(spatial_dims=2))
    draws = []
    for seed in (0, 0, 1):
        steps.set_random_state(seed=seed)
        draws.append(steps(data)["image"])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("augment", [False, True])
def test_the_cache_is_never_written_to(tmp_path: Path, augment: bool) -> None:
    random = surely(recipes.classification_random(spatial_dims=2, augment=augment, image_channels=1))
    steps = Compose([*pictures(mask_channel=True).transforms, *random.transforms])
    dataset = CacheDataset([write_picture(tmp_path)], steps, progress=False, copy_cache=False)
    cached = [value for value in dataset._cache[0].values() if isinstance(value, torch.Tensor)]
    before = [value.clone() for value in cached]
    assert sum(len(value) for value in cached) == 2  # image and mask
    assert not any(isinstance(value, MetaTensor) for value in cached)  # their histories would grow
    for _ in range(5):
        dataset[0]["image"].zero_()
    assert all(torch.equal(now, then) for now, then in zip(cached, before, strict=True))


def test_real_ultrasound_becomes_a_batch() -> None:
    folder = real_data("busi_ultrasound")
    names = sorted(path.name for path in (folder / "images").glob("malignant*"))[:2]
    masks = [folder / "masks" / name for name in names]
    assert all(mask.is_file() for mask in masks)
    cases = [
        {"image": str(folder / "images" / name), "mask": str(mask), "label": 1, "case_id": name}
        for name, mask in zip(names, masks, strict=True)
    ]
    random = recipes.classification_random(spatial_dims=2, image_channels=1)
    steps = Compose([*pictures(128, mask_channel=True).transforms, *random.transforms])
    batch = next(iter(DataLoader(CacheDataset(cases, steps, progress=False, copy_cache=False), batch_size=2)))
    assert batch["image"].shape == (2, 2, 128, 128) and batch["label"].tolist() == [1, 1]
    assert 0.001 < batch["image"][:, 1].mean() < 0.8
