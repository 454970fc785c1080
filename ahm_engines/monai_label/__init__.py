# SPDX-License-Identifier: Apache-2.0
"""MONAI Label: bundles put into its apps, and an app that also pretrains and asks for the scan least understood."""

from ahm_engines.monai_label.bundles import add_bundle
from ahm_engines.monai_label.understanding import LeastUnderstood, ReconstructionError, ReconstructionScoring

__all__ = ["LeastUnderstood", "ReconstructionError", "ReconstructionScoring", "add_bundle"]
