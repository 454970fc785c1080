# SPDX-License-Identifier: Apache-2.0
"""Networks that rebuild images, and networks that score cells."""

from ahm_networks.nets.backbones import backbone_network
from ahm_networks.nets.classifier import VGG16, EncoderClassifier, classifier_network
from ahm_networks.nets.context_unet import ContextUNet
from ahm_networks.nets.contrastive import ContrastiveEncoder
from ahm_networks.nets.encoders import drop_decoder, encoder_channels, encoder_features, encoder_stages
from ahm_networks.nets.mae import MaskedAutoencoder
from ahm_networks.nets.reconstruction import ReconstructionUNet
from ahm_networks.nets.simmim import SimMIM
from ahm_networks.nets.tokens import hidden_tokens, image_to_tokens, tokens_to_image
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
    "ContextUNet",
    "ContrastiveEncoder",
    "EncoderClassifier",
    "MaskedAutoencoder",
    "ReconstructionUNet",
    "SimMIM",
    "Transfer",
    "backbone_network",
    "classifier_network",
    "drop_decoder",
    "encoder_channels",
    "encoder_features",
    "encoder_stages",
    "freeze_encoder",
    "hidden_tokens",
    "image_to_tokens",
    "layerwise_parameters",
    "read_weights",
    "tokens_to_image",
    "transfer_weights",
    "unfreeze_encoder",
]
