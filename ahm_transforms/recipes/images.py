# SPDX-License-Identifier: Apache-2.0
"""Chains for images alone, as pretraining needs them, and the steps that all chains share."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import Compose, EnsureChannelFirstd, EnsureTyped, Orientationd, Transform
from monai.utils import ensure_tuple_rep

from ahm_transforms.intensity import PercentilesToUnitd, WindowToUnitd
from ahm_transforms.io import LoadCased
from ahm_transforms.masking import patch_shape
from ahm_transforms.recipes.augmentation import flips
from ahm_transforms.recipes.checks import CheckShaped
from ahm_transforms.spatial import CropBlockd, FixedCropSamplesd, RandCropSamplesd, ResampleToSpacingd

MODALITIES = ("mr", "ct", "image2d")
DEFAULT_WINDOW_HU = (-175.0, 250.0)


def deterministic(
    modality: str,
    *,
    spatial_dims: int,
    spacing_mm: Sequence[float] | float | None = None,
    channels: int = 1,
    window_hu: tuple[float, float] = DEFAULT_WINDOW_HU,
    percentiles: tuple[float, float] = (1.0, 99.0),
    keys: KeysCollection = "image",
) -> Compose:
    """Return the chain from a path to a `MetaTensor` [channels, *S] of float32 in [0, 1].

    Volumes are turned to RAS; where ``spacing_mm`` is given, images are resampled. Everything that moves voxels can be
    undone with `Invertd`. Other entries of the dictionary are left alone.

    Args:
        modality: ``mr`` (two percentiles become 0 and 1, each channel by itself), ``ct`` (a window in HU) or
            ``image2d`` (PNG, TIFF, JPEG, NIfTI of one slice, DICOM without a position in space; percentiles of all
            channels together).
        spatial_dims: 2 or 3. In 2D, MR and CT stay volumes here; the crops take slices of them.
        spacing_mm: voxel spacing to resample to, one number or one per axis; None keeps what they have. A pixel of a
            picture counts as 1 mm: 2 halves its sides.
        channels: channels every image must have.
        window_hu: HU that become 0 and 1.
        percentiles: percentiles that become 0 and 1.
        keys: entries that hold images.

    Raises:
        ValueError: unknown modality, or options that do not go together.

    Example:
        >>> chain = deterministic("ct", spatial_dims=3, spacing_mm=1.5)
        >>> [type(step).__name__ for step in chain.transforms][-2:]
        ['Orientationd', 'ResampleToSpacingd']
    """
    _check_options(modality, spatial_dims)
    intensity = intensity_steps(
        keys, modality, spatial_dims=spatial_dims, channels=channels, window_hu=window_hu, percentiles=percentiles
    )
    return Compose([*intensity, *grid_steps(keys, modality, spatial_dims=spatial_dims, spacing_mm=spacing_mm)])


def intensity_steps(
    keys: KeysCollection,
    modality: str,
    *,
    spatial_dims: int,
    channels: int = 1,
    window_hu: tuple[float, float] = DEFAULT_WINDOW_HU,
    percentiles: tuple[float, float] = (1.0, 99.0),
) -> list[Transform]:
    """Return the first half of `deterministic`: from a path to values in [0, 1] on the scan's own grid."""
    if modality == "ct":
        to_unit = WindowToUnitd(keys, *window_hu)
    else:
        to_unit = PercentilesToUnitd(keys, *percentiles, channel_wise=modality == "mr")
    picture = modality == "image2d"
    fits = CheckShaped(keys, channels, spatial_dims=spatial_dims, picture=picture)
    return [LoadCased(keys, pictures=picture), EnsureChannelFirstd(keys), fits, to_unit]


def grid_steps(
    keys: KeysCollection,
    modality: str,
    *,
    spatial_dims: int,
    spacing_mm: Sequence[float] | float | None = None,
    mode: Sequence[str] | str = "bilinear",
) -> list[Transform]:
    """Return the second half of `deterministic`, for everything that lies on the image's grid.

    Args:
        keys: images and, after them, what lies on their grid.
        modality: as in `deterministic`.
        spatial_dims: as in `deterministic`.
        spacing_mm: as in `deterministic`.
        mode: how to resample, one for all keys or one per key.

    Raises:
        ValueError: unknown modality, or options that do not go together.
    """
    _check_options(modality, spatial_dims)
    steps: list[Transform] = [CropBlockd(keys)]
    if modality != "image2d":
        steps.append(Orientationd(keys, axcodes="RAS", labels=None))
    if spacing_mm is not None:
        steps.append(ResampleToSpacingd(keys, _axes_mm(spacing_mm, spatial_dims), mode=mode))
    return steps


def random_crops(
    *,
    spatial_dims: int,
    crop_size: Sequence[int] | int,
    samples_per_case: int = 1,
    flip_prob: float = 0.5,
    keys: KeysCollection = "image",
) -> Compose:
    """Return the random part of training: crops that rather hold something, flipped along each axis at random.

    The result is a list of dictionaries with plain float32 tensors [C, *crop_size]. Images smaller than the crop are
    padded with zeros; in 2D, volumes give random slices.

    Args:
        spatial_dims: 2 or 3.
        crop_size: voxels along each axis.
        samples_per_case: how many crops come from one case.
        flip_prob: chance of a flip along each axis; 0 leaves flips out.
        keys: entries that hold images.
    """
    crop = RandCropSamplesd(keys, patch_shape(crop_size, spatial_dims, "crop_size"), samples_per_case)
    plain = EnsureTyped(keys, dtype=torch.float32, track_meta=False)
    return Compose([crop, *flips(keys, range(spatial_dims), flip_prob), plain])


def fixed_crops(
    *,
    spatial_dims: int,
    crop_size: Sequence[int] | int,
    samples_per_case: int = 1,
    seed: int = 0,
    keys: KeysCollection = "image",
) -> Compose:
    """Return the crops for validation: as `random_crops` without flips, but the same ones every time.

    Args:
        spatial_dims: 2 or 3.
        crop_size: voxels along each axis.
        samples_per_case: how many crops come from one case.
        seed: seed of the places.
        keys: entries that hold images.
    """
    return Compose(
        FixedCropSamplesd(keys, patch_shape(crop_size, spatial_dims, "crop_size"), samples_per_case, seed=seed)
    )


def preprocessing(
    modality: str,
    *,
    spatial_dims: int,
    crop_size: Sequence[int] | int,
    samples_per_case: int = 1,
    flip_prob: float = 0.5,
    **options: Any,
) -> Compose:
    """Return the whole training chain, flat, so that `CacheDataset` keeps everything before the random crops.

    Nothing in it writes into its input: ``CacheDataset(..., copy_cache=False)`` is safe and twice as fast.

    Args:
        modality: ``mr``, ``ct`` or ``image2d``.
        spatial_dims: 2 or 3.
        crop_size: voxels along each axis.
        samples_per_case: how many crops come from one case.
        flip_prob: chance of a flip along each axis.
        options: further arguments of `deterministic`.
    """
    crops = random_crops(
        spatial_dims=spatial_dims,
        crop_size=crop_size,
        samples_per_case=samples_per_case,
        flip_prob=flip_prob,
        keys=options.get("keys", "image"),
    )
    return _join(deterministic(modality, spatial_dims=spatial_dims, **options), crops)


def validation_preprocessing(
    modality: str,
    *,
    spatial_dims: int,
    crop_size: Sequence[int] | int,
    samples_per_case: int = 1,
    seed: int = 0,
    **options: Any,
) -> Compose:
    """Return the whole validation chain: that of training, with crops that are the same every time.

    Args:
        modality: ``mr``, ``ct`` or ``image2d``.
        spatial_dims: 2 or 3.
        crop_size: voxels along each axis.
        samples_per_case: how many crops come from one case.
        seed: seed of the places.
        options: further arguments of `deterministic`.
    """
    crops = fixed_crops(
        spatial_dims=spatial_dims,
        crop_size=crop_size,
        samples_per_case=samples_per_case,
        seed=seed,
        keys=options.get("keys", "image"),
    )
    return _join(deterministic(modality, spatial_dims=spatial_dims, **options), crops)


def _join(*chains: Compose) -> Compose:
    """Return one flat Compose; a nested one would count as random as a whole and never be cached."""
    return Compose([step for chain in chains for step in chain.transforms])


def _axes_mm(spacing_mm: Sequence[float] | float, spatial_dims: int) -> tuple[float, ...]:
    """Return the spacing for three axes; slices of a 2D recipe keep their distance."""
    try:
        given = ensure_tuple_rep(spacing_mm, spatial_dims)
    except ValueError:
        given = ()
    if not given or not all(isinstance(number, Real) for number in given):
        raise ValueError(f"spacing_mm: expected 1 or {spatial_dims} numbers, got {spacing_mm!r}.")
    return (*given, *(0.0,) * (3 - len(given)))


def _check_options(modality: str, spatial_dims: int) -> None:
    if modality not in MODALITIES:
        raise ValueError(f"modality must be one of {', '.join(MODALITIES)}, got {modality!r}.")
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
    if modality == "image2d" and spatial_dims != 2:
        raise ValueError(f"modality image2d goes with spatial_dims=2, got {spatial_dims}.")
