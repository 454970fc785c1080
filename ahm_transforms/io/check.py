# SPDX-License-Identifier: Apache-2.0
"""Open every case before training starts, so that a bad file does not end a run hours later."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing, is_no_channel

from ahm_transforms.io._types import Case, Geometry, LeftOut
from ahm_transforms.io.dicom import transfer_syntax
from ahm_transforms.io.reader import load_image

LOGGER = logging.getLogger(__name__)


class Checked(NamedTuple):
    """The cases that can be read, their geometry by case id, and the others with the reason."""

    cases: list[Case]
    geometry: dict[str, Geometry]
    bad: list[LeftOut]


def check_cases(
    cases: Sequence[Case],
    *,
    spatial_dims: int,
    min_size: Sequence[int] | int | None = None,
    channels: int | None = None,
) -> Checked:
    """Read every case with the reader that training uses.

    Cases that hold NaN or a single value stay: a warning names them, and the recipes' normalisation copes.

    Args:
        cases: what to read.
        spatial_dims: 3 wants volumes; 2 takes pictures and volumes, of which slices are used.
        min_size: smallest usable size in voxels, one number or one per spatial axis.
        channels: how many channels every image must have; None takes any.
    """
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        results = list(pool.map(lambda case: _check(case, spatial_dims, min_size, channels), cases))
    named = list(zip(cases, results, strict=True))
    odd = [f"{case_name(case)} ({result[1]})" for case, result in named if not isinstance(result, str) and result[1]]
    if odd:
        LOGGER.warning("%d image(s) hold NaN, infinite or constant values: %s", len(odd), ", ".join(odd))
    return Checked(
        cases=[case for case, result in named if not isinstance(result, str)],
        geometry={case["case_id"]: result[0] for case, result in named if not isinstance(result, str)},
        bad=[LeftOut(case_name(case), result) for case, result in named if isinstance(result, str)],
    )


def case_name(case: Case) -> str:
    """Return how a report calls a case: its file's name, or the id of a DICOM series and its folder's name."""
    image = case["image"]
    if isinstance(image, list):
        return f"{case['case_id']} in {Path(image[0]).parent.name}"
    return Path(image).name


def _check(
    case: Case, spatial_dims: int, min_size: Sequence[int] | int | None, channels: int | None
) -> tuple[Geometry, str] | str:
    """Return geometry and what is odd about the values, or the reason why the case cannot be used."""
    image = case["image"]
    first = image if isinstance(image, str) else image[0]
    if not Path(first).exists():
        return "the file does not exist"
    try:
        loaded = load_image(image)
    except OSError as error:
        syntax = transfer_syntax(first) if isinstance(image, list) else ""
        cause = " ".join(f"{type(error.__cause__).__name__}: {error.__cause__}".split())[:200]
        return f"cannot be read{f' (transfer syntax {syntax})' if syntax else ''}: {cause}"
    problem = _shape_problem(loaded, spatial_dims, min_size, channels)
    return problem or (_geometry(loaded), _odd_values(loaded))


def _shape_problem(
    image: MetaTensor, dims: int, min_size: Sequence[int] | int | None, channels: int | None
) -> str | None:
    shape = _geometry(image).shape
    channel_dim = image.meta["original_channel_dim"]
    found = 1 if is_no_channel(channel_dim) else image.shape[int(channel_dim)]
    if len(shape) < dims or image.ndim - len(shape) > 1:
        return f"has shape {tuple(image.shape)}, expected {dims} spatial axes and at most one of channels"
    if channels is not None and found != channels:
        return f"has {found} channel(s), expected {channels}: pass --channels {found} or leave the file out"
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
