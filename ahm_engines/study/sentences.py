# SPDX-License-Identifier: Apache-2.0
"""Plain sentences: what was shown, what was not, and how far to trust it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median, median_low

from ahm_engines.study.cells import draws_of
from ahm_engines.study.comparisons import Comparison, Race
from ahm_engines.study.finished import FINETUNE, PRETRAIN, Finished
from ahm_engines.study.quantities import quantity
from ahm_engines.study.statistics import (
    ALPHA,
    ENOUGH_SEEDS,
    FEWEST_SEEDS,
    POWER,
    Verdict,
    detectable_effect,
    mean_and_sd,
    seeds_needed,
)

__all__ = [
    *("caveats", "count", "equal_times", "finding", "findings", "headroom", "left_out", "luck", "name_fraction"),
    *("patients", "progress", "sensitivity", "too_coarse", "unmatched"),
]


def findings(study: Finished, comparisons: Sequence[Comparison]) -> dict[str, list[str]]:
    """Sentences about every compared arm, by its title."""
    said: dict[str, list[str]] = {}
    for comparison in comparisons:
        said.setdefault(study.arms[comparison.arm].title, []).append(finding(study, comparison))
    return said


def finding(study: Finished, comparison: Comparison) -> str:
    """Say what one comparison has shown."""
    arm, reference = study.arms[comparison.arm].title, study.arms[comparison.reference].title
    seeds = count(comparison.interval.count, "paired seed")
    words = {
        Verdict.SHOWN: f"shown ({seeds})",
        Verdict.HINT: f"a hint ({seeds})",
        Verdict.NOT_SHOWN: f"not shown ({seeds}): the interval contains zero",
        Verdict.NO_INTERVAL: f"nothing can be said ({seeds})",
    }
    place = f"{arm} against {reference}, {share(comparison.fraction)}"
    return f"{place}: {words[comparison.verdict]}{_effect(comparison)}."


def _effect(comparison: Comparison) -> str:
    interval, seeds = comparison.interval, comparison.interval.count
    mean, low, high = interval.mean, interval.low, interval.high
    shown = quantity(comparison.metric)
    if comparison.verdict is Verdict.NO_INTERVAL:
        few = ["none has both arms", "one tells no spread", "two tell too little of it"]
        reason = few[seeds] if seeds < FEWEST_SEEDS else "all differ alike"
        return f": {reason}" + (f"; the difference is {shown.number(mean, signed=True)} {shown.unit}" if seeds else "")
    ends = f"{shown.number(low, signed=True)} to {shown.number(high, signed=True)}"
    if comparison.verdict is Verdict.NOT_SHOWN:
        return f" ({shown.number(mean, signed=True)} {shown.unit}, 95 % interval {ends})"
    better = (mean > 0) != shown.lower_is_better
    unit = f"{shown.unit} of {shown.title}" if shown.unit else f"in {shown.title}"
    return f": {'better' if better else 'worse'} by {shown.number(abs(mean))} {unit} (95 % interval {ends})"


def headroom(study: Finished) -> list[str]:
    """What the labels that a fraction lacks are worth to scratch, and with them what pretraining may make up for."""
    shown, most = quantity(study.key_metric), max(study.seeds)
    lines = []
    for fraction in study.seeds:
        few, all_ = (study.values(study.key_metric, study.scratch or "", f) for f in (fraction, most))
        gains = [all_[seed] - few[seed] for seed in few if seed in all_]
        if fraction < most and gains:
            gain = shown.number(math.fsum(gains) / len(gains), signed=True)
            lines.append(
                f"From {share(fraction)} to {100 * most:.3g} %, scratch changes by {gain} {shown.unit} "
                f"({count(len(gains), 'paired seed')})."
            )
    if lines:
        lines.append(
            "That is about what pretraining may make up for. Where it is little, labels are not what these runs lack: "
            "finetune longer, or a larger network, before the arms are compared."
        )
    return lines


def unmatched(study: Finished, comparisons: Sequence[Comparison]) -> list[str]:
    """Name the seeds that did not count because only one arm has them."""
    lines = []
    for comparison in comparisons:
        arm, reference = study.arms[comparison.arm].title, study.arms[comparison.reference].title
        place = f"{arm} against {reference}, {share(comparison.fraction)}"
        for name, seeds in comparison.unmatched.items():
            numbers = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
            lines.append(f"{place}: {numbers} not counted, only {study.arms[name].title} has a value.")
    return lines


def caveats(study: Finished, comparisons: Sequence[Comparison]) -> list[str]:
    """Say how far the intervals can be trusted, and how many were made."""
    once = any(draws_of(study, one.reference) == 1 for one in comparisons if one.interval.count)
    made = sum(comparison.verdict is not Verdict.NO_INTERVAL for comparison in comparisons)
    choices = "several choices" if study.draw_labels else "a choice"
    return [
        f"Shown means: at least {ENOUGH_SEEDS} paired seeds, a 95 % interval that excludes zero, and p < {ALPHA} in a "
        "paired t-test. An interval that excludes zero without these is a hint and no more: three seeds have the same "
        "sign one time in four where nothing differs.",
        "A bootstrap over few seeds is too narrow: where differences are normal, its 95 % interval holds the truth "
        "about 75 % of the time with 3 seeds, 84 % with 5 and 90 % with 10. Hence the t-test.",
        f"{count(made, 'interval')} were computed and none is corrected for it: even if every one were as good as it "
        f"says, about {0.05 * made:.1f} of them would exclude zero by chance alone. "
        "Choosing the best arm after looking makes it worse.",
        f"A seed is a split of the patients, {choices} of labelled ones, a pretraining and its finetunings. Splits "
        "share patients, so seeds are not independent: the intervals speak of this data set, not of another one.",
        "All arms of a seed are compared with the same finetunings of a reference: where those were lucky, all are "
        "behind at once, and their number proves nothing."
        + " Several of each (--set draws=3; with --set draw_labels=true, of other labelled patients too) are averaged "
        "and leave less to luck." * once,
    ]


def luck(study: Finished) -> list[str]:
    """How far the draws of one seed lie apart, fraction by fraction; nothing where each has one."""
    shown, lines = quantity(study.key_metric), []
    labels = " and its labelled patients" * study.draw_labels
    for fraction in study.seeds:
        groups = [group for arm in study.arms for group in study.drawn(study.key_metric, arm, fraction).values()]
        spreads = [(sd, len(group) - 1) for group in groups if math.isfinite(sd := mean_and_sd(group)[1])]
        if spreads:
            pooled = math.sqrt(sum(sd**2 * freedom for sd, freedom in spreads) / sum(freedom for _, freedom in spreads))
            lines.append(
                f"{share(fraction)}: finetunings that differ by their draw{labels} alone have a standard deviation of "
                f"{shown.number(pooled)} {shown.unit}".strip()
                + f" ({count(len(spreads), 'group')} of draws)."
            )
    return lines


def sensitivity(comparisons: Sequence[Comparison]) -> list[str]:
    """How small a difference so many seeds can show, fraction by fraction; nothing where they are too few for any."""
    lines = []
    for fraction in dict.fromkeys(comparison.fraction for comparison in comparisons):
        here = [one for one in comparisons if one.fraction == fraction and one.interval.count >= ENOUGH_SEEDS]
        spreads = [sd for _, sd in (mean_and_sd([*one.differences.values()]) for one in here) if sd > 0]
        if not spreads:
            continue
        seeds, spread = median_low([one.interval.count for one in here]), median(spreads)
        effect, shown = detectable_effect(seeds), quantity(here[0].metric)
        deviation, difference = (f"{shown.number(size)} {shown.unit}".strip() for size in (spread, effect * spread))
        lines.append(
            f"{share(fraction)}: paired differences have a standard deviation of {deviation} (median of "
            f"{count(len(spreads), 'comparison')}). If it stays so, {seeds} seeds show a true difference of "
            f"{difference} {10 * POWER:.0f} times in 10; for half of that it takes {seeds_needed(effect / 2)}."
        )
    return lines


def progress(study: Finished) -> list[str]:
    """How much of the study is there."""
    cells = list(study.planned())
    lines = []
    for stage, name in ((PRETRAIN, "pretraining"), (FINETUNE, "finetuning")):
        planned = sum(cell.stage == stage for cell in cells)
        done, failed = len(study.done(stage)), len(study.failed(stage))
        open_cells = planned - done - failed
        lines.append(f"{done} of {count(planned, f'{name} cell')} finished, {failed} failed, {open_cells} to do.")
    return lines


def left_out(study: Finished) -> list[str]:
    """What the files hold that the report does not use, and what they lack."""
    lines = []
    if study.ignored:
        lines.append(
            f"{count(study.ignored, 'row')} of results.csv left out: of a cell that study.json does not plan, "
            f"evaluated on other patients than the {study.evaluate_on} patients, or unreadable."
        )
    rows = study.done(FINETUNE)
    absent = [name for name in study.metrics if rows and not any(name in row.texts for row in rows)]
    if absent:
        lines.append(f"results.csv has no column for {', '.join(absent)}.")
    unseen = sum(row.texts.get("validation") == "" for row in rows)
    if unseen:
        lines.append(
            f"{count(unseen, 'finetuning')} without a {quantity(study.key_metric).title} on the validation patients, "
            "where it is undefined (a class may be absent): scored with the weights of the last step."
        )
    return lines


def equal_times(study: Finished) -> list[str]:
    """How equal the times are that were to be equal."""
    lines = []
    for name, arm in study.arms.items():
        ours, theirs = (_seconds(study, other) for other in (name, arm.equal_time))
        both = [seed for seed in ours if seed in theirs]
        if arm.equal_time and both:
            share = math.fsum(ours[seed] for seed in both) / math.fsum(theirs[seed] for seed in both)
            title = study.arms[arm.equal_time].title
            seeds = count(len(both), "seed")
            lines.append(f"{arm.title}: {100 * share:.0f} % of the wall-clock time of {title} ({seeds}).")
    return lines


def _seconds(study: Finished, arm: str | None) -> dict[int, float]:
    rows = study.done(PRETRAIN, arm) if arm else []
    return {row.cell.seed: row.number("seconds") for row in rows if row.number("seconds") > 0}


def too_coarse(races: Sequence[Race]) -> list[str]:
    """Say so where validations are too far apart to tell by the steps to the target which arm was faster."""
    reached = sum(steps is not None for race in races for steps in race.steps.values())
    at_once = sum(len(race.at_once) for race in races)
    if not at_once:
        return []
    return [
        f"{at_once} of {count(reached, 'curve')} that came to the target were there at the first validation that "
        "counts. Between two of these, the ratio does not say which was faster: validate more often, as with "
        "--set finetune.val_interval=1."
    ]


def name_fraction(study: Finished, fraction: float) -> str:
    """Such as ``6 % of the labels (4 patients)``."""
    known = patients(study, fraction)
    return share(fraction) + (f" ({known})" if known else "")


def share(fraction: float) -> str:
    """Such as ``6 % of the labels``."""
    return f"{100 * fraction:.3g} % of the labels"


def patients(study: Finished, fraction: float) -> str:
    """Number of labelled patients, a range where seeds differ, empty where no cell tells."""
    numbers = [row.number("labelled_patients") for row in study.done(FINETUNE, fraction=fraction)]
    known = sorted({int(number) for number in numbers if math.isfinite(number)})
    if not known:
        return ""
    return count(known[0], "patient") if len(known) == 1 else f"{known[0]} to {known[-1]} patients"


def count(number: int, noun: str) -> str:
    """Number and noun, plural where it is not one."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
