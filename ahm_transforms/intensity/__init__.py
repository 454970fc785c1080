# SPDX-License-Identifier: Apache-2.0
"""Intensity transforms that MONAI lacks, as arrays and as dictionaries."""

from ahm_transforms.intensity.array import PercentilesToUnit, WindowToUnit
from ahm_transforms.intensity.dictionary import PercentilesToUnitd, WindowToUnitd

__all__ = ["PercentilesToUnit", "PercentilesToUnitd", "WindowToUnit", "WindowToUnitd"]
