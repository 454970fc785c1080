# SPDX-License-Identifier: Apache-2.0
"""Write the report of a study, finished or not: Markdown, HTML and figures."""

from __future__ import annotations

from collections.abc import Sequence
from operator import methodcaller
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from ahm_engines.files import writable_folder, write_atomically
from ahm_engines.study.cells import draws_of
from ahm_engines.study.comparisons import MISSING, Comparison, compare_all, race
from ahm_engines.study.drawing import save_figure
from ahm_engines.study.figures import draw_differences, draw_label_fractions, draw_learning_curves
from ahm_engines.study.finished import FINETUNE, PRETRAIN, Finished, read_finished
from ahm_engines.study.map_figure import draw_mask_maps
from ahm_engines.study.markup import Block, Bullets, Heading, Paragraph, Picture, Table, to_html, to_markdown
from ahm_engines.study.quantities import quantity
from ahm_engines.study.sentences import (
    caveats,
    equal_times,
    findings,
    headroom,
    left_out,
    luck,
    name_fraction,
    progress,
    sensitivity,
    too_coarse,
    unmatched,
)
from ahm_engines.study.settings import RANDOM
from ahm_engines.study.statistics import SMOOTHING, TARGET_SHARE
from ahm_engines.study.tables import (
    difference_table,
    failure_table,
    key_table,
    metric_difference_table,
    metrics_table,
    pretraining_table,
    steps_table,
)

__all__ = ["Report", "write_report"]


class Report(NamedTuple):
    """Files of a report, and its sentences: the state of the study, then what it has shown, by arm."""

    markdown: Path
    html: Path
    figures: list[Path]
    progress: list[str]
    findings: dict[str, list[str]]


def write_report(folder: str | Path) -> Report:
    """Write report.md, report.html and figures/ from what a study has finished so far.

    Args:
        folder: of the study: study.json, and as far as they are there results.csv, curves.csv and the maps below runs/.

    Raises:
        FileNotFoundError: when there is no study.json.
        ValueError: when study.json cannot be read, or is of another version.
        OSError: when the folder cannot be written to.
    """
    study = read_finished(folder)
    comparisons = compare_all(study, study.key_metric)
    pictures, files = _draw(study, comparisons)
    blocks = _blocks(study, comparisons, pictures)
    texts = {"report.md": to_markdown(blocks), "report.html": to_html(blocks, title=study.name, folder=study.folder)}
    for name, text in texts.items():
        write_atomically(study.folder / name, methodcaller("write", text.encode()))
    markdown, html = (study.folder / name for name in texts)
    return Report(markdown, html, files, progress(study), findings(study, comparisons))


def _draw(study: Finished, comparisons: Sequence[Comparison]) -> tuple[dict[str, Picture], list[Path]]:
    """Draw what there is; a figure that there is nothing for is removed."""
    folder = writable_folder(study.folder / "figures")
    drawn: dict[str, Figure | None] = {
        "label_fractions": draw_label_fractions(study),
        "differences": draw_differences(study, comparisons),
        "learning_curves": draw_learning_curves(study),
        "mask_maps": draw_mask_maps(study),
    }
    pictures: dict[str, Picture] = {}
    files: list[Path] = []
    for name, figure in drawn.items():
        if figure is not None:
            files += save_figure(figure, folder, name)
            width = float(figure.get_size_inches()[0])
            pictures[name] = Picture(f"figures/{name}.png", CAPTIONS[name], width)
        else:
            for stale in folder.glob(f"{name}.*"):
                stale.unlink()
    return pictures, files


CAPTIONS = {
    "label_fractions": "Score over the labelled share. Lines: mean over the seeds; dots: seeds.",
    "differences": (
        "Paired differences, arm minus reference. Ticks: seeds; bars: bootstrap 95 % intervals; the mean is filled "
        "where the difference is shown and hollow where it is a hint or not shown."
    ),
    "learning_curves": (
        f"Score on the validation patients while finetuning: running mean over {SMOOTHING} validations, mean over the "
        "seeds. Dotted: mean target."
    ),
    "mask_maps": (
        "Masks over pretraining, on one validation image: the policy map (one scale per arm; the mask, where there "
        "is no policy). Last column: share of the validation images in which each place was hidden."
    ),
}


def _blocks(study: Finished, comparisons: Sequence[Comparison], pictures: dict[str, Picture]) -> list[Block]:
    blocks: list[Block] = [Heading(f"Study {study.name}", 1), *_about(study)]
    if study.done(FINETUNE):
        others = [one for metric in study.other_metrics for one in compare_all(study, metric)]
        blocks += _results(study, comparisons, pictures)
        blocks += _findings(study, comparisons, others)
        blocks += _steps(study, pictures)
        blocks += _other_metrics(study, others)
    else:
        blocks.append(Paragraph("No finetuning has finished yet, so nothing can be said about the arms."))
    if study.done(PRETRAIN) or "mask_maps" in pictures:
        blocks += _pretraining(study, pictures)
    if study.failed():
        blocks += [Heading("Failed cells"), failure_table(study)]
    return blocks


def _about(study: Finished) -> list[Block]:
    on_validation = " They also chose the checkpoints, so scores are optimistic." * (study.evaluate_on == "validation")
    fractions = [f"{name_fraction(study, f)}, seeds {', '.join(map(str, s))}" for f, s in study.seeds.items()]
    lines = [
        f"Task: {study.task}; key metric: {quantity(study.key_metric).heading}.",
        f"Evaluated on the {study.evaluate_on} patients.{on_validation}",
        f"Arms: {', '.join(arm.title for arm in study.arms.values())}.",
        f"Labels: {'; '.join(fractions)}.",
        f"Pretraining steps: {_values(study, PRETRAIN, 'steps')}.",
        f"Finetuning steps: {_values(study, FINETUNE, 'steps')}.",
        f"Devices: {_values(study, None, 'device')}.",
        "Versions: " + ", ".join(f"{name} {_values(study, None, name)}" for name in ("ahm", "monai", "torch")) + ".",
    ]
    return [Bullets(lines), Heading("State"), Bullets([*progress(study), *left_out(study)])]


def _values(study: Finished, stage: str | None, column: str) -> str:
    """All values that a column takes in finished cells."""
    rows = [row for row in study.rows.values() if row.done and stage in (None, row.cell.stage)]
    found = {row.texts.get(column) for row in rows}
    return ", ".join(sorted(filter(None, found), key=lambda text: (len(text), text))) or "not known yet"


def _results(study: Finished, comparisons: Sequence[Comparison], pictures: dict[str, Picture]) -> list[Block]:
    shown = quantity(study.key_metric)
    drawn = any(draws_of(study, name) > 1 for name in study.arms)
    chosen = any(arm.labels != RANDOM for arm in study.arms.values())
    exception = " but those whose pretraining chooses them" * chosen
    blocks: list[Block] = [
        Heading(f"{shown.heading} on the {study.evaluate_on} patients"),
        Paragraph(
            "Mean ± standard deviation over the seeds."
            + " A seed's draws count as their mean." * drawn
            + f" Each draw has other labelled patients, the same for all arms{exception}." * study.draw_labels
        ),
        key_table(study),
        *_bullets(headroom(study)),
        *_picture(pictures, "label_fractions"),
    ]
    if not comparisons:
        return blocks
    paired = (
        f"Arm minus reference in {shown.heading}, paired by seed: both arms had the same patients"
        + " (to choose from, where their pretraining chooses who has the labels)" * chosen
        + ". In brackets the bootstrap 95 % interval of the mean."
    )
    blocks += [Heading("Paired differences"), Paragraph(paired), difference_table(study, comparisons)]
    return [*blocks, *_bullets(unmatched(study, comparisons)), *_picture(pictures, "differences")]


def _findings(study: Finished, comparisons: Sequence[Comparison], others: Sequence[Comparison]) -> list[Block]:
    if not comparisons:
        return []
    blocks: list[Block] = [Heading("What was shown, and what was not")]
    for title, lines in findings(study, comparisons).items():
        blocks += [Heading(title, 3), Bullets(lines)]
    trust = [*luck(study), *sensitivity(comparisons), *caveats(study, [*comparisons, *others])]
    return [*blocks, Heading("How far to trust this", 3), Bullets(trust)]


def _steps(study: Finished, pictures: dict[str, Picture]) -> list[Block]:
    races = {fraction: [race(study, arm, fraction) for arm in study.arms] for fraction in study.seeds}
    about = (
        f"First finetuning step at which the running mean over {SMOOTHING} validations (the last {SMOOTHING}, so none "
        f"is reached before) comes to {100 * TARGET_SHARE:.0f} % of what it ends with in the scratch arm of the same "
        "fraction and seed. The ratio is a geometric mean over the seeds where both arms reached it, above 1 = faster "
        "than scratch; seeds where the arm never reached it are left out, which flatters the arm. It cannot be finer "
        "than the steps between two validations, and leaves the cost of pretraining out. ≤: already there at the first "
        "validation that counts."
    )
    blocks: list[Block] = [Heading("Steps to target"), Paragraph(about)]
    for fraction, found in races.items():
        if any(one.steps for one in found):
            blocks += [
                Heading(name_fraction(study, fraction), 3),
                steps_table(study, found),
                *_bullets(too_coarse(found)),
            ]
    if not any(isinstance(block, Table) for block in blocks):
        blocks.append(
            Paragraph(
                f"Not known: it takes a finished scratch arm with at least {SMOOTHING} validations in curves.csv and a "
                "key metric of which more is better."
            )
        )
    return [*blocks, *_picture(pictures, "learning_curves")]


def _other_metrics(study: Finished, comparisons: Sequence[Comparison]) -> list[Block]:
    if not study.other_metrics:
        return []
    about = (
        "Mean ± standard deviation over the finished seeds, and arm minus reference as above. What was shown is said "
        "of the key metric: the more metrics are looked at, the more intervals exclude zero by chance."
    )
    if MISSING in study.other_metrics:
        about += (
            " Where a network finds nothing of what is there, HD95 is a mean over the other cases: such seeds do "
            "not count in its differences."
        )
    blocks: list[Block] = [Heading("Other metrics"), Paragraph(about)]
    for fraction in study.seeds:
        if study.done(FINETUNE, fraction=fraction):
            blocks += [Heading(name_fraction(study, fraction), 3), metrics_table(study, fraction)]
            here = [comparison for comparison in comparisons if comparison.fraction == fraction]
            blocks += [metric_difference_table(study, here)] if here else []
    return blocks


def _pretraining(study: Finished, pictures: dict[str, Picture]) -> list[Block]:
    about = "Mean ± standard deviation over the seeds. One step: median over the training steps, without validation."
    blocks: list[Block] = [Heading("Pretraining"), Paragraph(about), pretraining_table(study)]
    devices = {row.texts.get("device") for row in study.done(PRETRAIN)}
    lines = equal_times(study)
    lines += ["Measured on several devices: times and memory cannot be compared."] if len(devices) > 1 else []
    return [*blocks, *_bullets(lines), *_picture(pictures, "mask_maps")]


def _bullets(lines: Sequence[str]) -> list[Block]:
    return [Bullets(lines)] if lines else []


def _picture(pictures: dict[str, Picture], name: str) -> list[Block]:
    return [pictures[name]] if name in pictures else []
