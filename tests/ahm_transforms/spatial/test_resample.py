# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, Orientationd, Spacing, SpatialResample

from ahm_transforms.spatial import ResampleToSpacing, ResampleToSpacingd

OBLIQUE = np.array([[1.2, 0.3, 0, 10], [-0.3, 0.9, 0.1, -20], [0, -0.1, 2.5, 5], [0, 0, 0, 1]])
FLIPPED = np.array([[-1.5, 0, 0, 60], [0, -1.5, 0, 80], [0, 0, 3.0, -7], [0, 0, 0, 1]])


def image(shape: tuple[int, ...] = (20, 24, 12), affine: np.ndarray = FLIPPED, channels: int = 1) -> MetaTensor:
    values = torch.randn(channels, *shape, generator=torch.Generator().manual_seed(0))
    return MetaTensor(values, affine=torch.as_tensor(affine))


@pytest.mark.parametrize("affine", [FLIPPED, OBLIQUE])
@pytest.mark.parametrize("spacing", [1.0, 2.0, (1.0, 2.5, 0.7), (0.0, 1.0, -1.0), (1.45, 2.0, 2.9), (1.45, 1.48, 2.9)])
def test_values_are_those_of_monai_on_the_same_grid(affine: np.ndarray, spacing: float | tuple) -> None:
    img = image(affine=affine, channels=2)
    ours = ResampleToSpacing(spacing)(img)
    monai = SpatialResample(padding_mode="border", align_corners=False)(
        img, dst_affine=ours.affine, spatial_size=ours.shape[1:]
    )
    torch.testing.assert_close(ours.as_tensor(), monai.as_tensor(), atol=1e-4, rtol=0)


def test_spacing_is_exact_and_the_field_of_view_stays() -> None:
    out = ResampleToSpacing((1.0, 2.0, 1.0))(image())
    assert out.shape == (1, 30, 18, 36)
    np.testing.assert_allclose(out.pixdim, [1.0, 2.0, 1.0], atol=1e-9)
    edges = [affine.numpy() @ [-0.5, -0.5, -0.5, 1] for affine in (image().affine, out.affine)]
    np.testing.assert_allclose(*edges, atol=1e-6)


def test_a_ramp_in_the_world_stays_that_ramp() -> None:
    img = image(affine=OBLIQUE)

    def world(like: MetaTensor) -> torch.Tensor:
        index = torch.stack(torch.meshgrid(*map(torch.arange, like.shape[1:]), indexing="ij"), -1).double()
        points = index @ like.affine[:3, :3].T + like.affine[:3, 3]
        return (points @ torch.tensor([0.3, -0.2, 0.5], dtype=torch.double))[None]

    img.set_(world(img).float())
    out = ResampleToSpacing(1.1)(img)
    inner = (slice(None), *(slice(3, -3),) * 3)
    torch.testing.assert_close(out.as_tensor()[inner], world(out).float()[inner], atol=1e-4, rtol=1e-4)


def test_shape_is_within_a_voxel_of_monai_spacing() -> None:
    ours, monai = ResampleToSpacing(1.3)(image()), Spacing(1.3)(image())
    assert all(abs(a - b) <= 1 for a, b in zip(ours.shape, monai.shape, strict=True))


@pytest.mark.parametrize(("size", "spacing", "target", "wanted"), [(30, 0.1, 0.3, 10), (7, 0.3, 0.1, 21), (1, 1, 5, 1)])
def test_sizes_do_not_suffer_from_rounding(size: int, spacing: float, target: float, wanted: int) -> None:
    img = image((size, 8, 8), np.diag([spacing, 1, 1, 1]))
    assert ResampleToSpacing((target, 1, 1))(img).shape[1] == wanted


def test_two_dimensions_and_memory_order() -> None:
    img = MetaTensor(torch.randn(1, 10, 8), affine=torch.eye(4) * 2)
    assert ResampleToSpacing(1.0)(img).shape == (1, 20, 16)
    volume = image()
    turned = MetaTensor(volume.as_tensor().permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1), affine=volume.affine)
    assert torch.equal(ResampleToSpacing(1.0)(volume), ResampleToSpacing(1.0)(turned))


def test_extra_entries_that_crash_monai_spacingd_are_no_concern() -> None:
    img = image()
    img.meta["filename_or_obj"] = "a.nii.gz"
    data = {"image": img, "image_path": "a.nii.gz", "image_id": 3, "image_mask": torch.zeros(1), 5: "five"}
    out = ResampleToSpacingd("image", 2.0)(data)
    assert {key: out[key] for key in data if key != "image"} == {key: data[key] for key in data if key != "image"}


@pytest.mark.parametrize("nearest", [False, True])
def test_invertd_brings_a_result_back_to_the_old_grid(nearest: bool) -> None:
    ramp = torch.linspace(0, 1, 24)[None, None, :, None].expand(1, 20, 24, 12)
    img = MetaTensor(ramp.clone(), affine=torch.as_tensor(FLIPPED))
    chain = Compose([Orientationd("image", axcodes="RAS", labels=None), ResampleToSpacingd("image", 1.0)])
    data = chain({"image": img})
    assert data["image"].shape == (1, 30, 36, 36)
    if nearest:
        data["image"] = (data["image"] > 0.5).float()
    back = Invertd("image", transform=chain, orig_keys="image", nearest_interp=nearest)(data)["image"]
    assert back.shape == img.shape
    torch.testing.assert_close(back.affine, img.affine)
    inner = (slice(None), *(slice(2, -2),) * 3)
    wanted = (img > 0.5).float() if nearest else img
    torch.testing.assert_close(back.as_tensor()[inner], wanted.as_tensor()[inner], atol=0.02, rtol=0)


def test_an_image_that_has_the_spacing_already_is_inverted_too() -> None:
    resample = ResampleToSpacing((1.5, 1.5, 3.0))
    out = resample(image())
    assert torch.equal(out, image())
    assert resample.inverse(out).shape == image().shape


def test_plain_tensors_have_no_spacing() -> None:
    with pytest.raises(TypeError, match="needs a MetaTensor"):
        ResampleToSpacing(1.0)(torch.zeros(1, 4, 4, 4))


def classes(shape: tuple[int, ...] = (20, 24, 12), affine: np.ndarray = FLIPPED) -> MetaTensor:
    values = torch.randint(0, 5, (1, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return MetaTensor(values, affine=torch.as_tensor(affine))


@pytest.mark.parametrize("affine", [FLIPPED, OBLIQUE])
@pytest.mark.parametrize("spacing", [0.7, 1.1, 2.0, (1.3, 2.5, 0.7), (0.0, 1.1, -1.0)])
def test_nearest_is_that_of_monai_on_the_same_grid_up_to_ties(affine: np.ndarray, spacing: float | tuple) -> None:
    label = classes(affine=affine)
    ours = ResampleToSpacing(spacing, "nearest")(label)
    image = ResampleToSpacing(spacing)(label.float())
    assert ours.dtype == torch.uint8 and ours.shape == image.shape and torch.equal(ours.affine, image.affine)
    monai = SpatialResample(mode="nearest", align_corners=False)(
        label, dst_affine=ours.affine, spatial_size=ours.shape[1:]
    )
    clear = torch.ones(ours.shape[1:], dtype=torch.bool)  # not half-way between two voxels
    step = np.linalg.inv(label.affine.numpy()) @ ours.affine.numpy()
    for axis, size in enumerate(ours.shape[1:]):
        place = torch.arange(size) * step[axis, axis] + step[axis, 3]
        tied = ((place % 1) - 0.5).abs() < 1e-3
        clear &= ~tied.reshape([-1 if i == axis else 1 for i in range(3)])
    assert clear.float().mean() > 0.2
    assert torch.equal(ours.as_tensor()[0][clear], monai.as_tensor()[0][clear].to(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64])
def test_nearest_keeps_classes_of_any_type(dtype: torch.dtype) -> None:
    label = classes().clamp(max=1) if dtype == torch.bool else classes()
    resample = ResampleToSpacing((1.3, 2.5, 0.7), "nearest")
    ours = resample(label.to(dtype))
    assert ours.dtype == dtype and torch.equal(ours.to(torch.uint8), resample(label))
    back = resample.inverse(ours)
    assert back.dtype == dtype and back.shape == label.shape


def test_ties_take_one_of_the_two_voxels() -> None:
    label = MetaTensor(torch.arange(8, dtype=torch.uint8)[None], affine=torch.eye(4))
    halved = ResampleToSpacing(2.0, "nearest")(label)
    assert all(int(value) in (2 * i, 2 * i + 1) for i, value in enumerate(halved[0]))


@pytest.mark.parametrize("spacing", [1.1, (1.5, 1.5, 3.0)])
def test_classes_are_brought_back_as_classes(spacing: float | tuple) -> None:
    label = MetaTensor(torch.zeros(1, 20, 24, 12, dtype=torch.uint8), affine=torch.as_tensor(FLIPPED))
    label[:, 4:12, 5:20, 3:9] = 200
    chain = Compose([ResampleToSpacingd(["image", "label"], spacing, mode=["bilinear", "nearest"])])
    data = chain({"image": label.float(), "label": label})
    assert data["label"].dtype == torch.uint8 and set(data["label"].unique().tolist()) == {0, 200}
    assert data["image"].dtype == torch.float32 and data["image"].shape == data["label"].shape
    back = Invertd("label", transform=chain, orig_keys="label", nearest_interp=False)(data)["label"]
    assert back.dtype == torch.uint8 and torch.equal(back, label)
    assert chain.inverse(data)["image"].shape == label.shape


def test_modes_are_checked() -> None:
    with pytest.raises(ValueError, match="mode must be bilinear or nearest, got 'bicubic'"):
        ResampleToSpacing(1.0, "bicubic")
