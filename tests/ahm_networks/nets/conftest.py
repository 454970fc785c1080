# SPDX-License-Identifier: Apache-2.0
"""Every backbone, small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ahm_networks import ReconstructionUNet
from ahm_networks.nets import backbone_network

ARGS: dict[str, dict[str, Any]] = {
    "unet": {"channels": (4, 8, 12), "strides": (2, 2), "num_res_units": 1},
    "basicunet": {"features": (4, 4, 4, 8, 8, 4)},
    "dynunet": {"kernel_size": [3] * 3, "strides": [1, 2, 2], "filters": [4, 8, 12]},
    "segresnet": {"init_filters": 8, "blocks_down": (1, 1), "blocks_up": (1,)},
    "swinunetr": {"feature_size": 12},
    "unetr": {"img_size": 32, "feature_size": 4, "hidden_size": 12, "mlp_dim": 16, "num_heads": 2},
    "contextunet": {"features": (4, 8, 12), "context_kernel": 3},
}


@pytest.fixture
def build() -> Callable[..., nn.Module]:
    """Build a small plain backbone: ``build(name, dims=2, inputs=1, outputs=2, seed=0, **args)``."""

    def make(name: str, dims: int = 2, inputs: int = 1, outputs: int = 2, *, seed: int = 0, **args: Any) -> nn.Module:
        torch.manual_seed(seed)
        return backbone_network(name, dims, inputs, outputs, **ARGS[name] | args).eval()

    return make


@pytest.fixture
def pretrained() -> Callable[..., ReconstructionUNet]:
    """Build a small ``ReconstructionUNet``: ``pretrained(name, dims=2, channels=1, mask_channel=False, **args)``."""

    def make(
        name: str, dims: int = 2, channels: int = 1, *, mask_channel: bool = False, **args: Any
    ) -> ReconstructionUNet:
        torch.manual_seed(1)
        backbone_args = ARGS[name] | args
        return ReconstructionUNet(
            dims, channels, backbone=name, mask_channel=mask_channel, backbone_args=backbone_args
        ).eval()

    return make
