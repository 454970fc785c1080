# SPDX-License-Identifier: Apache-2.0
"""Spatial transforms that MONAI lacks, as arrays and as dictionaries."""

from ahm_transforms.spatial.array import ResampleToSpacing
from ahm_transforms.spatial.crops import FixedCropSamplesd, RandCropSamplesd
from ahm_transforms.spatial.dictionary import ClearOutsideBlockd, CropBlockd, ResampleToSpacingd

__all__ = [
    "ClearOutsideBlockd",
    "CropBlockd",
    "FixedCropSamplesd",
    "RandCropSamplesd",
    "ResampleToSpacing",
    "ResampleToSpacingd",
]
