# SPDX-License-Identifier: Apache-2.0
"""A study folder is read as far as it goes: the last row of a cell counts, foreign rows do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ahm_engines.study.cells import Cell
from ahm_engines.study.comparisons import compare
from ahm_engines.study.finished import FINETUNE, PRETRAIN, read_finished
from ahm_engines.study.tables import pretraining_table
from tests.fixtures_study import COLUMNS, finetuned, pretrained, write_curves, write_results, write_settings


def test_planned_are_the_finetunings_of_every_arm_and_the_pretrainings_of_all_but_scratch(tmp_path: Path) -> None:
    study = read_finished(write_settings(tmp_path, seeds={"0.06": [0, 1, 2], "1.0": [0]}))
    stages = [cell.stage for cell in study.planned()]
    assert (stages.count(PRETRAIN), stages.count(FINETUNE)) == (2 * 3, 3 * 4)
    assert study.scratch == "scratch" and not study.rows and not study.curves


def test_the_last_row_of_a_cell_counts(tmp_path: Path) -> None:
    failed = {"status": "failed", "error": "out of memory"}
    rows = [finetuned("a3c", 0, 0.5) | failed, finetuned("a3c", 0, 0.7), finetuned("a3c", 1, 0.8)]
    write_results(write_settings(tmp_path, seeds={"0.25": [0, 1]}), [*rows, finetuned("a3c", 1, 0.8) | failed])
    study = read_finished(tmp_path)
    assert study.values("dice", "a3c", 0.25) == {0: 0.7}
    assert [str(row.cell) for row in study.failed()] == ["finetune a3c, 0.25 of the labels, seed 1"]


def test_the_pretraining_of_an_arm_may_be_that_of_another(tmp_path: Path) -> None:
    write_settings(tmp_path, seeds={"0.25": [0]})
    settings = json.loads((tmp_path / "study.json").read_text())
    settings["arms"]["a3c_encoder"] = settings["arms"]["a3c"] | {"pretrained_by": "a3c", "title": "encoder only"}
    (tmp_path / "study.json").write_text(json.dumps(settings))
    write_results(tmp_path, [pretrained("a3c", 0), finetuned("a3c", 0, 0.7), finetuned("a3c_encoder", 0, 0.6)])
    study = read_finished(tmp_path)
    assert study.done(PRETRAIN, "a3c_encoder") == study.done(PRETRAIN, "a3c") != []
    assert Cell(PRETRAIN, "a3c_encoder", 0) not in set(study.planned())
    assert [row[0] for row in pretraining_table(study).rows] == [arm.title for arm in study.arms.values()][1:]


def test_steps_are_raced_against_scratch_of_the_same_network(tmp_path: Path) -> None:
    vit = {"backbone": "unetr"}
    arms = {
        "scratch": {"title": "scratch"},
        "a3c": {"title": "A3C", "pretrain": {}},
        "mae": {"title": "MAE", "pretrain": {}, "finetune": vit, "compare_with": ["scratch"]},
    }
    study = read_finished(write_settings(tmp_path, arms=arms, seeds={"1.0": [0]}))
    assert [study.scratch_of(name) for name in arms] == ["scratch", "scratch", None]
    more = arms | {"scratch_unetr": {"title": "UNETR", "finetune": vit}}
    study = read_finished(write_settings(tmp_path, arms=more, seeds={"1.0": [0]}))
    assert study.scratch_of("mae") == "scratch_unetr"


def test_rows_of_other_cells_and_other_patients_do_not_count(tmp_path: Path) -> None:
    rows = [
        finetuned("a3c", 0, 0.7),
        finetuned("a3c", 0, 0.9, evaluated_on="validation"),
        finetuned("a3c", 5, 0.9),
        finetuned("a3c", 0, 0.9, fraction=0.5),
        finetuned("other", 0, 0.9),
    ]
    write_results(write_settings(tmp_path, seeds={"0.25": [0]}), rows)
    study = read_finished(tmp_path)
    assert study.values("dice", "a3c", 0.25) == {0: 0.7} and len(study.rows) == 1 and study.ignored == 4


def test_undefined_metrics_and_missing_columns_are_no_values(tmp_path: Path) -> None:
    rows = [
        finetuned("a3c", 0, float("nan")),
        finetuned("a3c", 1, 0.6, hd95_mm="inf"),
        finetuned("a3c", 2, 0.6) | {"dice": ""},
    ]
    write_results(write_settings(tmp_path, seeds={"0.25": [0, 1, 2]}), rows, columns=COLUMNS[:-1])
    study = read_finished(tmp_path)
    assert study.values("dice", "a3c", 0.25) == {1: 0.6}
    assert set(study.values("hd95_mm", "a3c", 0.25)) == {2}
    assert study.values("surface_dice", "a3c", 0.25) == {}


def test_a_learning_curve_holds_the_last_value_of_every_step_in_order_and_only_of_finished_cells(
    tmp_path: Path,
) -> None:
    write_results(write_settings(tmp_path, seeds={"0.25": [0, 1]}), [finetuned("a3c", 0, 0.7), pretrained("a3c", 0)])
    write_curves(tmp_path, {("a3c", 0.25, 0): {20: 0.2, 10: 0.1}, ("a3c", 0.25, 1): {10: 0.5}})
    with open(tmp_path / "curves.csv", "a") as file:
        file.write("a3c,0.25,0,0,20,0.3\n")
    curves = read_finished(tmp_path).finished_curves("a3c", 0.25)
    assert {seed: list(curve.items()) for seed, curve in curves.items()} == {0: [(10.0, 0.1), (20.0, 0.3)]}


def test_draws_of_a_seed_count_as_their_mean(tmp_path: Path) -> None:
    write_settings(tmp_path, seeds={"0.25": [0, 1]}, draws=2)
    rows = [finetuned("a3c", 0, 0.6), finetuned("a3c", 0, 0.7, draw=1), finetuned("a3c", 1, 0.5)]
    rows += [finetuned("random", 0, 0.4), finetuned("random", 0, 0.6, draw=1, surface_dice="nan")]
    write_results(tmp_path, rows)
    cells = {("a3c", 0.25, 0, 0): {10: 0.1, 20: 0.2, 30: 0.3}, ("a3c", 0.25, 0, 1): {20: 0.4, 10: 0.3}}
    write_curves(tmp_path, cells | {("random", 0.25, 0, 1): {10: 0.5}})
    study = read_finished(tmp_path)
    assert study.values("dice", "a3c", 0.25) == pytest.approx({0: 0.65, 1: 0.5})
    assert study.drawn("dice", "a3c", 0.25) == {0: [0.6, 0.7], 1: [0.5]}
    assert study.values("surface_dice", "random", 0.25) == {}  # one of its two is undefined
    assert study.finished_seeds(FINETUNE, "a3c", 0.25) == [0, 1]
    curve = study.finished_curves("a3c", 0.25)[0]
    assert list(curve) == [10, 20] and list(curve.values()) == pytest.approx([0.2, 0.3])
    assert study.finished_curves("random", 0.25) == {0: {10: 0.5}}
    assert compare(study, "dice", "a3c", "random", 0.25).differences == pytest.approx({0: 0.15})


def test_files_from_before_there_were_draws_hold_the_first(tmp_path: Path) -> None:
    columns = [name for name in COLUMNS if name != "draw"]
    write_results(write_settings(tmp_path, seeds={"0.25": [0]}), [finetuned("a3c", 0, 0.7)], columns=columns)
    (tmp_path / "curves.csv").write_text("arm,fraction,seed,step,value\na3c,0.25,0,10,0.5\n")
    study = read_finished(tmp_path)
    assert study.values("dice", "a3c", 0.25) == {0: 0.7} and study.finished_curves("a3c", 0.25) == {0: {10: 0.5}}


def test_cells_are_matched_however_the_fraction_is_written(tmp_path: Path) -> None:
    write_results(write_settings(tmp_path, seeds={"1.0": [0]}), [finetuned("a3c", 0, 0.7) | {"fraction": "1"}])
    assert Cell(FINETUNE, "a3c", 0, 1.0) in read_finished(tmp_path).rows


def test_without_a_readable_study_json_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"study.json: no such file; expected the folder of a study"):
        read_finished(tmp_path)
    path = write_settings(tmp_path, seeds={"1.0": [0]}) / "study.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"version": 0}))
    with pytest.raises(ValueError, match=r"study.json: .*expected version 1, got 0.*into a new folder"):
        read_finished(tmp_path)
    path.write_text(json.dumps({key: value for key, value in settings.items() if key != "arms"}))
    with pytest.raises(ValueError, match=r"study.json: expected an entry 'arms', got none"):
        read_finished(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"study.json: cannot be read as a study"):
        read_finished(tmp_path)
