# SPDX-License-Identifier: Apache-2.0
"""The commands of the segmentation bundle as users type them, each in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bundles.ahm_segmentation.segmenting import TINY, write_labelled
from tests.bundles.running import SEGMENTATION, command, finish, start

SECRET = "Doe_Jane_1970"


def words(options: Mapping[str, Any], *files: str, run_id: str = "training") -> Sequence[str]:
    paths = [str(SEGMENTATION / "configs" / name) for name in files]
    return command(options, run_id=run_id, files=str(paths))


def test_train_evaluate_and_infer_by_commands(tmp_path: Path) -> None:
    """And what is handed on with a checkpoint names neither folders nor patients."""
    data = write_labelled(tmp_path / SECRET)
    run, labels = tmp_path / "run", data.parent / "labels"
    options = {**TINY, "dataset_dir": data, "labels_dir": labels, "output_dir": run, "skip_bad": "true"}
    text = finish(start(words(options, "train.json")))
    assert "Epoch 1/1" in text and "training from scratch" in text
    record = json.loads((run / "run_record.json").read_text())
    assert record["config"]["labels_dir"] == str(labels)
    content = (run / "models/model.pt").read_bytes()
    assert not any(told in content for told in (SECRET.encode(), str(tmp_path).encode(), b"scan0"))

    given = {"dataset_dir": data, "labels_dir": labels, "output_dir": run}
    finish(start(words(given, "train.json", "evaluate.json", run_id="evaluating")))
    assert (run / "evaluation/scores.csv").read_text().startswith("case_id,dice,hd95_mm,surface_dice,dice_box")

    (data / "broken.nii.gz").write_text("no image")
    given = {"dataset_dir": data, "output_dir": tmp_path / "out", "checkpoint": run / "models/model.pt"}
    process = start(words(given, "inference.json", run_id="run"))
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert "IncompleteInferenceError: 1 of 7 case(s) failed" in text
    assert "6 case(s) done, 1 failed" in text
    assert len(list((tmp_path / "out").rglob("*_seg.nii.gz"))) == 6
