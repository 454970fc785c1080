# SPDX-License-Identifier: Apache-2.0
"""From a folder or a datalist to checked training, validation and test cases, in one call."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ahm_transforms.io._types import PARTS, BadCasesError, Case, Found, Geometry, LeftOut, Source, lines_by_reason
from ahm_transforms.io.check import Checked, check_cases
from ahm_transforms.io.classes import add_classes, class_names
from ahm_transforms.io.datalist import Datalist
from ahm_transforms.io.pairs import find_pairs, hide_label_folders, no_labels, place_of
from ahm_transforms.io.source import find_source
from ahm_transforms.io.split import divide, join_unlabelled, keep_usable
from ahm_transforms.io.template import template_cases

LOGGER = logging.getLogger(__name__)


@dataclass
class Cases:
    """Cases to train, to validate and to test on, and what was left out.

    Attributes:
        training: dictionaries with ``image``, ``case_id`` and ``patient_id``, and ``label`` where labels are loaded.
        validation: the same; no patient is in two parts, unless there are too few.
        test: the same.
        left_out: what is not used, with the reason.
        geometry: size and spacing by case id.
        classes: names of the (foreground) classes, empty without labels.
        present: the classes that occur in a case, by case id.
    """

    training: list[Case]
    validation: list[Case]
    test: list[Case] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    geometry: dict[str, Geometry] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    present: dict[str, frozenset[str]] = field(default_factory=dict)

    def count_classes(self, part: str) -> dict[str, int]:
        """Return in how many cases of ``training``, ``validation`` or ``test`` each class occurs."""
        cases = getattr(self, part)
        return {name: sum(name in self.present[case["case_id"]] for case in cases) for name in self.classes}

    def part(self, name: str) -> list[Case]:
        """Return the cases of ``training``, ``validation`` or ``test``.

        Raises:
            ValueError: for another name, and when the part is empty.
        """
        if name not in PARTS:
            raise ValueError(f"expected one of {', '.join(PARTS)}, got {name!r}.")
        cases: list[Case] = getattr(self, name)
        if not cases:
            raise ValueError(f"there are no {name} cases: set {name}_fraction above 0, or list them in the datalist.")
        return cases

    def class_weights(self) -> list[float]:
        """Return one weight per class, inverse to its share of the training cases; 1 where all are equally frequent."""
        counts = self.count_classes("training")
        return [sum(counts.values()) / (len(counts) * count) for count in counts.values()]

    def summary(self) -> dict[str, Any]:
        """Return counts and the ranges of size and spacing, ready for JSON; no names of files or patients."""
        numbers: dict[str, Any] = {}
        for part in PARTS:
            cases = getattr(self, part)
            numbers[f"{part}_cases"] = len(cases)
            numbers[f"{part}_patients"] = len({case["patient_id"] for case in cases})
            if self.classes:
                numbers[f"{part}_cases_by_class"] = self.count_classes(part)
        numbers["left_out"] = len(self.left_out)
        return {**numbers, **_ranges(list(self.geometry.values()))}


def load_cases(
    dataset_dir: str | Path | None = None,
    *,
    datalist: Datalist | None = None,
    labels_dir: str | Path | None = None,
    split_classes: Sequence[str] | None = None,
    class_pattern: str | None = None,
    labels_csv: str | Path | None = None,
    spatial_dims: int = 3,
    val_fraction: float = 0.2,
    test_fraction: float = 0.0,
    seed: int = 0,
    patient_pattern: str | None = None,
    pictures: bool | None = None,
    skip_bad: bool = False,
    min_size: Sequence[int] | int | None = None,
    channels: int | None = None,
    cache_dir: str | Path | None = None,
) -> Cases:
    r"""Find, check and split the cases; without folder and datalist, take the MNI152 template of nilearn.

    Args:
        dataset_dir: folder with NIfTI files, 2D pictures or DICOM series, in it or below it.
        datalist: JSON file in Decathlon form, or what it would hold, to use instead of a search; paths in it are
            relative to ``dataset_dir``, or else to itself. Its ``validation`` list is used as it is; without one the
            split is drawn. Its ``test`` list, like the template's test blocks, stays untouched, and no other test part
            is drawn.
        labels_dir: folder with label maps of some of the images, called as these are. The split is then that of
            `load_segmentation_cases`, and whoever has no label map is trained on. No label map is opened: those that
            cannot be used, or are empty, count in both splits.
        split_classes: names of the classes that some of the images have, where `load_classification_cases` divides the
            patients. The split is then that one's, and whoever has none of these classes is trained on.
        class_pattern: finds these classes, as in `load_classification_cases`.
        labels_csv: tells these classes, as in `load_classification_cases`.
        spatial_dims: 2 or 3.
        val_fraction: share of the patients for validation, of those with labels where ``labels_dir`` or
            ``split_classes`` are given.
        test_fraction: share of the patients to leave out. They are those that `load_segmentation_cases` tests on,
            given the same folders, fractions and ``split_seed``, if all its images have labels or ``labels_dir`` is
            given; with ``split_classes``, those of `load_classification_cases`.
        seed: seed of the split.
        patient_pattern: regular expression that finds the patient in a file's path, such as ``(patient\d+)``.
        pictures: whether DICOM images without a position in space (radiographs, mammograms, ultrasound) are cases, and
            volumes are bad; False wants volumes, so that pictures are bad. None takes both, and no such DICOM images.
        skip_bad: leave out what cannot be used, with a warning, where the default is to stop. The others are divided
            as if it were there.
        min_size: smallest usable image in voxels, one patch for instance.
        channels: how many channels every image must have; None takes any.
        cache_dir: folder that remembers DICOM headers and which files were checked, until they change.

    Raises:
        BadCasesError: some cases cannot be used; it lists them all.
        FileNotFoundError: a folder, the datalist or the table is missing, there is no image, or none has a label map.
        ImportError: the template is wanted and nilearn is not installed.
        OSError: files cannot be written to ``cache_dir``.
        ValueError: the datalist, the split or the pattern is wrong, two files would have the same id, nothing of a part
            can be used, a class of ``split_classes`` occurs nowhere, or labels are given without a folder of images or
            beside a datalist.
    """
    check_dims(spatial_dims, pictures=pictures)
    by_class = {"class_pattern": class_pattern, "labels_csv": labels_csv}
    _check_labels(dataset_dir, datalist, labels_dir=labels_dir, classes=split_classes, **by_class)
    template = partial(template_cases, spatial_dims=spatial_dims)
    source = find_source(
        dataset_dir,
        datalist,
        patient_pattern=patient_pattern,
        pictures=pictures,
        cache_dir=cache_dir,
        template=template,
    )
    found, listed = source.found, source.listed
    found.cases = [_unlabelled(case) for case in found.cases if listed.get(case["case_id"]) != "test"]
    drawn = found.cases
    if labels_dir is not None:
        drawn = _with_maps(source, labels_dir)
    elif split_classes is not None:
        drawn = _with_classes(source, class_names(split_classes), **by_class)
    checked, left_out = check_found(
        found,
        skip_bad=skip_bad,
        where=f"dataset_dir {dataset_dir}",
        spatial_dims=spatial_dims,
        min_size=min_size,
        channels=channels,
        pictures=pictures,
        cache_dir=cache_dir,
    )
    by = None if split_classes is None else "label"
    split = divide(drawn, listed, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed, stratify=by)
    labelled = {case["case_id"] for case in drawn}
    if others := [case for case in found.cases if case["case_id"] not in labelled]:
        split = join_unlabelled(split, others)
    return Cases(*keep_usable(split, checked.cases), left_out, checked.geometry)


def check_dims(spatial_dims: int, *, pictures: bool | None = None) -> None:
    """Stop unless there are 2 or 3 spatial dimensions, of pictures 2."""
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
    if pictures and spatial_dims != 2:
        raise ValueError("spatial_dims: expected 2 for pictures (modality image2d), got 3: pass --spatial_dims 2.")


def check_found(found: Found, *, skip_bad: bool, where: str, **options: Any) -> tuple[Checked, list[LeftOut]]:
    """Return what `check_cases` says about ``found``, and all that is not used.

    Raises:
        BadCasesError: some cases cannot be used, and ``skip_bad`` is off or no case is left.
        FileNotFoundError: there is no case at all.
        ValueError: two cases have the same id.
    """
    _refuse_equal_ids(found.cases)
    checked = check_cases(found.cases, **options)
    bad = found.bad + checked.bad
    if bad and not (skip_bad and checked.cases):
        raise BadCasesError(bad)
    if not checked.cases:
        raise FileNotFoundError(f"{where} holds no usable image:{lines_by_reason(found.left_out)}")
    left_out = found.left_out + bad
    if left_out:
        LOGGER.warning("%d left out:%s", len(left_out), lines_by_reason(left_out))
    return checked, left_out


def _check_labels(dataset_dir: str | Path | None, datalist: Datalist | None, **options: Any) -> None:
    given = [name for name, value in options.items() if value is not None]
    names = " and ".join(given)
    if given and (dataset_dir is None or datalist is not None):
        raise ValueError(f"{names}: expected dataset_dir beside it, and no datalist, which names the parts itself.")
    if given and given != ["labels_dir"] and ("labels_dir" in given or "classes" not in given):
        raise ValueError(f"expected labels_dir alone, or classes with class_pattern or labels_csv, got {names}.")


def _with_maps(source: Source, labels_dir: str | Path) -> list[Case]:
    """Return the images that have a label map, and take the maps off the list of images."""
    hide_label_folders(source, labels_dir)
    cases = source.found.cases
    pairs = find_pairs(cases, root=source.root, folder=labels_dir)
    if cases and not pairs:
        raise no_labels(len(cases), labels_dir)
    return [case for case in cases if case["case_id"] in pairs]


def _with_classes(source: Source, classes: Sequence[str], **options: Any) -> list[Case]:
    """Return the images that have a class, with its index as their label."""
    labelled = source._replace(found=Found(list(source.found.cases)))
    add_classes(labelled, classes, **options)
    seen = {case["label"] for case in labelled.found.cases}
    if absent := [name for index, name in enumerate(classes) if index not in seen]:
        raise ValueError(
            f"classes: expected each of them in one image at least, got none of {', '.join(absent)} among "
            f"{len(source.found.cases)} image(s)."
        )
    return labelled.found.cases


def _unlabelled(case: Case) -> Case:
    return {key: value for key, value in case.items() if key not in ("label", "mask")}


def _refuse_equal_ids(cases: Sequence[Case]) -> None:
    counts = Counter(case["case_id"] for case in cases)
    places = [place_of(case) for case in cases if counts[case["case_id"]] > 1]
    if places:
        top = os.path.commonpath([place.parent for place in places])
        names = ", ".join(place.relative_to(top).as_posix() for place in places[:10])
        raise ValueError(f"these images would have the same case_id, keep one of each: {names}.")


def _ranges(geometry: Sequence[Geometry]) -> dict[str, Any]:
    """Return the smallest and largest size and spacing along each axis, for each number of axes that occurs."""
    ranges: dict[str, Any] = {}
    for dims in sorted({len(item.shape) for item in geometry}):
        items = [item for item in geometry if len(item.shape) == dims]
        shapes, spacings = [item.shape for item in items], [item.spacing_mm for item in items]
        ranges[f"images_{dims}d"] = {
            "shape_min": [min(axis) for axis in zip(*shapes, strict=True)],
            "shape_max": [max(axis) for axis in zip(*shapes, strict=True)],
            "spacing_mm_min": [min(axis) for axis in zip(*spacings, strict=True)],
            "spacing_mm_max": [max(axis) for axis in zip(*spacings, strict=True)],
        }
    return ranges
