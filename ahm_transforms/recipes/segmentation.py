# SPDX-License-Identifier: Apache-2.0
"""Chains for images with label maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.transforms import Compose, EnsureChannelFirstd, EnsureTyped, Transform

from ahm_transforms.io import LoadLabeld
from ahm_transforms.masking import patch_shape
from ahm_transforms.recipes.augmentation import Strength, augmentation
from ahm_transforms.recipes.checks import OnImageGridd
from ahm_transforms.recipes.images import grid_steps, intensity_steps
from ahm_transforms.spatial import ClearOutsideBlockd, RandCropSamplesd

_KEYS = ("image", "label")


def segmentation_deterministic(
    modality: str,
    *,
    num_classes: int,
    label_values: Sequence[int] | None = None,
    spatial_dims: int,
    spacing_mm: Sequence[float] | float | None = None,
    **options: Any,
) -> Compose:
    """Return the chain from paths to an image as `deterministic` gives it and the label on the very same grid.

    ``image`` is a `MetaTensor` [channels, *S] of float32 in [0, 1], ``label`` one of [1, *S], uint8, with 0 for
    background. Labels are resampled to the nearest voxel. `Invertd` undoes what moves voxels.

    Args:
        modality: ``mr``, ``ct`` or ``image2d``.
        num_classes: how many classes there are beside the background.
        label_values: what the file holds for each class; None takes 1, 2, ...
        spatial_dims: 2 or 3. In 2D, MR and CT stay volumes here; the crops take slices of them.
        spacing_mm: voxel spacing to resample volumes to; None keeps what they have.
        options: ``channels``, ``window_hu`` and ``percentiles`` of `deterministic`.

    Raises:
        ValueError: options that do not go together; on call, a label on another grid than its image.

    Example:
        >>> chain = segmentation_deterministic("mr", num_classes=2, spatial_dims=3)
        >>> [type(step).__name__ for step in chain.transforms][-2:]
        ['CropBlockd', 'Orientationd']
    """
    return Compose(
        [
            *intensity_steps("image", modality, spatial_dims=spatial_dims, **options),
            *_label_steps(num_classes, label_values, pictures=modality == "image2d"),
            *grid_steps(
                _KEYS, modality, spatial_dims=spatial_dims, spacing_mm=spacing_mm, mode=("bilinear", "nearest")
            ),
        ]
    )


def segmentation_crops(
    *,
    spatial_dims: int,
    crop_size: Sequence[int] | int,
    samples_per_case: int = 1,
    foreground_share: float = 0.5,
    augment: Strength = True,
    flip_prob: float = 0.5,
    flip_axes: int | Sequence[int] | None = None,
) -> Compose:
    """Return the random part of training: crops of image and label, part of them where a class is, and augmentation.

    The result is a list of dictionaries with plain tensors: ``image`` float32 [C, *crop_size] in [0, 1], ``label``
    uint8 [1, *crop_size]. What is smaller than the crop is padded with zeros; in 2D, volumes give slices. Nothing in
    it writes into its input, so that ``CacheDataset(..., copy_cache=False)`` is safe.

    Args:
        spatial_dims: 2 or 3.
        crop_size: voxels along each axis.
        samples_per_case: how many crops come from one case.
        foreground_share: chance of a crop to lie around a voxel of a class, all classes equally often; the others lie
            anywhere.
        augment: strength of rotations, zooms and intensity changes, or two: of moves and of intensities. From 0 to 5;
            True is 1 and False 0, flips only.
        flip_prob: chance of a flip along each axis; 0 leaves flips out.
        flip_axes: the axes to flip; None takes all. Leave out 0, left and right in RAS, if sides are classes.
    """
    crop = RandCropSamplesd(
        _KEYS,
        patch_shape(crop_size, spatial_dims, "crop_size"),
        samples_per_case,
        label_key="label",
        foreground_share=foreground_share,
        tries=1,  # empty windows too: inference meets them, and a network that never saw air finds classes in it
    )
    steps = augmentation(*_KEYS, spatial_dims=spatial_dims, flip_prob=flip_prob, flip_axes=flip_axes, augment=augment)
    return Compose([crop, *steps, EnsureTyped(_KEYS, dtype=(torch.float32, torch.uint8), track_meta=False)])


def segmentation_evaluation(
    modality: str,
    *,
    num_classes: int,
    label_values: Sequence[int] | None = None,
    spatial_dims: int,
    spacing_mm: Sequence[float] | float | None = None,
    **options: Any,
) -> Compose:
    """Return the chain for scores on the scan's own grid: ``image`` as the network wants it, ``label`` as stored.

    ``label`` is a `MetaTensor` [1, *S] of uint8 on the grid of the file. Where a case is a block of a scan, voxels
    outside are background: `Invertd` fills up predictions the same way.

    Args:
        modality: ``mr``, ``ct`` or ``image2d``.
        num_classes: how many classes there are beside the background.
        label_values: what the file holds for each class; None takes 1, 2, ...
        spatial_dims: 2 or 3.
        spacing_mm: voxel spacing to resample volumes to; None keeps what they have.
        options: ``channels``, ``window_hu`` and ``percentiles`` of `deterministic`.

    Raises:
        ValueError: as `segmentation_deterministic`.
    """
    return Compose(
        [
            *intensity_steps("image", modality, spatial_dims=spatial_dims, **options),
            *_label_steps(num_classes, label_values, pictures=modality == "image2d"),
            ClearOutsideBlockd("label"),
            *grid_steps("image", modality, spatial_dims=spatial_dims, spacing_mm=spacing_mm),
        ]
    )


def _label_steps(num_classes: int, label_values: Sequence[int] | None, *, pictures: bool) -> list[Transform]:
    """Return the steps from the path of a label to classes [1, *S] on the grid of the image as stored."""
    return [
        LoadLabeld("label", num_classes=num_classes, label_values=label_values, pictures=pictures),
        EnsureChannelFirstd("label", channel_dim="no_channel"),
        OnImageGridd("label"),
    ]
