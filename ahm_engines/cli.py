# SPDX-License-Identifier: Apache-2.0
"""The command ``ahm``."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from ahm_engines.study import Progress, Study, preset_names, read_study, run_study
from ahm_engines.study.cells import Cell
from ahm_engines.study.results import Row

__all__ = ["app"]

FAILED, UNFINISHED = 1, 3  # exit codes
# --data_dir as in bundles, --data-dir as elsewhere
NAMES = {"token_normalize_func": lambda name: name.replace("_", "-")}
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()


@app.callback()
def main() -> None:
    """Learned masking for MONAI: studies of what pretraining brings. Training and inference are bundle commands."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(show_path=False)])


@app.command(context_settings=NAMES)
def study(
    preset: Annotated[
        str | None, typer.Option(help=f"Settings for a data set: {', '.join(preset_names()['preset'])}.")
    ] = None,
    size: Annotated[str, typer.Option(help="small: two CPU cores; full: a GPU.")] = "small",
    ablation: Annotated[str | None, typer.Option(help=f"A question: {', '.join(preset_names()['ablation'])}.")] = None,
    config: Annotated[Path | None, typer.Option(help="JSON file with entries like those of a preset.")] = None,
    data_dir: Annotated[Path | None, typer.Option(envvar="AHM_DATA", help="Folder that holds a preset's data.")] = None,
    dataset_dir: Annotated[
        Path | None, typer.Option(help="Your images; those without a label serve for pretraining.")
    ] = None,
    labels_dir: Annotated[Path | None, typer.Option(help="Label maps, called as the images are.")] = None,
    datalist: Annotated[Path | None, typer.Option(help="Decathlon JSON instead of folders.")] = None,
    classes: Annotated[str | None, typer.Option(help="Names of the classes, with commas.")] = None,
    arms: Annotated[str | None, typer.Option(help="What to compare, with commas.")] = None,
    fractions: Annotated[str | None, typer.Option(help='Seeds by label fraction: "0.1=5,0.3=3,1=3".')] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="One more entry: finetune.max_epochs=20.")] = None,
    output_dir: Annotated[Path, typer.Option(help="Where results go; a stopped study goes on there.")] = Path("study"),
    bundles_dir: Annotated[Path | None, typer.Option(help="Folder of the bundles, where it is not found.")] = None,
    devices: Annotated[str | None, typer.Option(help='GPUs, one cell on each: "0,1"; by default all.')] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Cells at a time on CPUs, or on each GPU.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop after that time; the same command goes on.")
    ] = None,
    keep_models: Annotated[bool, typer.Option(help="Keep finetuned checkpoints.")] = False,
) -> None:
    """Compare pretraining with learned, random and no masks on your data, by patient, over seeds and label fractions.

    Exit code 0: all cells have a result. 1: some failed. 3: stopped by --minutes before the end.
    """
    try:
        given = _given(dataset_dir, labels_dir, datalist, classes, arms, fractions) | _parsed(changes or [])
        what = read_study(preset, size=size, ablation=ablation, config=config, data_dir=data_dir, changes=given)
        slots, threads = _resources(devices, workers)
        console.print(_describe(what), markup=False, highlight=False, soft_wrap=True)
        progress = run_study(
            what,
            output_dir,
            bundles_dir=bundles_dir,
            devices=slots,
            threads=threads,
            minutes=minutes,
            keep_models=keep_models,
            listener=_tell,
        )
    except (OSError, ValueError) as error:
        console.print(f"[red]{type(error).__name__}[/]: ", end="")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(FAILED) from None
    _finish(output_dir, progress)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="The output_dir of a study.")]) -> None:
    """Write report.md, report.html and the figures of a study anew, finished or not."""
    from ahm_engines.study.report import write_report

    try:
        write_report(folder)
    except (OSError, ValueError) as error:
        console.print(str(error), markup=False, soft_wrap=True)
        raise typer.Exit(FAILED) from None
    console.print(f"report: {folder / 'report.md'}, {folder / 'report.html'}", soft_wrap=True)


def _given(
    dataset_dir: Path | None,
    labels_dir: Path | None,
    datalist: Path | None,
    classes: str | None,
    arms: str | None,
    fractions: str | None,
) -> dict[str, Any]:
    """Options as entries; folders on the command line are relative to where it is typed."""
    paths = {"dataset_dir": dataset_dir, "labels_dir": labels_dir, "datalist": datalist}
    given: dict[str, Any] = {f"data.{key}": str(path.absolute()) for key, path in paths.items() if path is not None}
    if classes:
        given["data.classes"] = [name.strip() for name in classes.split(",")]
    if arms:
        given["arms"] = [name.strip() for name in arms.split(",")]
    if fractions:
        given["seeds"] = {key: _value(text) for key, text in map(_halves, fractions.split(","))}
    return given


def _parsed(changes: list[str]) -> dict[str, Any]:
    return {key: _value(text) for key, text in map(_halves, changes)}


def _halves(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"expected name=value, got {text!r}.")
    return key.strip(), value.strip()


def _value(text: str) -> Any:
    """JSON, or else plain text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _resources(devices: str | None, workers: int | None) -> tuple[list[str], int]:
    """A slot for each cell that runs at a time, and the threads of each."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = devices.split(",") if devices else [str(index) for index in range(torch.cuda.device_count())]
    slots = gpus * (workers or 1) if gpus else [""] * (workers or min(cores, MOST_WORKERS))
    return slots, max(1, cores // len(slots))


MOST_WORKERS = 4  # on CPUs, unless told otherwise: each of them holds its images in memory


def _describe(what: Study) -> str:
    finetunings = len(what.arms) * sum(len(seeds) for seeds in what.seeds.values())
    pretrainings = len(what.all_seeds) * sum(arm.pretrain is not None for arm in what.arms.values())
    seeds = ", ".join(f"{fraction:g} ({len(seeds)} seeds)" for fraction, seeds in what.seeds.items())
    return (
        f"{what.name}: {what.task}, arms {', '.join(what.arms)}; label fractions {seeds}; "
        f"{pretrainings} pretrainings, {finetunings} finetunings."
    )


def _tell(cell: Cell, row: Row) -> None:
    if row["status"] != "done":
        console.print(f"[red]failed[/] {cell}: {escape(row['error'])}", highlight=False, soft_wrap=True)
        return
    names = ("random_psnr",) if cell.stage == "pretrain" else ("dice", "accuracy")
    score = ", ".join(f"{name} {float(row[name]):.3f}" for name in names if row.get(name))
    console.print(f"[green]done[/] {cell}: {score or 'no score'}, {float(row['seconds']):.0f} s", highlight=False)


def _finish(output_dir: Path, progress: Progress) -> None:
    report(output_dir)
    console.print(f"{progress.finished} cells finished, {len(progress.failed)} failed, {progress.open} to go.")
    if progress.open:
        console.print("Stopped before the end; the same command goes on.")
        raise typer.Exit(UNFINISHED)
    if progress.failed:
        raise typer.Exit(FAILED)
