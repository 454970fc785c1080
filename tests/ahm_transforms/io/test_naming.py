# SPDX-License-Identifier: Apache-2.0
"""Results are named by the case, where there is one."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from ahm_transforms.io import NameByCased


def prediction() -> MetaTensor:
    return MetaTensor(torch.zeros(1, 2, 3), meta={"filename_or_obj": "ward/Doe_Jane.nii.gz", "original_channel_dim": 0})


def test_the_name_is_the_id_of_the_case() -> None:
    given = prediction()
    named = NameByCased("pred")({"pred": given, "case_id": "c1"})["pred"]
    assert (named.meta["filename_or_obj"], named.meta["original_channel_dim"]) == ("c1", "no_channel")
    assert given.meta["filename_or_obj"] == "ward/Doe_Jane.nii.gz"


def test_data_without_an_id_are_passed_over_only_where_that_is_asked_for() -> None:
    data = {"pred": prediction()}
    assert NameByCased("pred", allow_missing_keys=True)(data)["pred"] is data["pred"]
    with pytest.raises(KeyError, match="case_id"):
        NameByCased("pred")(data)
