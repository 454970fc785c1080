# SPDX-License-Identifier: Apache-2.0
"""The tables of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ahm_engines.study.cells import draws_of
from ahm_engines.study.comparisons import Comparison, Race
from ahm_engines.study.finished import FINETUNE, PRETRAIN, Finished
from ahm_engines.study.markup import Table
from ahm_engines.study.quantities import Quantity, quantity
from ahm_engines.study.results import PRETRAINING_METRICS
from ahm_engines.study.sentences import count, name_fraction
from ahm_engines.study.statistics import Verdict, mean_and_sd

__all__ = [
    *("difference_table", "failure_table", "key_table", "metric_difference_table", "metrics_table"),
    *("pretraining_table", "steps_table"),
]

NONE = "-"
COSTS = ("steps", "seconds", "step_seconds", "memory_mib")


def key_table(study: Finished) -> Table:
    """Key metric: arms by label fractions."""
    headings = ["arm", *(name_fraction(study, fraction) for fraction in study.seeds)]
    rows = [[arm.title, *(_key_cell(study, name, f) for f in study.seeds)] for name, arm in study.arms.items()]
    return Table(headings, rows)


def _key_cell(study: Finished, arm: str, fraction: float) -> str:
    planned, values = len(study.seeds[fraction]), study.values(study.key_metric, arm, fraction)
    undefined = len(study.finished_seeds(FINETUNE, arm, fraction)) - len(values)
    failed = len(study.failed(FINETUNE, arm, fraction))
    seeds = count(planned, "seed") if len(values) == planned else f"{len(values)} of {count(planned, 'seed')}"
    troubles = [f"{undefined} undefined" if undefined else "", f"{failed} failed" if failed else ""]
    draws = draws_of(study, arm)
    brackets = ", ".join(filter(None, [seeds, f"{draws} draws each" if draws > 1 else "", *troubles]))
    return f"{_spread(quantity(study.key_metric), [*values.values()]) or 'none yet'} ({brackets})"


def difference_table(study: Finished, comparisons: Sequence[Comparison]) -> Table:
    """Arm minus reference in one metric with its interval: pairs of arms by label fractions."""
    columns = {fraction: name_fraction(study, fraction) for fraction in study.seeds}
    return _paired(study, columns, [(comparison, comparison.fraction) for comparison in comparisons])


def metric_difference_table(study: Finished, comparisons: Sequence[Comparison]) -> Table:
    """Arm minus reference at one label fraction with its interval: pairs of arms by metrics."""
    columns = {comparison.metric: quantity(comparison.metric).heading for comparison in comparisons}
    return _paired(study, columns, [(comparison, comparison.metric) for comparison in comparisons])


def _paired(study: Finished, columns: Mapping[Any, str], placed: Sequence[tuple[Comparison, Any]]) -> Table:
    cells: dict[tuple[str, str], dict[Any, str]] = {}
    for comparison, column in placed:
        cells.setdefault((comparison.arm, comparison.reference), {})[column] = _difference_cell(comparison)
    titles = {pair: " - ".join(study.arms[name].title for name in pair) for pair in cells}
    rows = [[titles[pair], *(its[column] for column in columns)] for pair, its in cells.items()]
    return Table(["arm - reference", *columns.values()], rows)


def _difference_cell(comparison: Comparison) -> str:
    interval, shown = comparison.interval, quantity(comparison.metric)
    if not interval.count:
        return "no pair"
    mean, low, high = (shown.number(end, signed=True) for end in (interval.mean, interval.low, interval.high))
    ends = "" if comparison.verdict is Verdict.NO_INTERVAL else f" [{low}, {high}]"
    return f"{mean}{ends} ({count(interval.count, 'seed')}): {comparison.verdict.value}"


def metrics_table(study: Finished, fraction: float) -> Table:
    """All other metrics at one label fraction: arms by metrics; ``n`` where fewer seeds have it than finished."""
    metrics = study.other_metrics
    rows = []
    for name, arm in study.arms.items():
        finished = len(study.finished_seeds(FINETUNE, name, fraction))
        cells = [_counted(quantity(m), [*study.values(m, name, fraction).values()], finished) for m in metrics]
        rows.append([arm.title, str(finished), *cells])
    return Table(["arm", "seeds", *(quantity(metric).heading for metric in metrics)], rows)


def pretraining_table(study: Finished) -> Table:
    """Cost and quality of pretraining: arms by quantities, those columns that hold anything."""
    columns = [name for name in (*COSTS, *PRETRAINING_METRICS) if any(_pretraining(study, a, name) for a in study.arms)]
    headings = ["arm", "seeds", *(quantity(name).heading for name in columns), "one step, of random's"]
    rows = []
    for name, arm in study.arms.items():
        finished = len(study.done(PRETRAIN, name))
        cells = [_counted(quantity(column), _pretraining(study, name, column), finished) for column in columns]
        if arm.pretrain is not None:
            rows.append([arm.title, str(finished), *cells, _relative_time(study, name)])
    return Table(headings, rows)


def _pretraining(study: Finished, arm: str, column: str) -> list[float]:
    values = [row.number(column) for row in study.done(PRETRAIN, arm)]
    return [value for value in values if math.isfinite(value)]


def _relative_time(study: Finished, arm: str) -> str:
    ours, random = (mean_and_sd(_pretraining(study, name, "step_seconds"))[0] for name in (arm, "random"))
    return f"{ours / random:.2f}x" if random > 0 and math.isfinite(ours) else NONE


def steps_table(study: Finished, races: Sequence[Race]) -> Table:
    """Steps to the target at one label fraction, at most so many where it was reached at once; the ratio to scratch."""
    headings = ["arm", "steps, seed by seed", "reached", "scratch / arm", "over the seeds", "seeds where slower"]
    return Table(headings, [_steps_row(study, race) for race in races if race.steps])


def _steps_row(study: Finished, race: Race) -> list[str]:
    steps = [_steps_of(race, seed) for seed in sorted(race.steps)]
    reached = sum(number is not None for number in race.steps.values())
    cells = [study.arms[race.arm].title, ", ".join(steps), f"{reached} of {len(steps)}"]
    ratio = race.against_scratch
    if race.arm == study.scratch_of(race.arm) or not ratio.both:
        return [*cells, NONE, NONE, NONE]
    mean = f"{ratio.ratio:.2f} ({count(ratio.both, 'seed')})"
    return [*cells, mean, f"{ratio.low:.2f} to {ratio.high:.2f}", f"{ratio.slower} of {ratio.both}"]


def _steps_of(race: Race, seed: int) -> str:
    number = race.steps[seed]
    return "not reached" if number is None else f"{'≤ ' if seed in race.at_once else ''}{number:.0f}"


def failure_table(study: Finished) -> Table:
    """Cells whose last try failed, and why."""
    return Table(["cell", "error"], [[str(row.cell), row.texts.get("error") or "unknown"] for row in study.failed()])


def _counted(shown: Quantity, values: Sequence[float], finished: int) -> str:
    text = _spread(shown, values) or NONE
    return f"{text} (n={len(values)})" if values and len(values) < finished else text


def _spread(shown: Quantity, values: Sequence[float]) -> str:
    """Mean and standard deviation; empty without a value."""
    mean, sd = mean_and_sd(values)
    if math.isnan(mean):
        return ""
    return shown.number(mean) + (f" ± {shown.number(sd)}" if math.isfinite(sd) else "")
