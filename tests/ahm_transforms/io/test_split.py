# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import random

import pytest

from ahm_transforms.io import split_by_patient


def make(patients: int, each: int = 3) -> list[dict]:
    return [{"case_id": f"c{i:03d}", "patient_id": f"p{i % patients}"} for i in range(patients * each)]


@pytest.mark.parametrize("patients", [2, 3, 10, 33])
@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.99])
def test_no_patient_is_in_both_and_neither_is_empty(patients: int, fraction: float) -> None:
    cases = make(patients)
    training, validation = split_by_patient(cases, val_fraction=fraction, seed=3)
    sides = [{case["patient_id"] for case in part} for part in (training, validation)]
    assert not sides[0] & sides[1]
    assert all(sides)
    assert sorted(case["case_id"] for case in training + validation) == [case["case_id"] for case in cases]


def test_share_of_patients_is_the_one_asked() -> None:
    assert len(split_by_patient(make(10), val_fraction=0.3)[1]) == 9


def test_order_does_not_matter_and_the_seed_does() -> None:
    cases = make(20)
    shuffled = random.Random(1).sample(cases, len(cases))
    assert split_by_patient(cases, seed=5) == split_by_patient(shuffled, seed=5)
    assert split_by_patient(cases, seed=5) != split_by_patient(cases, seed=6)


def test_one_patient_trains_and_validates_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        training, validation = split_by_patient(make(1))
    assert training == validation
    assert "Only one patient" in caplog.text


def test_no_validation_at_fraction_zero() -> None:
    assert split_by_patient(make(3), val_fraction=0)[1] == []
    with pytest.raises(ValueError, match=r"val_fraction must be in \[0, 1\), got 1"):
        split_by_patient(make(3), val_fraction=1)
