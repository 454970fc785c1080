# SPDX-License-Identifier: Apache-2.0
"""Everything with weights or gradients: reconstruction networks, maskers, reinforcement-learning formulas."""

from ahm_networks.maskers import (
    ActorCriticMasker,
    CurriculumMasker,
    Decision,
    LossPredictionMasker,
    Masker,
    UniformMasker,
    masker_from_shelf,
)
from ahm_networks.nets import ReconstructionUNet

__all__ = [
    "ActorCriticMasker",
    "CurriculumMasker",
    "Decision",
    "LossPredictionMasker",
    "Masker",
    "ReconstructionUNet",
    "UniformMasker",
    "masker_from_shelf",
]
