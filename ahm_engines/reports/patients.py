# SPDX-License-Identifier: Apache-2.0
"""Which patients a network was trained on, as hashes, and whether it is scored on some of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ahm_engines.files import write_json
from ahm_transforms.io.dicom_headers import short_hash
from ahm_transforms.io.json_file import read_json

__all__ = ["PATIENTS", "patient_hashes", "trained_patients", "warn_of_trained_patients", "write_trained_patients"]

PATIENTS = (
    "patients.json"  # beside the checkpoint, not in it: who hands weights on need not say whose scans taught them
)
TRAINED_ON = "trained_on"
logger = logging.getLogger(__name__)


def patient_hashes(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the sorted hashes of the patients of some cases; blocks of one scan count as patients.

    Who holds a list of patients can find them among the hashes.

    Example:
        >>> patient_hashes([{"patient_id": "a", "case_id": "a1"}, {"patient_id": "a", "case_id": "a2"}])
        ['ca978112ca1b']
    """
    patients = {case["case_id" if "block" in case else "patient_id"] for case in cases if "patient_id" in case}
    return sorted(short_hash(patient) for patient in patients)


def write_trained_patients(checkpoint: str | Path, hashes: Sequence[str]) -> None:
    """Note beside a checkpoint whom it was trained on; nothing is written for nobody."""
    if hashes:
        write_json(Path(checkpoint).with_name(PATIENTS), {TRAINED_ON: list(hashes)})


def trained_patients(checkpoint: str | Path) -> set[str]:
    """Return the hashes that were noted beside a checkpoint, none where there is no such file.

    Raises:
        ValueError: when the file cannot be read.
    """
    path = Path(checkpoint).with_name(PATIENTS)
    return set(read_json(path, "patients")[TRAINED_ON]) if path.is_file() else set()


def warn_of_trained_patients(checkpoint: str | Path | None, cases: Sequence[Mapping[str, Any]], part: str) -> None:
    """Log a warning when cases that are scored belong to patients who were trained on, or pretrained on.

    It is no error, as patients of other data may have the same names.

    Args:
        checkpoint: that is scored, or that training starts from; nothing is said without one, and where it is not
            known whom it was trained on.
        cases: those that are scored.
        part: which they are; those of ``training`` are meant to be such.
    """
    if checkpoint is None:
        return
    patients = patient_hashes(cases)
    known = len(trained_patients(checkpoint).intersection(patients))
    if known and part != "training":
        logger.warning(
            "%d of %d %s patients have names of patients whom %s was trained on; if they are the same, their scores "
            "say nothing about others. The split changes with the cases in a folder, and with their classes: take the "
            "same cases as in training, pretrain with --labels_dir, or --classes, if only some have labels, or fix the "
            "parts in a datalist.",
            *(known, len(patients), part, Path(checkpoint).name),
        )
