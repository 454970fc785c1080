# SPDX-License-Identifier: Apache-2.0
"""``results.csv`` and ``curves.csv`` of a study: rows are appended, never changed."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ahm_engines.study.cells import Cell
from ahm_engines.study.settings import STUDY_VERSION

__all__ = ["COLUMNS", "CURVE_COLUMNS", "PRETRAINING_METRICS", "Results", "append_row", "cell_of", "number", "read_rows"]

COLUMNS = [
    *("version", "stage", "arm", "fraction", "seed", "draw", "status", "error", "evaluated_on", "labelled_patients"),
    *("epochs", "steps", "seconds", "step_seconds", "memory_mib", "device", "config_hash"),
    *("ahm", "monai", "torch", "created", "validation"),
]
PRETRAINING_METRICS = [
    *("random_psnr", "random_ssim", "hardness", "rank_correlation", "foreground_share"),
    *("policy_entropy", "position_entropy", "overlap_images", "overlap_epochs", "overlap_chance"),
]
CURVE_COLUMNS = ["arm", "fraction", "seed", "draw", "step", "value"]
Row = dict[str, str]


class Results:
    """The rows of a study, by cell.

    Args:
        path: of ``results.csv``; made with the first row.
        metrics: names of the evaluation's columns.

    Raises:
        ValueError: when the file was written by another version or for other metrics; it stays as it is.
    """

    def __init__(self, path: Path, metrics: Sequence[str]) -> None:
        self.path = path
        self.columns = [*COLUMNS, *PRETRAINING_METRICS, *metrics]
        self.rows = {cell: row for row in read_rows(path, self.columns) if (cell := cell_of(row))}

    def done(self, cell: Cell) -> Row | None:
        """The row of a cell that has finished, or ``None``."""
        row = self.rows.get(cell)
        return row if row is not None and row["status"] == "done" else None

    def append(self, cell: Cell, values: Mapping[str, Any]) -> Row:
        """Write one row, whole, and keep it."""
        fraction = "" if cell.fraction is None else str(cell.fraction)
        place = {"stage": cell.stage, "arm": cell.arm, "fraction": fraction, "seed": cell.seed, "draw": cell.draw}
        row = append_row(self.path, self.columns, {**values, **place, "version": STUDY_VERSION})
        self.rows[cell] = row
        return row


def read_rows(path: Path, columns: Sequence[str] | None = None) -> list[Row]:
    """Return the rows of a file, none if there is no file; a last line that was cut off does not count.

    Raises:
        ValueError: when the columns are not those expected.
    """
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    found = list(reader.fieldnames or [])
    if columns is not None and found and found != list(columns):
        odd = sorted(set(found) ^ set(columns))
        raise ValueError(
            f"{path}: written by another version of ahm or for other metrics (columns {odd or 'in another order'}); "
            "nothing was changed. Choose another --output_dir, or move the file away."
        )
    return [dict(row) for row in reader]


def append_row(path: Path, columns: Sequence[str], values: Mapping[str, Any]) -> Row:
    """Append one line in one step, and the header before the first; a line that was cut off is removed."""
    row = {name: _text(values.get(name)) for name in columns}
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    with open(path, "ab+") as file:
        file.seek(0)
        kept = file.read().rfind(b"\n") + 1
        file.truncate(kept)
        if kept == 0:
            writer.writeheader()
        writer.writerow(row)
        file.write(text.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())
    return row


def cell_of(row: Mapping[str, str]) -> Cell | None:
    """Return the cell that a row is about, ``None`` where it names no seed."""
    fraction, seed, draw = (number(row.get(name)) for name in ("fraction", "seed", "draw"))
    if not math.isfinite(seed):
        return None
    known = fraction if math.isfinite(fraction) else None
    return Cell(row.get("stage", ""), row.get("arm", ""), int(seed), known, int(draw) if math.isfinite(draw) else 0)


def number(text: str | None) -> float:
    """Return the number that a row holds as text, NaN where there is none."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())
