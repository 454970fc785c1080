# SPDX-License-Identifier: Apache-2.0
"""Images with a planted hard region."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ahm_transforms.masking.functional import cell_count, cells_to_image, choose_cells
from tests.fixtures_planted import Planted, train_on_planted

Plant = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(scope="session")
def plant() -> Plant:
    """Make smooth images in which a tenth of the cells, at random places, is noise that nothing can rebuild.

    Called with ``dims``, ``number``, ``grid_side``, ``patch`` and ``seed``, it returns images ``[B, 1, *S]`` on [0, 1]
    and the hard cells ``[B, 1, *G]``, bool.
    """

    def make(dims: int, number: int, *, grid_side: int, patch: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        size = [grid_side * patch] * dims
        scores = torch.rand(number, 1, *[grid_side] * dims, generator=generator)
        hard = choose_cells(scores, cell_count(0.1, grid_side**dims))
        corners = torch.rand(number, 1, *[2] * dims, generator=generator)
        smooth = F.interpolate(corners, size, mode="bilinear" if dims == 2 else "trilinear", align_corners=True)
        noise = torch.rand(number, 1, *size, generator=generator)
        return torch.where(cells_to_image(hard, patch, size), noise, smooth), hard

    return make


@pytest.fixture(scope="session")
def train_planted(plant: Plant) -> Callable[..., Planted]:
    """``train_planted(build, dims, epochs=..., learning_rate=...)``: see `tests.fixtures_planted.train_on_planted`."""
    return partial(train_on_planted, plant)
