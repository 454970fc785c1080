# SPDX-License-Identifier: Apache-2.0
"""The commands of the segmentation bundle as users type them, each in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bundles.ahm_segmentation.segmenting import TINY, evaluate, write_labelled
from tests.bundles.running import SEGMENTATION, assert_same_state, checkpoint, command, finish, start

SECRET = "Doe_Jane_1970"
TWO = ["-m", "torch.distributed.run", "--standalone", "--nnodes=1", "--nproc_per_node=2"]


def words(options: Mapping[str, Any], *files: str, run_id: str = "training", ranks: int = 1) -> Sequence[str]:
    paths = [str(SEGMENTATION / "configs" / name) for name in files]
    line = command(options, run_id=run_id, files=str(paths))
    return line if ranks == 1 else [line[0], *TWO, *line[1:]]


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


def test_two_processes_train_one_network_and_score_as_one(tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "data", 8)
    state = "$torch.save(@network.module.state_dict(), @output_dir + f'/rank{torch.distributed.get_rank()}.pt')"
    shared = {"val_fraction": 0.25, "test_fraction": 0.25}
    options = {
        **TINY,
        **shared,
        "dataset_dir": data,
        "output_dir": tmp_path / "run",
        "max_epochs": 2,
        "freeze_epochs": 1,  # parameters come and go, which distributed training must be told
    }
    finalize = str([state, "$torch.distributed.destroy_process_group()"])
    training = words({**options, "finalize": finalize}, "train.json", "multi_gpu_train.json", ranks=2)
    text = finish(start(training))
    assert_same_state(*(checkpoint(tmp_path / f"run/rank{rank}.pt") for rank in (0, 1)))
    assert checkpoint(tmp_path / "run/models/last.pt")["trainer"]["epoch"] == 2
    assert text.count("Key metric: dice") == 2  # of the first process alone, one for each validation
    assert len(list((tmp_path / "run/tensorboard").iterdir())) == 1

    files = ("train.json", "evaluate.json", "multi_gpu_evaluate.json")
    finish(start(words(options, *files, run_id="evaluating", ranks=2)))
    table = (tmp_path / "run/evaluation/scores.csv").read_text()
    assert len(table.splitlines()) == 3
    evaluate(data, tmp_path / "alone", **{**shared, "ckpt_dir": str(tmp_path / "run/models")})
    assert (tmp_path / "alone/evaluation/scores.csv").read_text() == table
