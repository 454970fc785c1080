# SPDX-License-Identifier: Apache-2.0
"""The commands as users type them, each in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.bundles.running import TINY, assert_same_state, checkpoint, command, finish, start, wait_for, write_cases


def test_training_command_records_its_configuration(tmp_path: Path) -> None:
    data = write_cases(tmp_path / "Doe_Jane_1970")
    options = {**TINY, "dataset_dir": data, "output_dir": tmp_path / "run", "masker": "uniform"}
    text = finish(start(command(options)))

    assert "Epoch 2/2" in text  # the progress bar
    record = json.loads((tmp_path / "run/run_record.json").read_text())
    assert record["config"]["max_epochs"] == 2
    assert record["config"]["masker"] == "uniform"
    assert record["config"]["backbone_args"] == TINY["backbone_args"]
    assert record["config"]["dataset_dir"] == str(data)  # the record stays with the user, checkpoints are handed on
    for name in ("last.pt", "model.pt"):
        content = (tmp_path / "run/models" / name).read_bytes()
        assert not any(text in content for text in (b"Doe_Jane_1970", str(tmp_path).encode(), b"scan0"))
        kept = checkpoint(tmp_path / "run/models" / name)["provenance"]
        assert kept.keys() == record.keys()
        assert kept["config"]["network_def"] == record["config"]["network_def"]


def test_run_killed_and_resumed_equals_one_never_stopped(tmp_path: Path) -> None:
    data = write_cases(tmp_path / "data")
    options: dict[str, Any] = {**TINY, "dataset_dir": data, "max_epochs": 3, "min_epoch_length": 12, "val_interval": 2}
    unbroken = start(command({**options, "output_dir": tmp_path / "unbroken"}))
    killed = {**options, "output_dir": tmp_path / "killed"}
    kill_within_an_epoch(killed, tmp_path / "killed/models/last.pt")
    stopped = checkpoint(tmp_path / "killed/models/last.pt")
    assert stopped["trainer"]["epoch"] < 3
    finish(unbroken)
    finish(start(command({**killed, "resume": "true"})))

    ends = [checkpoint(tmp_path / name / "models/last.pt") for name in ("unbroken", "killed")]
    for end in ends:
        assert end["trainer"] == {"epoch": 3, "iteration": 36, "epoch_length": 12, "max_epochs": 3}
    for part in ("model", "masker"):
        assert_same_state(ends[0][part], ends[1][part])
    for part in ("optimizer", "masker_optimizer", "lr_scheduler", "best"):
        assert str(ends[0][part]) == str(ends[1][part])
    assert not list((tmp_path / "killed").rglob("*.tmp"))


def kill_within_an_epoch(options: dict[str, Any], last: Path) -> None:
    """Start the command and end it with SIGKILL soon after its first checkpoint."""
    process = start(command(options))
    wait_for(process, last)
    process.kill()
    process.communicate()
