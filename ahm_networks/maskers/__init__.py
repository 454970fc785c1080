# SPDX-License-Identifier: Apache-2.0
"""Maskers decide what to hide."""

from ahm_networks.maskers.actor_critic import ActorCriticMasker
from ahm_networks.maskers.base import Decision, Masker
from ahm_networks.maskers.boxes import BoxMasker
from ahm_networks.maskers.curriculum import CurriculumMasker
from ahm_networks.maskers.loss_prediction import LossPredictionMasker
from ahm_networks.maskers.q_region import QRegionMasker
from ahm_networks.maskers.teacher_error import TeacherErrorMasker
from ahm_networks.maskers.uniform import UniformMasker
from ahm_networks.maskers.visible_sampling import VisibleSamplingMasker

__all__ = [
    "ActorCriticMasker",
    "BoxMasker",
    "CurriculumMasker",
    "Decision",
    "LossPredictionMasker",
    "Masker",
    "QRegionMasker",
    "TeacherErrorMasker",
    "UniformMasker",
    "VisibleSamplingMasker",
]
