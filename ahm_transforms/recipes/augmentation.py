# SPDX-License-Identifier: Apache-2.0
"""The random steps that chains share: flips for all, mild affine maps and intensities for labelled tasks."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from math import pi

from monai.config import KeysCollection
from monai.transforms import (
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandScaleIntensityd,
    RandShiftIntensityd,
    Transform,
)
from monai.utils import ensure_tuple

from ahm_transforms.intensity import WindowToUnitd

_ROTATION = pi / 12  # 15 degrees


def flips(
    keys: KeysCollection, axes: Iterable[int], prob: float, *, allow_missing_keys: bool = False
) -> list[Transform]:
    """Return flips along ``axes``, each with chance ``prob``; 0 leaves them out."""
    return [
        RandFlipd(keys, prob=prob, spatial_axis=axis, allow_missing_keys=allow_missing_keys) for axis in axes if prob
    ]


def augmentation(
    image_key: Hashable,
    mask_key: Hashable,
    *,
    spatial_dims: int,
    flip_prob: float,
    flip_axes: int | Sequence[int] | None = None,
    augment: bool = True,
) -> list[Transform]:
    """Return random steps for an image in [0, 1] and the label map or mask that may lie on its grid.

    Flips; with ``augment`` also rotations by up to 15 degrees with scaling by up to a tenth (one case in five; the
    mask follows by its nearest voxels, and what comes from outside is 0), and on the image alone contrast (gamma),
    scale, shift and noise, cut off at 0 and 1.

    Args:
        image_key: entry with the image, of shape [C, *S].
        mask_key: entry with classes, of shape [1, *S]; may be absent.
        spatial_dims: 2 or 3.
        flip_prob: chance of a flip along each axis.
        flip_axes: the axes to flip; None takes all.
        augment: whether there is more than flips.
    """
    keys = (image_key, mask_key)
    axes = range(spatial_dims) if flip_axes is None else ensure_tuple(flip_axes)
    steps = flips(keys, axes, flip_prob, allow_missing_keys=True)
    if not augment:
        return steps
    affine = RandAffined(
        keys,
        prob=0.2,
        rotate_range=(_ROTATION,) * (3 if spatial_dims == 3 else 1),
        scale_range=(0.1,) * spatial_dims,
        mode=("bilinear", "nearest"),
        padding_mode="zeros",
        allow_missing_keys=True,
    )
    return [
        *steps,
        affine,
        RandAdjustContrastd(image_key, prob=0.2, gamma=(0.7, 1.5)),
        RandScaleIntensityd(image_key, factors=0.1, prob=0.2),
        RandShiftIntensityd(image_key, offsets=0.1, prob=0.2),
        RandGaussianNoised(image_key, prob=0.2, std=0.05),
        WindowToUnitd(image_key, 0.0, 1.0),
    ]
