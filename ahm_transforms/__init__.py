# SPDX-License-Identifier: Apache-2.0
"""From files to tensors: transforms and readers without weights or optimisers.

Imported on demand, so that ``import ahm_transforms`` stays quick: `ahm_transforms.io` finds, lists, splits and writes
studies; `ahm_transforms.recipes` builds whole preprocessing chains.
"""

from __future__ import annotations

from ahm_transforms.masking import (
    AdaptiveHardMask,
    AdaptiveHardMaskD,
    AdaptiveHardMaskd,
    AdaptiveHardMaskDict,
    RandBoxMask,
    RandBoxMaskD,
    RandBoxMaskd,
    RandBoxMaskDict,
    RandPatchMask,
    RandPatchMaskD,
    RandPatchMaskd,
    RandPatchMaskDict,
)

__all__ = [
    "AdaptiveHardMask",
    "AdaptiveHardMaskD",
    "AdaptiveHardMaskDict",
    "AdaptiveHardMaskd",
    "RandBoxMask",
    "RandBoxMaskD",
    "RandBoxMaskDict",
    "RandBoxMaskd",
    "RandPatchMask",
    "RandPatchMaskD",
    "RandPatchMaskDict",
    "RandPatchMaskd",
]
