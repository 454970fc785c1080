# SPDX-License-Identifier: Apache-2.0
"""Ask a masker for its mask, and check the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ask_masker", "in_mode", "load_torchscript"]


def ask_masker(
    masker: Callable[[Tensor], Any], image: Tensor, *, seed: int, draw: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Call a masker without gradients and with torch's default generators seeded.

    Args:
        masker: answers an image with a mask ``[1, 1, *S]``, a pair of mask and policy map ``[1, 1, *G]``, or an object
            with the attributes ``mask`` and, if there is one, ``policy_map``.
        image: ``[1, C, *S]``.
        seed: for masks that torch's default generators draw; their state is put back afterwards.
        draw: ask a module in training instead of evaluation mode; it and its parts return to theirs afterwards.

    Returns:
        The mask ``[1, 1, *S]`` bool, and the policy map ``[1, 1, *G]`` or None.

    Raises:
        TypeError: when the answer is none of the above.
        ValueError: when the mask or the policy map has another shape, or the mask values other than true and false.
    """
    mode = in_mode(masker, training=draw) if isinstance(masker, nn.Module) else nullcontext()
    with _torch_seed(seed, image.device), mode, torch.no_grad():
        mask, policy_map = _read_answer(masker(image))
    _check_shapes(mask, policy_map, image)
    return _as_bool(mask), policy_map


def load_torchscript(path: Path, device: torch.device) -> nn.Module:
    """Open a TorchScript file on ``device``.

    Raises:
        RuntimeError: when torch cannot load the file.
    """
    try:
        module: nn.Module = torch.jit.load(str(path), map_location=device)
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"masker: expected a TorchScript file, could not load {path}; write one with torch.jit.save or hand in the "
            "module itself, as ahm_engines.load_masker(path) returns it from a checkpoint of a pretraining."
        ) from error
    return module


@contextmanager
def in_mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Put a module into training or evaluation mode for a while; every part of it returns to the mode it was in."""
    # TorchScript that was frozen has no mode.
    modes = [(part, part.training) for part in module.modules() if hasattr(part, "training")]
    module.train(training)
    try:
        yield
    finally:
        for part, own in modes:
            part.training = own


@contextmanager
def _torch_seed(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the default generators of the CPU and of ``device`` for a while; those of other devices are not touched."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for used in cuda:
            with torch.cuda.device(used):
                torch.cuda.manual_seed(seed)
        yield


def _read_answer(answer: Any) -> tuple[Tensor, Tensor | None]:
    """Split what a masker returned into mask and policy map."""
    mask, policy_map = answer, None
    if hasattr(answer, "mask"):
        mask, policy_map = answer.mask, getattr(answer, "policy_map", None)
    elif isinstance(answer, tuple | list) and len(answer) == 2:
        mask, policy_map = answer
    if not isinstance(mask, Tensor) or not isinstance(policy_map, Tensor | None):
        raise TypeError(
            "masker: expected a mask tensor, a pair (mask, policy_map) or an object with the attribute 'mask', "
            f"got {type(answer).__name__}."
        )
    return mask, policy_map


def _check_shapes(mask: Tensor, policy_map: Tensor | None, image: Tensor) -> None:
    expected = (1, 1, *image.shape[2:])
    if tuple(mask.shape) != expected:
        raise ValueError(
            f"masker: expected a mask of shape {expected}, got {tuple(mask.shape)}; spread cells over their voxels "
            "with ahm_transforms.masking.cells_to_image."
        )
    if policy_map is not None and (policy_map.ndim != image.ndim or tuple(policy_map.shape[:2]) != (1, 1)):
        raise ValueError(
            f"masker: expected a policy map [1, 1, *G] with {image.ndim - 2} grid axes, got {tuple(policy_map.shape)}."
        )


def _as_bool(mask: Tensor) -> Tensor:
    """Accept zeros and ones of any type, as exported programs may return, but no probabilities."""
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            f"masker: expected a bool mask (or zeros and ones), got {mask.dtype} from {mask.min().item():.3g} to "
            f"{mask.max().item():.3g}; threshold or sample probabilities in the masker."
        )
    return mask.bool()
