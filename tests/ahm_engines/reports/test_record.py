# SPDX-License-Identifier: Apache-2.0
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigWorkflow

import ahm_engines.reports.record as code
from ahm_engines.reports import describe_run, provenance, running_config, write_record
from tests.bundles.running import BUNDLES


def write_bundle(folder):
    (folder / "a.json").write_text(
        """{"imports": ["$import ahm_engines.reports as reports"], "lr": 0.1, "net": {"width": 8},
        "shelf": {"x": {"v": 1}}, "pick": "%shelf::x", "record": "$reports.describe_run(seed=0, data={})"}"""
    )
    (folder / "b.json").write_text('{"net#width": 16}')
    return [str(folder / name) for name in ("a.json", "b.json")]


def test_the_record_holds_the_bundles_files_and_overrides_in_whatever_process_it_runs(tmp_path):
    overrides = {"lr": 0.5, "net#depth": 3}
    workflow = ConfigWorkflow(write_bundle(tmp_path), logging_file=False, workflow_type=None, **overrides)
    workflow.initialize()
    workflow.parser["net#depth"] = 4  # as federated clients and MONAI Label change a bundle that they have read
    workflow.parser.parse(reset=True)
    config = workflow.parser.get_parsed_content("record")["config"]
    assert config.pop("imports") and config.pop("record").startswith("$reports")
    assert config == {"lr": 0.5, "net": {"width": 16, "depth": 4}, "shelf": {"x": {"v": 1}}, "pick": {"v": 1}}


def test_outside_of_a_bundle_there_is_no_configuration(caplog):
    assert running_config() == {}
    assert "no configuration" in caplog.text


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
    config = {"dataset_dir": "/scans/Jane Doe", "datalist": None, "lr": 0.1, "tracking_uri": "https://me:secret@server"}
    record = describe_run(seed=0, data={}, config=config)
    assert provenance(record)["config"] == {"lr": 0.1}
    assert record["config"]["dataset_dir"] == "/scans/Jane Doe"


def test_checkpoints_do_not_carry_cases_or_paths_that_somebody_put_deep_into_the_configuration():
    """As MONAI Label does with its data lists and handlers."""
    cases = [{"image": "Jane_Doe.nii.gz"}]
    handlers = ["@x", {"_target_": "Saver", "load_path": "/models/Jane Doe/model.pt", "epochs": 2}, "/scans/Jane Doe"]
    config = {"train": {"dataset": {"data": cases, "cache_rate": 1.0}, "handlers": handlers}}
    record = describe_run(seed=0, data={}, config=config)
    kept = {"dataset": {"cache_rate": 1.0}, "handlers": ["@x", {"_target_": "Saver", "epochs": 2}]}
    assert provenance(record)["config"] == {"train": kept}
    assert provenance(describe_run(seed=0, data={}, config={"a": {"data": "$@cases"}}))["config"]["a"]["data"]


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)
def test_every_folder_of_a_bundle_is_known_as_one(bundle: Path):
    """Relative ones are not seen by their form."""
    configs = [json.loads(path.read_text()) for path in (bundle / "configs").glob("*.json")]
    folders = {name for config in configs for name in config if name.endswith(("_dir", "_root", "_report"))}
    assert folders >= {"bundle_root", "output_dir", "dataset_dir"}
    assert provenance({"config": dict.fromkeys(folders, "../Jane Doe")})["config"] == {}


def test_the_commit_is_that_of_the_code_and_not_of_a_project_around_its_environment(tmp_path, monkeypatch):
    folder = tmp_path / "project/.venv"
    folder.mkdir(parents=True)
    shutil.copy(code.__file__, folder / "record.py")
    monkeypatch.setattr(code, "__file__", str(folder / "record.py"))
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a"]
    subprocess.run([*git, "init", "-q", str(tmp_path / "project")], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    assert describe_run(seed=0, data={}, config={})["git_commit"] is None
    subprocess.run([*git, "add", "record.py"], check=True)
    assert len(describe_run(seed=0, data={}, config={})["git_commit"]) == 40
