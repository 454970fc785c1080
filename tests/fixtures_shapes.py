# SPDX-License-Identifier: Apache-2.0
"""Shapes by which a test can tell whether an image and its label are in step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from monai.transforms import Compose

_BLOB = 10  # voxels across, about


def blobs(shape: Sequence[int]) -> np.ndarray:
    """Return shapes without symmetry; about half of the voxels are True."""
    coarse = [size // _BLOB + 2 for size in shape]
    noise = torch.rand(1, 1, *coarse, generator=torch.Generator().manual_seed(0))
    mode = {2: "bilinear", 3: "trilinear"}[len(shape)]
    smooth = torch.nn.functional.interpolate(noise, tuple(shape), mode=mode)[0, 0].numpy()
    return smooth > np.median(smooth)


def agreement(image: torch.Tensor, label: torch.Tensor) -> float:
    """Return the share of voxels in which both are set or both are not; about one half where they are out of step."""
    return float(((image > 0.5) == (label > 0.5)).float().mean())


def surely(steps: Compose) -> Compose:
    """Let every random step but the flips happen every time."""
    for step in steps.transforms:
        if hasattr(step, "prob") and type(step).__name__ != "RandFlipd":
            step.prob = 1.0
    return steps
