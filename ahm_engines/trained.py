# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what they were made for, and what they hold."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ahm_engines.bundles import bundles_folder, inference_of
from ahm_engines.handlers.checkpoint import check_fit, load_checkpoint, look_at_checkpoint, restore_objects
from ahm_networks import CurriculumMasker
from ahm_networks.rl.schedules import check_share

__all__ = ["fitting_network", "load_masker", "load_trained", "masked_settings", "trained_settings"]

PRETRAINING = "pretraining"
logger = logging.getLogger(__name__)


def trained_settings(path: str | Path, *, task: str | None = None) -> dict[str, Any]:
    """Return the settings that a training wrote into its checkpoint, so that inference need not repeat them.

    Args:
        path: a checkpoint.
        task: what it must have been trained for; ``None`` takes any.

    Returns:
        Such as ``task``, ``classes``, ``spatial_dims``, ``crop_size``, ``backbone``; empty where there is no file, so
        that a configuration can be read before anything was trained, and for checkpoints without settings.

    Raises:
        ValueError: when the file is no checkpoint, or one of another task.
    """
    if not Path(path).is_file():
        return {}
    settings: dict[str, Any] = look_at_checkpoint(path).get("provenance", {}).get("settings", {})
    if task is not None:
        _check_task(path, settings, task)
    return settings


def masked_settings(path: str | Path) -> dict[str, Any]:
    """Return the settings of a pretraining whose network rebuilds images, as :func:`trained_settings` does.

    Raises:
        ValueError: when the file is no checkpoint, or one of another task or of contrastive pretraining.
    """
    settings = trained_settings(path, task=PRETRAINING)
    if settings.get("architecture") == "contrastive":
        raise ValueError(
            f"{path}: a checkpoint of contrastive pretraining, which hides and rebuilds nothing: judge its encoder by "
            "the labelled task, with this as --pretrained of ahm_segmentation or ahm_classification."
        )
    return settings


def fitting_network(network: nn.Module, path: str | Path | None) -> nn.Module:
    """Return ``network`` after a look whether the weights of a checkpoint fit it; none are loaded.

    Programs that load weights themselves, such as MONAI Label, use it: they take a file of another architecture for
    good, and would predict with random weights.

    Args:
        network: what is to get the weights.
        path: a checkpoint; where there is none, or no such file, nothing is looked at.

    Raises:
        ValueError: when the file is no checkpoint, or belongs to another architecture.
    """
    if path is not None and Path(path).is_file():
        check_fit(path, look_at_checkpoint(path), {"model": network})
    return network


def load_masker(
    path: str | Path, *, policy_share: float = 0.5, bundles_dir: str | Path | None = None
) -> CurriculumMasker:
    """Return the masker of a pretraining, for mask transforms and training loops of one's own.

    In ``eval()`` mode, which it is in, it hides the cells that it wants to hide most. In ``train()`` mode it draws from
    its policy, and the rest uniformly.

    Args:
        path: a checkpoint of the bundle ``ahm_pretrain``, trained with any masker that has a name there.
        policy_share: share of the hidden cells that it chooses in ``train()`` mode, in [0, 1].
        bundles_dir: folder of the bundles, by default found; they say how the masker is built.

    Raises:
        FileNotFoundError: when there is no checkpoint, or no bundle.
        ValueError: when the file is no checkpoint of pretraining, its masker has no name, or the share is no share.

    Example:
        >>> from ahm_transforms import AdaptiveHardMaskd
        >>> hide = AdaptiveHardMaskd("image", load_masker("model.pt"), draw=True)  # doctest: +SKIP
    """
    check_share("policy_share", policy_share)
    content = load_checkpoint(path)
    settings = content.get("provenance", {}).get("settings", {})
    _check_task(path, settings, PRETRAINING)
    if settings.get("masker") is None or "masker" not in content:
        raise ValueError(
            f"{path}: expected a checkpoint with a masker that the bundle ahm_pretrain knows by name, got none; build "
            "yours and load it with ahm_engines.handlers.load_checkpoint(path, {'masker': masker})."
        )
    parser = inference_of(bundles_folder(bundles_dir) / "ahm_pretrain", path)
    parser["curriculum"]["policy_share"] = [policy_share, policy_share]
    masker: CurriculumMasker = parser.get_parsed_content("curriculum")
    network: nn.Module = parser.get_parsed_content("network_def")  # of which some maskers make use
    restore_objects(path, content, {"model": network, "masker": masker})
    masker.set_progress(1.0)
    return masker.eval()


def load_trained(path: str | Path, network: nn.Module, *, task: str, classes: Sequence[str]) -> dict[str, Any]:
    """Load a finetuned network after a look at what it was trained for.

    Args:
        path: a checkpoint of finetuning, or one with the network's weights under ``model``.
        network: what gets the weights.
        task: what is to be done with it: ``segmentation`` or ``classification``.
        classes: the names that its outputs will get, in order.

    Returns:
        The checkpoint's provenance.

    Raises:
        FileNotFoundError: when there is no checkpoint.
        ValueError: when it belongs to pretraining, to another task, to other classes, or to another architecture;
            nothing is loaded then.
    """
    content = load_checkpoint(path)
    provenance: dict[str, Any] = content.get("provenance", {})
    settings = provenance.get("settings", {})
    _check_task(path, settings, task)
    if list(settings.get("classes", classes)) != list(classes):
        raise ValueError(f"{path}: trained for the classes {settings['classes']}, got classes {list(classes)}.")
    restore_objects(path, content, {"model": network})
    logger.info("Loaded %s, made %s with versions %s.", path, provenance.get("created"), provenance.get("versions"))
    return provenance


def _check_task(path: str | Path, settings: Mapping[str, Any], task: str) -> None:
    found = settings.get("task", task)
    if found != task:
        start = " with this as --pretrained if it shall start from there," if found == PRETRAINING else ""
        raise ValueError(
            f"{path}: a checkpoint of {found}, expected one of {task}: train one first,{start} or name it."
        )
