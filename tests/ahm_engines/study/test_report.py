# SPDX-License-Identifier: Apache-2.0
"""The report says what was planted, no more, and is written however little has finished."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from ahm_engines.study.report import Report, write_report
from tests.fixtures_study import (
    ARMS,
    COLUMNS,
    finetuned,
    planted_study,
    pretrained,
    write_curves,
    write_maps,
    write_results,
    write_settings,
)


def small_gain(arm: str, fraction: float, seed: int) -> float:
    """A3C is better by 4 points, random masks are not better."""
    return {"scratch": 0.0, "random": 0.01 * math.cos(2.0 * seed), "a3c": 0.04 + 0.01 * math.sin(seed)}[arm]


def text_of(folder: Path) -> str:
    return write_report(folder).markdown.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("study")
    planted_study(folder, seeds={"0.06": [0, 1, 2, 3, 4], "1.0": [0, 1, 2]}, gain=small_gain)
    write_maps(folder, "a3c", 5)
    return write_report(folder)


def test_the_sentences_keep_to_what_the_seeds_allow(whole: Report) -> None:
    few, many = whole.findings["A3C"][0], whole.findings["A3C"][1]
    assert re.match(
        r"A3C against from scratch, 6 % of the labels: shown \(5 paired seeds\): better by 4\.\d points of Dice", few
    )
    assert "100 % of the labels: a hint (3 paired seeds): better by" in many
    nothing = whole.findings["random masks"][0]
    assert "not shown (5 paired seeds): the interval contains zero" in nothing and "better" not in nothing


def test_the_report_counts_the_intervals_and_says_that_they_are_narrow(whole: Report) -> None:
    text = whole.markdown.read_text(encoding="utf-8")
    assert "18 intervals were computed" in text and "about 0.9 of them" in text and "too narrow" in text


def test_the_report_says_what_luck_does_to_one_finetuning(tmp_path: Path) -> None:
    arms = ARMS | {"scratch": ARMS["scratch"] | {"draws": 2}}
    write_settings(tmp_path, arms=arms, seeds={"0.25": [0, 1, 2]})
    rows = [finetuned("scratch", seed, 0.5 + 0.02 * draw, draw=draw) for seed in range(3) for draw in (0, 1)]
    write_results(tmp_path, rows + [finetuned("random", seed, 0.6 + 0.01 * seed) for seed in range(3)])
    text = text_of(tmp_path)
    assert "differ by their draw alone have a standard deviation of 1.4 points (3 groups of draws)" in text
    assert "| from scratch | 51.0 ± 0.0 (3 seeds, 2 draws each) |" in text
    assert "| random masks | 61.0 ± 1.0 (3 seeds) |" in text and "draws count as their mean" in text
    assert r"+10.0 \[+9.0, +11.0\] (3 seeds)" in text
    assert "leave less to luck" not in text  # scratch, the reference of both, has several


def test_the_report_says_that_draws_have_other_labelled_patients(tmp_path: Path) -> None:
    write_settings(tmp_path, seeds={"0.25": [0, 1]}, draws=2, draw_labels=True)
    rows = [finetuned("scratch", seed, 0.5 + 0.02 * draw, draw=draw) for seed in (0, 1) for draw in (0, 1)]
    write_results(tmp_path, rows)
    text = text_of(tmp_path)
    assert "Each draw has other labelled patients, the same for all arms." in text
    assert "differ by their draw and its labelled patients alone have a standard deviation of 1.4 points" in text
    assert "several choices of labelled ones" in text


def test_the_report_says_how_small_a_difference_so_many_seeds_show(tmp_path: Path) -> None:
    rows = [finetuned("scratch", seed, 0.5) for seed in range(5)]
    rows += [finetuned("random", seed, 0.5 + 0.01 * (seed - 2)) for seed in range(5)]
    rows += [finetuned("a3c", seed, 0.5 + 0.03 * (seed - 2)) for seed in range(5)]
    write_results(write_settings(tmp_path, seeds={"0.25": [*range(5)], "1.0": [0, 1]}), rows)
    said = [line for line in text_of(tmp_path).splitlines() if "paired differences have" in line]
    # deviations of 1.6 (random - scratch), 4.7 (A3C - scratch) and 3.2 (A3C - random)
    assert said == [
        "- 25 % of the labels: paired differences have a standard deviation of 3.2 points (median of 3 comparisons). "
        "If it stays so, 5 seeds show a true difference of 5.3 points 8 times in 10; for half of that it takes 14."
    ]


def test_markdown_and_html_are_complete_and_the_page_needs_no_other_file(whole: Report) -> None:
    text, page = whole.markdown.read_text(encoding="utf-8"), whole.html.read_text(encoding="utf-8")
    links = re.findall(r"\]\((figures/\w+\.png)\)", text)
    assert len(links) == 4 and all((whole.markdown.parent / link).is_file() for link in links)
    assert {path.suffix for path in whole.figures} == {".png", ".pdf"} and len(whole.figures) == 8
    assert page.count("data:image/png;base64,") == 4 and not re.search(r'(src|href)="(?!data:)|<script', page)
    for said in (
        "hippocampus-small",
        "6 % of the labels (4 patients)",
        "test patients",
        "torch 2.13.0",
        "Devices: cpu",
    ):
        assert said in text and said in page


def test_tables_hold_mean_sd_and_seeds_in_points(tmp_path: Path) -> None:
    rows = [finetuned("scratch", seed, dice, hd95_mm=5.0) for seed, dice in enumerate((0.5, 0.6))]
    rows += [finetuned("a3c", seed, dice, hd95_mm=3.0) for seed, dice in enumerate((0.6, 0.8, 0.7))]
    write_results(write_settings(tmp_path, seeds={"0.25": [0, 1, 2]}), rows)
    text = text_of(tmp_path)
    assert "| from scratch | 55.0 ± 7.1 (2 of 3 seeds) |" in text and "| A3C | 70.0 ± 10.0 (3 seeds) |" in text
    assert "| random masks | none yet (0 of 3 seeds) |" in text
    assert "| A3C - from scratch | +15.0 (2 seeds): no interval |" in text
    assert "nothing can be said (2 paired seeds): two tell too little of it; the difference is +15.0 points." in text
    assert "| A3C - random masks | no pair |" in text
    assert "A3C against from scratch, 25 % of the labels: seed 2 not counted, only A3C has a value." in text
    assert "HD95 (mm, lower is better)" in text and "| A3C | 3 | 3.00 ± 0.00 |" in text


def test_other_metrics_have_their_differences_and_intervals_too(tmp_path: Path) -> None:
    rows = [finetuned("scratch", seed, 0.5, hd95_mm=5.0, surface_dice=0.5) for seed in range(5)]
    rows += [finetuned("a3c", s, 0.5, hd95_mm=4.0 - 0.1 * s, surface_dice=0.5 + 0.1 * (-1) ** s) for s in range(5)]
    write_results(write_settings(tmp_path, seeds={"0.25": [*range(5)], "1.0": [0]}), rows)
    others = text_of(tmp_path).split("## Other metrics")[1]
    assert others.count("| arm - reference | HD95 (mm, lower is better) | surface Dice (points) |") == 1  # 25 % only
    row = next(line for line in others.splitlines() if line.startswith("| A3C - from scratch |"))
    _, _, distance, surface, _ = row.split("|")
    assert distance == r" -1.20 \[-1.32, -1.08\] (5 seeds): shown "
    assert surface.startswith(" +2.0 ") and surface.endswith("(5 seeds): not shown ")
    assert "| random masks - from scratch | no pair | no pair |" in others


def test_what_more_labels_are_worth_to_scratch_is_said(tmp_path: Path) -> None:
    scores = {0.06: (0.40, 0.50, 0.45), 0.25: (0.55, 0.55), 1.0: (0.62, 0.66)}
    rows = [finetuned("scratch", s, dice, fraction=f) for f, its in scores.items() for s, dice in enumerate(its)]
    rows += [finetuned("a3c", 0, 0.9, fraction=0.06)]
    write_results(write_settings(tmp_path, seeds={"0.06": [0, 1, 2], "0.25": [0, 1], "1.0": [0, 1]}), rows)
    text = text_of(tmp_path)
    assert "From 6 % of the labels to 100 %, scratch changes by +19.0 points (2 paired seeds)." in text
    assert "From 25 % of the labels to 100 %, scratch changes by +9.0 points (2 paired seeds)." in text
    assert text.count("That is about what pretraining may make up for.") == 1


def test_with_one_fraction_nothing_is_said_of_more_labels(tmp_path: Path) -> None:
    planted_study(tmp_path, seeds={"0.25": [0, 1]}, gain=small_gain)
    assert "pretraining may make up for" not in text_of(tmp_path)


def test_a_smaller_distance_is_better_and_a_larger_one_worse(tmp_path: Path) -> None:
    rows = [finetuned("scratch", seed, 0.5, hd95_mm=5.0) for seed in range(5)]
    rows += [finetuned("a3c", seed, 0.5, hd95_mm=4.0 - 0.1 * seed) for seed in range(5)]
    rows += [finetuned("random", seed, 0.5, hd95_mm=6.0 + 0.1 * seed) for seed in range(5)]
    write_results(write_settings(tmp_path, seeds={"0.25": [*range(5)]}, key_metric="hd95_mm"), rows)
    said = write_report(tmp_path).findings
    assert "shown (5 paired seeds): better by 1.20 mm of HD95 (95 % interval -1.32 to -1.08)" in said["A3C"][0]
    assert "worse by 1.20 mm" in said["random masks"][0]


@pytest.mark.parametrize("seeds", [[0], [0, 1, 2, 3, 4]])
def test_with_one_pair_or_equal_differences_nothing_can_be_said(tmp_path: Path, seeds: list[int]) -> None:
    planted_study(tmp_path, seeds={"0.25": seeds}, gain=lambda arm, *_: 0.05 * (arm == "a3c"))
    said = write_report(tmp_path).findings["A3C"]
    assert all("nothing can be said" in line and "+5.0 points" in line for line in said)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "[" not in text.split("Paired differences")[1].split("![")[0] and "0 intervals were computed" in text


def test_failed_cells_are_listed_with_their_error_and_undefined_scores_counted(tmp_path: Path) -> None:
    rows = [finetuned("a3c", 0, 0.6), finetuned("a3c", 1, math.nan)]
    rows += [finetuned("a3c", 2, 0.9, status="failed", error="RuntimeError: a|b <c>")]
    write_results(write_settings(tmp_path, seeds={"0.25": [0, 1, 2]}), rows)
    text = text_of(tmp_path)
    assert "| A3C | 60.0 (1 of 3 seeds, 1 undefined, 1 failed) |" in text
    assert r"| finetune a3c, 0.25 of the labels, seed 2 | RuntimeError: a\|b \<c> |" in text
    assert "2 of 9 finetuning cells finished, 1 failed, 6 to do." in text


def test_finetunings_without_a_score_on_validation_patients_are_counted(tmp_path: Path) -> None:
    rows = [finetuned("a3c", seed, 0.6, validation=value) for seed, value in enumerate(("", 0.5, ""))]
    write_results(write_settings(tmp_path, seeds={"0.25": [0, 1, 2]}), rows, columns=(*COLUMNS, "validation"))
    assert "2 finetunings without a Dice on the validation patients, where it is undefined" in text_of(tmp_path)


def test_a_figure_that_there_is_nothing_for_any_more_is_removed(tmp_path: Path) -> None:
    folder = write_settings(tmp_path, seeds={"0.25": [0]})
    (folder / "figures").mkdir()
    for name in ("differences.png", "differences.pdf", "own.png"):
        (folder / "figures" / name).write_bytes(b"old")
    write_report(folder)
    assert [path.name for path in (folder / "figures").iterdir()] == ["own.png"]


def test_titles_may_hold_dollar_signs(tmp_path: Path) -> None:
    arms = {name: arm | {"title": f"${arm['title']} \\foo$"} for name, arm in ARMS.items()}
    write_results(write_settings(tmp_path, arms=arms, seeds={"0.25": [0]}), [finetuned(arm, 0, 0.6) for arm in ARMS])
    assert write_report(tmp_path).figures


def test_without_a_finished_cell_it_says_so(tmp_path: Path) -> None:
    report = write_report(write_settings(tmp_path, seeds={"0.25": [0]}))
    text = report.markdown.read_text(encoding="utf-8")
    assert "No finetuning has finished yet, so nothing can be said" in text and "|" not in text and not report.figures
    assert report.progress == [
        "0 of 2 pretraining cells finished, 0 failed, 2 to do.",
        "0 of 3 finetuning cells finished, 0 failed, 3 to do.",
    ]


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    rows = [finetuned(arm, 0, 0.6) for arm in ARMS]
    write_results(write_settings(tmp_path, seeds={"0.25": [0]}), rows, columns=COLUMNS[:-1])
    text = text_of(tmp_path)
    assert r"results.csv has no column for surface\_dice." in text and "| A3C | 1 | 2.20 | - |" in text


def test_the_pretraining_table_compares_times_and_says_how_equal_they_are(tmp_path: Path) -> None:
    equal = {"title": "random masks, equal time", "pretrain": {}, "equal_time": "a3c", "compare_with": ["scratch"]}
    arms = ARMS | {"equal": equal}
    rows = [pretrained("random", 0), pretrained("a3c", 0, step_seconds=0.3, seconds=150.0, hardness=1.25)]
    rows += [pretrained("equal", 0, seconds=147.0, device="H200")]
    write_results(write_settings(tmp_path, arms=arms, seeds={"0.25": [0]}), rows)
    text = text_of(tmp_path)
    assert "| A3C | 1 | 500 | 2.5 | 300.0 | 512 | 1.250 | 1.50x |" in text
    assert "| random masks | 1 | 500 | 1.7 | 200.0 | 512 | - | 1.00x |" in text and "| from scratch | 0" not in text
    assert "random masks, equal time: 98 % of the wall-clock time of A3C (1 seed)." in text
    assert "Measured on several devices" in text


def test_steps_to_target_name_what_was_not_reached(tmp_path: Path) -> None:
    def gain(arm: str, fraction: float, seed: int) -> float:
        return {"scratch": 0.0, "random": -0.3, "a3c": 0.1}[arm]

    planted_study(tmp_path, seeds={"0.25": [0, 1]}, gain=gain)
    steps = text_of(tmp_path).split("## Steps to target")[1].split("## Other metrics")[0]
    assert "| random masks | not reached, not reached | 0 of 2 | - | - | - |" in steps
    assert re.search(r"\| A3C \| \d+, \d+ \| 2 of 2 \| [12]\.\d\d \(2 seeds\) \| [\d. to]+ \| 0 of 2 \|", steps)


def test_validations_that_are_too_far_apart_for_steps_to_target_are_named(tmp_path: Path) -> None:
    planted_study(tmp_path, seeds={"0.25": [0, 1]}, gain=small_gain)
    curve = {10 * (n + 1): 0.8 for n in range(4)}
    late = {10: 0.0, 20: 0.0, 30: 0.5, 40: 0.8, 50: 0.8, 60: 0.8}
    curves = {("scratch", 0.25, 0): late, ("scratch", 0.25, 1): curve, ("a3c", 0.25, 0): curve, ("a3c", 0.25, 1): curve}
    write_curves(tmp_path, curves)
    steps = text_of(tmp_path).split("## Steps to target")[1].split("## Other metrics")[0]
    assert "| from scratch | 60, ≤ 30 |" in steps and "| A3C | ≤ 30, ≤ 30 |" in steps
    assert "3 of 4 curves that came to the target were there at the first validation that" in steps
    write_curves(tmp_path, {cell: late for cell in curves})
    steps = text_of(tmp_path).split("## Steps to target")[1].split("## Other metrics")[0]
    assert "≤ " not in steps and "validate more often" not in steps


def test_a_report_is_written_again_to_the_letter(tmp_path: Path) -> None:
    planted_study(tmp_path, seeds={"0.25": [0, 1, 2]}, gain=small_gain)
    assert text_of(tmp_path) == text_of(tmp_path)
