# SPDX-License-Identifier: Apache-2.0
"""One row of scores per case: collected on an evaluator, gathered over processes, summarised and written."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import ignite.distributed as idist
import torch.distributed as dist
from ignite.engine import Engine, Events

from ahm_engines.files import writable_folder, write_csv, write_json

__all__ = ["CaseScores", "Row", "known_mean", "statistics"]

CASE = "case_id"
Row = dict[str, Any]


class CaseScores(ABC):
    """What scores of segmentation and classification share; both are attached like a metric or like a handler.

    As a metric, ``key_val_metric={"<name>": scores}``, the number of that name decides which epoch is best; as a
    handler the numbers merely stand in ``engine.state.metrics``. A number that cannot be known is NaN there; a key
    metric is ``None`` then, which MONAI does not compare with others.

    Args:
        classes: their names.
        totals: measures that have one number.
        per_class: measures that have a number for each class, named ``<measure>_<class>``.
        output_dir: where to write ``scores.csv``, a row per case, and ``scores.json``, after every run; the first
            process writes. ``None`` writes nothing.

    Raises:
        ValueError: without classes, when two have one name, or when no number has the name of the key metric.
        OSError: when ``output_dir`` cannot be written to.
    """

    def __init__(
        self, classes: Sequence[str], totals: Sequence[str], per_class: Sequence[str], output_dir: str | Path | None
    ) -> None:
        self.classes = list(classes)
        if not self.classes or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes: expected at least one name and no name twice, got {self.classes}.")
        self.names = [*totals, *(f"{measure}_{name}" for name in self.classes for measure in per_class)]
        self.folder = None if output_dir is None else writable_folder(output_dir)
        self._rows: dict[str, Row] = {}

    def attach(self, engine: Engine, name: str | None = None) -> None:
        """Attach to an evaluator with decollated output, as the metric ``name`` or as a handler."""
        if name is not None and name not in self.names:
            raise ValueError(f"key metric: expected one of {self.names}, got {name!r}.")
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish, name)

    @abstractmethod
    def score(self, case: str, output: Mapping[Any, Any]) -> Row:
        """Columns of one case, from its decollated output."""

    @abstractmethod
    def summarise(self, rows: Sequence[Row]) -> tuple[dict[str, float], dict[str, Any]]:
        """Numbers for ``engine.state.metrics``, and what ``scores.json`` holds."""

    def _start(self) -> None:
        self._rows = {}

    def _collect(self, engine: Engine) -> None:
        batch, outputs = engine.state.batch, engine.state.output
        if not isinstance(outputs, list) or not isinstance(batch, list):
            raise TypeError(f"output: expected a list of cases, got {type(outputs).__name__}; set decollate=True.")
        for entry, output in zip(batch, outputs, strict=True):
            case = self._case_id({**entry, **output})
            self._rows[case] = {CASE: case} | self.score(case, output)

    def _case_id(self, entry: Mapping[Any, Any]) -> str:
        if CASE not in entry and idist.get_world_size() > 1:
            raise ValueError(f"{CASE}: expected one for each case, or several processes cannot tell repeated cases.")
        case = str(entry.get(CASE, f"{len(self._rows):05d}"))
        if case in self._rows:
            raise ValueError(f"{CASE}: {case!r} came twice in one run; give every case its own.")
        return case

    def _finish(self, engine: Engine, name: str | None) -> None:
        rows = _gathered(list(self._rows.values()))
        metrics, report = self.summarise(rows)
        engine.state.metrics |= metrics
        if name is not None and math.isnan(metrics[name]):
            engine.state.metrics[name] = None
        if self.folder is not None and idist.get_rank() == 0:
            write_csv(self.folder / "scores.csv", list(rows[0]) if rows else [CASE], rows)
            facts = {"cases": len(rows), "classes": self.classes}
            write_json(self.folder / "scores.json", _without_nan(facts | report))


def known_mean(values: Sequence[float]) -> float:
    """Mean of the values that are not NaN; NaN when none is known."""
    known = [value for value in values if not math.isnan(value)]
    return mean(known) if known else math.nan


def statistics(values: Sequence[float]) -> dict[str, float]:
    """Mean, sample standard deviation, median and count of the values that are not NaN."""
    known = [value for value in values if not math.isnan(value)]
    return {
        "mean": mean(known) if known else math.nan,
        "std": stdev(known) if len(known) > 1 else math.nan,
        "median": median(known) if known else math.nan,
        "count": len(known),
    }


def _gathered(rows: list[Row]) -> list[Row]:
    """Rows of all processes, ordered by case; a case that filled up a process is there once."""
    parts = [rows]
    if dist.is_available() and dist.is_initialized():
        parts = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, rows)
    unique = {row[CASE]: row for part in parts for row in part}
    return [unique[case] for case in sorted(unique)]


def _without_nan(content: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(content, dict):
        return {name: _without_nan(value) for name, value in content.items()}
    return None if isinstance(content, float) and math.isnan(content) else content
