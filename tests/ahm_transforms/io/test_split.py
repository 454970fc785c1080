# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import random
from collections import Counter
from itertools import combinations, pairwise

import pytest

from ahm_transforms.io import Split, split_by_patient
from ahm_transforms.io.split import choose_patients, divide


def make(patients: int, each: int = 3) -> list[dict]:
    return [{"case_id": f"c{i:03d}", "patient_id": f"p{i % patients}"} for i in range(patients * each)]


def patients_of(split: Split) -> list[set[str]]:
    return [{case["patient_id"] for case in part} for part in split]


@pytest.mark.parametrize("patients", [3, 4, 10, 33])
@pytest.mark.parametrize("fractions", [(0.01, 0.01), (0.2, 0.2), (0.1, 0.5), (0.49, 0.5), (0.01, 0.98), (0.98, 0.01)])
def test_no_patient_is_in_two_parts_and_none_is_empty(patients: int, fractions: tuple[float, float]) -> None:
    cases = make(patients)
    split = split_by_patient(cases, val_fraction=fractions[0], test_fraction=fractions[1], seed=3)
    sides = patients_of(split)
    assert all(sides)
    assert not any(one & other for one, other in combinations(sides, 2))
    assert sorted(case["case_id"] for part in split for case in part) == [case["case_id"] for case in cases]


@pytest.mark.parametrize("patients", [2, 3, 10])
@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_without_a_test_part_there_are_two(patients: int, fraction: float) -> None:
    training, validation, test = patients_of(split_by_patient(make(patients), val_fraction=fraction))
    assert training and validation and not test and not training & validation


def test_shares_of_patients_are_those_asked() -> None:
    split = split_by_patient(make(10), val_fraction=0.3, test_fraction=0.2)
    assert [len(side) for side in patients_of(split)] == [5, 3, 2]
    assert len(split.validation) == 9


def test_order_does_not_matter_and_the_seed_does() -> None:
    cases = make(20)
    shuffled = random.Random(1).sample(cases, len(cases))
    assert split_by_patient(cases, seed=5) == split_by_patient(shuffled, seed=5)
    assert split_by_patient(cases, seed=5) != split_by_patient(cases, seed=6)


def test_test_patients_do_not_depend_on_the_validation_share() -> None:
    tests = [split_by_patient(make(20), val_fraction=share, test_fraction=0.2).test for share in (0, 0.1, 0.5)]
    assert tests[0] == tests[1] == tests[2]


def test_one_patient_serves_for_all_with_warnings(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        split = split_by_patient(make(1), test_fraction=0.2)
    assert split.training == split.validation == split.test
    assert caplog.text.count("Only one patient") == 2


def test_of_two_patients_the_test_keeps_its_own(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        split = split_by_patient(make(2), test_fraction=0.2)
    assert split.training == split.validation != split.test
    assert len(split.test) == 3 and "validation uses the training cases" in caplog.text


def test_fractions_outside_their_range_are_errors() -> None:
    assert split_by_patient(make(3), val_fraction=0)[1] == []
    with pytest.raises(ValueError, match=r"val_fraction must be in \[0, 1\), got 1"):
        split_by_patient(make(3), val_fraction=1)
    with pytest.raises(ValueError, match=r"test_fraction must be in \[0, 1\), got -0.1"):
        split_by_patient(make(3), test_fraction=-0.1)
    with pytest.raises(ValueError, match=r"val_fraction 0.5 and test_fraction 0.5 leave nothing for training"):
        split_by_patient(make(3), val_fraction=0.5, test_fraction=0.5)


def test_stratified_parts_hold_the_same_share_of_each_class() -> None:
    cases = [case | {"label": int(int(case["patient_id"][1:]) >= 40)} for case in make(50, each=1)]
    split = split_by_patient(cases, val_fraction=0.2, test_fraction=0.2, seed=1, stratify="label")
    assert [sum(case["label"] for case in part) for part in split] == [6, 2, 2]
    few = choose_patients(split.training, 0.2, stratify="label")
    assert [case["label"] for case in few].count(1) == 1 and len(few) == 6


def test_a_class_of_one_patient_is_for_training() -> None:
    cases = [case | {"label": int(case["patient_id"] == "p7")} for case in make(10, each=1)]
    for seed in range(10):
        split = split_by_patient(cases, val_fraction=0.2, test_fraction=0.2, seed=seed, stratify="label")
        assert sum(case["label"] for case in split.training) == 1


def test_stratified_patients_with_several_classes_stay_together() -> None:
    cases = [case | {"label": index % 2} for index, case in enumerate(make(9, each=4))]
    sides = patients_of(split_by_patient(cases, test_fraction=0.2, stratify="label"))
    assert not any(one & other for one, other in combinations(sides, 2))


def test_listed_parts_stay_and_the_others_are_drawn() -> None:
    cases = make(10, each=1)
    split = divide(cases, {"c003": "validation"}, val_fraction=0.5, test_fraction=0.2, seed=0)
    assert [case["case_id"] for case in split.validation] == ["c003"]
    assert (len(split.training), len(split.test)) == (7, 2)


def test_smaller_label_fractions_are_parts_of_larger_ones() -> None:
    cases = make(20, each=2)
    chosen = [choose_patients(cases, fraction, seed=4) for fraction in (0.01, 0.1, 0.25, 0.5, 1)]
    assert [len(part) for part in chosen] == [2, 4, 10, 20, 40]
    for small, large in pairwise(chosen):
        assert all(case in large for case in small)
    assert choose_patients(cases, 0.25, seed=5) != chosen[2]
    for wrong in (0, 1.5):
        with pytest.raises(ValueError, match=rf"label_fraction must be in \(0, 1\], got {wrong}"):
            choose_patients(cases, wrong)


def test_choices_take_patients_in_turn() -> None:
    cases = make(10, each=2)
    chosen = [choose_patients(cases, 0.3, seed=4, choice=choice) for choice in range(11)]
    assert chosen[0] == choose_patients(cases, 0.3, seed=4) and chosen[10] == chosen[0]
    counts = Counter(case["case_id"] for choice in chosen[:10] for case in choice)
    assert len(counts) == 20 and set(counts.values()) == {3}
    assert not any(case in chosen[1] + chosen[2] for case in chosen[0])
    assert all(len({case["patient_id"] for case in choice}) == 3 for choice in chosen)


def test_choices_keep_the_shares_of_groups() -> None:
    cases = [case | {"label": "ab"[index % 2]} for index, case in enumerate(make(20, each=1))]
    for choice in range(5):
        few = choose_patients(cases, 0.2, stratify="label", choice=choice)
        assert Counter(case["label"] for case in few) == {"a": 2, "b": 2}


def test_blocks_of_one_scan_count_one_by_one() -> None:
    blocks = [case | {"block": [[0, 1]]} for case in make(1, each=4)]
    assert len(choose_patients(blocks, 0.5)) == 2
