# SPDX-License-Identifier: Apache-2.0
"""Maskers decide what to hide."""

from ahm_networks.maskers.actor_critic import ActorCriticMasker
from ahm_networks.maskers.base import Decision, Masker
from ahm_networks.maskers.curriculum import CurriculumMasker
from ahm_networks.maskers.loss_prediction import LossPredictionMasker
from ahm_networks.maskers.uniform import UniformMasker

__all__ = [
    "ActorCriticMasker",
    "CurriculumMasker",
    "Decision",
    "LossPredictionMasker",
    "Masker",
    "UniformMasker",
]
