# SPDX-License-Identifier: Apache-2.0
"""The commands as users type them, each in a process of its own."""

from __future__ import annotations

from pathlib import Path

from tests.bundles.ahm_classification.classifying import (
    LEARNING,
    PICTURES,
    options_for,
    predictions,
    write_masked,
)
from tests.bundles.running import CLASSIFICATION, command, finish, start


def files(*names: str) -> str:
    return str([str(CLASSIFICATION / "configs" / name) for name in names])


def test_training_and_inference_commands(tmp_path: Path) -> None:
    images, masks = write_masked(tmp_path / "Doe_Jane_1970")
    given = {**PICTURES, **LEARNING, "masks_dir": masks, "max_epochs": 1, "val_interval": 1}
    options = options_for(images, tmp_path / "run", **given)
    finish(start(command(options, files=files("train.json"))), timeout=300)
    for name in ("last.pt", "model.pt"):
        content = (tmp_path / "run/models" / name).read_bytes()
        assert not any(text in content for text in (b"Doe_Jane_1970", str(tmp_path).encode(), b"rows_0"))

    (images / "rows_0.png").write_text("this is no picture")
    options = {
        "dataset_dir": images,
        "masks_dir": masks,
        "checkpoint": tmp_path / "run/models/model.pt",
        "output_dir": tmp_path / "out",
    }
    words = command(options, run_id="run", files=files("inference.json"))
    process = start(words)
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 1
    assert "1 of 10 case(s) failed" in text and "rows_0 " in text
    assert len(predictions(tmp_path / "out")) == 9
