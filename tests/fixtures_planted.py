# SPDX-License-Identifier: Apache-2.0
"""Train a masker with a network on images with a planted hard region, and see what it hides on held-out ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ahm_engines.trainer import MaskedTrainer
from ahm_networks import Masker, ReconstructionUNet

PATCH = 4
GRID_SIDE = {2: 8, 3: 4}  # 64 cells in both
Build = Callable[[int, int, float, nn.Module], Masker]


@dataclass(frozen=True)
class Planted:
    """A trained masker and what it hides on held-out images.

    Attributes:
        masker: the masker, in eval mode.
        hard: cells that cannot be rebuilt, ``[B, 1, *G]`` bool.
        drawn: cells hidden as in training.
        most_probable: cells hidden in eval mode.
        entropy: the masker's `policy_entropy`, 1 where it has none.
    """

    masker: Masker
    hard: Tensor
    drawn: Tensor
    most_probable: Tensor
    entropy: float

    def times_chance(self, cells: Tensor) -> float:
        """How often hard cells are hidden, over how often any cell is."""
        return float(cells[self.hard].float().mean() / cells.float().mean())

    def mean_overlap(self) -> float:
        """Intersection over union of the most probable masks of neighbouring images."""
        first, second = self.most_probable.flatten(1), self.most_probable.roll(1, 0).flatten(1)
        return float(((first & second).sum(1) / (first | second).sum(1)).mean())


def train_on_planted(
    plant: Callable[..., tuple[Tensor, Tensor]],
    build: Build,
    dims: int,
    *,
    epochs: int,
    learning_rate: float,
    frozen: bool = False,
    ratio: float = 0.25,
    seed: int = 0,
) -> Planted:
    """Train on 256 images, 16 a step.

    Args:
        plant: makes the images, see the fixture of that name.
        build: ``build(dims, patch, ratio, network)`` gives the masker.
        dims: 2 or 3.
        epochs: of 16 steps.
        learning_rate: of the masker.
        frozen: whether the masker's weights stay as they are.
        ratio: share of the cells to hide, and so the chance of each hard cell.
        seed: of weights and batches.
    """
    torch.manual_seed(seed)
    sizes = {"grid_side": GRID_SIDE[dims], "patch": PATCH}
    images, _ = plant(dims, 256, seed=0, **sizes)
    small = {"channels": (4, 8), "strides": (2,), "num_res_units": 0}
    network = ReconstructionUNet(dims, backbone_args=small)
    masker = build(dims, PATCH, ratio, network)
    learned = [] if frozen else [weight for weight in masker.parameters() if weight.requires_grad]
    MaskedTrainer(
        "cpu",
        epochs,
        DataLoader(images, batch_size=16, shuffle=True),
        network,
        torch.optim.Adam(network.parameters(), 3e-3),
        masker,
        masker_optimizer=torch.optim.Adam(learned, learning_rate) if learned else None,
    ).run()
    return _held_out(masker, *plant(dims, 128, seed=1, **sizes))


@torch.no_grad()
def _held_out(masker: Masker, images: Tensor, hard: Tensor) -> Planted:
    drawn = masker.train()(images)
    entropy = float(masker.diagnostics(drawn).get("policy_entropy", torch.tensor(1.0)))
    return Planted(masker, hard, drawn.cells, masker.eval()(images).cells, entropy)
