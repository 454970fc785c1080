# SPDX-License-Identifier: Apache-2.0
"""Scans with planted boxes, and the segmentation bundle with settings small enough for a test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow

from tests.bundles.running import SEGMENTATION, TINY_NET, error_chain, run_bundle

SHAPE = (20, 24, 18)
CLASSES = ["box", "slab"]
TINY: dict[str, Any] = {
    **TINY_NET,
    "classes": CLASSES,
    "crop_size": 16,
    "max_epochs": 1,
    "min_epoch_length": 1,
    "val_interval": 1,
    "overlap": 0.25,
}
# one output for air and one for what is brighter than the middle of the intensities: a segmentation known beforehand
THRESHOLD = {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 2, "kernel_size": 1}


def train(data: Path | None, output: Path, *, files: str | Sequence[str] = "train.json", **overrides: Any) -> Any:
    """Train with tiny settings."""
    folder = None if data is None else str(data)
    given = {**TINY, "dataset_dir": folder, "output_dir": str(output), **overrides}
    return run_bundle(files, bundle=SEGMENTATION, **given)


def evaluate(data: Path, output: Path, **overrides: Any) -> ConfigWorkflow:
    """Score the best checkpoint of ``output`` with tiny settings."""
    return train(data, output, files=["train.json", "evaluate.json"], **overrides)


def infer(data: Path, output: Path, checkpoint: Path, **overrides: Any) -> ConfigWorkflow:
    """Run inference; the settings are those of the checkpoint."""
    given = {"dataset_dir": str(data), "output_dir": str(output), "checkpoint": str(checkpoint), **overrides}
    return run_bundle("inference.json", "infer", bundle=SEGMENTATION, **given)


def message_of(call: Callable[..., Any], *args: Any, **options: Any) -> str:
    """Return what the user reads when the call fails, as it must."""
    with pytest.raises(Exception) as error:  # MONAI wraps each error in its own
        call(*args, **options)
    return error_chain(error.value)


def planted(number: int, shape: Sequence[int] = SHAPE) -> np.ndarray:
    """Return class indices: a box (1), somewhere else in each scan, and a slab (2)."""
    label = np.zeros(shape, np.uint8)
    start = 2 + number % 4
    label[start : start + 7, 3:11, start : start + 7] = 1
    label[4:14, 15:20, 4:12] = 2
    return label


def write_case(folder: Path, name: str, label: np.ndarray, affine: np.ndarray | None = None) -> None:
    """Write a label, and an image that is brighter the higher the class."""
    noise = np.random.default_rng(len(name)).integers(0, 40, label.shape)
    affine = np.eye(4) if affine is None else affine
    for kind, values in (("images", (noise + 400.0 * label).astype(np.int16)), ("labels", label)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(values, affine), folder / kind / f"{name}.nii.gz")


def write_labelled(folder: Path, count: int = 6, affine: np.ndarray | None = None) -> Path:
    """Write scans and labels in folders of their own; return that of the scans."""
    for number in range(count):
        write_case(folder, f"scan{number}", planted(number), affine)
    return folder / "images"


def write_threshold(path: Path, dims: int = 3, **settings: Any) -> dict[str, Any]:
    """Write a checkpoint that finds all that is bright, and return the option that builds its network."""
    network = {**THRESHOLD, "_target_": f"torch.nn.Conv{dims}d"}
    weight = torch.tensor([0.0, 20.0]).reshape(2, 1, *[1] * dims)
    known = {"task": "segmentation", "classes": ["box"], "spatial_dims": dims, "crop_size": 16, "modality": "mr"}
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "model": {"weight": weight, "bias": torch.tensor([10.0, 0.0])},
        "provenance": {"settings": {**known, **settings}},
    }
    torch.save(content, path)
    return {"network_def": network}
