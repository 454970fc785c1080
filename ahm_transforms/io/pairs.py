# SPDX-License-Identifier: Apache-2.0
"""Find the label or mask that belongs to an image: the file of the same name in another folder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

from ahm_transforms.io._types import Case, Found, LeftOut, LeftOutCase, Source
from ahm_transforms.io.check import case_name, case_names
from ahm_transforms.io.dicom import DICOM_SUFFIXES
from ahm_transforms.io.find import LABEL_FOLDER
from ahm_transforms.io.reader import IMAGE_SUFFIXES, NIFTI_SUFFIXES, has_suffix, is_nifti_or_picture
from ahm_transforms.io.spelling import nfc, on_disk

_FIRST_CHANNEL = "_0000"  # nnU-Net's images have it, its labels do not
_LABEL_FOLDERS = {
    "images": ("labels", "labelstr", "masks", "segmentations"),
    "imagestr": ("labelstr", "labels", "masks", "segmentations"),
}


def hide_label_folders(source: Source, folder: str | Path | None) -> None:
    """Take the files in ``folder`` off the list of images, and say nothing of folders of labels: they are wanted here.

    Raises:
        ValueError: images and labels are in one folder.
    """
    found = source.found
    found.left_out[:] = [item for item in found.left_out if item.reason != LABEL_FOLDER]
    if folder is None:
        return
    hidden, root = Path(folder).resolve(), source.root.resolve()
    if hidden == root:
        raise ValueError(f"images and labels must be in different folders, got {folder} for both.")
    if hidden.is_relative_to(root):
        found.cases[:] = [case for case in found.cases if not lies_in(case, hidden)]


def add_files(source: Source, key: str, folder: str | Path | None) -> None:
    """Give the cases the path of their label or mask, from the datalist's entry or by `find_pairs`, if there is one.

    Raises:
        ValueError: an entry of the datalist is neither a path nor, for labels, a list of paths.
    """
    for case in source.found.cases:
        if case.setdefault(key) is not None:
            case[key] = _resolved(case, key, source.root)
    cases = [case for case in source.found.cases if case[key] is None]
    pairs = find_pairs(cases, root=source.root, folder=folder)
    for case in cases:
        case[key] = pairs.get(case["case_id"])


def no_labels(images: int, labels_dir: str | Path | None) -> FileNotFoundError:
    """Return what to raise where none of the images has a label."""
    where = f"labels_dir {labels_dir}" if labels_dir else "a folder labels, labelsTr or masks beside images"
    return FileNotFoundError(f"none of {images} image(s) has a label: expected files of the same names in {where}.")


def with_masks(found: Found, path: str | Path, masks_dir: str | Path | None, *, wanted: bool) -> Found:
    """Return what to predict on with the path of each case's mask; cases without one are in ``bad``.

    Args:
        found: what `find_inputs` brought.
        path: the folder or file in which it was found.
        masks_dir: folder with masks, called as the images are.
        wanted: whether the network was trained with masks; without, ``found`` stays as it is.

    Raises:
        FileNotFoundError: ``masks_dir`` does not exist.
        ValueError: masks are wanted and not given, or given and not wanted.
    """
    if wanted and masks_dir is None:
        raise ValueError("the network was trained with masks: pass --masks_dir, a folder with one for each image.")
    if masks_dir is None:
        return found
    if not wanted:
        raise ValueError(f"the network was trained without masks: do not pass masks_dir, got {masks_dir}.")
    root = Path(path)
    source = Source(found, {}, root if root.is_dir() else root.parent)
    hide_label_folders(source, masks_dir)
    add_files(source, "mask", masks_dir)
    move_without(source, "mask", to=found.bad)
    return found


def move_without(source: Source, key: str, *, to: list[LeftOut]) -> None:
    """Move the cases that have no ``key`` to a list of what is not used."""
    called = case_names(source.found.cases)
    without = [case for case in source.found.cases if case[key] is None]
    source.found.cases[:] = [case for case in source.found.cases if case[key] is not None]
    for case in without:
        to.append(LeftOutCase(called[case["case_id"]], f"no {key}", case["case_id"]))


def find_pairs(cases: Sequence[Case], *, root: Path, folder: str | Path | None = None) -> dict[str, str]:
    """Return the path of the file that belongs to a case, by case id, for the cases that have one.

    It has the same path, without suffix and in any Unicode form, below ``folder`` as the image has below ``root`` or
    below a folder ``images`` or ``imagesTr``; for a DICOM series, as the folder that holds it. Without ``folder``, the
    folder ``labels``, ``labelsTr``, ``masks`` or ``segmentations`` beside ``images`` or ``imagesTr`` is taken.

    Args:
        cases: images to find files for.
        root: folder in which the images were found.
        folder: where the files are.

    Raises:
        FileNotFoundError: ``folder`` does not exist.
        ValueError: two files have the same name but for the suffix.
    """
    if folder is not None and not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is not a folder.")
    files_in, places_for = cache(_files_by_name), cache(partial(_places, root=root.absolute(), folder=folder))
    pairs: dict[str, str] = {}
    for case in cases:
        path = place_of(case)
        for base, other in places_for(path.parent):
            name = nfc(_without_suffix(path.relative_to(base).as_posix()))
            file = files_in(other).get(name) or files_in(other).get(name.removesuffix(_FIRST_CHANNEL))
            if file is not None:
                pairs.setdefault(case["case_id"], file)
    return pairs


def _resolved(case: Case, key: str, root: Path) -> str | list[str]:
    files = case[key]
    if isinstance(files, str):
        return str(on_disk(root / files))
    if key == "label" and isinstance(files, list) and files and all(isinstance(name, str) for name in files):
        return [str(on_disk(root / name)) for name in files]
    expected = "a path or a list of paths" if key == "label" else "a path"
    raise ValueError(f"the {key} of {case_name(case)} must be {expected}, got {files!r}.")


def place_of(case: Case) -> Path:
    """Return the absolute path of a case's file, or of the folder that holds its DICOM series."""
    image = case["image"]
    return Path(image).absolute() if isinstance(image, str) else Path(image[0]).absolute().parent


def lies_in(case: Case, folder: Path) -> bool:
    """Return whether a case's file lies in a folder, whichever way its path goes there; ``folder`` is resolved."""
    place = place_of(case)
    return (place.parent.resolve() / place.name).is_relative_to(folder)


def _places(parent: Path, *, root: Path, folder: str | Path | None) -> list[tuple[Path, Path]]:
    """Return the folders that the name of an image in ``parent`` may be relative to, each with where to look."""
    above = [each for each in (parent, *parent.parents) if each.is_relative_to(root)]
    images = [each for each in above if each.name.lower() in _LABEL_FOLDERS]
    if folder is None:
        return [(base, beside) for base in images for beside in _label_folders(base)]
    return [(base, Path(folder)) for base in (above[-1:] + images)]


def _label_folders(images: Path) -> list[Path]:
    """Return the folders of labels beside a folder of images, the likeliest first."""
    names = _LABEL_FOLDERS[images.name.lower()]
    folders = [each for each in images.parent.iterdir() if each.name.lower() in names and each.is_dir()]
    return sorted(folders, key=lambda each: names.index(each.name.lower()))


def _files_by_name(folder: Path) -> dict[str, str]:
    """Return the NIfTI files and pictures below a folder by their path in it, without suffix."""
    files: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith(".") and is_nifti_or_picture(path):
            name = nfc(_without_suffix(path.relative_to(folder).as_posix()))
            if name in files:
                raise ValueError(f"{folder} holds {Path(files[name]).name} and {path.name}: keep one of them.")
            files[name] = str(path)
    return files


def _without_suffix(name: str) -> str:
    ends = [end for end in (*NIFTI_SUFFIXES[::-1], *IMAGE_SUFFIXES, *DICOM_SUFFIXES) if has_suffix(name, [end])]
    return name[: -len(ends[0])] if ends else name
