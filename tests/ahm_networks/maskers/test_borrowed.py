# SPDX-License-Identifier: Apache-2.0
"""A masker may ask a network without owning it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ahm_networks import ReconstructionUNet, UniformMasker
from ahm_networks.maskers.borrowed import BorrowedNetwork

SMALL = {"channels": (4, 8), "strides": (2,), "num_res_units": 0, "dropout": 0.5}


class Asking(UniformMasker):
    """A masker with a network at hand."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(2, 8)
        self.asked = BorrowedNetwork(network)


def test_it_runs_in_eval_mode_without_gradient_and_leaves_the_mode_alone() -> None:
    network = ReconstructionUNet(2, backbone_args=SMALL)
    image, mask = torch.rand(2, 1, 32, 32), torch.rand(2, 1, 32, 32) > 0.5
    for training in (True, False):
        network.train(training)
        first, second = (BorrowedNetwork(network)(image, mask) for _ in range(2))
        assert torch.equal(first, second)  # dropout would differ
        assert not first.requires_grad
        assert network.training is training


def test_parts_that_do_not_train_stay_as_they_are() -> None:
    network = ReconstructionUNet(2, backbone_args=SMALL)
    frozen = next(iter(network.backbone.children())).eval()
    BorrowedNetwork(network)(torch.rand(2, 1, 32, 32), torch.rand(2, 1, 32, 32) > 0.5)
    assert network.training and not any(module.training for module in frozen.modules())


def test_the_mode_is_put_back_after_an_error() -> None:
    network = ReconstructionUNet(2, backbone_args=SMALL)
    with pytest.raises(ValueError, match="image: expected"):
        BorrowedNetwork(network)(torch.rand(2, 3, 32, 32), torch.zeros(2, 1, 32, 32, dtype=torch.bool))
    assert network.training


def test_its_weights_are_not_the_maskers() -> None:
    masker = Asking(ReconstructionUNet(2, backbone_args=SMALL))
    assert not list(masker.parameters())
    assert set(masker.state_dict()) == {"_extra_state"}


def test_copies_of_the_masker_ask_the_same_network() -> None:
    network = ReconstructionUNet(2, backbone_args=SMALL)
    assert copy.deepcopy(Asking(network)).asked.network is network
