# SPDX-License-Identifier: Apache-2.0
"""Arms are compared seed by seed, and raced to the target of scratch's same seed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from ahm_engines.study.comparisons import compare, compare_all, race, targets
from ahm_engines.study.finished import read_finished
from ahm_engines.study.report import write_report
from ahm_engines.study.statistics import Verdict
from tests.fixtures_study import COLUMNS, finetuned, planted_study, write_curves, write_results, write_settings


def test_only_seeds_that_both_arms_have_count_and_the_others_are_named(tmp_path: Path) -> None:
    rows = [finetuned("a3c", seed, dice) for seed, dice in {0: 0.7, 1: 0.5, 2: 0.9, 4: math.nan}.items()]
    rows += [finetuned("random", seed, dice) for seed, dice in {1: 0.4, 0: 0.5, 3: 0.1, 4: 0.6}.items()]
    write_results(write_settings(tmp_path, seeds={"0.25": [0, 1, 2, 3, 4]}), rows)
    found = compare(read_finished(tmp_path), "dice", "a3c", "random", 0.25)
    assert found.differences == {0: pytest.approx(0.2), 1: pytest.approx(0.1)}
    assert found.interval.mean == pytest.approx(0.15) and found.interval.count == 2
    assert found.unmatched == {"a3c": [2], "random": [3, 4]}


def test_draws_of_other_labels_are_paired_draw_by_draw(tmp_path: Path) -> None:
    """The second patient is the harder one, and one arm has not come to it in seed 1."""
    rows = [finetuned("a3c", seed, dice, draw=draw) for seed in (0, 1) for draw, dice in enumerate((0.7, 0.3))]
    rows += [finetuned("random", 0, dice, draw=draw) for draw, dice in enumerate((0.6, 0.2))]
    rows += [finetuned("random", 1, 0.6), finetuned("scratch", 2, 0.5)]
    write_settings(tmp_path, seeds={"0.25": [0, 1, 2]}, draws=2, draw_labels=True)
    write_results(tmp_path, rows)
    study = read_finished(tmp_path)
    assert compare(study, "dice", "a3c", "random", 0.25).differences == pytest.approx({0: 0.1, 1: 0.1})
    assert compare(study, "dice", "a3c", "scratch", 0.25).unmatched == {"a3c": [0, 1], "scratch": [2]}
    same = replace(study, draw_labels=False)
    assert compare(same, "dice", "a3c", "random", 0.25).differences == pytest.approx({0: 0.1, 1: -0.1})


def test_a_race_is_run_with_the_same_labels(tmp_path: Path) -> None:
    slow, fast = ({10 * step: min(step / late, 1.0) for step in range(1, 41)} for late in (30, 10))
    curves = {(arm, 0.25, 0, 0): fast for arm in ("scratch", "a3c")} | {("a3c", 0.25, 0, 1): slow}
    write_settings(tmp_path, seeds={"0.25": [0]}, draws=2, draw_labels=True)
    write_results(tmp_path, [finetuned(arm, seed, 0.5, draw=draw) for arm, _, seed, draw in curves])
    write_curves(tmp_path, curves)
    assert race(read_finished(tmp_path), "a3c", 0.25).against_scratch.ratio == 1


def test_pairing_finds_a_small_gain_below_a_large_spread_between_seeds(tmp_path: Path) -> None:
    gains = {"scratch": 0.0, "random": 0.0, "a3c": 0.02}
    folder = planted_study(
        tmp_path,
        seeds={"0.25": [*range(6)]},
        gain=lambda arm, _, seed: gains[arm] + 0.001 * (-1) ** seed * (arm == "a3c"),
    )
    found = {(c.arm, c.reference): c for c in compare_all(read_finished(folder), "dice")}
    assert list(found) == [("random", "scratch"), ("a3c", "scratch"), ("a3c", "random")]
    assert found["a3c", "random"].verdict is Verdict.SHOWN
    assert 0.0185 < found["a3c", "random"].interval.low < 0.02 < found["a3c", "random"].interval.high < 0.0215
    assert found["random", "scratch"].verdict is Verdict.NO_INTERVAL  # all differences are zero


def test_distances_are_compared_where_both_arms_have_found_something_in_every_case(tmp_path: Path) -> None:
    """An arm that finds nothing in the hard cases has the mean of the easy ones."""
    missing = {"a3c": [0, 4, 0], "random": [0, 0, 1]}
    rows = [
        finetuned(arm, seed, 0.5, hd95_missing=count) for arm, of in missing.items() for seed, count in enumerate(of)
    ]
    metrics = ["dice", "hd95_mm", "hd95_missing", "surface_dice"]
    write_settings(tmp_path, seeds={"0.25": [0, 1, 2]}, metrics=metrics)
    write_results(tmp_path, rows, columns=[*COLUMNS, "hd95_missing"])
    study = read_finished(tmp_path)
    seeds = {metric: [*compare(study, metric, "a3c", "random", 0.25).differences] for metric in metrics}
    assert seeds == {"dice": [0, 1, 2], "hd95_mm": [0], "hd95_missing": [0, 1, 2], "surface_dice": [0, 1, 2]}
    assert "Where a network finds nothing of what is there" in write_report(tmp_path).markdown.read_text()


def raced(folder: Path, curves: dict[tuple[str, int], list[float]], **settings: object) -> Path:
    """A study with these curves, a validation every 10 steps."""
    seeds = sorted({seed for _, seed in curves})
    write_results(write_settings(folder, seeds={"0.25": seeds}, **settings), [finetuned(*cell, 0.5) for cell in curves])
    lines = {(arm, 0.25, seed): {10 * (n + 1): v for n, v in enumerate(c)} for (arm, seed), c in curves.items()}
    write_curves(folder, lines)
    return folder


def test_the_target_is_95_percent_of_where_scratch_of_the_same_seed_ends_smoothed(tmp_path: Path) -> None:
    curves = {("scratch", 0): [0.0, 0.6, 0.6, 0.6], ("scratch", 1): [0.0, 0.1, 0.2, 0.6]}
    study = read_finished(raced(tmp_path, curves))
    assert targets(study, 0.25, "scratch") == {0: pytest.approx(0.57), 1: pytest.approx(0.285)}


def test_an_arm_is_raced_against_its_own_seed(tmp_path: Path) -> None:
    flat = [0.8] * 6
    curves = {
        ("scratch", 0): [0.0, 0.0, 0.0, *[0.8] * 3],
        ("scratch", 1): [0.0, 0.0, 0.0, *[0.4] * 3],
        ("a3c", 0): flat,
        ("a3c", 1): [0.0, *[0.4] * 5],
        ("a3c", 2): flat,
        ("random", 0): [0.4] * 6,
    }
    study = read_finished(raced(tmp_path, curves))
    fast, slow = race(study, "a3c", 0.25), race(study, "random", 0.25)
    assert fast.steps == {0: 30.0, 1: 40.0}  # seed 2 has no scratch
    assert fast.against_scratch.ratio == pytest.approx(math.sqrt(60 / 30 * 60 / 40))
    assert slow.steps == {0: None} and slow.against_scratch.both == 0
    assert fast.at_once == {0} and slow.at_once == set()  # 30 is the first step with a mean over three validations


def test_every_arm_is_raced_against_its_own_scratch(tmp_path: Path) -> None:
    fine, coarse = {"title": "fine", "pretrain": None}, {"title": "coarse", "pretrain": None}
    arms = {
        "fine": {**fine, "compare_with": []},
        "coarse": {**coarse, "compare_with": []},
        "coarse_random": {"title": "random", "pretrain": {}, "compare_with": ["coarse"]},
    }
    curves = {("fine", 0): [0.9] * 5, ("coarse", 0): [0.0, *[0.5] * 4], ("coarse_random", 0): [0.5] * 5}
    study = read_finished(raced(tmp_path, curves, arms=arms))
    assert race(study, "coarse", 0.25).steps == {0: 40.0}
    found = race(study, "coarse_random", 0.25)
    assert found.steps == {0: 30.0} and found.against_scratch.ratio == pytest.approx(4 / 3)


def test_there_is_no_target_for_short_or_broken_curves_nor_where_less_is_better(tmp_path: Path) -> None:
    curves = {("scratch", 0): [0.5, 0.5], ("scratch", 1): [0.5, 0.5, math.nan], ("a3c", 0): [0.5] * 4}
    study = read_finished(raced(tmp_path / "short", curves))
    assert targets(study, 0.25, "scratch") == {} and race(study, "a3c", 0.25).steps == {}
    study = read_finished(raced(tmp_path / "distance", {("scratch", 0): [0.5] * 4}, key_metric="hd95_mm"))
    assert targets(study, 0.25, "scratch") == {}
