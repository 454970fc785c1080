# SPDX-License-Identifier: Apache-2.0
"""MONAI Label: bundles put into its apps, and an app that also pretrains and chooses by that the scan to label next."""

from ahm_engines.monai_label.bundles import add_bundle
from ahm_engines.monai_label.understanding import (
    LeastUnderstood,
    MostTypical,
    ReconstructionError,
    ReconstructionScoring,
    TypicalityScoring,
)

__all__ = [
    "LeastUnderstood",
    "MostTypical",
    "ReconstructionError",
    "ReconstructionScoring",
    "TypicalityScoring",
    "add_bundle",
]
