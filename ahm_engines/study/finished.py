# SPDX-License-Identifier: Apache-2.0
"""What a study has finished so far, as its folder tells it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from ahm_engines.study.cells import Cell, pretrained_by, stages
from ahm_engines.study.results import cell_of, number, read_rows
from ahm_engines.study.settings import STUDY_VERSION, Arm, scratch_like

__all__ = ["FINETUNE", "PRETRAIN", "Finished", "Row", "mean_curve", "read_finished"]

PRETRAIN, FINETUNE = "pretrain", "finetune"
Curve = dict[float, float]


@dataclass(frozen=True)
class Row:
    """The last line of results.csv about a cell."""

    cell: Cell
    texts: Mapping[str, str]

    @property
    def done(self) -> bool:
        """Whether the cell has finished."""
        return self.texts["status"] == "done"

    def number(self, column: str) -> float:
        """Value of a column; NaN where it is missing, empty or no number."""
        return number(self.texts.get(column))


@dataclass(frozen=True)
class Finished:
    """Settings, rows and learning curves of a study; a curve is step to validation score."""

    folder: Path
    name: str
    task: str
    evaluate_on: str
    key_metric: str
    metrics: tuple[str, ...]
    arms: Mapping[str, Arm]
    seeds: Mapping[float, tuple[int, ...]]
    draws: int = 1
    draw_labels: bool = False
    rows: Mapping[Cell, Row] = field(default_factory=dict)
    curves: Mapping[Cell, Curve] = field(default_factory=dict)
    ignored: int = 0

    @property
    def scratch(self) -> str | None:
        """The first arm that is not pretrained."""
        return next((name for name, arm in self.arms.items() if arm.pretrain is None), None)

    def scratch_of(self, name: str) -> str | None:
        """The arm without pretraining that an arm is compared with; its network and spacing are those of the arm."""
        arm = self.arms[name]
        alike = scratch_like(arm, self.arms)
        return next((other for other in (name, *arm.compare_with, *alike) if other in alike), None)

    @property
    def other_metrics(self) -> list[str]:
        """All metrics but the key metric."""
        return [metric for metric in self.metrics if metric != self.key_metric]

    @property
    def all_seeds(self) -> list[int]:
        """Every seed that some fraction uses."""
        return sorted({seed for seeds in self.seeds.values() for seed in seeds})

    def planned(self) -> Iterator[Cell]:
        """All cells: pretraining first."""
        return chain.from_iterable(stages(self))

    def done(self, stage: str, arm: str | None = None, fraction: float | None = None) -> list[Row]:
        """Rows of finished cells by seed, those of one arm or fraction where given; arms may share a pretraining."""
        if stage == PRETRAIN and arm is not None and arm in self.arms:
            arm = pretrained_by(self, arm)
        rows = [row for row in self.rows.values() if row.done and row.cell.stage == stage]
        rows = [row for row in rows if arm in (None, row.cell.arm) and fraction in (None, row.cell.fraction)]
        return sorted(rows, key=lambda row: (row.cell.seed, row.cell.draw))

    def finished_seeds(self, stage: str, arm: str, fraction: float | None = None) -> list[int]:
        """Seeds of which at least one cell has finished, ascending."""
        return [*dict.fromkeys(row.cell.seed for row in self.done(stage, arm, fraction))]

    def failed(self, stage: str | None = None, arm: str | None = None, fraction: float | None = None) -> list[Row]:
        """Rows of cells whose last try failed."""
        rows = [row for row in self.rows.values() if not row.done and stage in (None, row.cell.stage)]
        return [row for row in rows if arm in (None, row.cell.arm) and fraction in (None, row.cell.fraction)]

    def values(self, metric: str, arm: str, fraction: float) -> dict[int, float]:
        """Seed to metric, the mean of the finished draws; seeds where it is undefined in one of them are left out."""
        found = {seed: fmean(values) for seed, values in self.drawn(metric, arm, fraction).items()}
        return {seed: value for seed, value in found.items() if math.isfinite(value)}

    def drawn(self, metric: str, arm: str, fraction: float) -> dict[int, list[float]]:
        """Seed to metric of each finished draw; NaN where it is undefined."""
        found: dict[int, list[float]] = {}
        for row in self.done(FINETUNE, arm, fraction):
            found.setdefault(row.cell.seed, []).append(row.number(metric))
        return found

    def finished_curves(self, arm: str, fraction: float) -> dict[int, Curve]:
        """Seed to learning curve, the mean of the finished draws at the steps that all of them have, rising."""
        drawn: dict[int, list[Curve]] = {}
        for row in self.done(FINETUNE, arm, fraction):
            if row.cell in self.curves:
                drawn.setdefault(row.cell.seed, []).append(self.curves[row.cell])
        return {seed: mean_curve(curves) for seed, curves in drawn.items()}


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Return the mean at the steps that all of them have, rising; none of none."""
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return {step: fmean(curve[step] for curve in curves) for step in steps}


def read_finished(folder: str | Path) -> Finished:
    """Read study.json, results.csv and curves.csv of a study folder; only the first must be there.

    The last row of a cell counts, and of a learning curve the last value at a step. Rows of cells that study.json does
    not plan, and those evaluated on other patients than it says, are left out and counted in ``ignored``.

    Raises:
        FileNotFoundError: when there is no study.json.
        ValueError: when study.json cannot be read, or is of another version.
    """
    study = _settings(Path(folder))
    planned = set(study.planned())
    lines = read_rows(study.folder / "results.csv")
    rows = [row for row in map(_row, lines) if row and row.cell in planned and _same_patients(row, study)]
    curves: dict[Cell, Curve] = {}
    for line in read_rows(study.folder / "curves.csv"):
        cell, step = cell_of({**line, "stage": FINETUNE}), number(line.get("step"))
        if cell in planned and math.isfinite(step):
            curves.setdefault(cell, {})[step] = number(line.get("value"))
    return replace(study, rows={row.cell: row for row in rows}, curves=curves, ignored=len(lines) - len(rows))


def _settings(folder: Path) -> Finished:
    path = folder / "study.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the folder of a study, as `ahm study` leaves it.")
    try:
        return _finished(folder, json.loads(path.read_text(encoding="utf-8")))
    except KeyError as error:
        raise ValueError(f"{path}: expected an entry {error}, got none; run the study into a new folder.") from error
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a study ({error}); run the study into a new folder.") from error


def _finished(folder: Path, settings: Mapping[str, Any]) -> Finished:
    if settings["version"] != STUDY_VERSION:
        raise ValueError(f"expected version {STUDY_VERSION}, got {settings['version']}")
    return Finished(
        folder=folder,
        name=settings["name"],
        task=settings["task"],
        evaluate_on=settings["evaluate_on"],
        key_metric=settings["key_metric"],
        metrics=tuple(settings["metrics"]),
        arms={name: Arm(**arm) for name, arm in settings["arms"].items()},
        seeds={float(fraction): tuple(seeds) for fraction, seeds in settings["seeds"].items()},
        draws=settings.get("draws", 1),  # absent, as the next, where it was written before there were several
        draw_labels=settings.get("draw_labels", False),
    )


def _row(line: Mapping[str, str]) -> Row | None:
    cell = cell_of(line)
    return Row(cell, line) if cell and line.get("status") in ("done", "failed") else None


def _same_patients(row: Row, study: Finished) -> bool:
    return row.cell.stage == PRETRAIN or row.texts.get("evaluated_on") in (None, "", study.evaluate_on)
