# SPDX-License-Identifier: Apache-2.0
"""Figures of the scores: label fractions, learning curves, differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ahm_engines.study.comparisons import Comparison, targets
from ahm_engines.study.drawing import COLUMN, PAGE, TEXT, ArmStyle, End, arm_styles, in_style, label_ends
from ahm_engines.study.finished import Finished, mean_curve
from ahm_engines.study.quantities import quantity
from ahm_engines.study.sentences import patients
from ahm_engines.study.statistics import Verdict, running_mean

__all__ = ["draw_differences", "draw_label_fractions", "draw_learning_curves"]

ACROSS = 3  # panels in a row
FORESTS = 4  # panels side by side that share their names


@in_style
def draw_label_fractions(study: Finished) -> Figure | None:
    """Key metric over the label fractions: line = mean over the seeds, dots = seeds; ``None`` without a value."""
    shown, styles = quantity(study.key_metric), arm_styles(study)
    fractions = [*study.seeds]
    width = COLUMN if len(styles) < 6 else 1.4 * COLUMN
    figure = Figure(figsize=(width, 2.9), layout="constrained")
    axis = figure.add_subplot(xlabel="labelled share of the training patients", ylabel=shown.heading)
    ends = []
    for number, (name, style) in enumerate(styles.items()):
        shift = 0.3 * ((number + 0.5) / len(styles) - 0.5)
        found = [(i + shift, [*study.values(study.key_metric, name, f).values()]) for i, f in enumerate(fractions)]
        points = [(x, shown.factor * np.array(values)) for x, values in found if values]
        ends += [_fraction_line(axis, points, style)] if points else []
    if not ends:
        return None
    axis.set_xticks(range(len(fractions)), [_tick(study, fraction) for fraction in fractions])
    axis.set_xlim(-0.25, len(fractions) - 0.75)
    label_ends(axis, ends, x=len(fractions) - 0.7, height=2.4)
    return figure


def _fraction_line(axis: Axes, points: Sequence[tuple[float, np.ndarray]], style: ArmStyle) -> End:
    for x, values in points:
        axis.plot([x] * len(values), values, ".", color=style.colour, ms=3.5, alpha=0.45, mew=0)
    places, means = [x for x, _ in points], [float(values.mean()) for _, values in points]
    axis.plot(places, means, color=style.colour, ls=style.line, marker=style.marker, mec="white", mew=0.4)
    return End(places[-1], means[-1], style)


def _tick(study: Finished, fraction: float) -> str:
    return f"{100 * fraction:.3g} %" + (f"\n{known}" if (known := patients(study, fraction)) else "")


def _title(study: Finished, fraction: float) -> str:
    return _tick(study, fraction).replace(" %", " % of the labels")


@in_style
def draw_learning_curves(study: Finished) -> Figure | None:
    """Smoothed validation score over the steps, mean over the seeds, one panel per fraction; ``None`` without any."""
    styles = arm_styles(study)
    fractions = [f for f in study.seeds if any(study.finished_curves(name, f) for name in study.arms)]
    if not fractions:
        return None
    figure, axes = _panels(len(fractions), height=2.3)
    for fraction, axis in zip(fractions, axes, strict=True):
        for name, style in styles.items():
            mean = mean_curve([*study.finished_curves(name, fraction).values()])
            if mean:
                scores = quantity(study.key_metric).factor * running_mean([*mean.values()])
                axis.plot([*mean], scores, color=style.colour, ls=style.line, label=style.title)
        _target_line(axis, study, fraction)
        axis.set(title=_title(study, fraction), xlabel="finetuning steps")
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes[0].set_ylabel(f"validation {quantity(study.key_metric).heading}")
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside right center", handlelength=2.2)
    return figure


def _target_line(axis: Axes, study: Finished, fraction: float) -> None:
    goals = [*targets(study, fraction, study.scratch).values()]
    if goals:
        goal = quantity(study.key_metric).factor * float(np.mean(goals))
        axis.axhline(goal, color="0.55", lw=0.7, ls=(0, (2, 2)), zorder=0)
        axis.annotate("target", (0, goal), (3, 1.5), ("axes fraction", "data"), "offset points", color="0.4", size=6)


@in_style
def draw_differences(study: Finished, comparisons: Sequence[Comparison]) -> Figure | None:
    """Paired differences with their intervals, one panel per fraction; ``None`` without any pair.

    Small dots are seeds; the marker of the mean is filled where the difference is shown, and hollow elsewhere.
    """
    fractions = [f for f in study.seeds if any(c.fraction == f and c.differences for c in comparisons)]
    if not fractions:
        return None
    places = _forest_places(comparisons)
    lines = max(place for place, _ in places.values()) + 1
    figure, axes = _panels(len(fractions), height=0.55 + 0.16 * lines, sharey=True, across=FORESTS)
    styles, shown = arm_styles(study), quantity(study.key_metric)
    for fraction, axis in zip(fractions, axes, strict=True):
        axis.axvline(0.0, color="0.4", lw=0.7, zorder=0)
        for comparison in comparisons:
            if comparison.fraction == fraction and comparison.differences:
                place = places[comparison.arm, comparison.reference][0]
                _forest_line(axis, comparison, place, shown.factor, styles[comparison.arm])
        axis.set(title=_title(study, fraction))
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
    for axis in axes[::FORESTS]:
        _forest_names(axis, study, places, styles)
    figure.supxlabel(_forest_unit(study), size=TEXT)
    return figure


def _forest_places(comparisons: Sequence[Comparison]) -> dict[tuple[str, str | None], tuple[float, bool]]:
    """Heights from the top: each arm's title, then its references; and whether it is a title."""
    places: dict[tuple[str, str | None], tuple[float, bool]] = {}
    height = 0.0
    for comparison in comparisons:
        for key in ((comparison.arm, None), (comparison.arm, comparison.reference)):
            if key not in places:
                height += 0.5 if key[1] is None and places else 0.0
                places[key] = (height, key[1] is None)
                height += 1.0
    return places


def _forest_line(axis: Axes, comparison: Comparison, place: float, factor: float, style: ArmStyle) -> None:
    interval = comparison.interval
    seeds = factor * np.array([*comparison.differences.values()])
    axis.plot(seeds, np.full(len(seeds), place), "|", color=style.colour, ms=5, mew=0.6, alpha=0.6)
    axis.plot([factor * interval.low, factor * interval.high], [place] * 2, color=style.colour, lw=1.6)
    face = style.colour if comparison.verdict is Verdict.SHOWN else "white"
    axis.plot([factor * interval.mean], [place], "o", color=style.colour, mfc=face, mew=1, ms=4.5)


def _forest_unit(study: Finished) -> str:
    shown = quantity(study.key_metric)
    return f"difference in {shown.title}" + (f" ({shown.unit})" if shown.unit else "")


def _forest_names(axis: Axes, study: Finished, places: Mapping[Any, Any], styles: Mapping[str, ArmStyle]) -> None:
    names = [
        study.arms[arm].title if title else f"against {study.arms[other].title}"
        for (arm, other), (_, title) in places.items()
    ]
    axis.set_yticks([place for place, _ in places.values()], names)
    axis.set_ylim(max(place for place, _ in places.values()) + 0.7, -0.7)
    for tick, (arm, other) in zip(axis.get_yticklabels(), places, strict=True):
        tick.set(color=styles[arm].colour, weight="normal" if other else "bold", size=TEXT if other is None else 7)


def _panels(count: int, *, height: float, sharey: bool = False, across: int = ACROSS) -> tuple[Figure, list[Axes]]:
    rows, columns = -(-count // across), min(count, across)
    width = min(PAGE, 1.3 + 2.1 * columns)
    figure = Figure(figsize=(width, rows * height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey="row" if sharey else False).flatten().tolist()
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]
