# SPDX-License-Identifier: Apache-2.0
"""How good a reconstruction is where it was hidden, and how good a masker is at finding hard places.

All functions return one number per image, ``[B]``, on the device of their input.
"""

from __future__ import annotations

import torch
from monai.metrics.regression import KernelType, compute_ssim_and_cs
from torch import Tensor

from ahm_networks.rl.functional import masked_mean

__all__ = ["composite", "hidden_psnr", "hidden_ssim", "mask_overlap", "rank_correlation"]


def composite(image: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
    """The reconstruction with visible voxels put back."""
    return torch.where(mask, pred.to(image.dtype), image)


def hidden_psnr(pred: Tensor, image: Tensor, mask: Tensor, *, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio over hidden voxels, in dB; 100 where the reconstruction is perfect."""
    error = (pred.float() - image.float()).square().mean(1, keepdim=True)
    mse = masked_mean(error.flatten(1), mask.flatten(1))
    return 10.0 * torch.log10(data_range**2 / mse.clamp_min(1e-10 * data_range**2))


def hidden_ssim(
    pred: Tensor, image: Tensor, mask: Tensor, *, data_range: float = 1.0, window: int = 7, sigma: float = 1.5
) -> Tensor:
    """Structural similarity of the composite to the image, averaged over hidden voxels (Wang et al. 2004).

    Voxels nearer to the border than half a window have no similarity and do not count.

    Raises:
        ValueError: when the image is smaller than the window.
    """
    dims = image.ndim - 2
    if min(image.shape[2:]) < window:
        raise ValueError(f"image: expected at least {window} voxels per axis, got {tuple(image.shape[2:])}.")
    shown = composite(image, pred, mask)
    similarity, _ = compute_ssim_and_cs(
        shown.float(),
        image.float(),
        spatial_dims=dims,
        kernel_size=[window] * dims,
        kernel_sigma=[sigma] * dims,
        data_range=data_range,
        kernel_type=KernelType.GAUSSIAN,
    )
    edge = window // 2
    inner = mask[(slice(None), slice(None), *(slice(edge, size - edge) for size in mask.shape[2:]))]
    return masked_mean(similarity.mean(1).flatten(1), inner.flatten(1))


def rank_correlation(score: Tensor, error: Tensor, where: Tensor) -> Tensor:
    """Spearman's correlation of two cell maps over the marked cells; 0 where either is constant.

    Args:
        score: ``[B, N]``, such as a policy map.
        error: ``[B, N]``, the true errors.
        where: ``[B, N]`` bool, cells whose error is known.
    """
    a, b = _centred_ranks(score, where), _centred_ranks(error, where)
    spread = (a.square().sum(1) * b.square().sum(1)).sqrt()
    return (a * b).sum(1) / spread.clamp_min(1e-6)


def mask_overlap(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of the hidden cells of paired images, ``[B]``."""
    first, second = first.flatten(1), second.flatten(1)
    return (first & second).sum(1) / (first | second).sum(1).clamp_min(1)


def _centred_ranks(values: Tensor, where: Tensor) -> Tensor:
    """Mean ranks (ties share theirs) among the marked places, centred; 0 elsewhere."""
    less = (values.unsqueeze(2) > values.unsqueeze(1)) & where.unsqueeze(1)
    ties = (values.unsqueeze(2) == values.unsqueeze(1)) & where.unsqueeze(1)
    rank = less.sum(2) + 0.5 * ties.sum(2)
    return torch.where(where, rank - masked_mean(rank, where).unsqueeze(1), 0.0)
