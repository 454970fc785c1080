# SPDX-License-Identifier: Apache-2.0
"""Open every case before training starts, so that a bad file does not end a run hours later."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pydicom
import torch
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing, is_no_channel
from monai.utils import ensure_tuple
from PIL import Image

from ahm_transforms.io._types import Case, Geometry, LeftOut
from ahm_transforms.io.dicom import transfer_syntax
from ahm_transforms.io.memory import available_memory
from ahm_transforms.io.progress import with_bar
from ahm_transforms.io.reader import IMAGE_SUFFIXES, NIFTI_SUFFIXES, has_suffix, is_nifti_or_picture, load_image
from ahm_transforms.io.remembered import Remembered
from ahm_transforms.io.seen import FEW_VALUES, Seen, recall, remember, warn

LOGGER = logging.getLogger(__name__)

_BYTES_PER_VOXEL = 12  # while one image is read and looked at, with its label
_LOOKS = 16  # along each axis
_PLACES = 256  # the same, to tell copies

Inspect = Callable[[Case, MetaTensor], frozenset[str]]
"""Look at a case's label beside its image; return the classes that occur, or raise a ValueError with the reason."""


class Checked(NamedTuple):
    """The cases that can be read, their geometry and classes by case id, and the others with the reason."""

    cases: list[Case]
    geometry: dict[str, Geometry]
    classes: dict[str, frozenset[str]]
    bad: list[LeftOut]


def check_cases(
    cases: Sequence[Case],
    *,
    spatial_dims: int,
    min_size: Sequence[int] | int | None = None,
    channels: int | None = None,
    pictures: bool | None = None,
    inspect: Inspect | None = None,
    cache_dir: str | Path | None = None,
) -> Checked:
    """Read every case with the reader that training uses, each image once, however many cases are blocks of it.

    Cases that hold NaN or a single value stay: a warning names them, and the recipes' normalisation copes. So do those
    that look like label maps, which are asked about where nothing else is inspected, and copies of other patients'.

    Args:
        cases: what to read.
        spatial_dims: 3 wants volumes; 2 takes pictures and volumes, of which slices are used.
        min_size: smallest usable size in voxels, one number or one per spatial axis.
        channels: how many channels every image must have; None takes any.
        pictures: whether volumes are bad, of which 2 would take slices, but for NIfTI files of one slice; or, if False,
            pictures; None takes both.
        inspect: what else to look at, while the image is there; its ``repr`` says what decides the answer.
        cache_dir: folder that remembers the cases without fault, which are not read again until a file of theirs
            changes.
    """
    images: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        images[str(case["image"])].append(case)
    asked = (spatial_dims, min_size, channels, pictures)
    memory = None if cache_dir is None else Remembered(cache_dir, "check", *asked, repr(inspect))
    results = {image: recall(group, memory) for image, group in images.items()}
    unknown = [image for image, seen in results.items() if not seen]
    if len(unknown) < len(images):
        LOGGER.info("%d of %d images are as they were last checked.", len(images) - len(unknown), len(images))
    with ThreadPoolExecutor(max_workers=_workers([images[image][0]["image"] for image in unknown])) as pool:
        checked = pool.map(lambda image: _check(images[image], *asked, inspect), unknown)
        for image, group in zip(unknown, with_bar(checked, "Checking images", len(unknown)), strict=True):
            results[image] = group
            remember(group, memory)
    seen = [result for group in results.values() for result in group]
    called = case_names(cases)
    warn(seen, called)
    good = [result for result in seen if not result.bad]
    return Checked(
        cases=[result.case for result in good],
        geometry={result.case["case_id"]: result.geometry for result in good},
        classes={result.case["case_id"]: result.classes for result in good},
        bad=[LeftOut(called[result.case["case_id"]], result.bad) for result in seen if result.bad],
    )


def case_name(case: Case) -> str:
    """Return how a report calls a case: its file's name, or the id of a DICOM series and its folder's name."""
    image = case["image"]
    if isinstance(image, list):
        return f"{case['case_id']} in {Path(image[0]).parent.name}"
    return Path(image).name


def case_names(cases: Sequence[Case]) -> dict[str, str]:
    """Return by case id how a report calls these cases; files of one name have their id beside it."""
    places = {str(case["image"]): case_name(case) for case in cases}
    counts = Counter(places.values())
    ids = {case["case_id"]: places[str(case["image"])] for case in cases}
    return {case_id: name if counts[name] == 1 else f"{name} ({case_id})" for case_id, name in ids.items()}


def unreadable(error: OSError) -> str:
    """Return what a report says about a file that `load_image` could not read."""
    cause = error.__cause__ or error
    return "cannot be read: " + " ".join(f"{type(cause).__name__}: {cause}".split())[:200]


def axes_problem(size: Sequence[int], *, pictures: bool | None, spatial_dims: int) -> str:
    """Return what is wrong with an image of this size, or an empty text; ``pictures=None`` takes both kinds."""
    if spatial_dims == 3 and len(size) == 3 and 1 in size:
        return f"has size {tuple(size)}, a single slice: expected a volume for spatial_dims=3"
    if pictures is None or (len(size) == 2) == pictures:
        return ""
    if pictures:
        return f"has size {tuple(size)}, expected a picture for modality image2d; mr and ct take slices of volumes"
    wanted = "expected a volume for modality mr or ct: pass --modality image2d --spatial_dims 2 for pictures"
    return f"has size {tuple(size)}, {wanted}"


def _workers(images: Sequence[str | list[str]]) -> int:
    """Return how many images to read at a time: no more than fit in memory if each is as large as the largest."""
    largest = max(map(_voxels, images), default=0)
    return max(1, min(8, os.cpu_count() or 1, available_memory() // (_BYTES_PER_VOXEL * max(1, largest))))


def _voxels(image: str | list[str]) -> int:
    """Return what an image's header says; 0 if it cannot be read, of which the check tells the reason."""
    try:
        files = ensure_tuple(image)
        if has_suffix(files[0], NIFTI_SUFFIXES):
            return math.prod(nib.load(files[0]).shape)
        if has_suffix(files[0], IMAGE_SUFFIXES):
            with Image.open(files[0]) as picture:
                return math.prod(picture.size)
        header = pydicom.dcmread(files[0], specific_tags=["Rows", "Columns"], stop_before_pixels=True)
        return int(header.Rows) * int(header.Columns) * len(files)
    except Exception:  # every format has its own errors for damaged files
        return 0


def _check(
    cases: Sequence[Case],
    spatial_dims: int,
    min_size: Sequence[int] | int | None,
    channels: int | None,
    pictures: bool | None,
    inspect: Inspect | None,
) -> list[Seen]:
    """Return what is to be said about the cases of one image."""
    image = cases[0]["image"]
    first = image if isinstance(image, str) else image[0]
    if not Path(first).exists():
        return [Seen(case, bad="the file does not exist") for case in cases]
    try:
        loaded = load_image(image, pictures=bool(pictures))
    except OSError as error:
        syntax = "" if is_nifti_or_picture(first) else transfer_syntax(first)
        named = f"cannot be read (transfer syntax {syntax})" if syntax else "cannot be read"
        return [Seen(case, bad=unreadable(error).replace("cannot be read", named, 1)) for case in cases]
    if problem := _shape_problem(loaded, spatial_dims, min_size, channels, pictures):
        return [Seen(case, bad=problem) for case in cases]
    geometry, odd = _geometry(loaded), _odd_values(loaded)
    like_labels = inspect is None and not odd and _has_few_values(loaded.as_tensor())
    digest = _digest(loaded.as_tensor())
    seen = [Seen(case, odd=odd, like_labels=like_labels, digest=digest, geometry=geometry) for case in cases]
    return [_inspected(each, loaded, inspect) for each in seen]


def _inspected(seen: Seen, image: MetaTensor, inspect: Inspect | None) -> Seen:
    if inspect is None:
        return seen
    try:
        return seen._replace(classes=inspect(seen.case, image))
    except ValueError as error:
        return seen._replace(bad=str(error))


def _shape_problem(
    image: MetaTensor, dims: int, min_size: Sequence[int] | int | None, channels: int | None, pictures: bool | None
) -> str | None:
    shape = _geometry(image).shape
    channel_dim = image.meta["original_channel_dim"]
    found = 1 if is_no_channel(channel_dim) else image.shape[int(channel_dim)]
    if problem := axes_problem(shape, pictures=pictures, spatial_dims=dims):
        return problem
    if len(shape) < dims or image.ndim - len(shape) > 1:
        return f"has shape {tuple(image.shape)}, expected {dims} spatial axes and at most one of channels"
    if channels is not None and found != channels:
        return f"has {found} channel(s), expected {channels}: pass --in_channels {found} or leave the file out"
    least = (min_size or 1,) * dims if isinstance(min_size, int | None) else tuple(min_size)
    if any(size < low for size, low in zip(shape[:dims], least, strict=True)):
        return f"has size {shape[:dims]}, smaller than one patch {least}: pass a smaller patch_size or leave it out"
    return None


def _geometry(image: MetaTensor) -> Geometry:
    shape = [int(size) for size in image.meta["spatial_shape"]]
    spacing = affine_to_spacing(image.affine, len(shape)).tolist()
    order = list(range(len(shape)))
    if len(shape) == 3:
        order = np.argsort(nib.orientations.io_orientation(image.affine.numpy())[:, 0]).tolist()
    return Geometry(tuple(shape[i] for i in order), tuple(round(spacing[i], 4) for i in order))


def _odd_values(image: MetaTensor) -> str:
    low, high = (float(value) for value in torch.aminmax(image.as_tensor()))  # NaN and infinity show in them
    if not (math.isfinite(low) and math.isfinite(high)):
        return "NaN or infinite"
    return "constant" if low == high else ""


def _digest(image: torch.Tensor) -> str:
    """Return what no other image has, but for a copy: a hash of its shape and values, of large ones at some places."""
    some = image[tuple(slice(None, None, max(1, size // _PLACES)) for size in image.shape)]
    key = str(tuple(image.shape)).encode()
    return hashlib.blake2b(some.contiguous().numpy().data, key=key, digest_size=16).hexdigest()


def _has_few_values(image: torch.Tensor) -> bool:
    """Return whether there are no more than `FEW_VALUES`, all of them whole numbers."""
    some = image[tuple(slice(None, None, max(1, size // _LOOKS)) for size in image.shape)]  # of most images that is all
    return _are_few(some.unique()) and _are_few(
        image.permute(*range(image.ndim)[::-1]).flatten().unique_consecutive().unique()
    )


def _are_few(values: torch.Tensor) -> bool:
    return len(values) <= FEW_VALUES and torch.equal(values, values.round())
