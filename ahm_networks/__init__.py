# SPDX-License-Identifier: Apache-2.0
"""Everything with weights or gradients: reconstruction networks, maskers, reinforcement-learning formulas."""

from ahm_networks.maskers import (
    ActorCriticMasker,
    CurriculumMasker,
    Decision,
    LossPredictionMasker,
    Masker,
    UniformMasker,
)
from ahm_networks.nets import (
    VGG16,
    EncoderClassifier,
    ReconstructionUNet,
    Transfer,
    backbone_network,
    classifier_network,
    freeze_encoder,
    layerwise_parameters,
    read_weights,
    transfer_weights,
    unfreeze_encoder,
)
from ahm_networks.shelf import from_shelf

__all__ = [
    "VGG16",
    "ActorCriticMasker",
    "CurriculumMasker",
    "Decision",
    "EncoderClassifier",
    "LossPredictionMasker",
    "Masker",
    "ReconstructionUNet",
    "Transfer",
    "UniformMasker",
    "backbone_network",
    "classifier_network",
    "freeze_encoder",
    "from_shelf",
    "layerwise_parameters",
    "read_weights",
    "transfer_weights",
    "unfreeze_encoder",
]
