# SPDX-License-Identifier: Apache-2.0
"""Run the bundle as its commands do, in this process or in one of its own, with settings small enough for a test."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigWorkflow

from tests.fixtures_data import write_nifti

ROOT = Path(__file__).parents[2]
PRETRAIN, SEGMENTATION, CLASSIFICATION = (
    ROOT / "bundles" / name for name in ("ahm_pretrain", "ahm_segmentation", "ahm_classification")
)
BUNDLES = (PRETRAIN, SEGMENTATION, CLASSIFICATION)
CONFIGS = PRETRAIN / "configs"
SHELF = (
    "uniform",
    "a3c",
    "a3c_bernoulli",
    "loss_prediction",
    "boxes",
    "boxes_actor_critic",
    "q_region",
    "teacher_error",
    "adamae",
)
TINY_UNET = {"channels": [4, 8], "strides": [2], "num_res_units": 0}
TINY_NET: dict[str, Any] = {"backbone_args": TINY_UNET}
TINY_INFERENCE: dict[str, Any] = {**TINY_NET, "crop_size": 16, "patch_size": 4}
TINY: dict[str, Any] = {**TINY_INFERENCE, "max_epochs": 2, "min_epoch_length": 3, "val_interval": 1}
# axes to the left, down and to the front; turned by 30 degrees about x, 1 x 2.5 x 1.5 mm
OBLIQUE_LIA = np.array([[-1, 0, 0, 40], [0, -1.25, 1.299038, -21], [0, -2.165064, -0.75, 7], [0, 0, 0, 1]])


def read_bundle(
    files: str | Sequence[str], kind: str = "train", *, bundle: Path = PRETRAIN, **overrides: Any
) -> ConfigWorkflow:
    """Return the workflow of config files of a bundle, initialised and not yet run."""
    names = [files] if isinstance(files, str) else files
    workflow = ConfigWorkflow(
        config_file=[str(bundle / "configs" / name) for name in names],
        meta_file=str(bundle / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type=kind,
        **overrides,
    )
    workflow.initialize()
    return workflow


def run_bundle(
    files: str | Sequence[str], kind: str = "train", *, bundle: Path = PRETRAIN, **overrides: Any
) -> ConfigWorkflow:
    """Run config files of a bundle in this process and return the workflow."""
    workflow = read_bundle(files, kind, bundle=bundle, **overrides)
    workflow.run()
    workflow.finalize()
    return workflow


def train(data: Path | None, output: Path, **overrides: Any) -> ConfigWorkflow:
    """Train with tiny settings."""
    folder = None if data is None else str(data)
    return run_bundle("train.json", **{**TINY, "dataset_dir": folder, "output_dir": str(output), **overrides})


def infer(data: Path, output: Path, checkpoint: Path, **overrides: Any) -> ConfigWorkflow:
    """Run inference with tiny settings."""
    given = {"dataset_dir": str(data), "output_dir": str(output), "checkpoint": str(checkpoint), **overrides}
    return run_bundle("inference.json", "infer", **{**TINY_INFERENCE, **given})


def command(options: Mapping[str, Any], *, run_id: str = "training", files: str | None = None) -> list[str]:
    """Return the words of the README's command with further options."""
    words = [sys.executable, "-m", "monai.bundle", "run", run_id, "--config_file", files or str(CONFIGS / "train.json")]
    for key, value in options.items():
        words += [f"--{key}", str(value)]
    return words


def start(words: Sequence[str]) -> subprocess.Popen[str]:
    """Start a command in the project's folder, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        words, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen[str], *, timeout: float = 120) -> str:
    """Wait for a command to end well and return what it wrote."""
    try:
        text = process.communicate(timeout=timeout)[0]
    finally:
        process.kill()
    if process.returncode != 0:
        raise AssertionError(f"{process.args!r} ended with {process.returncode}:\n{text[-4000:]}")
    return text


def wait_for(process: subprocess.Popen[str], last: Path, *, timeout: float = 120) -> None:
    """Wait until a command has written its first checkpoint and goes on."""
    until = time.monotonic() + timeout
    while not last.is_file():
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            raise AssertionError(f"no checkpoint was written:\n{process.communicate()[0][-2000:]}")
        time.sleep(0.01)
    time.sleep(0.2)


def error_chain(error: BaseException) -> str:
    """Join the messages of an error and of all its causes."""
    messages: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        messages.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    return "\n".join(messages)


def write_cases(folder: Path, count: int = 4, affine: np.ndarray | None = None) -> Path:
    """Write small volumes."""
    for number in range(count):
        write_nifti(folder / f"scan{number}.nii.gz", (20, 24, 18), affine)
    return folder


def checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint as anybody may who does not trust it."""
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def kept(output: Path) -> list[bytes]:
    """What a training that is refused leaves as it is."""
    return [(output / name).read_bytes() for name in ("models/last.pt", "run_record.json")]


def assert_same_state(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Compare two state dictionaries bit for bit."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[name]), name
