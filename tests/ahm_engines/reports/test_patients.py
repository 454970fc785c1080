# SPDX-License-Identifier: Apache-2.0
"""Patients are told apart by hashes, and those who were trained on are not scored unseen."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from ahm_engines.reports import patient_hashes, warn_of_trained_patients
from ahm_engines.reports.patients import trained_patients, write_trained_patients


def cases_of(*patients: str) -> list[dict[str, Any]]:
    return [{"case_id": f"{patient}-{i}", "patient_id": patient} for patient in patients for i in range(2)]


def test_hashes_are_sorted_and_one_for_each_patient() -> None:
    expected = sorted(sha256(name.encode()).hexdigest()[:12] for name in "abc")
    assert patient_hashes(cases_of("c", "a", "b")) == expected


def test_blocks_of_one_scan_count_as_patients() -> None:
    assert len(patient_hashes([{**case, "block": [[0, 1]]} for case in cases_of("head")])) == 2


def test_cases_without_a_patient_are_passed_over() -> None:
    assert patient_hashes([{"image": "a.nii", "label": "b.nii"}]) == []


@pytest.mark.parametrize("part", ["test", "validation"])
def test_patients_who_were_trained_on_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture, part: str) -> None:
    write_trained_patients(tmp_path / "last.pt", patient_hashes(cases_of("a", "b", "c")))
    warn_of_trained_patients(tmp_path / "model.pt", cases_of("b", "c", "d"), part)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(f"2 of 3 {part} patients have names of patients whom model.pt was")
    assert "a datalist" in record.getMessage()


@pytest.mark.parametrize(
    ("patients", "part"), [("a", "training"), ("b", "test"), ("", "test")], ids=["on purpose", "others", "unknown"]
)
def test_nothing_else_is_worth_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, patients: str, part: str
) -> None:
    write_trained_patients(tmp_path / "model.pt", patient_hashes(cases_of(*patients)))
    warn_of_trained_patients(tmp_path / "model.pt", cases_of("a"), part)
    warn_of_trained_patients(None, cases_of("a"), "test")
    assert caplog.records == [] and len(trained_patients(tmp_path / "model.pt")) == len(patients)
