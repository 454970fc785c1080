# SPDX-License-Identifier: Apache-2.0
import json

import torch

from ahm_engines.reports import bundle_config, describe_run, provenance, write_record


def test_bundle_config_merges_files_and_applies_the_command_line(tmp_path):
    (tmp_path / "a.json").write_text('{"lr": 0.1, "net": {"width": 8}, "shelf": {"x": {"v": 1}}, "pick": "%shelf::x"}')
    (tmp_path / "b.json").write_text('{"net#width": 16}')
    files = f"['{tmp_path}/a.json','{tmp_path}/b.json']"
    command = ["run", "training", "--config_file", files, "--lr", "0.5", "--net#depth=3", "--logging_file", "x"]
    config = bundle_config(command)
    assert config == {"lr": 0.5, "net": {"width": 16, "depth": 3}, "shelf": {"x": {"v": 1}}, "pick": {"v": 1}}


def test_other_commands_have_no_bundle_config():
    assert bundle_config(["pytest", "--maxfail", "1"]) == {}


def test_the_record_is_plain_json_and_fit_for_a_checkpoint(tmp_path):
    record = describe_run(seed=3, data={"cases": 2}, config={"device": torch.device("cpu"), "sizes": (1, 2)})
    write_record(tmp_path / "new" / "run_record.json", record)
    stored = json.loads((tmp_path / "new" / "run_record.json").read_text())
    assert stored == record
    assert stored["config"] == {"device": "cpu", "sizes": [1, 2]}
    assert stored["seed"] == 3
    assert stored["versions"]["monai"]
    torch.save(record, tmp_path / "r.pt")
    assert torch.load(tmp_path / "r.pt", weights_only=True) == record


def test_checkpoints_do_not_carry_the_names_of_folders():
    record = describe_run(seed=0, data={}, config={"dataset_dir": "/scans/Jane Doe", "datalist": None, "lr": 0.1})
    assert provenance(record)["config"] == {"lr": 0.1}
    assert record["config"]["dataset_dir"] == "/scans/Jane Doe"
