# SPDX-License-Identifier: Apache-2.0
"""Spatial transforms for dictionaries."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import get_track_meta
from monai.transforms import Crop, InvertibleTransform, MapTransform
from monai.utils import convert_to_tensor, ensure_tuple_rep

from ahm_transforms.spatial.array import ResampleToSpacing


class ResampleToSpacingd(MapTransform, InvertibleTransform):
    """`ResampleToSpacing` for dictionaries; entries such as ``image_path`` beside the image are no concern of it.

    Args:
        keys: entries to resample, each from its own spacing.
        spacing_mm: new spacing, one number or one per axis; 0 or below keeps an axis.
        mode: ``bilinear`` or ``nearest``, one for all keys or one per key.
        allow_missing_keys: whether an absent entry is passed over.
    """

    def __init__(
        self,
        keys: KeysCollection,
        spacing_mm: Sequence[float] | float,
        *,
        mode: Sequence[str] | str = "bilinear",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.resamplers = [ResampleToSpacing(spacing_mm, each) for each in ensure_tuple_rep(mode, len(self.keys))]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with the keys resampled."""
        result = dict(data)
        for key, resample in self.key_iterator(result, self.resamplers):
            result[key] = resample(result[key])
        return result

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Bring the keys back to their old grids."""
        result = dict(data)
        for key, resample in self.key_iterator(result, self.resamplers):
            result[key] = resample.inverse(result[key])
        return result


class CropBlockd(MapTransform, InvertibleTransform):
    """Keep only the block of the image that the case asks for, so that one file can serve as several cases.

    A case without the entry keeps the whole image. The entry itself is removed.

    Args:
        keys: entries to crop, of shape [C, *S].
        block_key: entry that holds ``[[start, stop], ...]``, voxels along each spatial axis as stored on disk.
        allow_missing_keys: whether an absent image is passed over.

    Example:
        >>> import torch
        >>> case = {"image": torch.zeros(1, 8, 8), "block": [[0, 8], [2, 6]]}
        >>> CropBlockd("image")(case)["image"].shape
        torch.Size([1, 8, 4])
    """

    def __init__(
        self, keys: KeysCollection, block_key: Hashable = "block", *, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.block_key = block_key
        self.cropper = Crop()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with the keys cropped."""
        result = dict(data)
        block = result.pop(self.block_key, None)
        for key in self.key_iterator(result):
            shape = result[key].shape[1:]
            starts, stops = zip(*(block or [(0, size) for size in shape]), strict=True)
            cropped = self.cropper(result[key], Crop.compute_slices(roi_start=starts, roi_end=stops))
            # a copy, or else a cache would hold the whole image for each of its blocks
            result[key] = cropped if block is None else cropped.clone()
        return result

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Pad the keys back to the size of the whole image."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.cropper.inverse(result[key])
        return result


class ClearOutsideBlockd(MapTransform):
    """Set voxels outside the block of `CropBlockd` to 0 and leave the size as it is.

    A case without the entry stays as it is. The entry itself stays, too.

    Args:
        keys: entries to clear, of shape [C, *S].
        block_key: entry that holds ``[[start, stop], ...]``, voxels along each spatial axis as stored on disk.
        allow_missing_keys: whether an absent image is passed over.
    """

    def __init__(
        self, keys: KeysCollection, block_key: Hashable = "block", *, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.block_key = block_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with the keys cleared."""
        result = dict(data)
        if result.get(self.block_key) is None:
            return result
        inside = (slice(None), *(slice(*ends) for ends in result[self.block_key]))
        for key in self.key_iterator(result):
            image: torch.Tensor = convert_to_tensor(result[key], track_meta=get_track_meta())
            cleared = torch.zeros_like(image)
            cleared[inside] = image[inside]
            result[key] = cleared
        return result
