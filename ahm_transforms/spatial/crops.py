# SPDX-License-Identifier: Apache-2.0
"""Cut samples of one size out of images of any size, rather where something is to be seen."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Randomizable
from monai.transforms.traits import MultiSampleTrait

_EMPTY = 0.05  # at or below this value, in images scaled to [0, 1], a voxel is air
_LOOKS = 16
_FILLED = 0.25  # a window with this share of other voxels is good enough


class _CropSamplesd(MapTransform, MultiSampleTrait):
    def __init__(
        self,
        keys: KeysCollection,
        crop_size: Sequence[int],
        samples: int,
        *,
        tries: int,
        allow_missing_keys: bool,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if min(crop_size) < 1 or samples < 1 or tries < 1:
            raise ValueError(
                f"crop_size, samples and tries must be at least 1, got {tuple(crop_size)}, {samples} and {tries}."
            )
        self.crop_size, self.samples, self.tries = tuple(crop_size), samples, tries

    def _crop(self, data: Mapping[Hashable, Any], rng: np.random.RandomState) -> list[dict[Hashable, Any]]:
        padded = {key: _pad(data[key], self.crop_size) for key in self.key_iterator(dict(data))}
        first = next(iter(padded.values()))
        windows = [_choose_window(first, self.crop_size, self.tries, rng) for _ in range(self.samples)]
        return [{**data, **{key: img[window].contiguous() for key, img in padded.items()}} for window in windows]


class RandCropSamplesd(_CropSamplesd, Randomizable):
    """Cut ``samples`` windows at random places; returns a list of dictionaries with plain tensors [C, *crop_size].

    Images smaller than the window are padded with zeros, evenly on both sides. Where the window has fewer axes than
    the image, each sample is a random slice along the remaining last axes: 2D crops of volumes. Of up to ``tries``
    places the first is taken of which a quarter is no air, or else the fullest. All keys are cut at one place, judged
    by the first of them.

    Args:
        keys: entries to crop, of one shape [C, *S].
        crop_size: voxels of the window along each axis.
        samples: how many windows come out of each image.
        tries: how many places are drawn at most; 1 takes every place equally often.
        allow_missing_keys: whether an absent entry is passed over.

    Raises:
        ValueError: a number below 1, or, on call, more axes in the window than in the image.

    Example:
        >>> crop = RandCropSamplesd("image", (4, 4), samples=2)
        >>> [item["image"].shape for item in crop({"image": torch.rand(1, 6, 3, 5)})]
        [torch.Size([1, 4, 4]), torch.Size([1, 4, 4])]
    """

    def __init__(
        self,
        keys: KeysCollection,
        crop_size: Sequence[int],
        samples: int = 1,
        *,
        tries: int = 4,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, crop_size, samples, tries=tries, allow_missing_keys=allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> list[dict[Hashable, Any]]:
        """Return one dictionary for each window."""
        return self._crop(data, self.R)


class FixedCropSamplesd(_CropSamplesd):
    """Cut windows as `RandCropSamplesd` does, but the same ones on every call: for validation.

    Args:
        keys: entries to crop, of one shape [C, *S].
        crop_size: voxels of the window along each axis.
        samples: how many windows come out of each image.
        seed: seed of the draw that every call repeats.
        tries: how many places are drawn at most for each window.
        allow_missing_keys: whether an absent entry is passed over.
    """

    def __init__(
        self,
        keys: KeysCollection,
        crop_size: Sequence[int],
        samples: int = 1,
        *,
        seed: int = 0,
        tries: int = 4,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, crop_size, samples, tries=tries, allow_missing_keys=allow_missing_keys)
        self.seed = seed

    def __call__(self, data: Mapping[Hashable, Any]) -> list[dict[Hashable, Any]]:
        """Return one dictionary for each window."""
        return self._crop(data, np.random.RandomState(self.seed))


def _pad(img: torch.Tensor, crop_size: Sequence[int]) -> torch.Tensor:
    """Return ``img`` as a plain tensor, at least as large as the window along the window's axes."""
    plain = img.as_tensor() if isinstance(img, MetaTensor) else img
    sizes = plain.shape[1:]
    if len(sizes) < len(crop_size):
        raise ValueError(f"crop_size {tuple(crop_size)} has more axes than the image, whose size is {tuple(sizes)}.")
    missing = [max(0, want - have) for want, have in zip(crop_size, sizes, strict=False)]
    if not any(missing):
        return plain
    missing += [0] * (len(sizes) - len(missing))
    return torch.nn.functional.pad(plain, [end for lack in missing[::-1] for end in (lack // 2, lack - lack // 2)])


def _choose_window(img: torch.Tensor, crop_size: Sequence[int], tries: int, rng: np.random.RandomState) -> tuple:
    """Return an index into [C, *S]: the first drawn window that is filled, or else the fullest."""
    best: tuple = ()
    fullest = -1.0
    for _ in range(tries):
        window = _draw_window(img.shape[1:], crop_size, rng)
        filled = _filled_share(img[window]) if tries > 1 else 1.0
        if filled > fullest:
            best, fullest = window, filled
        if fullest >= _FILLED:
            break
    return best


def _filled_share(crop: torch.Tensor) -> float:
    """Return the share of voxels that are no air, from about `_LOOKS` of them along each axis."""
    steps = [slice(None, None, max(1, size // _LOOKS)) for size in crop.shape[1:]]
    return float((crop[(slice(None), *steps)] > _EMPTY).float().mean())


def _draw_window(sizes: Sequence[int], crop_size: Sequence[int], rng: np.random.RandomState) -> tuple:
    starts = [rng.randint(have - want + 1) for have, want in zip(sizes, crop_size, strict=False)]
    slices = [slice(start, start + want) for start, want in zip(starts, crop_size, strict=True)]
    return (slice(None), *slices, *(rng.randint(size) for size in sizes[len(crop_size) :]))
