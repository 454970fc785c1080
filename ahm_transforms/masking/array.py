# SPDX-License-Identifier: Apache-2.0
"""Transforms that hide parts of one channel-first image.

Each class only says *which* voxels to hide (`MaskTransform.choose_mask`); drawing, filling and metadata are shared.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from monai.config import NdarrayOrTensor
from monai.data import get_track_meta
from monai.transforms import RandomizableTransform
from monai.utils import MAX_SEED, TransformBackends, convert_to_tensor
from torch import Tensor, nn

from ahm_transforms.masking.ask import ask_masker, load_torchscript
from ahm_transforms.masking.functional import (
    boxes_to_mask,
    cell_count,
    cells_to_image,
    check_mask_ratio,
    choose_cells,
    grid_shape,
    image_to_cells,
    patch_shape,
)

__all__ = ["AdaptiveHardMask", "Fill", "Foreground", "MaskTransform", "RandBoxMask", "RandPatchMask"]

Fill = float | Literal["mean"]
Foreground = float | Callable[[Tensor], Tensor]


class MaskTransform(RandomizableTransform):
    """Hide voxels of an image; a subclass says which.

    The call takes ``[C, *S]`` (at least two spatial axes) and returns a new tensor of the same shape and dtype with
    the hidden voxels filled, a MetaTensor as in all MONAI transforms. The mask stays readable as ``mask``.

    Args:
        prob: chance that an image is masked at all; otherwise it comes back as it is, with a mask that hides nothing.
        fill: value of hidden voxels, cast to the image's dtype; ``"mean"`` is the mean of each channel.

    Attributes:
        mask: ``[1, *S]`` bool, ``True`` = hidden, as drawn last; None before.
    """

    backend = [TransformBackends.TORCH]  # noqa: RUF012  # MONAI declares it as a plain list

    def __init__(self, *, prob: float = 1.0, fill: Fill = 0.0) -> None:
        super().__init__(prob)
        if fill != "mean" and not isinstance(fill, Real):
            raise ValueError(f"fill: expected a number or 'mean', got {fill!r}.")
        self.fill = fill
        self.mask: Tensor | None = None

    @abstractmethod
    def choose_mask(self, image: Tensor) -> Tensor:
        """Draw the mask ``[1, *S]`` for ``image`` (``[C, *S]``, a plain tensor) with ``self.R``."""

    def randomize(self, data: NdarrayOrTensor) -> None:
        """Draw ``mask`` for an image ``[C, *S]``.

        Raises:
            ValueError: when the image is not channel-first with at least two spatial axes.
        """
        super().randomize(None)
        image = convert_to_tensor(data, track_meta=False)
        if image.ndim < 3:
            raise ValueError(
                f"img: expected a channel-first image [C, *S] with 2 or more spatial axes, got shape "
                f"{tuple(image.shape)}; put EnsureChannelFirst ahead."
            )
        self.mask = self.choose_mask(image) if self._do_transform else torch.zeros_like(image[:1], dtype=torch.bool)

    def __call__(self, img: NdarrayOrTensor, randomize: bool = True) -> Tensor:
        """Return ``img`` with the hidden voxels filled; with ``randomize=False`` the last mask is used again."""
        image: Tensor = convert_to_tensor(img, track_meta=get_track_meta())
        if randomize or self.mask is None:
            self.randomize(image)
        mask: Tensor = self.mask  # type: ignore[assignment]  # randomize() has just set it
        if image.shape[1:] != mask.shape[1:]:
            raise ValueError(
                f"img: expected the spatial shape of the mask, {tuple(mask.shape[1:])}, got {tuple(image.shape[1:])}; "
                "images that share a mask must have one shape."
            )
        return torch.where(mask.to(image.device), self._fill_value(image), image)

    def _fill_value(self, image: Tensor) -> Tensor:
        if self.fill == "mean":
            plain = convert_to_tensor(image, track_meta=False)
            means: Tensor = plain.flatten(1).mean(1, dtype=torch.float64).to(image.dtype)
            return means.view(-1, *[1] * (image.ndim - 1))
        return torch.tensor(self.fill, dtype=image.dtype, device=image.device)


class RandPatchMask(MaskTransform):
    """Hide an exact share of the cells of a patch grid, drawn uniformly (He et al. 2022, arXiv:2111.06377).

    Args:
        patch_size: voxels per cell, one number or one per axis; partial cells at the border count like any other.
        mask_ratio: share of cells to hide, between 0 and 1; ``mask_ratio * cells`` is rounded half up.
        prob: chance that an image is masked at all.
        fill: value of hidden voxels, or ``"mean"`` of each channel.
        foreground: restricts what may be hidden. A number: cells whose mean intensity exceeds it in some channel. A
            callable ``[C, *S] -> [C or 1, *S]`` bool: cells with at least one voxel of this foreground. An image
            without any such cell is treated as if there were no restriction.
        ratio_of: what ``mask_ratio`` is a share of, the ``"foreground"`` cells or the whole ``"grid"``.

    Raises:
        ValueError: for a bad argument, an image smaller than a patch, or, with ``ratio_of="grid"``, when more cells
            are asked for than the foreground has.

    Example:
        >>> hide = RandPatchMask(patch_size=4, mask_ratio=0.75).set_random_state(seed=0)
        >>> masked = hide(torch.ones(1, 16, 16))
        >>> tuple(masked.shape), masked.mean().item(), hide.mask.float().mean().item()
        ((1, 16, 16), 0.25, 0.75)
    """

    def __init__(
        self,
        patch_size: int | Sequence[int],
        mask_ratio: float,
        *,
        prob: float = 1.0,
        fill: Fill = 0.0,
        foreground: Foreground | None = None,
        ratio_of: Literal["foreground", "grid"] = "foreground",
    ) -> None:
        super().__init__(prob=prob, fill=fill)
        if ratio_of not in ("foreground", "grid"):
            raise ValueError(f"ratio_of: expected 'foreground' or 'grid', got {ratio_of!r}.")
        if not (foreground is None or callable(foreground) or isinstance(foreground, Real)):
            raise ValueError(f"foreground: expected a number, a callable or None, got {foreground!r}.")
        self.patch_size = patch_size
        self.mask_ratio = check_mask_ratio(mask_ratio)
        self.foreground = foreground
        self.ratio_of = ratio_of

    def choose_mask(self, image: Tensor) -> Tensor:
        """Draw cells without replacement and spread them over their voxels."""
        grid = grid_shape(image.shape[1:], self.patch_size)
        scores = torch.from_numpy(self.R.random_sample((1, 1, *grid)))
        allowed = self._allowed_cells(image)
        cells = scores.numel() if allowed is None or self.ratio_of == "grid" else int(allowed.sum())
        hidden = choose_cells(scores, cell_count(self.mask_ratio, cells), allowed=allowed)
        return cells_to_image(hidden.to(image.device), self.patch_size, image.shape[1:])[0]

    def _allowed_cells(self, image: Tensor) -> Tensor | None:
        """Return ``[1, 1, *G]`` on the CPU, where the draw is made; None when every cell may be hidden."""
        if self.foreground is None:
            return None
        if callable(self.foreground):
            inside, threshold = convert_to_tensor(self.foreground(image), track_meta=False), 0.0
            if inside.dtype != torch.bool or inside.ndim != image.ndim or inside.shape[1:] != image.shape[1:]:
                raise ValueError(
                    f"foreground: expected the callable to return bool [C or 1, *S] for an image {tuple(image.shape)}, "
                    f"got {inside.dtype} of shape {tuple(inside.shape)}."
                )
        else:
            inside, threshold = image, self.foreground
        allowed = (image_to_cells(inside[None], self.patch_size) > threshold).any(1, keepdim=True).cpu()
        return allowed if allowed.any() else None


class RandBoxMask(MaskTransform):
    """Hide axis-aligned boxes at random places inside the image (DeVries and Taylor 2017, arXiv:1708.04552).

    Boxes may overlap, so the hidden share varies; `RandPatchMask` hides an exact one.

    Args:
        num_boxes: number of boxes, or the smallest number when ``max_num_boxes`` is given.
        box_size: box size in voxels, one number or one per axis, or the smallest when ``max_box_size`` is given.
        max_num_boxes: largest number of boxes.
        max_box_size: largest box size; every box and axis draws its own. Cut to the image where it is larger.
        prob: chance that an image is masked at all.
        fill: value of hidden voxels, or ``"mean"`` of each channel.

    Raises:
        ValueError: for a bad argument, or when ``box_size`` is larger than the image.

    Example:
        >>> hide = RandBoxMask(1, (4, 8)).set_random_state(seed=0)
        >>> masked = hide(torch.ones(1, 16, 16))
        >>> int(hide.mask.sum()), int(masked.sum())
        (32, 224)
    """

    def __init__(
        self,
        num_boxes: int,
        box_size: int | Sequence[int],
        *,
        max_num_boxes: int | None = None,
        max_box_size: int | Sequence[int] | None = None,
        prob: float = 1.0,
        fill: Fill = 0.0,
    ) -> None:
        super().__init__(prob=prob, fill=fill)
        self.num_boxes = num_boxes
        self.max_num_boxes = num_boxes if max_num_boxes is None else max_num_boxes
        numbers = (self.num_boxes, self.max_num_boxes)
        if not all(isinstance(number, Integral) for number in numbers) or not 1 <= numbers[0] <= numbers[1]:
            raise ValueError(
                "num_boxes: expected 1 <= num_boxes <= max_num_boxes in whole numbers, got "
                f"{num_boxes!r} and {max_num_boxes!r}."
            )
        self.box_size = box_size
        self.max_box_size = box_size if max_box_size is None else max_box_size

    def choose_mask(self, image: Tensor) -> Tensor:
        """Draw the number, the sizes and the places of the boxes."""
        spatial = image.shape[1:]
        smallest, largest = self._size_range(spatial)
        boxes = self.R.randint(self.num_boxes, self.max_num_boxes + 1)
        size = self.R.randint(smallest, np.add(largest, 1), size=(boxes, len(spatial)))
        start = self.R.randint(0, np.subtract(spatial, size) + 1)
        corners = torch.from_numpy(np.stack([start, size])[:, None]).to(image.device)
        return boxes_to_mask(corners[0], corners[1], spatial)[0]

    def _size_range(self, spatial: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        smallest = patch_shape(self.box_size, len(spatial), name="box_size")
        largest = patch_shape(self.max_box_size, len(spatial), name="max_box_size")
        if any(low > n for low, n in zip(smallest, spatial, strict=True)):
            raise ValueError(
                f"box_size: expected at most the image size {tuple(spatial)}, got {smallest}; "
                "take smaller boxes or pad the image."
            )
        if any(low > high for low, high in zip(smallest, largest, strict=True)):
            raise ValueError(f"max_box_size: expected at least box_size {smallest}, got {largest}.")
        return smallest, tuple(min(high, int(n)) for high, n in zip(largest, spatial, strict=True))


class AdaptiveHardMask(MaskTransform):
    """Hide what a masker chooses for each image (adaptive hard masking).

    The masker gets the image as one batch ``[1, C, *S]``, without gradients. It answers with a mask ``[1, 1, *S]``, or
    a pair of mask and policy map ``[1, 1, *G]``, or an object with the attributes ``mask`` and, if there is one,
    ``policy_map``.

    Its random numbers follow this transform's state: torch's default generator is seeded from ``self.R`` for the
    time of the call, and ``set_random_state`` is passed on to a masker that has one.

    Args:
        masker: a module, any callable, or the path of a TorchScript file. The file is opened where it is first
            needed, in every DataLoader worker of its own; what is no file must be picklable for spawned workers.
        draw: ask a module in training mode, where maskers of this project draw from their policy: pretraining and
            augmentation want another mask at each look. By default it is asked in evaluation mode and hides the cells
            that it wants to hide most, the same at each look. It returns to its own mode afterwards.
        prob: chance that an image is masked at all.
        device: where the masker works, a module is moved there when first needed; where the image is by default.
        fill: value of hidden voxels, or ``"mean"`` of each channel.

    Attributes:
        policy_map: ``[1, *G]`` of the last image, None if the masker gave none or was not asked.

    Raises:
        FileNotFoundError: when there is no such file.
        TypeError: when the masker cannot be called or answers with something else.
        ValueError: when the mask has another shape, or values other than true and false.
        RuntimeError: when the file is not TorchScript.

    Example:
        >>> brightest = AdaptiveHardMask(lambda image: image == image.amax())
        >>> brightest(torch.tensor([[[1.0, 5.0], [2.0, 3.0]]])).tolist()
        [[[1.0, 0.0], [2.0, 3.0]]]
    """

    def __init__(
        self,
        masker: Callable[[Tensor], Any] | str | Path,
        *,
        draw: bool = False,
        prob: float = 1.0,
        device: str | torch.device | None = None,
        fill: Fill = 0.0,
    ) -> None:
        super().__init__(prob=prob, fill=fill)
        self.draw = draw
        self.masker = Path(masker) if isinstance(masker, str) else masker
        if isinstance(self.masker, Path):
            if not self.masker.is_file():
                raise FileNotFoundError(f"masker: expected a TorchScript file, {self.masker} does not exist.")
        elif not callable(self.masker):
            raise TypeError(f"masker: expected a module, a callable or a path, got {type(masker).__name__}.")
        self.device = None if device is None else torch.device(device)
        self.policy_map: Tensor | None = None
        self._scripted: nn.Module | None = None

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> AdaptiveHardMask:
        """Seed this transform and, with a number drawn from the new state, a masker that can be seeded."""
        super().set_random_state(seed, state)
        if hasattr(self.masker, "set_random_state"):
            self.masker.set_random_state(seed=self._draw_seed())
        return self

    def randomize(self, data: NdarrayOrTensor) -> None:
        """Draw ``mask``, and with it ``policy_map``, for an image ``[C, *S]``; errors are those of `MaskTransform`."""
        self.policy_map = None
        super().randomize(data)

    def choose_mask(self, image: Tensor) -> Tensor:
        """Ask the masker; its policy map is kept in ``policy_map``."""
        device = self.device or image.device
        masker, seed = self._masker_on(device), self._draw_seed()
        mask, policy_map = ask_masker(masker, image[None].to(device), seed=seed, draw=self.draw)
        self.policy_map = None if policy_map is None else policy_map[0].to(image.device)
        return mask[0].to(image.device)

    def _draw_seed(self) -> int:
        return int(self.R.randint(MAX_SEED, dtype="uint32"))

    def _masker_on(self, device: torch.device) -> Callable[[Tensor], Any]:
        if isinstance(self.masker, Path):
            if self._scripted is None:
                self._scripted = load_torchscript(self.masker, device)
            return self._scripted
        if isinstance(self.masker, nn.Module) and self.device is not None:
            self.masker.to(self.device)
        return self.masker

    def __getstate__(self) -> dict[str, Any]:
        """Leave the opened file out: every process opens it for itself."""
        return {**self.__dict__, "_scripted": None}
