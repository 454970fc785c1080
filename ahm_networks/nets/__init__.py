# SPDX-License-Identifier: Apache-2.0
"""Networks that rebuild images, and networks that score cells."""

from ahm_networks.nets.backbones import backbone_network
from ahm_networks.nets.classifier import VGG16, EncoderClassifier, classifier_network
from ahm_networks.nets.encoders import drop_decoder, encoder_channels, encoder_features, encoder_stages
from ahm_networks.nets.reconstruction import ReconstructionUNet
from ahm_networks.nets.weights import (
    Transfer,
    freeze_encoder,
    layerwise_parameters,
    read_weights,
    transfer_weights,
    unfreeze_encoder,
)

__all__ = [
    "VGG16",
    "EncoderClassifier",
    "ReconstructionUNet",
    "Transfer",
    "backbone_network",
    "classifier_network",
    "drop_decoder",
    "encoder_channels",
    "encoder_features",
    "encoder_stages",
    "freeze_encoder",
    "layerwise_parameters",
    "read_weights",
    "transfer_weights",
    "unfreeze_encoder",
]
