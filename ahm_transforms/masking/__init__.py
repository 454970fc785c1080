# SPDX-License-Identifier: Apache-2.0
"""Hide parts of images: the mask maths (`functional`) and MONAI transforms in array and dictionary form."""

from __future__ import annotations

from ahm_transforms.masking.array import AdaptiveHardMask, MaskTransform, RandBoxMask, RandPatchMask
from ahm_transforms.masking.dictionary import (
    AdaptiveHardMaskD,
    AdaptiveHardMaskd,
    AdaptiveHardMaskDict,
    MaskTransformd,
    RandBoxMaskD,
    RandBoxMaskd,
    RandBoxMaskDict,
    RandPatchMaskD,
    RandPatchMaskd,
    RandPatchMaskDict,
)
from ahm_transforms.masking.functional import (
    boxes_to_mask,
    cell_count,
    cells_to_image,
    check_mask_ratio,
    choose_cells,
    grid_shape,
    hidden_fraction,
    image_to_cells,
    patch_shape,
)

__all__ = [
    "AdaptiveHardMask",
    "AdaptiveHardMaskD",
    "AdaptiveHardMaskDict",
    "AdaptiveHardMaskd",
    "MaskTransform",
    "MaskTransformd",
    "RandBoxMask",
    "RandBoxMaskD",
    "RandBoxMaskDict",
    "RandBoxMaskd",
    "RandPatchMask",
    "RandPatchMaskD",
    "RandPatchMaskDict",
    "RandPatchMaskd",
    "boxes_to_mask",
    "cell_count",
    "cells_to_image",
    "check_mask_ratio",
    "choose_cells",
    "grid_shape",
    "hidden_fraction",
    "image_to_cells",
    "patch_shape",
]
