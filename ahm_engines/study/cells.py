# SPDX-License-Identifier: Apache-2.0
"""The cells of a study: one pretraining or one finetuning each, as a bundle run and its configuration files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ahm_engines.options import did_you_mean, unknown_entries
from ahm_engines.study.settings import COMMON, RANDOM, Arm, Study
from ahm_engines.study.splits import Choice, Splits
from ahm_transforms.io.json_file import read_json
from ahm_transforms.recipes import warn_of_flips

__all__ = [
    "Cell",
    "Choosing",
    "Job",
    "check_options",
    "draws_of",
    "finetuning_cells",
    "labels_of",
    "make_job",
    "pretrained_by",
    "pretraining_cells",
    "pretraining_of",
    "stages",
    "warn_of_swaps",
]

BEST, OPTIONS, DATALIST = "model.pt", "options.json", "datalist.json"
FINETUNING = {"segmentation": "ahm_segmentation", "classification": "ahm_classification"}
FURTHER_DRAW = 1_000_000  # added to the seed of a finetuning for each draw before
LABELLING = ("label_values", "allow_empty_labels")


@dataclass(frozen=True)
class Cell:
    """One pretraining (``fraction`` is ``None``) or finetuning, of which a seed may have several draws."""

    stage: str
    arm: str
    seed: int
    fraction: float | None = None
    draw: int = 0

    @property
    def folder(self) -> str:
        """Where its run writes, below the study's folder."""
        labels = "" if self.fraction is None else f"_labels{self.fraction:g}"
        draw = f"_draw{self.draw}" if self.draw else ""
        return f"runs/{self.stage}/{self.arm}{labels}_seed{self.seed}{draw}"

    def __str__(self) -> str:
        labels = "" if self.fraction is None else f", {self.fraction:.3g} of the labels"
        draw = f", draw {self.draw}" if self.draw else ""
        return f"{self.stage} {self.arm}{labels}, seed {self.seed}{draw}"


class Plan(Protocol):
    """What decides which cells there are: a study, or what it has finished."""

    @property
    def arms(self) -> Mapping[str, Arm]: ...
    @property
    def seeds(self) -> Mapping[float, Sequence[int]]: ...
    @property
    def draws(self) -> int: ...
    @property
    def all_seeds(self) -> list[int]: ...


@dataclass(frozen=True)
class Choosing:
    """What a finetuning has to find out first: which patients have the labels.

    Attributes:
        count: how many.
        pool: datalist with the labels of all who can be chosen.
    """

    count: int
    pool: Path


@dataclass(frozen=True)
class Job:
    """A cell ready to run.

    Attributes:
        cell: what it is.
        folder: where it writes.
        options: what ``options.json`` in that folder will hold: the entries that differ from the bundle's own.
        bundle: the bundle's folder.
        overlays: names of the bundle's configuration files between ``train.json`` and the options.
        config_hash: of all that decides its numbers; no paths.
        choosing: how it comes to its datalist, where its pretraining chooses the labelled patients.
    """

    cell: Cell
    folder: Path
    options: dict[str, Any]
    bundle: Path
    overlays: tuple[str, ...]
    config_hash: str
    choosing: Choosing | None = None

    def config_files(self, *more: str) -> list[str]:
        """Configuration files of the bundle command: train.json, overlays, ``more``, options."""
        names = ["train.json", *self.overlays, *more]
        return [*(str(self.bundle / "configs" / name) for name in names), str(self.folder / OPTIONS)]


def pretrained_by(study: Plan, name: str) -> str:
    """The arm whose pretraining an arm goes on from: mostly its own."""
    return study.arms[name].pretrained_by or name


def draws_of(study: Plan, name: str) -> int:
    """Finetunings of each pretraining of an arm."""
    return study.arms[name].draws or study.draws


def pretraining_cells(study: Plan, *, equal_time: bool) -> Iterator[Cell]:
    """Pretrainings of arms with (or without) a time to keep to, seed by seed."""
    for seed in study.all_seeds:
        for name, arm in study.arms.items():
            wanted = arm.pretrain is not None and (arm.equal_time is not None) == equal_time
            if wanted and pretrained_by(study, name) == name:
                yield Cell("pretrain", name, seed)


def finetuning_cells(study: Plan) -> Iterator[Cell]:
    """All finetunings; seed by seed, so that a study which is stopped early has whole seeds."""
    for seed in study.all_seeds:
        for fraction, seeds in study.seeds.items():
            if seed in seeds:
                for draw in range(max(draws_of(study, name) for name in study.arms)):
                    for name in study.arms:
                        if draw < draws_of(study, name):
                            yield Cell("finetune", name, seed, fraction, draw)


def stages(study: Plan) -> list[list[Cell]]:
    """All cells. Those of a stage need the results of the stages before."""
    pretraining = [[*pretraining_cells(study, equal_time=equal_time)] for equal_time in (False, True)]
    return [*pretraining, [*finetuning_cells(study)]]


def pretraining_of(study: Plan, cell: Cell) -> Cell | None:
    """The cell whose weights a cell starts from; ``None`` for a pretraining, and from scratch."""
    if cell.stage == "pretrain" or study.arms[cell.arm].pretrain is None:
        return None
    return Cell("pretrain", pretrained_by(study, cell.arm), cell.seed)


def labels_of(study: Study, cell: Cell) -> Choice | None:
    """Which choice of labelled patients a cell trains on; ``None`` for a pretraining."""
    if cell.fraction is None:
        return None
    return cell.fraction, cell.seed, cell.draw if study.draw_labels else 0


def make_job(
    cell: Cell,
    study: Study,
    splits: Splits,
    folder: Path,
    bundles: Path,
    cache_dir: Path | None = None,
    *,
    epochs: int,
    before: str | None,
) -> Job:
    """Return the run of a cell.

    Args:
        cell: which.
        study: its settings.
        splits: its datalists.
        folder: of the study.
        bundles: folder of the bundles.
        cache_dir: folder that keeps prepared scans.
        epochs: of its training.
        before: hash of the pretraining that it goes on from.
    """
    arm = study.arms[cell.arm]
    pretraining = cell.stage == "pretrain"
    labels = labels_of(study, cell)
    choosing = None
    if labels is not None and arm.labels != RANDOM:
        choosing = Choosing(splits.patients[labels], splits.pool[cell.seed])
        datalist = folder / cell.folder / DATALIST  # its run writes it
        patients = [arm.labels, choosing.count, _patients(choosing.pool)]
    else:
        datalist = splits.pretrain[cell.seed] if labels is None else splits.finetune[labels]
        patients = _patients(datalist)
    own = {**study.pretrain, **(arm.pretrain or {})} if pretraining else _finetuning(study, arm)
    common = {key: study.data[key] for key in COMMON if key in study.data}
    if pretraining and "skip_bad" in study.data:
        common["skip_bad"] = study.data["skip_bad"]  # smaller than a patch is bad only there
    options = {**common, **own, "max_epochs": epochs, "seed": cell.seed + FURTHER_DRAW * cell.draw}
    paths = {
        "dataset_dir": study.data.get("dataset_dir") or str(Path(study.data["datalist"]).parent),
        "datalist": str(datalist),
        "output_dir": str(folder / cell.folder),
        "resume": True,
        "cache_dir": None if cache_dir is None else str(cache_dir),
    }
    if (source := pretraining_of(study, cell)) is not None:
        paths["pretrained"] = str(folder / source.folder / "models" / BEST)
    overlays = tuple(arm.overlays) if pretraining else ()
    config_hash = _hash([cell.stage, options, overlays, patients, before])
    bundle = _bundle(cell.stage, study, bundles)
    return Job(cell, folder / cell.folder, options | paths, bundle, overlays, config_hash, choosing)


def check_options(study: Study, bundles: Path) -> None:
    """Refuse options that a bundle does not have: its run would ignore them.

    Args:
        study: its settings.
        bundles: folder of the bundles.

    Raises:
        ValueError: for such an option, of the study or of an arm.
    """
    for stage in ("pretrain", "finetune"):
        bundle = _bundle(stage, study, bundles)
        known = _entries(bundle, ["train.json"])
        _expect_entries(stage, getattr(study, stage), known, bundle)
        _refuse_decided(stage, getattr(study, stage))
        for name, arm in study.arms.items():
            more = _entries(bundle, arm.overlays) if stage == "pretrain" else set()
            _expect_entries(f"arms.{name}.{stage}", getattr(arm, stage) or {}, known | more, bundle)
            _refuse_decided(f"arms.{name}.{stage}", getattr(arm, stage) or {})


def warn_of_swaps(study: Study, bundles: Path) -> None:
    """Log a warning for every setting of flips in finetuning that swaps what the names of classes tell apart.

    Args:
        study: its settings.
        bundles: folder of the bundles.
    """
    defaults = read_json(_bundle("finetune", study, bundles) / "configs" / "train.json", "configuration")
    told: list[Any] = []
    for arm in study.arms.values():
        options = {**defaults, **study.data, **_finetuning(study, arm)}
        if options["flip_axes"] not in told:
            told.append(options["flip_axes"])
            warn_of_flips(**{name: options[name] for name in ("classes", "spatial_dims", "flip_axes")})


# What a study decides itself, and where it is told.
DECIDED = {
    **dict.fromkeys(("seed", "split_seed", "label_fraction"), "seeds"),
    **{name: name for name in ("val_fraction", "test_fraction")},
    **{name: f"data.{name}" for name in ("dataset_dir", "labels_dir", "datalist", "classes", "skip_bad")},
    **dict.fromkeys(("output_dir", "resume"), "--output_dir"),
    "cache_dir": "--cache_dir",
    "pretrained": "arms",
}


def _refuse_decided(where: str, options: Mapping[str, Any]) -> None:
    for name in DECIDED.keys() & options:
        raise ValueError(f"{where}: {name} is decided by the study for every run; give it as {DECIDED[name]}.")


def _bundle(stage: str, study: Study, bundles: Path) -> Path:
    return bundles / ("ahm_pretrain" if stage == "pretrain" else FINETUNING[study.task])


def _entries(bundle: Path, files: Sequence[str]) -> set[str]:
    return {key for name in files for key in read_json(bundle / "configs" / name, "configuration")}


def _expect_entries(where: str, options: Mapping[str, Any], known: set[str], bundle: Path) -> None:
    for name in unknown_entries(options, known):
        raise ValueError(f"{where}: {bundle.name} has no option {name!r}{did_you_mean(name, known)}")


def _finetuning(study: Study, arm: Arm) -> dict[str, Any]:
    labels = {key: study.data[key] for key in ("classes", *LABELLING) if key in study.data}
    if study.task == "classification":
        labels = {"classes": study.data["classes"], "key_metric": study.key_metric}
    if "unit" in study.data:
        labels["unit"] = study.data["unit"]
    return {**labels, "evaluate_cases": study.evaluate_on, **study.finetune, **arm.finetune}


def _patients(datalist: Path) -> Any:
    """The patients of a datalist, without folders."""
    content = json.loads(datalist.read_text(encoding="utf-8"))
    return {part: [entry["patient_id"] for entry in entries] for part, entries in content.items()}


def _hash(parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
