# SPDX-License-Identifier: Apache-2.0
"""Metrics agree with numbers worked out by hand, with MONAI's and with SciPy's."""

from __future__ import annotations

import pytest
import torch
from monai.metrics import SSIMMetric
from scipy.stats import spearmanr

from ahm_engines.metrics import composite, hidden_psnr, hidden_ssim, mask_overlap, rank_correlation


def pair(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)


def test_composite_takes_hidden_voxels_from_the_prediction_and_all_else_from_the_image() -> None:
    image, pred = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[8.0, 9.0]]]])
    shown = composite(image, pred.bfloat16(), torch.tensor([[[[False, True]]]]))
    assert shown.flatten().tolist() == [1.0, 9.0] and shown.dtype == image.dtype


@pytest.mark.parametrize(("error", "data_range", "psnr"), [(0.1, 1.0, 20.0), (0.01, 1.0, 40.0), (25.5, 255.0, 20.0)])
def test_psnr_by_hand(error: float, data_range: float, psnr: float) -> None:
    image = torch.zeros(1, 1, 4, 4)
    mask = torch.zeros_like(image, dtype=torch.bool)
    mask[..., :2] = True
    pred = torch.where(mask, error, 1e3)  # visible voxels do not count
    assert float(hidden_psnr(pred, image, mask, data_range=data_range)) == pytest.approx(psnr, abs=1e-3)


def test_psnr_is_one_number_per_image_and_100_where_perfect() -> None:
    image = torch.zeros(2, 3, 4, 4, 4)
    pred = image.clone()
    pred[1] = 1.0
    psnr = hidden_psnr(pred, image, torch.ones(2, 1, 4, 4, 4, dtype=torch.bool))
    assert psnr.tolist() == pytest.approx([100.0, 0.0])


@pytest.mark.parametrize("shape", [(2, 1, 16, 20), (2, 3, 16, 16), (1, 1, 9, 10, 11)])
def test_ssim_of_a_wholly_hidden_image_is_monais(shape: tuple[int, ...]) -> None:
    image, pred = pair(*shape)
    mask = torch.ones(shape[0], 1, *shape[2:], dtype=torch.bool)
    monai = SSIMMetric(spatial_dims=len(shape) - 2, data_range=1.0, win_size=7, kernel_sigma=1.5)
    assert torch.allclose(hidden_ssim(pred, image, mask), monai(pred, image).flatten(), atol=1e-5)


def test_ssim_of_flat_images_by_hand() -> None:
    image, pred = torch.full((1, 1, 9, 9), 0.5), torch.full((1, 1, 9, 9), 0.25)
    expected = (2 * 0.5 * 0.25 + 0.01**2) / (0.5**2 + 0.25**2 + 0.01**2)  # equal (no) contrast: luminance alone
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    assert float(hidden_ssim(pred, image, mask)) == pytest.approx(expected, abs=1e-4)


def test_ssim_ignores_visible_voxels_of_the_prediction() -> None:
    image, pred = pair(1, 1, 16, 16)
    mask = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    mask[..., 4:8, 4:8] = True
    spoilt = torch.where(mask, pred, 7.0)
    assert torch.equal(hidden_ssim(spoilt, image, mask), hidden_ssim(pred, image, mask))
    assert float(hidden_ssim(torch.where(mask, image, 7.0), image, mask)) == pytest.approx(1.0, abs=1e-5)


def test_ssim_needs_room_for_its_window() -> None:
    image = torch.zeros(1, 1, 6, 9)
    with pytest.raises(ValueError, match=r"image: expected at least 7 voxels per axis, got \(6, 9\)"):
        hidden_ssim(image, image, image.bool())


@pytest.mark.parametrize("levels", [1000, 4], ids=["hardly any ties", "many ties"])
def test_rank_correlation_is_scipys_over_the_marked_cells(levels: int) -> None:
    generator = torch.Generator().manual_seed(levels)
    score = torch.randint(levels, (5, 40), generator=generator).float()
    error = score + torch.randint(levels, (5, 40), generator=generator)
    where = torch.rand(5, 40, generator=generator) > 0.4
    expected = [spearmanr(s[w], e[w]).statistic for s, e, w in zip(score, error, where, strict=True)]
    assert rank_correlation(score, error, where).tolist() == pytest.approx(expected, abs=1e-5)


def test_rank_correlation_sees_order_only_and_its_sign() -> None:
    score = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    where = torch.ones(1, 4, dtype=torch.bool)
    assert float(rank_correlation(score, score.exp(), where)) == pytest.approx(1.0)
    assert float(rank_correlation(score, -score.exp(), where)) == pytest.approx(-1.0)


def test_rank_correlation_of_a_constant_or_of_nothing_is_zero() -> None:
    varied, flat = torch.arange(4.0).view(1, 4), torch.ones(1, 4)
    everywhere = torch.ones(1, 4, dtype=torch.bool)
    assert float(rank_correlation(flat, varied, everywhere)) == 0.0
    assert float(rank_correlation(varied, flat, everywhere)) == 0.0
    assert float(rank_correlation(varied, varied, ~everywhere)) == 0.0


def test_overlap_by_hand() -> None:
    first = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]).bool().view(4, 1, 2, 2)
    second = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool().view(4, 1, 2, 2)
    assert mask_overlap(first, second).tolist() == pytest.approx([1.0, 0.0, 1 / 3, 0.0])
