# SPDX-License-Identifier: Apache-2.0
"""Pictures and volumes with stripes one way or the other, and the classification bundle with settings for a test."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigWorkflow
from PIL import Image

from tests.bundles.running import CLASSIFICATION, TINY_NET, error_chain, read_bundle, run_bundle

CLASSES = ["rows", "columns"]
TINY: dict[str, Any] = {
    "architecture_args": TINY_NET,
    "classes": CLASSES,
    "image_size": 16,
    "cases_per_batch": 4,
    "max_epochs": 1,
    "min_epoch_length": 1,
    "val_interval": 1,
}
PICTURES: dict[str, Any] = {"modality": "image2d", "spatial_dims": 2}
# on these settings the tiny network learns stripes in seconds
LEARNING: dict[str, Any] = {
    "architecture_args": {**TINY_NET, "head": "conv", "dropout": 0.0},
    "max_epochs": 4,
    "min_epoch_length": 15,
    "val_interval": 4,
    "learning_rate": 0.01,
    "augment": False,
}
EVALUATION = ("train.json", "evaluate.json")


def options_for(data: Path | None, output: Path, **overrides: Any) -> dict[str, Any]:
    """Return tiny settings for these folders."""
    return {**TINY, "dataset_dir": None if data is None else str(data), "output_dir": str(output), **overrides}


def train(data: Path | None, output: Path, *, files: str | Sequence[str] = "train.json", **overrides: Any) -> Any:
    """Train with tiny settings."""
    return run_bundle(files, bundle=CLASSIFICATION, **options_for(data, output, **overrides))


def read(data: Path | None, output: Path, **overrides: Any) -> Any:
    """Return the parser of a training that does not run."""
    return read_bundle("train.json", bundle=CLASSIFICATION, **options_for(data, output, **overrides)).parser


def evaluate(data: Path, output: Path, **overrides: Any) -> dict[str, Any]:
    """Score the best checkpoint of ``output`` and return ``scores.json``; the settings are those of the checkpoint."""
    given = {"dataset_dir": str(data), "output_dir": str(output), **overrides}
    run_bundle(EVALUATION, bundle=CLASSIFICATION, **given)
    report: dict[str, Any] = json.loads((output / "evaluation/scores.json").read_text())
    return report


def infer(data: Path, output: Path, checkpoint: Path, **overrides: Any) -> ConfigWorkflow:
    """Run inference; the settings are those of the checkpoint."""
    given = {"dataset_dir": str(data), "output_dir": str(output), "checkpoint": str(checkpoint), **overrides}
    return run_bundle("inference.json", "infer", bundle=CLASSIFICATION, **given)


def predictions(output: Path) -> dict[str, str]:
    """Return the predicted class by case."""
    content = json.loads((output / "predictions.json").read_text())
    return {case["case_id"]: case["predicted"] for case in content["cases"]}


def message_of(call: Callable[..., Any], *args: Any, **options: Any) -> str:
    """Return what the user reads when the call fails, as it must."""
    with pytest.raises(Exception) as error:  # MONAI wraps each error in its own
        call(*args, **options)
    return error_chain(error.value)


def stripes(name: str, shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """Return noisy stripes along the first axis, or across it; no flip turns one kind into the other."""
    generator = np.random.default_rng(seed)
    axis = CLASSES.index(name)
    wave = np.sin(np.arange(shape[axis]) * np.pi / 3 + generator.random() * 6)
    wave = wave.reshape([-1 if place == axis else 1 for place in range(len(shape))])
    values: np.ndarray = (120 + 80 * wave + generator.normal(0, 10, shape)).astype(np.uint8)
    return values


def write_picture(path: Path, values: np.ndarray) -> None:
    """Write an array of uint8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def write_pictures(folder: Path, count: int = 5, classes: Sequence[str] = CLASSES) -> Path:
    """Write ``count`` pictures of each class, named after it."""
    for place, name in enumerate(classes):
        for number in range(count):
            values = stripes(CLASSES[place % 2], (24, 20), seed=10 * place + number)
            write_picture(folder / f"{name}_{number}.png", values)
    return folder


def write_volumes(folder: Path, count: int = 5, affine: np.ndarray | None = None) -> Path:
    """Write ``count`` volumes of each class, named after it."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, name in enumerate(CLASSES):
        for number in range(count):
            image = nib.Nifti1Image(stripes(name, (18, 20, 16), 10 * place + number), affine or np.eye(4))
            nib.save(image, folder / f"{name}_{number}.nii.gz")
    return folder


def write_masked(folder: Path, count: int = 5) -> tuple[Path, Path]:
    """Write pictures of noise whose class only the masks show; return the folders of both."""
    for place, name in enumerate(CLASSES):
        for number in range(count):
            seed = 10 * place + number
            noise = np.random.default_rng(seed).integers(0, 255, (24, 20)).astype(np.uint8)
            write_picture(folder / f"images/{name}_{number}.png", noise)
            write_picture(folder / f"drawn/{name}_{number}.png", np.uint8(255) * (stripes(name, (24, 20), seed) > 120))
    return folder / "images", folder / "drawn"
