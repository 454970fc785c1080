# SPDX-License-Identifier: Apache-2.0
"""What a masker and a network show of an image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ahm_engines import MaskedLoss, MaskingPredictor
from ahm_networks import UniformMasker


class Perfect(nn.Module):
    """Predicts exactly what it is trained to."""

    def __init__(self, loss: MaskedLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return self.loss._target(image)


def test_normalised_predictions_come_back_as_intensities() -> None:
    image = torch.rand(2, 1, 32, 32) * 0.5 + 0.2
    loss = MaskedLoss(patch_size=8)
    predictor = MaskingPredictor(Perfect(loss), UniformMasker(2, 8), loss.to_intensity)
    _, mask, rebuilt = predictor(image)
    assert mask.any()
    torch.testing.assert_close(rebuilt, image, atol=1e-5, rtol=0)
    raw = MaskingPredictor(Perfect(loss), UniformMasker(2, 8))(image)[2]
    assert (raw - image).abs().max() > 0.5
