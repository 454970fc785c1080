# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import CacheDataset, DataLoader, MetaTensor
from monai.transforms import Compose, Invertd, Randomizable, SpatialResample
from PIL import Image

from ahm_transforms import recipes
from tests.fixtures_data import real_data, write_nifti
from tests.fixtures_shapes import agreement, blobs, surely

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
SAGITTAL = np.array([[0, 0, 2.5, -40], [-0.8, 0, 0, 30], [0, -0.8, 0, 20], [0, 0, 0, 1.0]])
HALF_A_VOXEL_OFF = np.array([[-1, 0, 0, 0.5], [0, -1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
OBLIQUE = np.array([[1.2, 0.3, 0, 10], [-0.3, 0.9, 0.1, -20], [0, -0.1, 2.5, 5], [0, 0, 0, 1]])


def write_case(
    folder: Path, shape: Sequence[int] = (22, 27, 19), affine: np.ndarray = LPS, value: int = 1, **entries: Any
) -> dict[str, Any]:
    """Write an image that is bright exactly where the label is ``value``."""
    inside = blobs(shape)
    nib.save(nib.Nifti1Image(inside.astype(np.int16) * 500, affine), folder / "image.nii.gz")
    nib.save(nib.Nifti1Image(inside.astype(np.uint8) * value, affine), folder / "label.nii.gz")
    return {"image": str(folder / "image.nii.gz"), "label": str(folder / "label.nii.gz"), "case_id": "a", **entries}


def chain(spatial_dims: int = 3, **options: Any) -> Compose:
    options = {"num_classes": 1, "window_hu": (0, 500)} | options
    return recipes.segmentation_deterministic("ct", spatial_dims=spatial_dims, **options)


@pytest.mark.parametrize("affine", [LPS, SAGITTAL, OBLIQUE])
@pytest.mark.parametrize(("dims", "spacing"), [(3, None), (3, 0.9), (3, (1.0, 1.7, 1.3)), (2, 1.3)])
def test_label_lies_on_the_images_grid(tmp_path: Path, affine: np.ndarray, dims: int, spacing: Any) -> None:
    case = write_case(tmp_path, affine=affine)
    data = chain(dims, spacing_mm=spacing)(case)
    image, label = data["image"], data["label"]
    assert image.dtype == torch.float32 and label.dtype == torch.uint8
    assert label.shape == image.shape and torch.equal(label.affine, image.affine)
    assert nib.aff2axcodes(image.affine.numpy()) == ("R", "A", "S")
    assert agreement(data["image"], data["label"]) > (0.9 if spacing else 0.9999)
    alone = recipes.deterministic("ct", spatial_dims=dims, spacing_mm=spacing, window_hu=(0, 500))(case)["image"]
    assert torch.equal(image, alone) and torch.equal(image.affine, alone.affine)
    stored = chain(dims)(case)["label"]
    wanted = SpatialResample("nearest")(stored, dst_affine=label.affine, spatial_size=label.shape[1:])
    assert (wanted == label).float().mean() > 0.97


@pytest.mark.parametrize("size", [(31, 22), (40, 57)])
def test_pictures_and_their_masks_keep_step(tmp_path: Path, size: tuple[int, int]) -> None:
    inside = blobs(size)
    for name in ("image", "label"):
        Image.fromarray(inside.astype(np.uint8) * 255).save(tmp_path / f"{name}.png")
    steps = recipes.segmentation_deterministic("image2d", num_classes=1, label_values=[255], spatial_dims=2)
    data = steps({"image": str(tmp_path / "image.png"), "label": str(tmp_path / "label.png")})
    assert data["label"].shape == (1, *size[::-1]) and agreement(data["image"], data["label"]) == 1
    assert data["label"].max() == 1


def test_colours_have_labels_too(tmp_path: Path) -> None:
    Image.new("RGB", (9, 7)).save(tmp_path / "image.png")
    Image.new("L", (9, 7), 1).save(tmp_path / "label.png")
    case = {"image": str(tmp_path / "image.png"), "label": str(tmp_path / "label.png")}
    data = recipes.segmentation_deterministic("image2d", num_classes=1, spatial_dims=2, channels=3)(case)
    assert data["image"].shape == (3, 9, 7) and data["label"].shape == (1, 9, 7)


def test_values_of_the_file_become_classes(tmp_path: Path) -> None:
    case = write_case(tmp_path, value=205)
    label = chain(num_classes=2, label_values=[420, 205])(case)["label"]
    assert set(label.unique().tolist()) == {0, 2}


def test_a_prediction_returns_to_the_grid_of_the_scan_and_its_label(tmp_path: Path) -> None:
    case = write_case(tmp_path, affine=SAGITTAL, block=[[2, 20], [0, 27], [5, 19]])
    evaluation = recipes.segmentation_evaluation("ct", num_classes=1, spatial_dims=3, window_hu=(0, 500))
    data = evaluation(dict(case))
    trained = chain()(dict(case))
    assert torch.equal(data["image"], trained["image"])
    assert data["label"].shape == (1, 22, 27, 19) and data["label"].dtype == torch.uint8
    np.testing.assert_allclose(data["label"].affine, SAGITTAL, atol=1e-6)
    assert not data["label"][:, :2].any() and not data["label"][..., :5].any() and data["label"].any()
    data["pred"] = MetaTensor(trained["label"].as_tensor().float())
    back = Invertd("pred", transform=evaluation, orig_keys="image", nearest_interp=True)(data)["pred"]
    assert torch.equal(back.as_tensor(), data["label"].as_tensor().float())
    np.testing.assert_allclose(back.affine, SAGITTAL, atol=1e-6)


@pytest.mark.parametrize("recipe", ["deterministic", "evaluation"])
def test_a_resampled_prediction_returns_to_about_the_label(tmp_path: Path, recipe: str) -> None:
    case = write_case(tmp_path, affine=OBLIQUE)
    steps = getattr(recipes, f"segmentation_{recipe}")("mr", num_classes=1, spatial_dims=3, spacing_mm=0.8)
    data = steps(case)
    data["pred"] = MetaTensor((data["image"].as_tensor() > 0.5).float())
    back = Invertd("pred", transform=steps, orig_keys="image", nearest_interp=True)(data)["pred"]
    stored = recipes.segmentation_evaluation("mr", num_classes=1, spatial_dims=3)(case)["label"]
    assert back.shape == stored.shape
    assert (back.as_tensor() == stored.as_tensor()).float().mean() > 0.95


def test_a_block_is_cut_from_both(tmp_path: Path) -> None:
    data = chain()(write_case(tmp_path, block=[[2, 12], [3, 20], [0, 19]]))
    assert data["image"].shape == data["label"].shape == (1, 10, 17, 19)
    assert agreement(data["image"], data["label"]) == 1 and "block" not in data


@pytest.mark.parametrize(
    ("shape", "affine", "message"),
    [
        ((22, 27, 18), LPS, "has size (22, 27, 18), expected (22, 27, 19)"),
        ((22, 27, 19), np.eye(4), "affine that differs by up to 2"),
        ((22, 27, 19), HALF_A_VOXEL_OFF, "affine that differs by up to 0.5"),
    ],
)
def test_a_label_on_another_grid_is_refused(
    tmp_path: Path, shape: tuple[int, ...], affine: np.ndarray, message: str
) -> None:
    case = write_case(tmp_path)
    nib.save(nib.Nifti1Image(blobs(shape).astype(np.uint8), affine), tmp_path / "label.nii.gz")
    with pytest.raises(RuntimeError) as caught:  # Compose wraps what its steps raise
        chain()(case)
    reason = str(caught.value.__cause__)
    assert reason.startswith("label.nii.gz ") and reason.endswith(" its image image.nii.gz.") and message in reason


def test_rounded_affines_of_labels_are_no_other_grid(tmp_path: Path) -> None:
    case = write_case(tmp_path, affine=OBLIQUE)
    label = nib.load(case["label"])
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj), OBLIQUE + 1e-5 * np.sign(OBLIQUE)), case["label"])
    data = chain(spacing_mm=0.7)(case)
    assert torch.equal(data["image"].affine, data["label"].affine) and data["image"].shape == data["label"].shape


@pytest.mark.parametrize(("dims", "crop"), [(3, (16, 15, 17)), (3, 32), (2, (16, 13)), (2, 32)])
def test_crops_and_augmentation_keep_image_and_label_in_step(tmp_path: Path, dims: int, crop: Any) -> None:
    data = chain(dims)(write_case(tmp_path, (30, 25, 22)))
    steps = surely(recipes.segmentation_crops(spatial_dims=dims, crop_size=crop, samples_per_case=12))
    steps.set_random_state(seed=0)
    items = steps(data)
    assert len(items) == 12
    for item in items:
        size = (crop,) * dims if isinstance(crop, int) else crop
        assert item["image"].shape == item["label"].shape == (1, *size)
        assert type(item["image"]) is torch.Tensor and item["image"].dtype == torch.float32
        assert type(item["label"]) is torch.Tensor and item["label"].dtype == torch.uint8
        assert item["image"].min() >= 0 and item["image"].max() <= 1
        assert set(item["label"].unique().tolist()) <= {0, 1}
    assert np.mean([agreement(item["image"], item["label"]) for item in items]) > 0.93
    assert len({item["image"].sum().item() for item in items}) == 12


def test_without_augmentation_crops_are_flipped_cuttings(tmp_path: Path) -> None:
    data = chain()(write_case(tmp_path))
    steps = recipes.segmentation_crops(spatial_dims=3, crop_size=(22, 27, 19), augment=False, flip_prob=1.0)
    (item,) = steps(data)
    for key in ("image", "label"):
        assert torch.equal(item[key], data[key].as_tensor().flip(1, 2, 3))
    (item,) = recipes.segmentation_crops(spatial_dims=3, crop_size=9, augment=False, flip_prob=0.0)(data)
    assert agreement(item["image"], item["label"]) == 1


def test_intensities_change_and_labels_do_not(tmp_path: Path) -> None:
    data = chain()(write_case(tmp_path))
    steps = surely(recipes.segmentation_crops(spatial_dims=3, crop_size=(22, 27, 19), flip_prob=0.0))
    steps.transforms = tuple(step for step in steps.transforms if type(step).__name__ != "RandAffined")
    steps.set_random_state(seed=0)
    (item,) = steps(data)
    assert torch.equal(item["label"], data["label"].as_tensor())
    assert (item["image"] - data["image"].as_tensor()).abs().mean() > 0.005


def augmented(data: dict[str, Any], augment: Any, *, number: int = 60) -> list[dict[str, Any]]:
    size = tuple(data["image"].shape[1:])
    options = {"crop_size": size, "samples_per_case": number, "flip_prob": 0.0, "augment": augment}
    steps = recipes.segmentation_crops(spatial_dims=3, **options)
    steps.set_random_state(seed=0)
    return steps(data)


@pytest.mark.parametrize(
    ("names", "strength"), [((True, "true", "True", "1", [1, 1]), 1), ((False, "false", 0.0, (0, 0)), 0)]
)
def test_true_and_false_are_strengths(tmp_path: Path, names: Sequence[Any], strength: int) -> None:
    data = chain()(write_case(tmp_path))
    expected = augmented(data, strength)
    for name in names:
        for item, other in zip(augmented(data, name), expected, strict=True):
            assert torch.equal(item["image"], other["image"]) and torch.equal(item["label"], other["label"])


def test_stronger_augmentation_comes_more_often_and_goes_further(tmp_path: Path) -> None:
    """Moves by the one strength, intensities by the other."""
    data = chain()(write_case(tmp_path))
    image, label = data["image"].as_tensor(), data["label"].as_tensor()
    moved, changed = [], []
    for strength in (0, 1, 2.5, 5):
        moved.append(np.mean([not torch.equal(item["label"], label) for item in augmented(data, [strength, 0])]))
        still = augmented(data, (0, strength))
        assert all(torch.equal(item["label"], label) for item in still)
        changed.append(np.mean([(item["image"] - image).abs().mean() for item in still]))
    assert moved[0] == changed[0] == 0 and moved[-1] == 1
    assert 0.05 < moved[1] < 0.4 and 0.3 < moved[2] < 0.7
    assert changed == sorted(changed) and changed[2] > 2.5 * changed[1]


def test_labels_follow_the_strongest_moves(tmp_path: Path) -> None:
    data = chain()(write_case(tmp_path, (30, 25, 22)))
    items = augmented(data, [5, 0], number=12)
    assert np.mean([agreement(item["image"], item["label"]) for item in items]) > 0.9


@pytest.mark.parametrize("augment", [-1, 5.1, float("nan"), "yes", None, [1], [1, 6], [-1, 1], [1, 1, 1]])
def test_other_strengths_are_refused(augment: Any) -> None:
    for build in (recipes.segmentation_crops, recipes.classification_random):
        size = {"crop_size": 8} if build is recipes.segmentation_crops else {}
        with pytest.raises(ValueError, match=r"augment: expected a strength from 0 to 5, two of"):
            build(spatial_dims=2, augment=augment, **size)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_foreground_share_reaches_the_crops(share: float) -> None:
    label = torch.zeros(1, 60, 60, dtype=torch.uint8)
    label[:, 50, 50] = 1
    data = {"image": torch.ones(1, 60, 60), "label": label}
    steps = recipes.segmentation_crops(
        spatial_dims=2, crop_size=8, samples_per_case=50, foreground_share=share, augment=False
    )
    steps.set_random_state(seed=0)
    held = np.mean([bool(item["label"].any()) for item in steps(data)])
    assert held == 1 if share else held < 0.2


def test_the_same_seed_gives_the_same_crops(tmp_path: Path) -> None:
    data = chain()(write_case(tmp_path))
    steps = surely(recipes.segmentation_crops(spatial_dims=3, crop_size=12, samples_per_case=2))
    draws = []
    for seed in (0, 0, 1):
        steps.set_random_state(seed=seed)
        draws.append(torch.stack([item[key].float() for item in steps(data) for key in ("image", "label")]))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("crop", [12, (22, 27, 19)])
@pytest.mark.parametrize("augment", [False, True])
def test_the_cache_is_never_written_to(tmp_path: Path, crop: Any, augment: bool) -> None:
    random = surely(recipes.segmentation_crops(spatial_dims=3, crop_size=crop, augment=augment))
    steps = Compose([*chain(spacing_mm=1.0).transforms, *random.transforms])
    assert isinstance(random.transforms[0], Randomizable)  # so that all before it is cached
    dataset = CacheDataset([write_case(tmp_path)], steps, progress=False, copy_cache=False)
    cached = dataset._cache[0]
    before = {key: cached[key].clone() for key in ("image", "label")}
    for _ in range(5):
        item = dataset[0][0]
        item["image"].zero_(), item["label"].zero_()
    for key, tensor in before.items():
        assert isinstance(cached[key], MetaTensor) and torch.equal(cached[key], tensor)
        assert torch.equal(cached[key].affine, tensor.affine)
        assert len(cached[key].applied_operations) == len(tensor.applied_operations)


def test_crops_collate_in_worker_processes(tmp_path: Path) -> None:
    random = recipes.segmentation_crops(spatial_dims=2, crop_size=16, samples_per_case=3)
    steps = pickle.loads(pickle.dumps(Compose([*chain(2).transforms, *random.transforms])))
    dataset = CacheDataset([write_case(tmp_path)] * 2, steps, progress=False, copy_cache=False)
    batch = next(iter(DataLoader(dataset, batch_size=2, num_workers=1)))
    assert batch["image"].shape == batch["label"].shape == (6, 1, 16, 16)


def test_options_are_checked_as_for_images() -> None:
    for recipe in (recipes.segmentation_deterministic, recipes.segmentation_evaluation):
        with pytest.raises(ValueError, match="modality must be one of"):
            recipe("pet", num_classes=1, spatial_dims=3)
        with pytest.raises(ValueError, match="image2d goes with spatial_dims=2"):
            recipe("image2d", num_classes=1, spatial_dims=3)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        recipes.segmentation_crops(spatial_dims=3, crop_size=8, foreground_share=2)


def test_a_real_hippocampus() -> None:
    folder = real_data("hippocampus_mr")
    name = sorted(path.name for path in (folder / "images").glob("*.nii.gz"))[0]
    case = {"image": str(folder / "images" / name), "label": str(folder / "labels" / name)}
    evaluation = recipes.segmentation_evaluation("mr", num_classes=2, spatial_dims=3)
    data = evaluation(case)
    stored = np.asarray(nib.load(case["label"]).dataobj)
    np.testing.assert_array_equal(data["label"][0], stored)
    trained = recipes.segmentation_deterministic("mr", num_classes=2, spatial_dims=3)(case)
    data["pred"] = MetaTensor(trained["label"].as_tensor().float())
    back = Invertd("pred", transform=evaluation, orig_keys="image", nearest_interp=True)(data)["pred"]
    np.testing.assert_array_equal(back[0], stored)
    steps = recipes.segmentation_crops(spatial_dims=3, crop_size=48, samples_per_case=4, foreground_share=1.0)
    for item in steps(trained):
        assert item["image"].shape == (1, 48, 48, 48) and set(item["label"].unique().tolist()) == {0, 1, 2}


def test_crops_around_nothing_lie_anywhere() -> None:
    """A network that never saw air finds classes in it."""
    image, label = torch.zeros(1, 64, 64), torch.zeros(1, 64, 64, dtype=torch.uint8)
    image[:, :8, :8] = 1
    chain = recipes.segmentation_crops(
        spatial_dims=2, crop_size=8, samples_per_case=50, foreground_share=0, augment=False, flip_prob=0
    )
    crops: Any = chain({"image": image, "label": label})
    assert sum(not crop["image"].any() for crop in crops) > 35


@pytest.mark.parametrize("axes", [None, 0, [0], []])
def test_only_the_wanted_axes_are_flipped(axes: int | Sequence[int] | None) -> None:
    image = torch.arange(16.0).view(1, 4, 4) / 16
    chain = recipes.segmentation_crops(spatial_dims=2, crop_size=4, flip_axes=axes, augment=False)
    data = {"image": image, "label": torch.ones(1, 4, 4, dtype=torch.uint8)}
    found = {tuple(chain(data)[0]["image"].flatten().tolist()) for _ in range(60)}
    flipped = [[], [1], [2], [1, 2]] if axes is None else [[]] if axes == [] else [[], [1]]
    assert found == {tuple(image.flip(dims).flatten().tolist()) for dims in flipped}


@pytest.mark.parametrize("recipe", [recipes.segmentation_deterministic, recipes.segmentation_evaluation])
def test_a_picture_and_its_label_may_be_nifti_files_of_one_slice(tmp_path: Path, recipe: Any) -> None:
    write_nifti(tmp_path / "a.nii.gz", (8, 9, 1))
    nib.save(nib.Nifti1Image(np.ones((8, 9, 1), np.uint8), np.eye(4)), tmp_path / "label.nii.gz")
    case = {"image": str(tmp_path / "a.nii.gz"), "label": str(tmp_path / "label.nii.gz")}
    ready = recipe("image2d", num_classes=1, spatial_dims=2, spacing_mm=1)(case)
    assert ready["image"].shape == ready["label"].shape == (1, 8, 9)


@pytest.mark.parametrize(
    ("classes", "dims", "axes", "said"),
    [
        (
            ["anterior hippocampus", "posterior hippocampus"],
            3,
            None,
            ["'anterior' and 'posterior'", "flip_axes=[0, 2]"],
        ),
        (["lung_left", "lung_right"], 2, [0, 1], ["'left' and 'right'", "axis 0", "flip_axes=[1]"]),
        (["Upper lobe", "Lower lobe"], 3, 2, ["'upper' and 'lower'", "flip_axes=[]"]),
        (["lung_left", "lung_right"], 3, [1, 2], []),
        (["upper lobe", "lower lobe"], 2, None, []),
        (["left kidney", "liver"], 3, None, []),
        (["anterior", "posterior"], 3, [], []),
    ],
)
def test_flips_that_swap_what_class_names_tell_apart(
    classes: list[str], dims: int, axes: Any, said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    recipes.warn_of_flips(classes, spatial_dims=dims, flip_axes=axes)
    assert len(caplog.records) == bool(said)
    assert all(words in caplog.text for words in said)


@pytest.mark.parametrize("axes", [[], [0], 1, [0, 2], None])
def test_only_the_axes_asked_for_are_flipped(tmp_path: Path, axes: Any) -> None:
    data = chain()(write_case(tmp_path))
    steps = recipes.segmentation_crops(
        spatial_dims=3, crop_size=(22, 27, 19), augment=False, flip_prob=1.0, flip_axes=axes
    )
    (item,) = steps(data)
    flipped = [0, 1, 2] if axes is None else [axes] if axes == 1 else axes
    assert torch.equal(item["image"], data["image"].as_tensor().flip([1 + axis for axis in flipped]))
