# SPDX-License-Identifier: Apache-2.0
"""Chains for images with one class each."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    ConcatItemsd,
    DeleteItemsd,
    EnsureChannelFirstd,
    EnsureTyped,
    Lambdad,
    MapTransform,
    Resized,
    Transform,
)

from ahm_transforms.io.labels import load_map
from ahm_transforms.masking import patch_shape
from ahm_transforms.recipes.augmentation import Strength, augmentation
from ahm_transforms.recipes.checks import OnImageGridd
from ahm_transforms.recipes.images import grid_steps, intensity_steps

_MASK = "mask_channel"


def classification_deterministic(
    modality: str,
    *,
    spatial_dims: int,
    image_size: Sequence[int] | int,
    mask_channel: bool = False,
    spacing_mm: Sequence[float] | float | None = None,
    **options: Any,
) -> Compose:
    """Return the chain from a path to a whole image of one size: a `MetaTensor` [C, *image_size] in [0, 1].

    The image is prepared as by `deterministic` and then resized: each new voxel is the mean of those it covers, so
    that nothing aliases when images shrink. Other entries, such as ``label``, stay.

    Args:
        modality: ``mr``, ``ct`` or ``image2d``.
        spatial_dims: 2 for ``image2d``, 3 for the others.
        image_size: voxels along each axis.
        mask_channel: whether the file ``mask`` (above 0 is inside) becomes one more channel, the last, of 0 and 1.
            Without, an entry ``mask`` is removed.
        spacing_mm: voxel spacing to resample volumes to first; None keeps what they have.
        options: ``channels`` (without the mask), ``window_hu`` and ``percentiles`` of `deterministic`.

    Raises:
        ValueError: options that do not go together; on call, a mask on another grid than its image.

    Example:
        >>> chain = classification_deterministic("image2d", spatial_dims=2, image_size=224)
        >>> [type(step).__name__ for step in chain.transforms][-2:]
        ['Resized', 'DeleteItemsd']
    """
    if spatial_dims == 2 and modality != "image2d":
        raise ValueError(f"a 2D classifier takes pictures; {modality} scans are volumes, use spatial_dims=3 for them.")
    keys = ("image", "mask") if mask_channel else ("image",)
    resample, resize = ("bilinear", "nearest")[: len(keys)], ("area", "nearest-exact")[: len(keys)]
    return Compose(
        [
            *intensity_steps("image", modality, spatial_dims=spatial_dims, **options),
            *(_mask_steps(pictures=modality == "image2d") if mask_channel else []),
            *grid_steps(keys, modality, spatial_dims=spatial_dims, spacing_mm=spacing_mm, mode=resample),
            Resized(keys, patch_shape(image_size, spatial_dims, "image_size"), mode=resize),
            *([ConcatItemsd(keys, "image")] if mask_channel else []),
            DeleteItemsd("mask"),
        ]
    )


def classification_random(
    *,
    spatial_dims: int,
    augment: Strength = True,
    flip_prob: float = 0.5,
    flip_axes: int | Sequence[int] | None = None,
    image_channels: int | None = None,
) -> Compose:
    """Return the random part of training: flips, mild affine maps and intensity changes of plain tensors [C, *S].

    Args:
        spatial_dims: 2 or 3.
        augment: strength of rotations, zooms and intensity changes, or two: of moves and of intensities. From 0 to 5;
            True is 1 and False 0, flips only.
        flip_prob: chance of a flip along each axis; 0 leaves flips out.
        flip_axes: the axes to flip, where a mirrored image is of the same class still: 0 is left and right in volumes
            (which are RAS) and pictures; None takes all.
        image_channels: how many channels are intensities; a mask in the channels behind them moves along but keeps
            its values. None takes all for intensities.
    """
    plain = EnsureTyped(("image", _MASK), dtype=torch.float32, track_meta=False, allow_missing_keys=True)
    return Compose(
        [
            plain,  # MONAI's random steps note what they did in a MetaTensor that they leave as it is: the cached one
            SplitChannelsd("image", _MASK, image_channels),
            *augmentation(
                "image", _MASK, spatial_dims=spatial_dims, flip_prob=flip_prob, flip_axes=flip_axes, augment=augment
            ),
            plain,
            ConcatItemsd(("image", _MASK), "image", allow_missing_keys=True),
            DeleteItemsd(_MASK),
        ]
    )


class SplitChannelsd(MapTransform):
    """Move the channels behind the first ``channels`` to an entry of their own; where there are none, do nothing.

    Args:
        keys: the entry to split, of shape [C, *S].
        name: the entry that takes the rest.
        channels: how many channels stay; None keeps all.
    """

    def __init__(self, keys: KeysCollection, name: str, channels: int | None) -> None:
        super().__init__(keys)
        self.name, self.channels = name, channels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with one entry more, or none."""
        result = dict(data)
        for key in self.key_iterator(result):
            if self.channels is not None and self.channels < len(result[key]):
                result[self.name] = result[key][self.channels :]
                result[key] = result[key][: self.channels]
        return result


def _mask_steps(*, pictures: bool) -> list[Transform]:
    """Return the steps from the path of a mask to 0 and 1 [1, *S] on the grid of the image as stored."""
    load = partial(_load_mask, pictures=pictures)
    return [Lambdad("mask", load), EnsureChannelFirstd("mask", channel_dim="no_channel"), OnImageGridd("mask")]


def _load_mask(path: str, *, pictures: bool) -> MetaTensor:
    return (load_map(path, pictures=pictures) > 0).to(torch.float32)
