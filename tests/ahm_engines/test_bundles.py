# SPDX-License-Identifier: Apache-2.0
"""The bundles are found where people start from, or beside the packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from ahm_engines.bundles import bundles_folder

ROOT = Path(__file__).parents[2]


def test_bundles_are_found_here_or_beside_the_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert bundles_folder() == ROOT / "bundles"
    own = tmp_path / "bundles/ahm_pretrain/configs"
    own.mkdir(parents=True)
    (own / "train.json").write_text("{}")
    assert bundles_folder() == tmp_path / "bundles"
    assert bundles_folder(ROOT / "bundles") == ROOT / "bundles"
    with pytest.raises(FileNotFoundError, match=r"no bundles in .*elsewhere.*--bundles_dir"):
        bundles_folder(tmp_path / "elsewhere")
