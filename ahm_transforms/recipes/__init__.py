# SPDX-License-Identifier: Apache-2.0
"""Whole preprocessing chains, so that training and inference cannot drift apart."""

from ahm_transforms.io import LoadCased
from ahm_transforms.recipes.augmentation import warn_of_flips
from ahm_transforms.recipes.checks import CheckShaped, OnImageGridd
from ahm_transforms.recipes.classification import classification_deterministic, classification_random
from ahm_transforms.recipes.contrastive import contrastive_views, fixed_contrastive_views
from ahm_transforms.recipes.disk import PersistentSteps, persistent
from ahm_transforms.recipes.images import (
    DEFAULT_WINDOW_HU,
    MODALITIES,
    deterministic,
    fixed_crops,
    preprocessing,
    random_crops,
    validation_preprocessing,
)
from ahm_transforms.recipes.segmentation import (
    segmentation_crops,
    segmentation_deterministic,
    segmentation_evaluation,
)

__all__ = [
    "DEFAULT_WINDOW_HU",
    "MODALITIES",
    "CheckShaped",
    "LoadCased",
    "OnImageGridd",
    "PersistentSteps",
    "classification_deterministic",
    "classification_random",
    "contrastive_views",
    "deterministic",
    "fixed_contrastive_views",
    "fixed_crops",
    "persistent",
    "preprocessing",
    "random_crops",
    "segmentation_crops",
    "segmentation_deterministic",
    "segmentation_evaluation",
    "validation_preprocessing",
    "warn_of_flips",
]
