# SPDX-License-Identifier: Apache-2.0
"""Results are named by the case, where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import SaveImaged

from ahm_transforms.io import NameByCased


def prediction() -> MetaTensor:
    return MetaTensor(torch.zeros(1, 2, 3), meta={"filename_or_obj": "ward/Doe_Jane.nii.gz", "original_channel_dim": 0})


def test_the_name_is_the_id_of_the_case() -> None:
    given = prediction()
    named = NameByCased("pred")({"pred": given, "case_id": "c1"})["pred"]
    assert (named.meta["filename_or_obj"], named.meta["original_channel_dim"]) == ("c1.nii.gz", "no_channel")
    assert given.meta["filename_or_obj"] == "ward/Doe_Jane.nii.gz"


def test_data_without_an_id_are_passed_over_only_where_that_is_asked_for() -> None:
    data = {"pred": prediction()}
    assert NameByCased("pred", allow_missing_keys=True)(data)["pred"] is data["pred"]
    with pytest.raises(KeyError, match="case_id"):
        NameByCased("pred")(data)


def test_ids_may_hold_dots(tmp_path: Path) -> None:
    save = SaveImaged("pred", output_dir=str(tmp_path), output_postfix="seg", resample=False, print_log=False)
    ids = ["scan_1.0T", "scan_1.5T", "2021.03.04", "a.b.nii"]
    for case_id in ids:
        save(NameByCased("pred")({"pred": prediction(), "case_id": case_id}))
    written = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.nii.gz"))
    assert written == sorted(f"{case_id}/{case_id}_seg.nii.gz" for case_id in ids)
