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
STRONGEST = 5  # each random step comes in every case then


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
    augment: float | str = True,
) -> list[Transform]:
    """Return random steps for an image in [0, 1] and the label map or mask that may lie on its grid.

    Flips, and unless ``augment`` is 0 rotations with scaling (the mask follows by its nearest voxels, and what comes
    from outside is 0), and on the image alone contrast (gamma), scale, shift and noise, cut off at 0 and 1. At strength
    1 each comes in one case of five, rotations are up to 15 degrees, scales and shifts up to a tenth, gamma is from 0.7
    to 1.5 and noise has a standard deviation of 0.05; at strength 3 each comes in three of five and goes three times as
    far, gamma to the third power.

    Args:
        image_key: entry with the image, of shape [C, *S].
        mask_key: entry with classes, of shape [1, *S]; may be absent.
        spatial_dims: 2 or 3.
        flip_prob: chance of a flip along each axis.
        flip_axes: the axes to flip; None takes all.
        augment: how strong, from 0 to 5; True is 1, False 0, and "true" and "false" are those.

    Raises:
        ValueError: for another strength.
    """
    keys = (image_key, mask_key)
    axes = range(spatial_dims) if flip_axes is None else ensure_tuple(flip_axes)
    steps = flips(keys, axes, flip_prob, allow_missing_keys=True)
    strength = _strength(augment)
    if not strength:
        return steps
    prob, tenth = strength / STRONGEST, 0.1 * strength
    affine = RandAffined(
        keys,
        prob=prob,
        rotate_range=(_ROTATION * strength,) * (3 if spatial_dims == 3 else 1),
        scale_range=(tenth,) * spatial_dims,
        mode=("bilinear", "nearest"),
        padding_mode="zeros",
        allow_missing_keys=True,
    )
    return [
        *steps,
        affine,
        RandAdjustContrastd(image_key, prob=prob, gamma=(0.7**strength, 1.5**strength)),
        RandScaleIntensityd(image_key, factors=tenth, prob=prob),
        RandShiftIntensityd(image_key, offsets=tenth, prob=prob),
        RandGaussianNoised(image_key, prob=prob, std=tenth / 2),
        WindowToUnitd(image_key, 0.0, 1.0),
    ]


def _strength(augment: float | str) -> float:
    """A number; command lines hand on true and false as text."""
    named = {"true": 1.0, "false": 0.0}
    try:
        strength = named.get(str(augment).lower(), augment)
        if 0 <= float(strength) <= STRONGEST:
            return float(strength)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"augment: expected a strength from 0 to {STRONGEST}, true or false, got {augment!r}.")
