# SPDX-License-Identifier: Apache-2.0
"""Which patients pretrain, train, validate and test, once per seed, written down as datalists."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ahm_engines.files import write_json
from ahm_engines.study.settings import LABELS, RANDOM, Study
from ahm_transforms.io import Case, Cases, Split, load_cases, load_classification_cases, load_segmentation_cases
from ahm_transforms.io.split import choose_patients, split_by_patient

__all__ = ["Choice", "Splits", "make_splits"]

logger = logging.getLogger(__name__)


Choice = tuple[float, int, int]  # label fraction, seed, and which of its choices of labelled patients


@dataclass(frozen=True)
class Splits:
    """Datalists, and how many labelled patients each finetuning has.

    Attributes:
        pretrain: datalist by seed: images of all but the validation and test patients to train on.
        finetune: datalist by label fraction, seed and choice of labelled patients, the same for all arms.
        patients: labelled training patients of each of these.
        pool: datalist by seed with the labels of all training patients, for arms that choose among them.
    """

    pretrain: dict[int, Path]
    finetune: dict[Choice, Path]
    patients: dict[Choice, int]
    pool: dict[int, Path]


def make_splits(study: Study, folder: Path, *, cache_dir: Path | None = None) -> Splits:
    """Find the cases, divide them by patient for every seed, and write the datalists into ``folder``.

    Images without a label serve for pretraining. No patient of the validation or test part of a seed is in its
    pretraining or training part. A datalist's own validation and test lists are kept for every seed. Scans that
    ``cache_dir`` remembers are not checked again.

    Raises:
        BadCasesError: images or labels that cannot be used.
        FileNotFoundError: no data.
        ValueError: too few patients for the label fractions, a class that some labelled choice lacks, or datalists of
            other data in ``folder``.
    """
    finding = _finding(study) | {"cache_dir": cache_dir}
    labelled, images = _labelled(study, finding), _images(study, finding)
    logger.info(
        "%d labelled images of %d patients; %d images of %d patients in all.",
        *(len(cases) for found in (_all(labelled), images) for cases in (found, _patients(found))),
    )
    parts = {seed: _divide(study, labelled, seed) for seed in study.all_seeds}
    by = _stratify(study)
    chosen = {
        (fraction, seed, choice): choose_patients(parts[seed].training, fraction, seed=seed, stratify=by, choice=choice)
        for fraction, seeds in study.seeds.items()
        for seed in seeds
        for choice in range(study.draws if study.draw_labels else 1)
    }
    _check_fractions(study, parts)
    _check_classes(study, labelled, chosen, parts)
    pretrain = {seed: _write(folder / f"seed{seed}_pretrain.json", _unlabelled(images, parts[seed])) for seed in parts}
    finetune = {
        (fraction, seed, choice): _write(
            folder / f"seed{seed}_labels{fraction:g}{f'_draw{choice}' if choice else ''}.json",
            _lists(cases, parts[seed].validation, parts[seed].test),
        )
        for (fraction, seed, choice), cases in chosen.items()
    }
    pool = {
        seed: _write(folder / f"seed{seed}_pool.json", _lists(*part))
        for seed, part in parts.items()
        if any(arm.labels != RANDOM for arm in study.arms.values())
    }
    return Splits(pretrain, finetune, {key: len(_patients(cases)) for key, cases in chosen.items()}, pool)


def _labelled(study: Study, finding: dict[str, Any]) -> Cases:
    data = study.data
    options = finding | {"classes": data["classes"], "val_fraction": 0.0, "test_fraction": 0.0}
    options |= {key: data[key] for key in LABELS[study.task] if key in data}
    if study.task == "segmentation":
        return load_segmentation_cases(**options)
    cases = load_classification_cases(**options)
    parts = (cases.training, cases.validation, cases.test)
    training, validation, test = (_named(part, cases.classes) for part in parts)
    return replace(cases, training=training, validation=validation, test=test)


def _named(cases: Sequence[Case], classes: Sequence[str]) -> list[Case]:
    """With the names of their classes: an index would be taken for a name where classes are called 1, 2, 3."""
    return [{**case, "label": classes[case["label"]]} for case in cases]


def _images(study: Study, finding: dict[str, Any]) -> list[Case]:
    """All images, with or without a label, but label maps and those that a datalist wants to validate or test on."""
    return load_cases(**finding, labels_dir=study.data.get("labels_dir"), val_fraction=0.0).training


def _finding(study: Study) -> dict[str, Any]:
    data = study.data
    options: dict[str, Any] = {
        key: data[key] for key in ("dataset_dir", "datalist", "patient_pattern", "skip_bad") if key in data
    }
    options |= {"spatial_dims": data.get("spatial_dims", 3), "channels": data.get("in_channels", 1)}
    return options | {"pictures": data.get("modality") == "image2d"}


def _stratify(study: Study) -> str | None:
    return "label" if study.task == "classification" else None


def _divide(study: Study, cases: Cases, seed: int) -> Split:
    drawn = split_by_patient(
        cases.training,
        val_fraction=0.0 if cases.validation else study.val_fraction,
        test_fraction=0.0 if cases.test else study.test_fraction,
        seed=seed,
        stratify=_stratify(study),
    )
    split = Split(drawn.training, cases.validation or drawn.validation, cases.test or drawn.test)
    if several := _in_several((cases.training, cases.validation, cases.test)):
        raise ValueError(
            f"{study.name}: expected a datalist with different patients in training, validation and test, got "
            f"{several} in more than one of them."
        )
    if _in_several(split) or not split.validation or not split.test:
        raise ValueError(
            f"{study.name}: {len(_patients(cases.training))} patient(s) with labels do not suffice for training, "
            f"validation ({study.val_fraction}) and test ({study.test_fraction}) with different patients in each."
        )
    return split


def _in_several(parts: Sequence[Sequence[Case]]) -> int:
    patients = Counter(patient for part in parts for patient in _patients(part))
    return sum(count > 1 for count in patients.values())


def _check_fractions(study: Study, parts: dict[int, Split]) -> None:
    for seed, split in parts.items():
        total = len(_patients(split.training))
        counts = Counter(round(fraction * total) for fraction, seeds in study.seeds.items() if seed in seeds)
        if 0 in counts or max(counts.values()) > 1:
            fractions = [fraction for fraction, seeds in study.seeds.items() if seed in seeds]
            raise ValueError(
                f"{study.name}: label fractions {fractions} of {total} training patients are "
                f"{[round(fraction * total, 2) for fraction in fractions]} patients: expected one patient at least, "
                "and different numbers for different fractions. Take larger fractions or more patients."
            )


def _check_classes(study: Study, cases: Cases, chosen: dict[Choice, list[Case]], parts: dict[int, Split]) -> None:
    """Every class among the labelled patients, or no training makes sense; among the others a warning is enough."""
    lacking = {key: _absent(cases, some) for key, some in chosen.items()}
    lines = [
        f"fraction {fraction:g}, seed {seed}{f', draw {choice}' if choice else ''}: {names}"
        for (fraction, seed, choice), names in lacking.items()
        if names
    ]
    if lines:
        raise ValueError(
            f"{study.name}: some classes are absent from the labelled patients of: {'; '.join(lines)}. "
            "Take larger fractions, other seeds or other classes."
        )
    for seed, split in parts.items():
        for part in ("validation", "test"):
            names = _absent(cases, getattr(split, part))
            if names:
                logger.warning("seed %d: class %s is absent from the %s patients.", seed, names, part)


def _absent(cases: Cases, some: Sequence[Case]) -> list[str]:
    return [name for name in cases.classes if not any(name in cases.present[case["case_id"]] for case in some)]


def _all(cases: Cases) -> list[Case]:
    return [*cases.training, *cases.validation, *cases.test]


def _patients(cases: Sequence[Case]) -> set[str]:
    return {case["patient_id"] for case in cases}


def _unlabelled(images: Sequence[Case], split: Split) -> dict[str, Any]:
    held = _patients(split.validation) | _patients(split.test)
    return _lists([case for case in images if case["patient_id"] not in held], split.validation, labels=False)


def _lists(
    training: Sequence[Case], validation: Sequence[Case], test: Sequence[Case] = (), *, labels: bool = True
) -> dict[str, Any]:
    parts = {"training": training, "validation": validation, "test": test}
    return {name: [_entry(case, labels) for case in cases] for name, cases in parts.items() if cases}


def _entry(case: Case, labels: bool) -> dict[str, Any]:
    kept = ("image", "patient_id", "label") if labels else ("image", "patient_id")
    return {key: case[key] for key in kept}


def _write(path: Path, content: dict[str, Any]) -> Path:
    """Write a datalist, unless the study began with another one."""
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != content:
        raise ValueError(
            f"{path}: the data have changed since the study began: other images, patients or labels are found now. "
            "Nothing was changed; choose another --output_dir."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_json(path, content)
