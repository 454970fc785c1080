# SPDX-License-Identifier: Apache-2.0
"""Two views of every crop, for contrastive pretraining."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from itertools import combinations
from typing import Any
from zlib import crc32

import torch
from monai.transforms import (
    Compose,
    CopyItemsd,
    EnsureTyped,
    OneOf,
    RandAdjustContrastd,
    RandCoarseDropoutd,
    RandCoarseShuffled,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandRotate90d,
    RandScaleCropd,
    RandScaleIntensityd,
    RandShiftIntensityd,
    Resized,
    Transform,
)

from ahm_transforms.intensity import WindowToUnitd
from ahm_transforms.masking import patch_shape
from ahm_transforms.recipes.augmentation import flips

VIEWS = ("image", "view")
_SMALLEST = 8  # voxels along an axis: an eighth of it is the side of the smallest hole


def contrastive_views(
    *, spatial_dims: int, crop_size: Sequence[int] | int, smallest_part: float = 0.7, flip_prob: float = 0.5
) -> Compose:
    """Return the steps from a crop ``image`` [C, *crop_size] in [0, 1] to two views of it, ``image`` and ``view``.

    Each view draws for itself, after SimCLR (Chen et al. 2020) and MONAI's example of self-supervised pretraining: a
    part of the crop resized to all of it; flips and, in planes whose axes are equally long, turns by 90 degrees; scale,
    shift, contrast (gamma), smoothing and noise; little boxes of noise, or noise around a few large boxes; little
    boxes whose voxels are shuffled. Views are plain float32 tensors of the crop's shape, cut off at 0 and 1.

    It follows `random_crops`, whose lists it takes one by one: only views of one crop belong together.

    Args:
        spatial_dims: 2 or 3.
        crop_size: voxels along each axis.
        smallest_part: least share of each axis that a view keeps of the crop, in (0.5, 1]: above one half, any two
            views have something in common.
        flip_prob: chance of a flip along each axis; 0 leaves flips out.

    Raises:
        ValueError: a crop of less than 8 voxels along an axis, or a share out of range.

    Example:
        >>> views = contrastive_views(spatial_dims=2, crop_size=32)({"image": torch.rand(1, 32, 32)})
        >>> [tuple(views[key].shape) for key in ("image", "view")]
        [(1, 32, 32), (1, 32, 32)]
    """
    size = patch_shape(crop_size, spatial_dims, "crop_size")
    if min(size) < _SMALLEST:
        raise ValueError(f"crop_size: views need at least {_SMALLEST} voxels along each axis, got {size}.")
    if not 0.5 < smallest_part <= 1:
        raise ValueError(f"smallest_part: expected a share in (0.5, 1], got {smallest_part}.")
    return Compose(
        [
            CopyItemsd(VIEWS[0], names=VIEWS[1]),
            *(step for key in VIEWS for step in _view_steps(key, size, smallest_part, flip_prob)),
            EnsureTyped(VIEWS, dtype=torch.float32, track_meta=False),
        ]
    )


def fixed_contrastive_views(*, seed: int = 0, **options: Any) -> Compose:
    """Return the views for validation: as `contrastive_views`, but one crop has the same two views every time.

    Args:
        seed: seed of the views.
        options: arguments of `contrastive_views`.

    Raises:
        ValueError: as `contrastive_views`.
    """
    return Compose(FixedViewsd(contrastive_views(**options), seed=seed))


class FixedViewsd(Transform):
    """Let random steps draw numbers that only the seed and the values of ``image`` decide.

    Other images get other numbers, the same image the same ones: in every epoch, run, order and process.

    Args:
        steps: random steps from one dictionary to another.
        seed: seed of the numbers.
    """

    def __init__(self, steps: Compose, *, seed: int = 0) -> None:
        self.steps, self.seed = steps, seed

    def __call__(self, data: Mapping[Hashable, Any]) -> Any:
        """Return what the steps make of ``data``."""
        values = torch.as_tensor(data[VIEWS[0]]).numpy(force=True)
        steps = deepcopy(self.steps)  # threads that fill a cache share this transform
        return steps.set_random_state(seed=crc32(values.tobytes(), self.seed))(data)


def _view_steps(key: str, size: tuple[int, ...], smallest_part: float, flip_prob: float) -> list[Transform]:
    """Return the random steps of one view."""
    mode = "bilinear" if len(size) == 2 else "trilinear"
    turns = [axes for axes in combinations(range(len(size)), 2) if size[axes[0]] == size[axes[1]]]
    return [
        RandScaleCropd(key, roi_scale=smallest_part, max_roi_scale=1.0, random_size=True),
        Resized(key, size, mode=mode),
        *flips(key, range(len(size)), flip_prob),
        *(RandRotate90d(key, prob=0.5, max_k=3, spatial_axes=axes) for axes in turns),
        RandAdjustContrastd(key, prob=0.5, gamma=(0.6, 1.6)),
        RandScaleIntensityd(key, prob=0.5, factors=0.3),
        RandShiftIntensityd(key, prob=0.5, offsets=0.1),
        RandGaussianSmoothd(key, prob=0.3, **{f"sigma_{axis}": (0.25, 1.0) for axis in "xyz"[: len(size)]}),
        RandGaussianNoised(key, prob=0.5, std=0.05),
        *_coarse_steps(key, size),
        WindowToUnitd(key, 0.0, 1.0),
    ]


def _coarse_steps(key: str, size: tuple[int, ...]) -> list[Transform]:
    """Return what disturbs whole boxes; MONAI fills them with noise between the image's least and greatest value."""
    small, middle, large = ([max(1, round(side * part)) for side in size] for part in (1 / 8, 1 / 3, 2 / 3))
    boxes = RandCoarseDropoutd(key, prob=0.5, holes=6, spatial_size=small, max_spatial_size=middle)
    around = RandCoarseDropoutd(
        key, prob=0.5, holes=6, spatial_size=middle, max_spatial_size=large, dropout_holes=False
    )
    return [OneOf([boxes, around]), RandCoarseShuffled(key, prob=0.5, holes=10, spatial_size=small)]
