# SPDX-License-Identifier: Apache-2.0
"""The random steps that chains share: flips for all, mild affine maps and intensities for labelled tasks."""

from __future__ import annotations

import logging
import re
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
from monai.utils import ensure_tuple, ensure_tuple_rep

from ahm_transforms.intensity import WindowToUnitd

logger = logging.getLogger(__name__)

_ROTATION = pi / 12  # 15 degrees
_ENDS = {  # of the axes of RAS
    0: [("left", "right")],
    1: [("anterior", "posterior")],
    2: [("superior", "inferior"), ("upper", "lower")],
}
STRONGEST = 5  # each random step comes in every case then
Strength = float | str | Sequence[float]


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
    augment: Strength = True,
) -> list[Transform]:
    """Return random steps for an image in [0, 1] and the label map or mask that may lie on its grid.

    Flips, then moves: rotations with zooms, which the mask follows by its nearest voxels; what comes from outside is 0.
    Then, on the image alone, intensities: contrast (gamma), scale, shift and noise, cut off at 0 and 1.

    At strength 1 each comes in one case of five, rotations are up to 15 degrees, zooms, scales and shifts up to a
    tenth, gamma is from 0.7 to 1.5 and noise has a standard deviation of 0.05. At strength 3 each comes in three of
    five and goes three times as far, gamma to the third power; at 0 there are only flips.

    Args:
        image_key: entry with the image, of shape [C, *S].
        mask_key: entry with classes, of shape [1, *S]; may be absent.
        spatial_dims: 2 or 3.
        flip_prob: chance of a flip along each axis.
        flip_axes: the axes to flip; None takes all.
        augment: a strength from 0 to 5, or two, of moves and of intensities; True is 1 and False 0, as texts, too.

    Raises:
        ValueError: for another strength.
    """
    keys = (image_key, mask_key)
    axes = _flip_axes(flip_axes, spatial_dims)
    moves, intensities = _strengths(augment)
    return [
        *flips(keys, axes, flip_prob, allow_missing_keys=True),
        *(_moves(keys, spatial_dims, moves) if moves else []),
        *(_intensities(image_key, intensities) if intensities else []),
    ]


def warn_of_flips(classes: Iterable[str], *, spatial_dims: int, flip_axes: int | Sequence[int] | None = None) -> None:
    """Log a warning when flips swap what the names of classes tell apart: left and right, anterior and posterior.

    It is no error, as looks may tell such classes apart, too. Where they do not, flips cost much: on the anterior and
    posterior part of the hippocampus, with seven labelled patients, 4 points of Dice (``benchmarks/STUDY.md``, log 50).

    Args:
        classes: their names.
        spatial_dims: 2 or 3.
        flip_axes: the axes that are flipped, those of RAS in volumes; None for all.
    """
    axes = _flip_axes(flip_axes, spatial_dims)
    words = set(re.findall(r"[a-z]+", " ".join(classes).lower()))
    swapped = {axis: ends for axis in axes for ends in _ENDS.get(axis, []) if words.issuperset(ends)}
    kept = [axis for axis in axes if axis not in swapped]
    for axis, ends in swapped.items():
        logger.warning(
            "classes are called %r and %r, and flips along axis %d swap these. Unless looks alone tell such classes "
            "apart, leave these flips out: flip_axes=%s.",
            *(*ends, axis, f"{kept}, or [] for none" if kept else "[]"),
        )


def _flip_axes(flip_axes: int | Sequence[int] | None, spatial_dims: int) -> tuple[int, ...]:
    return tuple(range(spatial_dims)) if flip_axes is None else ensure_tuple(flip_axes)


def _moves(keys: KeysCollection, spatial_dims: int, strength: float) -> list[Transform]:
    affine = RandAffined(
        keys,
        prob=strength / STRONGEST,
        rotate_range=(_ROTATION * strength,) * (3 if spatial_dims == 3 else 1),
        scale_range=(0.1 * strength,) * spatial_dims,
        mode=("bilinear", "nearest"),
        padding_mode="zeros",
        allow_missing_keys=True,
    )
    return [affine]


def _intensities(key: Hashable, strength: float) -> list[Transform]:
    prob, tenth = strength / STRONGEST, 0.1 * strength
    return [
        RandAdjustContrastd(key, prob=prob, gamma=(0.7**strength, 1.5**strength)),
        RandScaleIntensityd(key, factors=tenth, prob=prob),
        RandShiftIntensityd(key, offsets=tenth, prob=prob),
        RandGaussianNoised(key, prob=prob, std=tenth / 2),
        WindowToUnitd(key, 0.0, 1.0),
    ]


def _strengths(augment: Strength) -> tuple[float, float]:
    """Of moves and of intensities; command lines hand on true and false as text."""
    named = {"true": 1.0, "false": 0.0}
    try:
        moves, intensities = (float(named.get(str(each).lower(), each)) for each in ensure_tuple_rep(augment, 2))
        if 0 <= moves <= STRONGEST and 0 <= intensities <= STRONGEST:
            return moves, intensities
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"augment: expected a strength from 0 to {STRONGEST}, two of them (moves, intensities), true or false, got "
        f"{augment!r}."
    )
