# SPDX-License-Identifier: Apache-2.0
"""From a folder or a datalist with labels to checked training, validation and test cases, in one call."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ahm_transforms.io._types import PARTS, Source
from ahm_transforms.io.cases import Cases, check_dims, check_found
from ahm_transforms.io.classes import add_classes, class_names
from ahm_transforms.io.datalist import Datalist
from ahm_transforms.io.label_check import ClassCheck, LabelCheck
from ahm_transforms.io.labels import values_of_classes
from ahm_transforms.io.pairs import add_files, hide_label_folders, move_without, no_labels
from ahm_transforms.io.source import find_source
from ahm_transforms.io.split import choose_patients, divide, keep_usable
from ahm_transforms.io.template import template_classification, template_segmentation

LOGGER = logging.getLogger(__name__)


def load_segmentation_cases(
    dataset_dir: str | Path | None = None,
    *,
    classes: Sequence[str],
    labels_dir: str | Path | None = None,
    datalist: Datalist | None = None,
    label_values: Sequence[int] | None = None,
    spatial_dims: int = 3,
    val_fraction: float = 0.2,
    test_fraction: float = 0.2,
    label_fraction: float = 1.0,
    seed: int = 0,
    split_seed: int = 0,
    patient_pattern: str | None = None,
    pictures: bool | None = None,
    skip_bad: bool = False,
    allow_empty_labels: bool = False,
    min_size: Sequence[int] | int | None = None,
    channels: int | None = None,
    cache_dir: str | Path | None = None,
) -> Cases:
    r"""Find, check and split images with label maps; without folder and datalist, take the MNI152 template.

    Images without a label are left out. The template's labels are maps of gray and white matter, and its three parts
    are given. Every image and label is read once.

    Args:
        dataset_dir: folder with NIfTI files, 2D pictures or DICOM series, in it or below it.
        classes: names of the foreground classes.
        labels_dir: folder with the label maps, called as the images are; without it, a folder ``labels``,
            ``labelsTr``, ``masks`` or ``segmentations`` beside ``images`` or ``imagesTr``.
        datalist: JSON file in Decathlon form, or what it would hold, to use instead of a search. Its ``validation``
            and ``test`` lists are used as they are; what is not listed is drawn from ``training``. An entry's ``label``
            is a path, or a list of paths with one map for each class; ``labels_dir`` serves those that have none.
        label_values: the value of each class in the label maps, 1, 2, ... unless told otherwise.
        spatial_dims: 2 or 3.
        val_fraction: share of the patients for validation.
        test_fraction: share of the patients for the test.
        label_fraction: share of the training patients to use, at least one; a smaller share is part of a larger one.
        seed: seed of the choice of those patients.
        split_seed: seed of the split.
        patient_pattern: regular expression that finds the patient in a file's path, such as ``(patient\d+)``.
        pictures: whether DICOM images without a position in space (radiographs, mammograms, ultrasound) are cases, and
            volumes are bad; False wants volumes, so that pictures are bad. None takes both, and no such DICOM images.
        skip_bad: leave out what cannot be used, with a warning, where the default is to stop. The others are divided
            as if it were there.
        allow_empty_labels: whether labels may be all background.
        min_size: smallest usable image in voxels, one crop for instance.
        channels: how many channels every image must have; None takes any.
        cache_dir: folder that remembers DICOM headers and which files were checked, until they change.

    Raises:
        BadCasesError: some images or labels cannot be used; it lists them all.
        FileNotFoundError: a folder or the datalist is missing, or no image has a label.
        ImportError: the template is wanted and nilearn is not installed.
        OSError: files cannot be written to ``cache_dir``.
        ValueError: an option is wrong, nothing of a part can be used, or a class occurs in no training case.
    """
    check_dims(spatial_dims, pictures=pictures)
    _refuse_for_template(dataset_dir, datalist, labels_dir=labels_dir, label_values=label_values)
    names = class_names(classes)
    values = values_of_classes(len(names), label_values)
    template = partial(template_segmentation, names, spatial_dims=spatial_dims)
    source = find_source(
        dataset_dir,
        datalist,
        patient_pattern=patient_pattern,
        pictures=pictures,
        cache_dir=cache_dir,
        template=template,
    )
    hide_label_folders(source, labels_dir)
    add_files(source, "label", labels_dir)
    _leave_out_unlabelled(source, labels_dir)
    return _load(
        source,
        dict(zip(names, (f"label value {value}" for value in values), strict=True)),
        check={
            "skip_bad": skip_bad,
            "spatial_dims": spatial_dims,
            "min_size": min_size,
            "channels": channels,
            "pictures": pictures,
            "inspect": LabelCheck(tuple(names), values, allow_empty_labels, bool(pictures)),
            "cache_dir": cache_dir,
        },
        split={"val_fraction": val_fraction, "test_fraction": test_fraction, "seed": split_seed},
        choice={"fraction": label_fraction, "seed": seed},
    )


def load_classification_cases(
    dataset_dir: str | Path | None = None,
    *,
    classes: Sequence[str],
    datalist: Datalist | None = None,
    class_pattern: str | None = None,
    labels_csv: str | Path | None = None,
    masks_dir: str | Path | None = None,
    with_mask: bool = False,
    stratify: bool = True,
    spatial_dims: int = 3,
    val_fraction: float = 0.2,
    test_fraction: float = 0.2,
    label_fraction: float = 1.0,
    seed: int = 0,
    split_seed: int = 0,
    patient_pattern: str | None = None,
    pictures: bool | None = None,
    skip_bad: bool = False,
    min_size: Sequence[int] | int | None = None,
    channels: int | None = None,
    cache_dir: str | Path | None = None,
) -> Cases:
    r"""Find, check and split images of which each has one class; without folder and datalist, take the MNI152 template.

    The template's classes are ``anterior`` and ``posterior``, told of small blocks, and its three parts are given.

    Args:
        dataset_dir: folder with NIfTI files, 2D pictures or DICOM series, in it or below it.
        classes: names of the classes.
        datalist: JSON file in Decathlon form, or what it would hold, to use instead of a search. Its ``validation``
            and ``test`` lists are used as they are; what is not listed is drawn from ``training``. An entry's ``label``
            is the name of its class, or its index where none is called by a number; ``mask`` is a path.
        class_pattern: regular expression that finds the class in a file's path relative to ``dataset_dir``: its first
            group, or else the whole match. Without it, a class's name in the path is enough, capital letters or not,
            if no letter stands beside it.
        labels_csv: table with the columns ``case_id`` or ``image`` (the path relative to ``dataset_dir``) and
            ``label``, to use instead.
        masks_dir: folder with masks, called as the images are, to add as ``mask``; every image needs one.
        with_mask: whether every image needs one anyhow, from the datalist or a folder ``masks`` beside ``images``.
        stratify: whether all parts shall have the classes in about the same shares; the patients are then others than
            those of `load_cases`, which knows no classes.
        spatial_dims: 2 or 3.
        val_fraction: share of the patients for validation.
        test_fraction: share of the patients for the test.
        label_fraction: share of the training patients to use, at least one; a smaller share is part of a larger one.
        seed: seed of the choice of those patients.
        split_seed: seed of the split.
        patient_pattern: regular expression that finds the patient in a file's path, such as ``(patient\d+)``.
        pictures: whether DICOM images without a position in space (radiographs, mammograms, ultrasound) are cases, and
            volumes are bad; False wants volumes, so that pictures are bad. None takes both, and no such DICOM images.
        skip_bad: leave out what cannot be used, with a warning, where the default is to stop. The others are divided
            as if it were there.
        min_size: smallest usable image in voxels.
        channels: how many channels every image must have; None takes any.
        cache_dir: folder that remembers DICOM headers and which files were checked, until they change.

    Raises:
        BadCasesError: some images or masks cannot be used, or have no class; it lists them all.
        FileNotFoundError: a folder, the datalist or the table is missing, or there is no image.
        ImportError: the template is wanted and nilearn is not installed.
        OSError: files cannot be written to ``cache_dir``.
        ValueError: an option is wrong, nothing of a part can be used, or a class occurs in no training case.
    """
    check_dims(spatial_dims, pictures=pictures)
    _refuse_for_template(dataset_dir, datalist, class_pattern=class_pattern, labels_csv=labels_csv, masks_dir=masks_dir)
    names = class_names(classes)
    template = partial(template_classification, names, spatial_dims=spatial_dims)
    source = find_source(
        dataset_dir,
        datalist,
        patient_pattern=patient_pattern,
        pictures=pictures,
        cache_dir=cache_dir,
        template=template,
    )
    hide_label_folders(source, masks_dir)
    add_classes(source, names, class_pattern=class_pattern, labels_csv=labels_csv)
    if with_mask or masks_dir is not None or any("mask" in case for case in source.found.cases):
        add_files(source, "mask", masks_dir)
    by = "label" if stratify else None
    return _load(
        source,
        dict(zip(names, (f"index {index}" for index in range(len(names))), strict=True)),
        check={
            "skip_bad": skip_bad,
            "spatial_dims": spatial_dims,
            "min_size": min_size,
            "channels": channels,
            "pictures": pictures,
            "inspect": ClassCheck(tuple(names), bool(pictures)),
            "cache_dir": cache_dir,
        },
        split={"val_fraction": val_fraction, "test_fraction": test_fraction, "seed": split_seed, "stratify": by},
        choice={"fraction": label_fraction, "seed": seed, "stratify": by},
    )


def _refuse_for_template(dataset_dir: str | Path | None, datalist: Datalist | None, **options: Any) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given and dataset_dir is None and datalist is None:
        raise ValueError(f"{' and '.join(given)}: pass dataset_dir or datalist too; the default data need none.")


def _leave_out_unlabelled(source: Source, labels_dir: str | Path | None) -> None:
    images = len(source.found.cases)
    move_without(source, "label", to=source.found.left_out)
    for case_id in source.listed.keys() - {case["case_id"] for case in source.found.cases}:
        del source.listed[case_id]  # a test list without labels does not count: the test part is drawn
    if images and not source.found.cases:
        raise no_labels(images, labels_dir)


def _load(
    source: Source, classes: dict[str, str], *, check: dict[str, Any], split: dict[str, Any], choice: dict[str, Any]
) -> Cases:
    """Check and divide what a source offers; ``classes`` says how messages call the number of a class."""
    checked, left_out = check_found(source.found, where=str(source.root), **check)
    parts = keep_usable(divide(source.found.cases, source.listed, **split), checked.cases)
    parts = parts._replace(training=choose_patients(parts.training, **choice))
    used = {case["case_id"] for part in parts for case in part}
    cases = Cases(
        *parts,
        left_out=left_out,
        geometry={case_id: value for case_id, value in checked.geometry.items() if case_id in used},
        classes=list(classes),
        present=checked.classes,
    )
    _require_every_class(cases, classes)
    return cases


def _require_every_class(cases: Cases, numbers: dict[str, str]) -> None:
    for part in PARTS:
        absent = [f"{name!r} ({numbers[name]})" for name, count in cases.count_classes(part).items() if not count]
        total = len(getattr(cases, part))
        if absent and part == "training":
            raise ValueError(
                f"class {', '.join(absent)} occurs in none of the {total} training case(s), expected one at least: "
                "pass another --seed or --split_seed, a larger --label_fraction, or other --classes."
            )
        if absent and total:
            LOGGER.warning("class %s occurs in none of the %d %s case(s).", ", ".join(absent), total, part)
