# SPDX-License-Identifier: Apache-2.0
"""The table of results is only ever added to."""

from __future__ import annotations

from pathlib import Path

import pytest

from ahm_engines.study.cells import Cell
from ahm_engines.study.results import Results, append_row, read_rows
from tests.fixtures_study_runs import header, table

METRICS = ["dice", "dice_square"]
SCRATCH = Cell("finetune", "scratch", 0, 0.25)
RANDOM = Cell("pretrain", "random", 1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.csv"


def fill(path: Path) -> Results:
    results = Results(path, METRICS)
    results.append(SCRATCH, {"status": "done", "dice": 0.5, "seconds": 12.345678, "steps": 40})
    results.append(RANDOM, {"status": "failed", "error": "out of memory", "random_psnr": 21.0})
    return results


def test_rows_are_read_back_by_cell(path: Path) -> None:
    fill(path)
    results = Results(path, METRICS)
    row = results.rows[SCRATCH]
    assert (row["version"], row["stage"], row["arm"], row["fraction"], row["seed"]) == (
        *("1", "finetune", "scratch", "0.25", "0"),
    )
    assert (row["dice"], row["dice_square"], row["seconds"], row["steps"]) == ("0.5", "", "12.3457", "40")
    assert results.rows.keys() == {SCRATCH, RANDOM} and results.rows[RANDOM]["fraction"] == ""
    assert table(path)[0] == header(METRICS)


def test_only_a_finished_cell_has_a_result(path: Path) -> None:
    results = fill(path)
    assert results.done(SCRATCH) == results.rows[SCRATCH]
    assert results.done(RANDOM) is None and results.done(Cell("finetune", "scratch", 1, 0.25)) is None


def test_what_was_written_stays_as_it_is(path: Path) -> None:
    results = fill(path)
    before = path.read_bytes()
    results.append(SCRATCH, {"status": "failed", "error": "again"})
    Results(path, METRICS).append(RANDOM, {"status": "done"})
    assert path.read_bytes().startswith(before) and path.read_bytes().count(b"\n") == 5


def test_the_last_row_of_a_cell_counts(path: Path) -> None:
    results = fill(path)
    results.append(RANDOM, {"status": "done", "random_psnr": 22.0})
    for each in (results, Results(path, METRICS)):
        row = each.done(RANDOM)
        assert row is not None and (row["random_psnr"], row["error"]) == ("22", "")


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_line_that_was_cut_off_does_not_count_and_is_repaired(path: Path, cut: int) -> None:
    fill(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    results = Results(path, METRICS)
    assert results.rows.keys() == {SCRATCH}
    results.append(RANDOM, {"status": "done"})
    first_two = b"".join(whole.splitlines(keepends=True)[:2])
    assert path.read_bytes().startswith(first_two) and len(table(path)) == 3
    assert Results(path, METRICS).done(RANDOM) is not None


def test_a_row_without_a_seed_does_not_count_and_stays(path: Path) -> None:
    fill(path)
    text = path.read_text().replace("pretrain,random,,1,", "pretrain,random,,one,")
    path.write_text(text)
    results = Results(path, METRICS)
    assert results.rows.keys() == {SCRATCH}
    results.append(RANDOM, {"status": "done"})
    assert path.read_text().startswith(text) and Results(path, METRICS).done(RANDOM) is not None


def test_a_header_that_was_cut_off_is_written_anew(path: Path) -> None:
    path.write_text("version,sta")
    results = Results(path, METRICS)
    assert results.rows == {}
    results.append(SCRATCH, {"status": "done"})
    assert table(path)[0] == header(METRICS) and len(table(path)) == 2


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (header(["dice"]), r"columns \['dice_square'\]"),
        ([name for name in header(METRICS) if name != "device"], r"columns \['device'\]"),
        (header(["dice_square", "dice"]), "columns in another order"),
    ],
)
def test_a_table_of_another_version_stays_as_it_is(path: Path, columns: list[str], message: str) -> None:
    path.write_text(",".join(columns) + "\n" + "," * (len(columns) - 1) + "\n1,fine")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"results.csv: written by another version of ahm .*{message}.*nothing was"):
        Results(path, METRICS)
    assert path.read_bytes() == before


@pytest.mark.parametrize("fraction", [1 / 3, 0.1 + 0.2, 1e-3])
def test_fractions_are_read_back_exactly(path: Path, fraction: float) -> None:
    cell = Cell("finetune", "scratch", 0, fraction)
    Results(path, METRICS).append(cell, {"status": "done"})
    assert Results(path, METRICS).done(cell) is not None


def test_errors_keep_to_their_line(path: Path) -> None:
    """Whatever they hold: commas, quotes, line breaks."""
    results = Results(path, METRICS)
    results.append(SCRATCH, {"status": "failed", "error": 'expected "a",\n got\r\n b; "é"'})
    assert path.read_bytes().count(b"\n") == 2
    assert Results(path, METRICS).rows[SCRATCH]["error"] == 'expected "a", got b; "é"'


def test_what_is_not_known_is_empty(path: Path) -> None:
    row = Results(path, METRICS).append(SCRATCH, {"status": "done", "dice": float("nan"), "seconds": None})
    assert (row["dice"], row["seconds"], row["memory_mib"]) == ("", "", "")
    assert read_rows(path) == [row]


def test_no_file_has_no_rows(path: Path) -> None:
    assert read_rows(path) == [] and Results(path, METRICS).rows == {} and not path.exists()


def test_curves_are_appended_below_one_header(path: Path) -> None:
    for step in (10, 20):
        append_row(path, ["arm", "step"], {"arm": "a", "step": step, "unknown": 1})
    assert table(path) == [["arm", "step"], ["a", "10"], ["a", "20"]]
