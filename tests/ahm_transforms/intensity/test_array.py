# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import ScaleIntensityRange, ScaleIntensityRangePercentiles

from ahm_transforms.intensity import PercentilesToUnit, PercentilesToUnitd, WindowToUnit, WindowToUnitd


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 300


def test_window_agrees_with_monai() -> None:
    img = noise(1, 20, 21, 22)
    wanted = ScaleIntensityRange(-175, 250, 0, 1, clip=True)(img)
    torch.testing.assert_close(WindowToUnit(-175, 250)(img), wanted.as_tensor(), atol=1e-6, rtol=0)


def test_percentiles_agree_with_monai() -> None:
    img = noise(2, 20, 21, 22)
    wanted = ScaleIntensityRangePercentiles(1, 99, 0, 1, clip=True, channel_wise=True)(img)
    torch.testing.assert_close(PercentilesToUnit()(img), wanted.as_tensor(), atol=1e-4, rtol=0)


def test_sampled_percentiles_of_a_large_image_are_close() -> None:
    img = noise(1, 128, 128, 96)
    low, high = np.percentile(img.numpy(), [1, 99])
    wanted = ((img - low) / (high - low)).clamp(0, 1)
    torch.testing.assert_close(PercentilesToUnit()(img), wanted, atol=0.02, rtol=0)


def test_channels_are_scaled_apart_or_together() -> None:
    img = torch.stack([torch.linspace(0, 1, 100), torch.linspace(0, 10, 100)])
    apart, together = PercentilesToUnit(0, 100)(img), PercentilesToUnit(0, 100, channel_wise=False)(img)
    assert apart[:, -1].tolist() == [1.0, 1.0]
    torch.testing.assert_close(together[:, -1], torch.tensor([0.1, 1.0]))


@pytest.mark.parametrize("transform", [WindowToUnit(-100, 100), PercentilesToUnit()])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_broken_voxels_leave_nothing_broken(transform: WindowToUnit | PercentilesToUnit, value: float) -> None:
    img = noise(1, 10, 10, 10)
    clean = transform(img)
    img[0, 2:4] = value
    out = transform(img)
    assert out.isfinite().all() and out.min() >= 0 and out.max() <= 1
    assert (out[0, 5:] - clean[0, 5:]).abs().max() < 0.2  # the rest keeps its contrast


def test_constant_images_become_zeros_and_nearly_constant_ones_keep_what_they_show() -> None:
    assert PercentilesToUnit()(torch.full((1, 8, 8), 7.0)).abs().max() == 0
    assert PercentilesToUnit()(torch.full((1, 8, 8), float("nan"))).abs().max() == 0
    speck = torch.zeros(1, 40, 40)
    speck[0, 3, 3] = 9
    assert PercentilesToUnit()(speck)[0, 3, 3] == 1


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.float64])
def test_type_metadata_and_input(dtype: torch.dtype) -> None:
    affine = torch.diag(torch.tensor([2.0, 3.0, 1.0, 1.0]))
    img = MetaTensor(noise(1, 6, 6, 6).abs().clamp(0, 200).to(dtype), affine=affine, meta={"filename_or_obj": "x"})
    before = img.clone()
    for transform in (WindowToUnitd("image", 0, 100), PercentilesToUnitd("image")):
        out = transform({"image": img, "image_path": "x"})["image"]
        assert isinstance(out, MetaTensor) and out.dtype == torch.float32
        assert torch.equal(out.affine, img.affine) and out.meta["filename_or_obj"] == "x"
    assert torch.equal(img, before)


@pytest.mark.parametrize("dtype", [np.float64, np.int16, np.uint16])
@pytest.mark.parametrize("transform", [WindowToUnit(-100, 100), PercentilesToUnit()])
def test_arrays_stay_arrays(transform: WindowToUnit | PercentilesToUnit, dtype: type) -> None:
    array = noise(1, 10, 11).abs().numpy().astype(dtype)
    kept, out = array.copy(), transform(array[:, ::-1])
    assert isinstance(out, np.ndarray) and out.dtype == np.float32 and np.array_equal(array, kept)
    np.testing.assert_allclose(out, transform(torch.as_tensor(kept.astype(np.float32)))[:, range(9, -1, -1)], atol=1e-6)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"a window needs low < high, got \[5, 5\]"):
        WindowToUnit(5, 5)
    with pytest.raises(ValueError, match="0 <= lower < upper <= 100, got 99 and 1"):
        PercentilesToUnit(99, 1)
    with pytest.raises(KeyError):
        WindowToUnitd("image", 0, 1)({})
    assert WindowToUnitd("image", 0, 1, allow_missing_keys=True)({}) == {}
