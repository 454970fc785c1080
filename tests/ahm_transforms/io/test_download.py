# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ahm_transforms.io import download, download_decathlon, load_cases
from tests.fixtures_data import write_nifti


def test_task_is_fetched_once_and_its_datalist_can_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def fetch(url: str, filepath: Path, output_dir: Path, hash_val: str) -> None:
        calls.append((url, filepath, hash_val))
        folder = Path(output_dir) / "Task04_Hippocampus"
        write_nifti(folder / "imagesTr/hippocampus_001.nii.gz")
        (folder / "dataset.json").write_text(json.dumps({"training": [{"image": "./imagesTr/hippocampus_001.nii.gz"}]}))

    monkeypatch.setattr(download, "download_and_extract", fetch)
    datalist = download_decathlon("Task04_Hippocampus", tmp_path)
    assert download_decathlon("Task04_Hippocampus", tmp_path) == datalist
    ((url, path, md5),) = calls
    assert url.endswith("Task04_Hippocampus.tar") and path == tmp_path / "Task04_Hippocampus.tar" and len(md5) == 32
    assert len(load_cases(datalist=datalist).training) == 1


def test_unknown_task(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown Decathlon task 'Task99', expected one of Task01_BrainTumour"):
        download_decathlon("Task99", tmp_path)


def test_archive_without_datalist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "download_and_extract", lambda *args, **kwargs: None)
    with pytest.raises(RuntimeError, match=r"holds no dataset\.json"):
        download_decathlon("Task09_Spleen", tmp_path)
