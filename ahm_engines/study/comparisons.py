# SPDX-License-Identifier: Apache-2.0
"""Every arm against the arms it is compared with, seed by seed, and its steps to the target."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from ahm_engines.study.finished import FINETUNE, Curve, Finished
from ahm_engines.study.quantities import quantity
from ahm_engines.study.statistics import (
    SMOOTHING,
    TARGET_SHARE,
    Interval,
    SpeedUp,
    Verdict,
    judge,
    paired_bootstrap,
    running_mean,
    speed_up,
    steps_to_target,
)

__all__ = ["MISSING", "Comparison", "Race", "compare", "compare_all", "race", "targets"]


DISTANCE, MISSING = "hd95_", "hd95_missing"


class Comparison(NamedTuple):
    """Arm minus reference in a metric; ``unmatched`` names the seeds that only one of them has."""

    metric: str
    arm: str
    reference: str
    fraction: float
    differences: dict[int, float]
    interval: Interval
    verdict: Verdict
    unmatched: dict[str, list[int]]


class Race(NamedTuple):
    """Steps of an arm to the target of scratch: seed to steps, ``None`` = never reached.

    Of the seeds in ``at_once`` the first validation that counts was there already, so that the steps may be fewer.
    """

    arm: str
    fraction: float
    steps: dict[int, float | None]
    against_scratch: SpeedUp
    at_once: set[int]


def compare_all(study: Finished, metric: str) -> list[Comparison]:
    """All comparisons of the study in one metric, arm by arm, fractions innermost."""
    pairs = [(arm, reference) for arm, settings in study.arms.items() for reference in settings.compare_with]
    known = [pair for pair in pairs if pair[1] in study.arms]
    return [compare(study, metric, *pair, fraction) for pair in known for fraction in study.seeds]


def compare(study: Finished, metric: str, arm: str, reference: str, fraction: float) -> Comparison:
    """Pair two arms by seed; only seeds that both have finished count.

    Where an arm has found nothing in some case, its mean distance is one over other cases: that seed does not count.
    """
    study = _with_same_labels(study, arm, reference, fraction)
    ours, theirs = (_comparable(study, metric, name, fraction) for name in (arm, reference))
    differences = {seed: ours[seed] - theirs[seed] for seed in sorted(ours) if seed in theirs}
    interval = paired_bootstrap(list(differences.values()))
    alone = {arm: sorted(set(ours) - set(theirs)), reference: sorted(set(theirs) - set(ours))}
    unmatched = {name: seeds for name, seeds in alone.items() if seeds}
    return Comparison(metric, arm, reference, fraction, differences, interval, judge(interval), unmatched)


def _with_same_labels(study: Finished, arm: str, reference: str, fraction: float) -> Finished:
    """Without finetunings of a seed whose labelled patients only one of two arms has trained on so far."""
    if not study.draw_labels:
        return study
    rows = (study.done(FINETUNE, name, fraction) for name in (arm, reference))
    ours, theirs = ({(row.cell.seed, row.cell.draw) for row in each} for each in rows)
    paired = {seed for seed, _ in ours} & {seed for seed, _ in theirs}
    alone = {(seed, draw) for seed, draw in ours ^ theirs if seed in paired}
    return replace(study, rows={cell: row for cell, row in study.rows.items() if (cell.seed, cell.draw) not in alone})


def _comparable(study: Finished, metric: str, arm: str, fraction: float) -> dict[int, float]:
    values = study.values(metric, arm, fraction)
    missing = study.values(MISSING, arm, fraction) if metric.startswith(DISTANCE) and metric != MISSING else {}
    return {seed: value for seed, value in values.items() if not missing.get(seed)}


def targets(study: Finished, fraction: float, scratch: str | None) -> dict[int, float]:
    """Seed to target: ``TARGET_SHARE`` of what the smoothed validation score of a scratch arm ends with.

    Seeds whose curve is shorter than the running mean, or ends in NaN, have none; nor has a metric of which less is
    better.
    """
    if scratch is None or quantity(study.key_metric).lower_is_better:
        return {}
    curves = study.finished_curves(scratch, fraction)
    found = {seed: TARGET_SHARE * float(running_mean([*curve.values()])[-1]) for seed, curve in curves.items()}
    return {seed: target for seed, target in found.items() if target > 0}  # NaN is not


def race(study: Finished, arm: str, fraction: float) -> Race:
    """Count the steps of an arm until the target of its seed."""
    scratch = study.scratch_of(arm)
    if scratch:
        study = _with_same_labels(study, arm, scratch, fraction)
    goals = targets(study, fraction, scratch)
    curves = study.finished_curves(arm, fraction)
    steps = _steps(curves, goals)
    reached = {seed: number for seed, number in steps.items() if number is not None}
    at_once = {seed for seed, number in reached.items() if number == [*curves[seed]][SMOOTHING - 1]}
    base = _steps(study.finished_curves(scratch, fraction), goals) if scratch else {}
    return Race(arm, fraction, steps, speed_up(base, steps), at_once)


def _steps(curves: dict[int, Curve], goals: dict[int, float]) -> dict[int, float | None]:
    return {
        seed: steps_to_target([*curve], [*curve.values()], target=goals[seed])
        for seed, curve in curves.items()
        if seed in goals
    }
