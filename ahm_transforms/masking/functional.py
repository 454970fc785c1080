# SPDX-License-Identifier: Apache-2.0
"""The mask maths, written once: cells of a patch grid, their voxels, and exact counts.

A *cell* is one patch of the grid that covers an image. Where the patch size does not divide the image, the last
cell of an axis is smaller: it is kept, never dropped. Everything here is vectorised, works for any number of spatial
axes (`image_to_cells` for one to three), and draws no random numbers: the caller brings the scores. ``True`` means
hidden, everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import cast

import torch
from monai.networks.layers.factories import Pool
from monai.utils import ensure_tuple_rep
from torch import Tensor

__all__ = [
    "boxes_to_mask",
    "cell_count",
    "cells_to_image",
    "check_mask_ratio",
    "choose_cells",
    "grid_shape",
    "hidden_fraction",
    "image_to_cells",
    "patch_shape",
]


def check_mask_ratio(mask_ratio: float, name: str = "mask_ratio") -> float:
    """Return ``mask_ratio`` if it lies in the open interval (0, 1).

    Raises:
        ValueError: for any other value (NaN included).
    """
    if not isinstance(mask_ratio, Real) or not 0.0 < mask_ratio < 1.0:
        raise ValueError(f"{name}: expected a number between 0 and 1 (both excluded), got {mask_ratio!r}.")
    return float(mask_ratio)


def patch_shape(patch_size: int | Sequence[int], spatial_dims: int, name: str = "patch_size") -> tuple[int, ...]:
    """Spell out the patch size, in voxels, for each of ``spatial_dims`` axes; ``name`` is what errors call it.

    Raises:
        ValueError: when a size is below 1 or not whole, or the number of sizes does not fit.
    """
    try:
        sizes = ensure_tuple_rep(patch_size, spatial_dims)
        patch = tuple(int(p) for p in sizes)
    except ValueError as error:
        raise ValueError(f"{name}: expected 1 or {spatial_dims} sizes, got {patch_size!r}.") from error
    if min(patch) < 1 or patch != sizes:
        raise ValueError(f"{name}: expected sizes of at least 1 voxel, in whole voxels, got {patch_size!r}.")
    return patch


def grid_shape(spatial_size: Sequence[int], patch_size: int | Sequence[int]) -> tuple[int, ...]:
    """Count the cells along each axis, partial cells at the border included.

    Raises:
        ValueError: when the image is smaller than one patch along an axis.

    Example:
        >>> grid_shape((40, 59), (16, 16))
        (3, 4)
    """
    patch = patch_shape(patch_size, len(spatial_size))
    if any(s < p for s, p in zip(spatial_size, patch, strict=True)):
        raise ValueError(
            f"patch_size: expected at most the image size {tuple(spatial_size)}, got {patch}; "
            "take smaller patches or pad the image."
        )
    return tuple(-(-int(s) // p) for s, p in zip(spatial_size, patch, strict=True))


def cell_count(mask_ratio: float | Tensor, cells: int | Tensor) -> int | Tensor:
    """Round ``mask_ratio * cells`` half up, for numbers or tensors alike, in double precision.

    Example:
        >>> cell_count(0.75, 27)
        20
    """
    count = mask_ratio * (cells.double() if isinstance(cells, Tensor) else cells) + 0.5
    return count.long() if isinstance(count, Tensor) else int(count)


def cells_to_image(cells: Tensor, patch_size: int | Sequence[int], spatial_size: Sequence[int]) -> Tensor:
    """Spread every cell over its voxels.

    Args:
        cells: ``[B, C, *G]``, any dtype.
        patch_size: voxels per cell.
        spatial_size: ``S`` of the image.

    Returns:
        ``[B, C, *S]`` of the same dtype.
    """
    patch = patch_shape(patch_size, len(spatial_size))
    grid = grid_shape(spatial_size, patch)
    if tuple(cells.shape[2:]) != grid:
        raise ValueError(f"cells: expected a grid of {grid} for an image of {tuple(spatial_size)}, got {cells.shape}.")
    # The last axis first: it is repeated while the tensor is small, the others then copy whole rows.
    for axis in range(cells.ndim - 1, 1, -1):
        size, step = int(spatial_size[axis - 2]), patch[axis - 2]
        repeated = cells.unsqueeze(axis + 1).expand(*cells.shape[: axis + 1], step, *cells.shape[axis + 1 :])
        cells = repeated.flatten(axis, axis + 1).narrow(axis, 0, size)
    return cells


def image_to_cells(image: Tensor, patch_size: int | Sequence[int], *, reduction: str = "mean") -> Tensor:
    """Reduce the voxels of each cell to one number.

    Args:
        image: ``[B, C, *S]`` with one to three spatial axes; float32 or float64, all else is read as float32 (a sum
            overflows in half precision).
        patch_size: voxels per cell.
        reduction: ``mean`` over the voxels that the cell really has, or their ``max``.

    Returns:
        ``[B, C, *G]``.

    Raises:
        ValueError: for another reduction, more axes, or an image smaller than a patch.
    """
    if image.ndim not in (3, 4, 5):
        raise ValueError(f"image: expected [B, C, *S] with 1 to 3 spatial axes, got shape {tuple(image.shape)}.")
    patch = patch_shape(patch_size, image.ndim - 2)
    grid_shape(image.shape[2:], patch)
    image = image if image.dtype in (torch.float32, torch.float64) else image.float()
    if reduction == "mean":
        mean = Pool[Pool.AVG, len(patch)](patch, stride=patch, ceil_mode=True, count_include_pad=False)
        return cast(Tensor, mean(image))
    if reduction == "max":
        return cast(Tensor, Pool[Pool.MAX, len(patch)](patch, stride=patch, ceil_mode=True)(image))
    raise ValueError(f"reduction: expected 'mean' or 'max', got {reduction!r}.")


def choose_cells(scores: Tensor, count: int | Tensor, *, allowed: Tensor | None = None) -> Tensor:
    """Pick exactly ``count`` cells of each image, those with the highest scores.

    Random scores give a uniform draw without replacement; perturbed logits give a policy's draw.

    Args:
        scores: ``[B, 1, *G]`` float.
        count: one number for all images, or ``[B]``; a tensor count is capped at the number of allowed cells, which
            saves the wait for a value from the device.
        allowed: ``[B, 1, *G]`` bool, cells that may be picked; all when missing.

    Returns:
        ``[B, 1, *G]`` bool, ``True`` = hidden.

    Raises:
        ValueError: when a plain-number ``count`` exceeds the (allowed) cells.
    """
    flat = scores.flatten(1)
    if isinstance(count, int):
        _check_enough_cells(count, flat.shape[1], allowed)
    elif allowed is not None:
        count = torch.minimum(count, allowed.flatten(1).sum(1))
    if allowed is not None:
        flat = flat.masked_fill(~allowed.flatten(1), float("-inf"))
    hidden = torch.zeros_like(flat, dtype=torch.bool)
    if isinstance(count, int):
        # 1 and not True: torch.jit.trace knows no scatter of a bool
        return hidden.scatter_(1, flat.topk(count, sorted=False).indices, 1).view_as(scores)
    position = torch.arange(flat.shape[1], device=flat.device)
    return hidden.scatter_(1, flat.argsort(descending=True), position < count.unsqueeze(1)).view_as(scores)


def boxes_to_mask(start: Tensor, size: Tensor, spatial_size: Sequence[int]) -> Tensor:
    """Unite axis-aligned boxes to one mask per image; what reaches beyond the image is cut off.

    Args:
        start: ``[B, T, D]`` first voxel of each of ``T`` boxes.
        size: ``[B, T, D]`` box sizes in voxels; a size of 0 hides nothing.
        spatial_size: ``S`` of the image, ``D`` numbers.

    Returns:
        ``[B, 1, *S]`` bool, ``True`` = hidden.
    """
    # A voxel is inside a box if it is inside along every axis: the product of one 0/1 vector per axis. Summing these
    # products over the boxes is a matrix product, far cheaper than one whole mask per box.
    inside = [_inside(start[..., axis, None], size[..., axis, None], int(n)) for axis, n in enumerate(spatial_size)]
    rows = torch.ones_like(inside[0][..., :1])
    for along_axis in inside[:-1]:
        rows = (rows.unsqueeze(-1) * along_axis.unsqueeze(-2)).flatten(2)
    hits = rows.transpose(1, 2) @ inside[-1]
    return (hits > 0).view(start.shape[0], 1, *spatial_size)


def hidden_fraction(mask: Tensor, within: Tensor | None = None) -> Tensor:
    """Share of hidden voxels (or cells) of each image, ``[B]``, optionally only of those ``within``."""
    hidden = mask.flatten(1).float()
    if within is None:
        return hidden.mean(1)
    weight = within.expand_as(mask).flatten(1).float()
    return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1.0)


def _inside(first: Tensor, size: Tensor, length: int) -> Tensor:
    """Return 1.0 for each of ``length`` voxels that lies in ``[first, first + size)``, else 0.0: ``[B, T, length]``."""
    voxel = torch.arange(length, device=first.device)
    return ((voxel >= first) & (voxel < first + size)).float()


def _check_enough_cells(count: int, cells: int, allowed: Tensor | None) -> None:
    available = cells if allowed is None else int(allowed.flatten(1).sum(1).min())
    if not 0 <= count <= available:
        raise ValueError(
            f"count: asked to hide {count} cells, but only {available} of {cells} cells may be hidden; "
            "lower mask_ratio, take smaller patches or widen the foreground."
        )
