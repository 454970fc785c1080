# SPDX-License-Identifier: Apache-2.0
"""The command ``ahm``."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from ahm_engines.files import writable_folder
from ahm_engines.options import entries, names
from ahm_engines.study import Progress, Study, preset_names, read_study, run_study
from ahm_engines.study.cells import Cell, stages
from ahm_engines.study.results import Row

__all__ = ["app"]

FAILED, UNFINISHED, EMPTY = 1, 3, 4  # exit codes
# --data_dir as in bundles, --data-dir as elsewhere
NAMES = {"token_normalize_func": lambda name: name.replace("_", "-")}
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()


@app.callback()
def main() -> None:
    """Learned masking for MONAI: studies of what pretraining brings. Training and inference are bundle commands."""
    shown = RichHandler(console=console, show_time=False, show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[shown])
    logging.getLogger("ahm_engines.study").setLevel(logging.INFO)


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
    patient_pattern: Annotated[
        str | None, typer.Option(help='What names the patient in a path: "(patient\\d+)".')
    ] = None,
    arms: Annotated[str | None, typer.Option(help="What to compare, with commas.")] = None,
    fractions: Annotated[str | None, typer.Option(help='Seeds by label fraction: "0.1=5,0.3=3,1=3".')] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="One more entry: finetune.max_epochs=20.")] = None,
    output_dir: Annotated[Path, typer.Option(help="Where results go; a stopped study goes on there.")] = Path("study"),
    cache_dir: Annotated[Path | None, typer.Option(help="Keep scans as they are prepared here, for all cells.")] = None,
    bundles_dir: Annotated[Path | None, typer.Option(help="Folder of the bundles, where it is not found.")] = None,
    devices: Annotated[str | None, typer.Option(help='GPUs, one cell on each: "0,1"; by default all.')] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Cells at a time on CPUs, or on each GPU.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop after that time; the same command goes on.")
    ] = None,
    keep_models: Annotated[bool, typer.Option(help="Keep finetuned checkpoints.")] = False,
    trial: Annotated[
        bool, typer.Option("--trial", help="Two steps of every arm instead, to see that all runs work.")
    ] = False,
) -> None:
    """Compare pretraining with learned, random and no masks on your data, by patient, over seeds and label fractions.

    Exit code 0: all cells have a result. 1: some failed. 3: stopped by --minutes before the end.
    """
    folder = output_dir
    try:
        given = _given(dataset_dir, labels_dir, datalist, classes, patient_pattern, arms, fractions)
        given |= entries(changes or [])
        what = read_study(preset, size=size, ablation=ablation, config=config, data_dir=data_dir, changes=given)
        slots, threads = _resources(devices, workers)
        if trial and minutes is not None:
            raise ValueError("minutes: a trial is not continued, expected --trial without --minutes, got both.")
        if trial:
            what, folder = what.trial(), _beside(output_dir)
        _say(_describe(what))
        progress = run_study(
            what,
            folder,
            cache_dir=cache_dir,
            bundles_dir=bundles_dir,
            devices=slots,
            threads=threads,
            minutes=minutes,
            keep_models=keep_models,
            listener=_tell,
        )
    except (OSError, ValueError) as error:
        if folder != output_dir:
            shutil.rmtree(folder)
        _fail(error)
    _finish(folder, progress)
    if trial:
        shutil.rmtree(folder)
        _say("All runs of the study work. Two steps say nothing about its arms, so their results were removed.")


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


@app.command(context_settings=NAMES)
def pacs(
    url: Annotated[str, typer.Argument(help="DICOMweb address, such as http://127.0.0.1:8042/dicom-web.")],
    study: Annotated[str, typer.Option(help="Study Instance UID.")],
    bundle: Annotated[Path, typer.Option(help="Folder of a bundle that segments, such as bundles/ahm_segmentation.")],
    series: Annotated[str | None, typer.Option(help="Series Instance UID, where several series fit.")] = None,
    modality: Annotated[str | None, typer.Option(help="Of the series; by default what the model learned on.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights; by default models/model.pt of the bundle.")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Leave a copy of the results here.")] = None,
    store: Annotated[bool, typer.Option(help="Store the DICOM SEG in the study.")] = True,
    timeout_s: Annotated[float, typer.Option(min=1, help="How long the server may be silent.")] = 60,
    changes: Annotated[list[str] | None, typer.Option("--set", help="Entry of inference.json: overlap=0.25.")] = None,
) -> None:
    """Fetch a series from a PACS, segment it, and store the result there as DICOM SEG.

    The environment says who asks: AHM_PACS_USER and AHM_PACS_PASSWORD, or AHM_PACS_TOKEN.

    Exit code 0: stored. 1: failed, and nothing was stored. 4: nothing was found in the images, and nothing was stored.
    """
    from ahm_engines.pacs import Pacs
    from ahm_engines.pacs_segmentation import segment_study

    signal.signal(signal.SIGTERM, _end)
    user, password, token = (os.environ.get(f"AHM_PACS_{name}") for name in ("USER", "PASSWORD", "TOKEN"))
    try:
        segmentation = segment_study(
            Pacs(url, user=user, password=password, token=token, timeout_s=timeout_s),
            study,
            bundle,
            series_uid=series,
            modality=modality and modality.upper(),
            checkpoint=checkpoint,
            output_dir=output_dir,
            store=store,
            changes=entries(changes or []),
            tell=_say,
        )
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        _fail(error)
    if segmentation.empty:
        _say("nothing was found: no DICOM SEG is stored.")
        raise typer.Exit(EMPTY)


def _beside(output_dir: Path) -> Path:
    """A new folder for a trial, on the same disk."""
    place = output_dir.absolute()
    return Path(tempfile.mkdtemp(prefix=f"{place.name}_trial_", dir=writable_folder(place.parent)))


def _say(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _fail(error: Exception) -> NoReturn:
    console.print(f"[red]{type(error).__name__}[/]: ", end="")
    _say(str(error))
    raise typer.Exit(FAILED) from None


def _end(number: int, frame: object) -> NoReturn:
    """Leave on SIGTERM as on an error, so that temporary folders go."""
    raise SystemExit(128 + number)


def _given(
    dataset_dir: Path | None,
    labels_dir: Path | None,
    datalist: Path | None,
    classes: str | None,
    patient_pattern: str | None,
    arms: str | None,
    fractions: str | None,
) -> dict[str, Any]:
    """Options as entries; folders on the command line are relative to where it is typed."""
    paths = {"dataset_dir": dataset_dir, "labels_dir": labels_dir, "datalist": datalist}
    given: dict[str, Any] = {f"data.{key}": str(path.absolute()) for key, path in paths.items() if path is not None}
    if classes:
        given["data.classes"] = names(classes)
    if patient_pattern:
        given["data.patient_pattern"] = patient_pattern
    if arms:
        given["arms"] = names(arms)
    if fractions:
        given["seeds"] = entries(names(fractions))
    return given


def _resources(devices: str | None, workers: int | None) -> tuple[list[str], int]:
    """A slot for each cell that runs at a time, and the threads of each."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    known = visible.split(",") if visible else [str(gpu) for gpu in range(count)]
    gpus = _named_gpus(devices, known) if devices else known[:count]
    slots = gpus * (workers or 1) if gpus else [""] * (workers or min(cores, MOST_WORKERS))
    named = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(named) if named.isdecimal() else 0
    return slots, threads or max(1, cores // len(slots))


def _named_gpus(devices: str, known: list[str]) -> list[str]:
    """CUDA falls back on the CPU where it does not know a name."""
    gpus = [name.strip() for name in devices.split(",") if name.strip()]
    if not gpus or not all(name in known or name.startswith(("GPU-", "MIG-")) for name in gpus):
        raise ValueError(f"--devices: expected some of the visible GPUs {known}, with commas, got {devices!r}.")
    return gpus


MOST_WORKERS = 4  # on CPUs, unless told otherwise: each of them holds its images in memory


def _describe(what: Study) -> str:
    *pretrainings, finetunings = map(len, stages(what))
    seeds = ", ".join(f"{fraction:g} ({len(seeds)} seeds)" for fraction, seeds in what.seeds.items())
    return (
        f"{what.name}: {what.task}, arms {', '.join(what.arms)}; label fractions {seeds}; "
        f"{sum(pretrainings)} pretrainings, {finetunings} finetunings."
    )


def _tell(cell: Cell, row: Row) -> None:
    if row["status"] != "done":
        console.print(f"[red]failed[/] {cell}: {escape(row['error'])}", highlight=False, soft_wrap=True)
        return
    metrics = ("random_psnr",) if cell.stage == "pretrain" else ("dice", "accuracy")
    score = ", ".join(f"{name} {float(row[name]):.3f}" for name in metrics if row.get(name))
    console.print(f"[green]done[/] {cell}: {score or 'no score'}, {float(row['seconds']):.0f} s", highlight=False)


def _finish(output_dir: Path, progress: Progress) -> None:
    report(output_dir)
    console.print(f"{progress.finished} cells finished, {len(progress.failed)} failed, {progress.open} to go.")
    if progress.open:
        console.print("Stopped before the end; the same command goes on.")
        raise typer.Exit(UNFINISHED)
    if progress.failed:
        raise typer.Exit(FAILED)
