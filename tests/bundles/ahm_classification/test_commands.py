# SPDX-License-Identifier: Apache-2.0
"""The commands as users type them, each in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.bundles.ahm_classification.classifying import (
    EVALUATION,
    LEARNING,
    PICTURES,
    evaluate,
    options_for,
    predictions,
    write_masked,
    write_pictures,
)
from tests.bundles.running import CLASSIFICATION, assert_same_state, checkpoint, command, finish, start


def files(*names: str) -> str:
    return str([str(CLASSIFICATION / "configs" / name) for name in names])


def torchrun(words: list[str]) -> list[str]:
    return [words[0], "-m", "torch.distributed.run", "--standalone", "--nnodes=1", "--nproc_per_node=2", *words[1:]]


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


def test_two_processes_end_with_the_same_weights_and_score_as_one(tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "data", 8)
    state = "$torch.save(@network.module.state_dict(), @output_dir + f'/rank{torch.distributed.get_rank()}.pt')"
    options: dict[str, Any] = options_for(
        data,
        tmp_path / "run",
        **{**PICTURES, "max_epochs": 2, "freeze_epochs": 1, "test_fraction": 0.45, "min_epoch_length": 3},
    )
    ending = {"finalize": str([state, "$torch.distributed.destroy_process_group()"])}
    words = command({**options, **ending}, files=files("train.json", "multi_gpu_train.json"))
    text = finish(start(torchrun(words)), timeout=300)
    first, second = (checkpoint(tmp_path / "run" / f"rank{rank}.pt") for rank in (0, 1))
    assert_same_state(first, second)
    assert checkpoint(tmp_path / "run/models/last.pt")["trainer"] == {"epoch": 2, "iteration": 6, "epoch_length": 3}
    assert len(list((tmp_path / "run/tensorboard").iterdir())) == 1  # of the first process alone
    assert text.count("Key metric: macro_f1") == 2  # one for each validation

    folders = {"dataset_dir": str(data), "output_dir": str(tmp_path / "run")}
    words = command(folders, run_id="evaluating", files=files(*EVALUATION, "multi_gpu_evaluate.json"))
    finish(start(torchrun(words)), timeout=300)
    table = (tmp_path / "run/evaluation/scores.csv").read_text()
    report = evaluate(data, tmp_path / "run")
    assert report["cases"] == 7  # does not divide by two
    assert (tmp_path / "run/evaluation/scores.csv").read_text() == table
