# SPDX-License-Identifier: Apache-2.0
"""Show for whole scans what a masker hides and what the network makes of the rest."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.engines import Evaluator, IterationEvents
from monai.inferers import Inferer, SliceInferer, SlidingWindowInferer
from torch import Tensor, nn

from ahm_engines.handlers.checkpoint import load_checkpoint
from ahm_engines.metrics import composite
from ahm_networks.maskers import Masker
from ahm_transforms.masking.functional import cells_to_image, patch_shape

__all__ = ["MaskingInference", "MaskingPredictor", "load_pretrained", "scan_inferer", "window_inferer"]

POLICY, MASK, RECONSTRUCTION = "policy", "mask", "reconstruction"
logger = logging.getLogger(__name__)


class MaskingPredictor(nn.Module):
    """Masker and network as one module that a window inferer can slide over a scan.

    Args:
        network: ``network(image, mask) -> image``.
        masker: its ``policy_map``, or the mask where it has none, is returned.
        to_intensity: ``to_intensity(pred, image)`` undoes the target normalisation that the network was trained with;
            ``None`` where there was none.
    """

    def __init__(
        self, network: nn.Module, masker: Masker, to_intensity: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.masker = masker
        self.to_intensity = to_intensity

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return policy map and mask ``[B, 1, *S]`` and composite ``[B, C, *S]``, all of the image's type."""
        if isinstance(image, MetaTensor):
            image = image.as_tensor()
        decision = self.masker(image)
        chance = decision.cells if decision.policy_map is None else decision.policy_map
        policy = cells_to_image(chance.to(image.dtype), self.masker.patch_size, image.shape[2:])
        pred = self.network(image, decision.mask)
        if self.to_intensity is not None:
            pred = self.to_intensity(pred, image)
        return policy, decision.mask.to(image.dtype), composite(image, pred, decision.mask)


class MaskingInference(Evaluator):
    """Run a :class:`MaskingPredictor` over whole scans, window by window.

    The output holds ``image``, ``policy``, ``mask`` and ``reconstruction``, decollated, in the grid of the
    preprocessed image; a postprocessing chain takes them back to the scan's own.

    Args:
        device: where to run.
        val_data_loader: batches with ``image``.
        network: maps an image to policy map, mask and reconstruction.
        inferer: slides windows of the training's crop size; without overlap, so that masks stay masks.
        seed: of maskers that draw in ``eval()`` mode too.
        postprocessing, val_handlers: as in MONAI's ``SupervisedEvaluator``.
    """

    def __init__(
        self,
        device: torch.device | str,
        val_data_loader: Iterable[Any],
        network: MaskingPredictor,
        inferer: Inferer,
        *,
        seed: int = 0,
        postprocessing: Callable[..., Any] | None = None,
        val_handlers: Sequence[Any] | None = None,
    ) -> None:
        super().__init__(
            device=torch.device(device),
            val_data_loader=val_data_loader,
            postprocessing=postprocessing,
            val_handlers=val_handlers,
            decollate=True,
        )
        self.network = network
        self.inferer = inferer
        self.seed = seed

    @torch.no_grad()
    def _iteration(self, engine: Any, batchdata: Any) -> dict[str, Any]:
        self.network.eval()
        self.network.masker.set_random_state(self.seed)
        image = batchdata["image"].to(self.state.device)
        policy, mask, rebuilt = self.inferer(image, self.network)
        # Entries of the scan itself keep its affine and history, so that Invertd can follow them back.
        self.state.output = {"image": image, POLICY: policy, MASK: mask, RECONSTRUCTION: rebuilt}
        self.fire_event(IterationEvents.FORWARD_COMPLETED)
        self.fire_event(IterationEvents.MODEL_COMPLETED)
        return self.state.output


def load_pretrained(path: str | Path, network: nn.Module, masker: Masker) -> dict[str, Any]:
    """Load network and masker of a pretraining checkpoint, and say where they come from.

    Returns:
        The checkpoint's provenance.

    Raises:
        FileNotFoundError: when there is no checkpoint.
        ValueError: when it belongs to another architecture.
    """
    content = load_checkpoint(path, {"model": network, "masker": masker})
    provenance: dict[str, Any] = content.get("provenance", {})
    logger.info("Loaded %s, made %s with versions %s.", path, provenance.get("created"), provenance.get("versions"))
    return provenance


def window_inferer(spatial_dims: int, crop_size: int | Sequence[int], *, volumes: bool = True) -> Inferer:
    """Inferer that tiles scans with windows of the training's crop size, slice by slice for 2D networks on volumes.

    Args:
        spatial_dims: of the network, 2 or 3.
        crop_size: of the windows, in voxels.
        volumes: whether the scans are 3D; for pictures ``False``.
    """
    window = patch_shape(crop_size, spatial_dims, "crop_size")
    if spatial_dims == 2 and volumes:
        slices = SliceInferer(roi_size=window, spatial_dim=2, overlap=0.0, sw_batch_size=4)
        return WholeWindows(slices, (*window, 1))
    return WholeWindows(SlidingWindowInferer(roi_size=window, overlap=0.0, sw_batch_size=4), window)


def scan_inferer(
    spatial_dims: int, crop_size: int | Sequence[int], *, volumes: bool = True, overlap: float = 0.5
) -> Inferer:
    """Inferer for predictions over whole scans: overlapping windows, averaged with Gaussian weights.

    Scans smaller than a window are padded with zeros, and their result is cut back. A 2D network goes through volumes
    slice by slice, along their last axis.

    Args:
        spatial_dims: of the network, 2 or 3.
        crop_size: of the windows, in voxels.
        volumes: whether the scans are 3D; for pictures ``False``.
        overlap: share of a window that the next one covers too, in [0, 1).
    """
    windows = {"roi_size": patch_shape(crop_size, spatial_dims, "crop_size"), "overlap": overlap, "mode": "gaussian"}
    if spatial_dims == 2 and volumes:
        return SliceInferer(spatial_dim=2, sw_batch_size=4, **windows)
    return SlidingWindowInferer(sw_batch_size=4, **windows)


class WholeWindows(Inferer):
    """Pad scans with zeros at their ends to whole windows: MONAI would rather shift the last ones back over others.

    Where windows overlap, their outputs are averaged: masks would be no masks, and visible voxels half rebuilt.

    Args:
        inferer: slides the windows.
        window: their size, one number per axis of the scan.
    """

    def __init__(self, inferer: Inferer, window: Sequence[int]) -> None:
        super().__init__()
        self.inferer = inferer
        self.window = window

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Return the network's outputs, cut to the size of ``inputs``."""
        size = inputs.shape[2:]
        missing = [-have % whole for have, whole in zip(size, self.window, strict=True)]
        padded = F.pad(inputs, [n for m in reversed(missing) for n in (0, m)])
        inside = (..., *(slice(have) for have in size))
        return tuple(output[inside] for output in self.inferer(padded, network, *args, **kwargs))
