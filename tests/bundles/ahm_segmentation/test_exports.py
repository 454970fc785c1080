# SPDX-License-Identifier: Apache-2.0
"""TorchScript and ONNX by MONAI's own commands: the exported network gives what the eager one gives."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ckpt_export, onnx_export

from tests.bundles.ahm_segmentation.segmenting import train, write_labelled
from tests.bundles.running import SEGMENTATION, read_bundle

Trained = tuple[Path, torch.nn.Module]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Checkpoint, and the eager network with its weights."""
    folder = tmp_path_factory.mktemp("trained")
    train(write_labelled(folder / "data", 4), folder / "run")
    path = folder / "run/models/model.pt"
    parser = read_bundle("inference.json", "infer", bundle=SEGMENTATION, checkpoint=str(path)).parser
    parser.get_parsed_content("checkpointloader")()
    network: torch.nn.Module = parser.get_parsed_content("network_def").eval()
    return path, network


def export(command: Any, trained: Trained, output: Path, **options: Any) -> Path:
    """Export as the README does."""
    configs = SEGMENTATION / "configs"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about its own exporters
        command(
            net_id="network_def",
            config_file=str(configs / "inference.json"),
            meta_file=str(configs / "metadata.json"),
            ckpt_file=str(trained[0]),
            key_in_ckpt="model",
            filepath=str(output),
            checkpoint=str(trained[0]),
            **options,
        )
    return output


def eager(trained: Trained, image: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = trained[1](image)
    return output


def test_torchscript(trained: Trained, tmp_path: Path) -> None:
    exported = torch.jit.load(export(ckpt_export, trained, tmp_path / "model.ts"))
    image = torch.rand(2, 1, 16, 16, 16)
    torch.testing.assert_close(exported(image), eager(trained, image), atol=1e-5, rtol=0)


def test_onnx(trained: Trained, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    shape = [1, 1, 16, 16, 16]
    path = export(onnx_export, trained, tmp_path / "model.onnx", input_shape=shape)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    image = torch.rand(shape)
    (output,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), eager(trained, image), atol=1e-5, rtol=0)
