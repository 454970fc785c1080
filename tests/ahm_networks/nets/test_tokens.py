# SPDX-License-Identifier: Apache-2.0
"""Images as tokens, in the order in which MONAI embeds them."""

from __future__ import annotations

import pytest
import torch

from ahm_networks.nets.tokens import hidden_tokens, image_to_tokens, tokens_to_image
from ahm_networks.nets.vit import build_vit, embed
from ahm_transforms.masking.functional import cells_to_image

SIZES = {2: ((8, 12), (4, 2)), 3: ((4, 6, 8), (2, 3, 8))}
two_and_three_d = pytest.mark.parametrize("dims", [2, 3], ids=["2d", "3d"])


def test_order_by_hand():
    first = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    tokens = image_to_tokens(torch.stack([first, -first])[None], (1, 2))
    assert tokens.tolist() == [[[1, -1, 2, -2], [3, -3, 4, -4], [5, -5, 6, -6], [7, -7, 8, -8]]]


@two_and_three_d
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_there_and_back(dims, dtype):
    size, patch = SIZES[dims]
    image = (torch.randn(3, 2, *size) * 9).to(dtype)
    tokens = image_to_tokens(image, patch)
    assert tokens.dtype == dtype
    assert torch.equal(tokens_to_image(tokens, patch, size, 2), image)


@two_and_three_d
class TestAgainstMonai:
    def vit(self, dims, proj_type):
        size, patch = SIZES[dims]
        args = {"hidden_size": 6, "mlp_dim": 6, "num_heads": 2, "num_layers": 1, "proj_type": proj_type}
        return build_vit(dims, 2, size, patch, args)

    def test_voxels_of_a_token(self, dims):
        size, patch = SIZES[dims]
        image = torch.rand(2, 2, *size)
        rearranged = self.vit(dims, "perceptron").patch_embedding.patch_embeddings[0](image)
        assert torch.equal(image_to_tokens(image, patch), rearranged)

    @pytest.mark.parametrize("proj_type", ["conv", "perceptron"])
    def test_embedding_of_some_tokens(self, dims, proj_type):
        size, patch = SIZES[dims]
        vit, image = self.vit(dims, proj_type), torch.rand(2, 2, *size)
        expected = vit.patch_embedding(image) - vit.patch_embedding.position_embeddings
        embedded = embed(vit, image_to_tokens(image, patch)[:, 1::2])
        assert torch.allclose(embedded, expected[:, 1::2], atol=1e-6)


@two_and_three_d
class TestHidden:
    def test_one_voxel_hides_its_token(self, dims):
        size, patch = SIZES[dims]
        voxel = tuple(side - 1 for side in size[:-1])
        mask = torch.zeros(2, 1, *size, dtype=torch.bool)
        mask[(1, 0, *voxel, 0)] = True
        hidden = hidden_tokens(mask, patch)
        last_row = hidden.shape[1] - size[-1] // patch[-1]
        assert hidden.nonzero().tolist() == [[1, last_row]]

    def test_the_order_is_that_of_the_cells(self, dims):
        size, patch = SIZES[dims]
        cells = torch.rand(3, 1, *(s // p for s, p in zip(size, patch, strict=True))) < 0.5
        assert torch.equal(hidden_tokens(cells_to_image(cells, patch, size), patch), cells.flatten(1))


@pytest.mark.parametrize("patch", [(3, 4), (4,), (4, 4, 4)])
def test_patch_that_does_not_fit(patch):
    with pytest.raises(ValueError, match=r"patch: expected 2 sizes that divide \(8, 8\), got"):
        image_to_tokens(torch.rand(1, 1, 8, 8), patch)
    with pytest.raises(ValueError, match=r"patch: expected 2 sizes that divide \(8, 8\), got"):
        tokens_to_image(torch.rand(1, 4, 16), patch, (8, 8), 1)
