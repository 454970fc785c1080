# SPDX-License-Identifier: Apache-2.0
"""Cut samples of one size out of images of any size, rather where something is to be seen."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import MapTransform, Randomizable
from monai.transforms.traits import MultiSampleTrait
from monai.utils import convert_to_tensor

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
        if np.ndim(crop_size) == 0:
            raise ValueError(f"crop_size: expected a size for each axis of the window, got {crop_size!r}.")
        if min(crop_size) < 1 or samples < 1 or tries < 1:
            raise ValueError(
                f"crop_size, samples and tries must be at least 1, got {tuple(crop_size)}, {samples} and {tries}."
            )
        self.crop_size, self.samples, self.tries = tuple(crop_size), samples, tries

    def _crop(self, data: Mapping[Hashable, Any], rng: np.random.RandomState) -> list[dict[Hashable, Any]]:
        images = {key: data[key] for key in self.key_iterator(dict(data))}
        _check_alike(images)
        padded = {key: _pad(img, self.crop_size) for key, img in images.items()}
        windows = self._windows(padded, rng) if padded else [()] * self.samples
        # clones: where the window is the whole image, a slice would share memory with it
        return [{**data, **{key: _copy(img[window]) for key, img in padded.items()}} for window in windows]

    def _windows(self, images: Mapping[Hashable, torch.Tensor], rng: np.random.RandomState) -> list[tuple]:
        """Return an index into [C, *S] for each sample."""
        first = next(iter(images.values()))
        return [_choose_window(first, self.crop_size, self.tries, rng) for _ in range(self.samples)]


class RandCropSamplesd(_CropSamplesd, Randomizable):
    """Cut ``samples`` windows at random places; returns a list of dictionaries with plain tensors [C, *crop_size].

    Images smaller than the window are padded with zeros, evenly on both sides. Where the window has fewer axes than
    the image, each sample is a random slice along the remaining last axes: 2D crops of volumes. Of up to ``tries``
    places the first is taken of which a quarter is no air, or else the fullest. All keys are cut at one place, judged
    by the first of them.

    With a label map among the keys, the share ``foreground_share`` of the windows is laid around a voxel of a class
    instead: the class is drawn among those that the map holds, all equally likely, and then one of its voxels, so that
    rare and small classes are seen as often as others. Without foreground, or without a map, windows are as above.

    Args:
        keys: entries to crop, of one shape [C, *S].
        crop_size: voxels of the window along each axis.
        samples: how many windows come out of each image.
        tries: how many places are drawn at most; 1 takes every place equally often.
        label_key: the one of ``keys`` that holds class indices [1, *S], 0 for background.
        foreground_share: chance of each window to lie around a voxel of a class.
        allow_missing_keys: whether an absent entry is passed over.

    Raises:
        ValueError: a number out of range, a share without label, a label that is not one of the keys, or, on call,
            more axes in the window than in the image, or entries of different sizes.

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
        label_key: Hashable | None = None,
        foreground_share: float = 0.0,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, crop_size, samples, tries=tries, allow_missing_keys=allow_missing_keys)
        if not 0 <= foreground_share <= 1:
            raise ValueError(f"foreground_share must be in [0, 1], got {foreground_share}.")
        if label_key not in self.keys and (label_key is not None or foreground_share):
            raise ValueError(f"foreground_share needs label_key, one of the keys {self.keys}, got {label_key!r}.")
        self.label_key, self.foreground_share = label_key, foreground_share

    def __call__(self, data: Mapping[Hashable, Any]) -> list[dict[Hashable, Any]]:
        """Return one dictionary for each window."""
        return self._crop(data, self.R)

    def _windows(self, images: Mapping[Hashable, torch.Tensor], rng: np.random.RandomState) -> list[tuple]:
        if not self.foreground_share or self.label_key not in images:
            return super()._windows(images, rng)
        first, classes = next(iter(images.values())), _Classes(images[self.label_key])
        windows = []
        for _ in range(self.samples):
            voxel = classes.draw_voxel(rng) if rng.random_sample() < self.foreground_share else None
            if voxel is None:
                windows.append(_choose_window(first, self.crop_size, self.tries, rng))
            else:
                windows.append(_draw_window(first.shape[1:], self.crop_size, rng, voxel))
        return windows


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


class _Classes:
    """Where the classes of one label map [1, *S] are; each is looked for once, and only if it is drawn and there."""

    def __init__(self, label: torch.Tensor) -> None:
        values = label[0].numpy(force=True)
        # images from disk vary fastest along their first axis; turned round they are scanned in the order of memory
        self.is_turned = values.flags.f_contiguous
        self.values = values.T if self.is_turned else values
        self.highest = int(values.max())
        self.places: dict[int, np.ndarray] = {}

    @cached_property
    def present(self) -> set[int]:
        """All values that the map holds."""
        if self.highest == 1:
            return {1}  # all that is asked for, without a look at the map
        return set(torch.from_numpy(self.values).flatten().unique_consecutive().unique().tolist())

    def draw_voxel(self, rng: np.random.RandomState) -> tuple[int, ...] | None:
        """Return a voxel of a class that is drawn among those there, or None where all is background."""
        for index in 1 + rng.permutation(self.highest):  # the first that is there: all are equally likely
            if index not in self.present:
                continue
            if index not in self.places:
                self.places[index] = np.flatnonzero(self.values == index)
            places = self.places[index]
            voxel = np.unravel_index(places[rng.randint(len(places))], self.values.shape)
            return tuple(int(i) for i in (voxel[::-1] if self.is_turned else voxel))
        return None


def _check_alike(images: Mapping[Hashable, NdarrayOrTensor]) -> None:
    sizes = {key: tuple(img.shape[1:]) for key, img in images.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"keys: expected entries of one size, got {sizes}.")


def _pad(img: NdarrayOrTensor, crop_size: Sequence[int]) -> torch.Tensor:
    """Return ``img`` as a plain tensor, at least as large as the window along the window's axes."""
    plain: torch.Tensor = convert_to_tensor(img)
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


def _draw_window(
    sizes: Sequence[int], crop_size: Sequence[int], rng: np.random.RandomState, voxel: Sequence[int] | None = None
) -> tuple:
    """Return the index of a window, all places being equally likely; with ``voxel``, all that hold it."""
    ranges = [(0, have - want) for have, want in zip(sizes, crop_size, strict=False)]
    ranges += [(0, have - 1) for have in sizes[len(crop_size) :]]
    if voxel is not None:
        wants = [*crop_size, *(1,) * (len(sizes) - len(crop_size))]
        held = zip(ranges, voxel, wants, strict=True)
        ranges = [(max(low, at + 1 - want), min(high, at)) for (low, high), at, want in held]
    starts = [rng.randint(low, high + 1) for low, high in ranges]
    slices = [slice(start, start + want) for start, want in zip(starts, crop_size, strict=False)]
    return (slice(None), *slices, *starts[len(crop_size) :])


def _copy(crop: torch.Tensor) -> torch.Tensor:
    return crop.clone(memory_format=torch.contiguous_format)
