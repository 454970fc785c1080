# SPDX-License-Identifier: Apache-2.0
"""Divide cases into training, validation and test so that no patient is in two of them."""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ahm_transforms.io._types import Case

LOGGER = logging.getLogger(__name__)


class Split(NamedTuple):
    """The three parts."""

    training: list[Case]
    validation: list[Case]
    test: list[Case]


def split_by_patient(
    cases: Sequence[Case],
    *,
    val_fraction: float = 0.2,
    test_fraction: float = 0.0,
    seed: int = 0,
    stratify: str | None = None,
) -> Split:
    """Return training, validation and test cases; the order in which ``cases`` come does not matter.

    The test patients are drawn first, so that they do not depend on ``val_fraction``. Where one patient is left to
    draw from, that patient serves for training too, and a warning says so.

    Args:
        cases: what to divide; ``patient_id`` says what belongs together.
        val_fraction: share of the patients for validation, in [0, 1). Above 0, at least one patient is in the part.
        test_fraction: the same for the test part.
        seed: seed of the draw.
        stratify: entry of the cases, such as a class, that all parts shall have in about the same shares. Patients
            are grouped by all the values that their cases have.

    Raises:
        ValueError: a fraction outside [0, 1), or nothing left for training.

    Example:
        >>> cases = [{"case_id": str(i), "patient_id": str(i // 2)} for i in range(8)]
        >>> split = split_by_patient(cases, val_fraction=0.25, test_fraction=0.25)
        >>> [len(part) for part in split]
        [4, 2, 2]
    """
    for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 <= fraction < 1:
            raise ValueError(f"{name} must be in [0, 1), got {fraction}.")
    if val_fraction + test_fraction >= 1:
        raise ValueError(f"val_fraction {val_fraction} and test_fraction {test_fraction} leave nothing for training.")
    ordered = sorted(cases, key=lambda case: case["case_id"])
    patients = _shuffled(ordered, seed, stratify)
    total = len(patients)
    test, rest = _take(patients, test_fraction, total, part="test", keep=2 if val_fraction else 1)
    validation, training = _take(rest, val_fraction, total, part="validation", keep=1)
    return Split(*([case for case in ordered if case["patient_id"] in part] for part in (training, validation, test)))


def divide(
    cases: Sequence[Case],
    listed: Mapping[str, str],
    *,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    stratify: str | None = None,
) -> Split:
    """Return the parts that ``listed`` names by case id, and draw the others from the rest of the cases."""
    parts = set(listed.values())
    drawn = split_by_patient(
        [case for case in cases if case["case_id"] not in listed],
        val_fraction=0.0 if "validation" in parts else val_fraction,
        test_fraction=0.0 if "test" in parts else test_fraction,
        seed=seed,
        stratify=stratify,
    )
    validation = [case for case in cases if listed.get(case["case_id"]) == "validation"]
    test = [case for case in cases if listed.get(case["case_id"]) == "test"]
    return Split(
        drawn.training,
        validation if "validation" in parts else drawn.validation,
        test if "test" in parts else drawn.test,
    )


def join_unlabelled(split: Split, others: Sequence[Case]) -> Split:
    """Return ``split`` with the cases that were not divided: with their patient, or else in the training part."""
    places = {case["patient_id"]: index for index in (2, 1, 0) for case in split[index]}
    parts = [list(part) for part in split]
    for case in others:
        parts[places.get(case["patient_id"], 0)].append(case)
    return Split(*(sorted(part, key=lambda case: case["case_id"]) for part in parts))


def keep_usable(split: Split, usable: Sequence[Case]) -> Split:
    """Return the cases of ``split`` that are among ``usable``.

    What cannot be used is divided first and left out then: a label map that finetuning cannot use, and that pretraining
    does not open, moves no other patient to another part.

    Raises:
        ValueError: nothing of a part can be used.
    """
    cases = {case["case_id"]: case for case in usable}
    kept = Split(*([cases[case["case_id"]] for case in part if case["case_id"] in cases] for part in split))
    for name, before, after in zip(split._fields, split, kept, strict=True):
        if before and not after:
            raise ValueError(
                f"none of the {len(before)} {name} case(s) can be used: repair or remove what is left out, or pass "
                "another --split_seed."
            )
    return kept


def choose_patients(
    cases: Sequence[Case], fraction: float, *, seed: int = 0, stratify: str | None = None, choice: int = 0
) -> list[Case]:
    """Return the cases of ``max(1, round(fraction * n))`` of the n patients; blocks of one scan count as patients.

    With the same seed, a smaller fraction chooses among the patients that a larger one chooses. Further choices of one
    seed and fraction take the patients in turn: none is chosen again before all have been.

    Raises:
        ValueError: ``fraction`` outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"label_fraction must be in (0, 1], got {fraction}.")
    ordered = sorted(cases, key=lambda case: case["case_id"])
    units = [{**case, "patient_id": case["case_id"]} if "block" in case else case for case in ordered]
    patients = _shuffled(units, seed, stratify)
    count = max(1, round(fraction * len(patients)))
    chosen = {patients[(choice * count + place) % len(patients)] for place in range(count)}
    return [case for case, unit in zip(ordered, units, strict=True) if unit["patient_id"] in chosen]


def _shuffled(cases: Sequence[Case], seed: int, stratify: str | None) -> list[str]:
    """Return the patients in random order; stratified, so that every stretch of it holds each group's share."""
    groups: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        groups[case["patient_id"]].add(str(case[stratify]) if stratify else "")
    patients = sorted(groups)
    random.Random(seed).shuffle(patients)
    members: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for patient in patients:
        members[tuple(sorted(groups[patient]))].append(patient)
    place = {name: (i + 0.5) / len(group) for group in members.values() for i, name in enumerate(group)}
    return sorted(patients, key=place.__getitem__)


def _take(patients: list[str], fraction: float, total: int, *, part: str, keep: int) -> tuple[list[str], list[str]]:
    """Return ``fraction`` of ``total`` patients and the rest, of whom at least ``keep`` where there are enough."""
    if fraction == 0 or not patients:
        return [], patients
    if len(patients) == 1:
        LOGGER.warning("Only one patient: %s uses the training cases and says nothing about other patients.", part)
        return patients, patients
    count = min(round(fraction * total), len(patients) - keep)
    return patients[: max(1, count)], patients[max(1, count) :]
