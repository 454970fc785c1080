# SPDX-License-Identifier: Apache-2.0
"""A network that a masker may ask but does not own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ahm_transforms.masking.ask import in_mode

__all__ = ["BorrowedNetwork"]


class BorrowedNetwork:
    """Run somebody else's reconstruction network: its weights are not among the masker's, nor in its ``state_dict``.

    It is no ``nn.Module``, so that a masker may keep it as an attribute. Copies of the masker ask the same network.

    Args:
        network: ``network(image, mask) -> image``.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    @torch.no_grad()
    def __call__(self, image: Tensor, mask: Tensor) -> Tensor:
        """Rebuild ``image`` ``[B, C, *S]`` under ``mask`` in eval mode; every module returns to the mode it was in."""
        with in_mode(self.network, training=False):
            rebuilt: Tensor = self.network(image, mask)
        return rebuilt

    def __deepcopy__(self, memo: dict[int, Any]) -> BorrowedNetwork:
        """Share the network."""
        return BorrowedNetwork(self.network)
