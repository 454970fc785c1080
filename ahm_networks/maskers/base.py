# SPDX-License-Identifier: Apache-2.0
"""The contract of every masker: an image goes in, a decision about what to hide comes out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from monai.utils import convert_to_tensor
from torch import Tensor, nn

from ahm_networks.rl.schedules import check_share
from ahm_transforms.masking.functional import (
    cell_count,
    cells_to_image,
    check_mask_ratio,
    grid_shape,
    image_to_cells,
    patch_shape,
)

__all__ = ["Decision", "Masker", "Scope", "Step"]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a masker decided about a batch; each masker adds what it needs to learn.

    Attributes:
        mask: ``[B, 1, *S]`` bool, ``True`` = hidden.
        cells: ``[B, 1, *G]`` bool, the hidden cells.
        allowed: ``[B, 1, *G]`` bool, cells that may be hidden; ``None`` = all.
        policy_map: ``[B, 1, *G]`` float in [0, 1], how much the masker wants to hide each cell; ``None`` where it has
            no opinion.
    """

    mask: Tensor
    cells: Tensor
    allowed: Tensor | None = None
    policy_map: Tensor | None = None


@dataclass(frozen=True)
class Scope:
    """What a masker may hide in a batch, and how much of it.

    Attributes:
        grid: cells along each axis.
        ratio: share of the allowed cells to hide.
        allowed: ``[B, 1, *G]`` bool, cells that may be hidden; ``None`` = all.
        count: cells to hide: a number where all are allowed, else ``[B]``.
    """

    grid: tuple[int, ...]
    ratio: float
    allowed: Tensor | None
    count: int | Tensor

    def confine(self, scores: Tensor) -> Tensor:
        """Give cells that may not be hidden a score of minus infinity; scores are ``[B, cells]``."""
        return scores if self.allowed is None else scores.masked_fill(~self.allowed.flatten(1), float("-inf"))


SEED_STEP = 7919  # apart from each other: the seeds of a masker and of one inside it
Step = tuple[Decision, Tensor]


class Masker(nn.Module, ABC):
    """Base of all maskers.

    All random numbers are drawn on the CPU from a generator of the masker's own, so that one seed gives the same masks
    on every device. The generator's state is part of ``state_dict``.

    Args:
        spatial_dims: 2 or 3.
        patch_size: voxels per cell, one number or one per axis.
        mask_ratio: share of the allowed cells to hide, in (0, 1).
        foreground_threshold: cells whose mean intensity (largest over the channels) does not exceed it are never
            hidden, in the units of the preprocessed image (recipes scale to [0, 1] with air near 0); ``None`` allows
            every cell. An image without any cell above it may be hidden everywhere.
        seed: of the generator.

    Raises:
        ValueError: when ``mask_ratio`` is not in (0, 1) or ``patch_size`` does not fit ``spatial_dims``.
    """

    in_channels: int | None = None
    """Channels that the masker's own network takes; ``None`` takes any number."""

    num_samples: int = 1
    """Masks that the trainer draws for each image and step; the error of all of them goes to :meth:`loss`."""

    def __init__(
        self,
        spatial_dims: int,
        patch_size: int | Sequence[int],
        mask_ratio: float = 0.6,
        *,
        foreground_threshold: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims: expected 2 or 3, got {spatial_dims!r}.")
        self.spatial_dims = spatial_dims
        self.patch_size = patch_shape(patch_size, spatial_dims)
        self.mask_ratio = check_mask_ratio(mask_ratio)
        if not isinstance(foreground_threshold, Real | None):
            raise ValueError(f"foreground_threshold: expected a number or None, got {foreground_threshold!r}.")
        self.foreground_threshold = foreground_threshold
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, image: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run :meth:`forward` on a plain tensor: a ``MetaTensor`` would drag its metadata through every step."""
        return super().__call__(convert_to_tensor(image), *args, **kwargs)

    @abstractmethod
    def forward(self, image: Tensor, *, mask_ratio: float | None = None, foreground: Tensor | None = None) -> Decision:
        """Decide what to hide.

        Args:
            image: ``[B, C, *S]``.
            mask_ratio: overrides the masker's own; 0 chooses nothing.
            foreground: ``[B, 1, *S]`` bool, restricts masks to cells that hold some of it; replaces the threshold.
        """

    def loss(self, steps: Sequence[Step]) -> Tensor | None:
        """Turn rewards into a loss for the masker's weights, or ``None`` where there is nothing to learn.

        Args:
            steps: one ``(decision, reward)`` for each mask drawn for the batch; the reward is a voxel map
                ``[B, 1, *S]`` without gradient.
        """
        return None

    def reward_of_cells(self, decision: Decision, reward: Tensor) -> Tensor:
        """Return the mean reward of each cell, ``[B, N]``, in the precision of the masker's weights.

        Raises:
            ValueError: when the reward is no voxel map of the decision's shape.
        """
        if reward.shape != decision.mask.shape:
            raise ValueError(
                f"reward: expected one number per voxel, of the mask's shape {tuple(decision.mask.shape)}, "
                f"got {tuple(reward.shape)}; take the mean of an error over its channels."
            )
        precision = next(self.parameters(), reward).dtype
        return image_to_cells(convert_to_tensor(reward, dtype=precision), self.patch_size).flatten(1)

    def diagnostics(self, decision: Decision) -> dict[str, Tensor]:
        """Scalars worth logging about this masker's own learning; no values leave the device here."""
        return {}

    def set_progress(self, progress: float) -> None:
        """Tell how much of the training is over, in [0, 1]; schedules follow it."""

    def generators(self) -> list[torch.Generator]:
        """The generators of this masker and of those inside it."""
        return [module._generator for module in self.modules() if isinstance(module, Masker)]

    def set_random_state(self, seed: int) -> Masker:
        """Start the generators anew; several processes need different seeds."""
        for number, generator in enumerate(self.generators()):
            generator.manual_seed(seed + number * SEED_STEP)
        return self

    def scope(self, image: Tensor, mask_ratio: float | None, foreground: Tensor | None) -> Scope:
        """Read the arguments of :meth:`forward`.

        Raises:
            ValueError: when the image or the ratio does not fit.
        """
        grid = self.check_image(image)
        ratio = self.mask_ratio if mask_ratio is None else mask_ratio
        allowed = self.allowed_cells(image, foreground)
        return Scope(grid, ratio, allowed, self.count(ratio, grid, allowed))

    def check_image(self, image: Tensor) -> tuple[int, ...]:
        """Return the grid for ``image``.

        Raises:
            ValueError: when the axes or channels do not fit, or the image is smaller than a patch.
        """
        if image.ndim != self.spatial_dims + 2:
            raise ValueError(
                f"image: expected [B, C, *S] with {self.spatial_dims} spatial axes, got shape {tuple(image.shape)}."
            )
        if self.in_channels not in (None, image.shape[1]):
            raise ValueError(f"image: the masker takes {self.in_channels} channel(s), got {image.shape[1]}.")
        return grid_shape(image.shape[2:], self.patch_size)

    def allowed_cells(self, image: Tensor, foreground: Tensor | None) -> Tensor | None:
        """Cells that may be hidden, ``[B, 1, *G]`` bool, or ``None`` for all.

        Raises:
            ValueError: when the foreground does not fit the image.
        """
        if foreground is not None:
            if foreground.shape != (len(image), 1, *image.shape[2:]):
                raise ValueError(
                    f"foreground: expected [B, 1, *S] for an image of shape {tuple(image.shape)}, "
                    f"got {tuple(foreground.shape)}."
                )
            allowed = image_to_cells(convert_to_tensor(foreground), self.patch_size, reduction="max") > 0
        elif self.foreground_threshold is not None:
            level = image_to_cells(image.detach(), self.patch_size).amax(1, keepdim=True)
            allowed = level > self.foreground_threshold
        else:
            return None
        return allowed | ~allowed.flatten(1).any(1).view(-1, *[1] * (image.ndim - 1))

    def count(self, mask_ratio: float, grid: Sequence[int], allowed: Tensor | None) -> int | Tensor:
        """Cells to hide: a number when all are allowed, else ``[B]``.

        Raises:
            ValueError: when ``mask_ratio`` is not in [0, 1].
        """
        check_share("mask_ratio", mask_ratio)
        if allowed is not None:
            return cell_count(mask_ratio, allowed.flatten(1).sum(1))
        return cell_count(mask_ratio, torch.Size(grid).numel())

    def uniform(self, *shape: int, device: torch.device) -> Tensor:
        """Draw float32 numbers on [0, 1) from the masker's generator, on ``device``."""
        draws = torch.rand(shape, generator=self._generator)
        return draws.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else draws.to(device)

    def expand(self, cells: Tensor, image: Tensor) -> Tensor:
        """Spread cells over the voxels of ``image``: ``[B, 1, *G]`` to ``[B, 1, *S]``."""
        return cells_to_image(cells, self.patch_size, image.shape[2:])

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the generator as bytes: torch would share a tensor that spawned workers find closed."""
        return {**self.__dict__, "_generator": self._generator.get_state().numpy().tobytes()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Build the generator from its state."""
        generator = torch.Generator()
        generator.set_state(torch.frombuffer(bytearray(state["_generator"]), dtype=torch.uint8))
        super().__setstate__({**state, "_generator": generator})

    def get_extra_state(self) -> Tensor:
        """State of the generator, saved with the weights."""
        return self._generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Take the generator's state back from a checkpoint."""
        self._generator.set_state(state.cpu().to(torch.uint8))
