# SPDX-License-Identifier: Apache-2.0
"""Divide cases into training and validation so that no patient is in both."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence

from ahm_transforms.io._types import Case

LOGGER = logging.getLogger(__name__)


def split_by_patient(
    cases: Sequence[Case], *, val_fraction: float = 0.2, seed: int = 0
) -> tuple[list[Case], list[Case]]:
    """Return training and validation cases; the order in which ``cases`` come does not matter.

    Args:
        cases: what to divide; ``patient_id`` says what belongs together.
        val_fraction: share of the patients for validation, in [0, 1). Above 0, at least one patient is in each part.
            With a single patient both parts hold the same cases, and a warning says so.
        seed: seed of the draw.

    Raises:
        ValueError: ``val_fraction`` outside [0, 1).

    Example:
        >>> cases = [{"case_id": str(i), "patient_id": str(i // 2)} for i in range(8)]
        >>> training, validation = split_by_patient(cases, val_fraction=0.25)
        >>> len(training), len(validation)
        (6, 2)
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be in [0, 1), got {val_fraction}.")
    ordered = sorted(cases, key=lambda case: case["case_id"])
    patients = sorted({case["patient_id"] for case in ordered})
    if val_fraction == 0:
        return ordered, []
    if len(patients) == 1:
        LOGGER.warning("Only one patient: validation uses the training cases and says nothing about other patients.")
        return ordered, list(ordered)
    random.Random(seed).shuffle(patients)
    count = min(max(1, round(val_fraction * len(patients))), len(patients) - 1)
    chosen = set(patients[:count])
    training = [case for case in ordered if case["patient_id"] not in chosen]
    return training, [case for case in ordered if case["patient_id"] in chosen]
