# SPDX-License-Identifier: Apache-2.0
"""Where the positions of transformers start."""

from __future__ import annotations

import pytest
import torch
from monai.networks.blocks.pos_embed_utils import build_sincos_position_embedding

from ahm_networks import MaskedAutoencoder
from ahm_networks.nets.vit import build_vit, sincos_positions

TINY = {"hidden_size": 12, "mlp_dim": 12, "num_heads": 2, "num_layers": 1}


@pytest.mark.parametrize("grid", [(2, 5), (3, 2, 4)], ids=["2d", "3d"])
@pytest.mark.filterwarnings("ignore:torch.meshgrid")
def test_columns_are_those_of_monai(grid):
    def columns(table):
        return sorted(tuple(column) for column in table.T.round(decimals=5).tolist())

    monai = build_sincos_position_embedding(list(grid), 24, len(grid))[0]
    assert columns(sincos_positions(grid, 24)) == columns(monai)


def test_by_hand():
    table = sincos_positions((1, 3), 5)  # one wave for each axis, of one radian a token
    assert table.shape == (3, 5)
    angle = torch.arange(3.0)
    assert torch.allclose(table[:, 1], angle.sin()) and torch.allclose(table[:, 3], angle.cos())
    assert table[:, 0].eq(0).all() and table[:, 2].eq(1).all()  # the first axis has one place
    assert table[:, 4].eq(0).all()  # left over


def test_no_two_tokens_are_alike():
    table = sincos_positions((4, 4, 4), 512)
    assert torch.cdist(table, table).fill_diagonal_(9.0).min() > 0.5


def test_networks_start_there_and_learn_on():
    network = MaskedAutoencoder(2, img_size=(32, 48), encoder_args=TINY, decoder_hidden_size=8)
    encoder, decoder = network.vit.patch_embedding.position_embeddings, network.decoder_positions
    assert torch.equal(encoder[0], sincos_positions((2, 3), 12)) and encoder.requires_grad
    assert torch.equal(decoder, sincos_positions((2, 3), 8)) and decoder.requires_grad


def test_other_kinds_of_positions_are_left_as_they_are():
    vit = build_vit(2, 1, 32, 16, {**TINY, "pos_embed_type": "none"})
    assert vit.patch_embedding.position_embeddings.eq(0).all()
