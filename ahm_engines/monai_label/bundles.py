# SPDX-License-Identifier: Apache-2.0
"""Put a bundle into an app of MONAI Label, which reads one file for each purpose and asks no questions."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.utils import ensure_tuple_rep

from ahm_engines import options
from ahm_engines.bundles import inference_of
from ahm_engines.errors import behind_monai
from ahm_engines.files import write_json
from ahm_engines.monai_label.understanding import CHECKPOINT
from ahm_engines.trained import trained_settings
from ahm_transforms.io.classes import class_names
from ahm_transforms.io.json_file import read_json

__all__ = ["add_bundle", "find_bundles", "task_of"]

SEGMENTATION, CLASSIFICATION, PRETRAINING = "segmentation", "classification", "pretraining"
PARTS = {"LICENSE", "configs", "docs"}  # of a bundle; what runs left in its folder may tell of patients
MODEL, PRETRAINED = "models/model.pt", "pretrained/model.pt"
MAIN = '''# SPDX-License-Identifier: Apache-2.0
"""The app that MONAI Label's server looks for."""

from ahm_engines.monai_label.app import LabelApp  # noqa: F401
'''
_WORDS = {"segmentation": SEGMENTATION, "classification": CLASSIFICATION, "pretrain": PRETRAINING}
_OTHER_WORDS = ("deepedit", "deepgrow", "detection")  # MONAI Label looks for these first
# What a segmentation takes over from a pretraining, and what neither takes over from the data it was trained on.
_SHARED = (
    "modality",
    "spatial_dims",
    "in_channels",
    "spacing_mm",
    "window_hu",
    "crop_size",
    "backbone",
    "backbone_args",
)
_OF_DATA = ("label_values", "val_fraction", "test_fraction", "split_seed", "patient_pattern", "class_pattern")
_HAS_MODEL = f"pathlib.Path(@bundle_root, '{MODEL}').is_file()"
# MONAI Label puts one with strict=False where there is none, which takes another architecture for good.
_LOADER = {
    "_target_": "CheckpointLoader",
    "_disabled_": f"$not {_HAS_MODEL}",
    "load_path": f"$@bundle_root + '/{MODEL}'",
    "load_dict": {"model": "@network"},
    "map_location": "@device",
    "strict": True,
}


def add_bundle(
    app: str | Path,
    bundle: str | Path,
    *,
    checkpoint: str | Path | None = None,
    pretrained: str | Path | None = None,
    classes: Sequence[str] | None = None,
    name: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """Copy a bundle into an app, with weights, and with the settings and class names that belong to them.

    ``app`` may be the stock app ``monaibundle``; where there is no app yet, one of ours is made.

    Args:
        app: folder of the app.
        bundle: folder of ``ahm_segmentation``, ``ahm_classification`` or ``ahm_pretrain``.
        checkpoint: a trained one; predictions and further training start from it.
        pretrained: one of pretraining, from which the first training starts; for ``ahm_segmentation``.
        classes: names of the foreground classes; a checkpoint knows its own.
        name: of the model on the server, the bundle's unless told otherwise. It must hold the word ``segmentation``,
            ``classification`` or ``pretrain``: MONAI Label goes by it.
        changes: further entries of ``train.json``, such as ``max_epochs``; not those that a checkpoint tells.

    Returns:
        The bundle's folder in the app.

    Raises:
        FileExistsError: the app has a bundle of that name.
        FileNotFoundError: there is no such bundle or checkpoint.
        ValueError: the checkpoint does not fit, or something is missing or asked for twice.
    """
    app, bundle = Path(app), Path(bundle)
    if not (bundle / "configs/metadata.json").is_file():
        raise FileNotFoundError(f"{bundle} is no bundle: expected configs/metadata.json in it.")
    name = name or bundle.absolute().name
    task, target = _checked_task(name, bundle), app / "model" / name
    if target.exists():
        raise FileExistsError(f"{target} is there already: remove it, or give another name.")
    told = _settings(task, checkpoint, pretrained, classes)
    settings = {**told, **_checked(changes or {}, told, bundle)}
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as folder:  # whole, or not at all
        copy = Path(folder) / name
        shutil.copytree(bundle, copy, ignore=_not_of_the_bundle(bundle))
        if checkpoint is not None:
            _place(checkpoint, copy / (CHECKPOINT if task == PRETRAINING else MODEL))
        if pretrained is not None:
            _place(pretrained, copy / PRETRAINED)
        _write_settings(copy / "configs", task, settings, start=pretrained is not None)
        if checkpoint is not None:
            _check_weights(copy, checkpoint)
        copy.rename(target)
    if not (app / "main.py").exists():
        (app / "main.py").write_text(MAIN, encoding="utf-8")
    return target


def find_bundles(folder: Path, names: str | None = None) -> dict[str, Path]:
    """Return the bundles of an app by name: those named, with commas, or all.

    Raises:
        FileNotFoundError: one of them is not there, or there is none.
    """
    there = sorted(path.parents[1].name for path in folder.glob("[!.]*/configs/metadata.json"))
    wanted = options.names(names) if names else there
    absent = [name for name in wanted if name not in there]
    if absent or not wanted:
        what = f"no bundle {', '.join(absent)}" if absent else "no bundle"
        raise FileNotFoundError(f"{folder} holds {what}, there are {there}: docs/monai_label.md says how to add one.")
    return {name: folder / name for name in wanted}


def task_of(name: str) -> str:
    """Return what a bundle of that name is for: ``segmentation``, ``classification`` or ``pretraining``.

    Raises:
        ValueError: the name does not tell, or tells MONAI Label something else.
    """
    other = [word for word in _OTHER_WORDS if word in name.lower()]
    tasks = [task for word, task in _WORDS.items() if word in name.lower()]
    if other or len(tasks) != 1:
        raise ValueError(
            f"name {name!r}: expected one of the words {', '.join(_WORDS)} in it, by which MONAI Label goes, and none "
            f"of {', '.join(_OTHER_WORDS)}."
        )
    return tasks[0]


def _checked_task(name: str, bundle: Path) -> str:
    task, own = task_of(name), task_of(bundle.absolute().name)
    if task != own:
        raise ValueError(f"name {name!r} is that of a {task}, and the bundle {bundle} is for {own}.")
    return task


def _settings(
    task: str, checkpoint: str | Path | None, pretrained: str | Path | None, classes: Sequence[str] | None
) -> dict[str, Any]:
    """Return what the checkpoints tell about the network and its input."""
    if (checkpoint is not None or task != SEGMENTATION) and (pretrained is not None or classes is not None):
        raise ValueError("pretrained and classes are for a segmentation that is to be trained, without a checkpoint.")
    if checkpoint is not None:
        settings = _told(checkpoint, task)
        if settings.get("mask_channel"):
            raise ValueError(f"{checkpoint}: this model wants a mask with each image, which MONAI Label does not have.")
        return {key: value for key, value in settings.items() if key not in _OF_DATA}
    if task == CLASSIFICATION:
        raise ValueError("a classification needs a checkpoint: MONAI Label keeps no classes to train on.")
    if task == PRETRAINING:
        return {}
    if classes is None:
        raise ValueError("a segmentation needs a checkpoint or, to be trained, the names of its classes.")
    known = {} if pretrained is None else _told(pretrained, PRETRAINING)
    return {key: known[key] for key in _SHARED if key in known} | {"classes": class_names(classes)}


def _checked(changes: Mapping[str, Any], told: Mapping[str, Any], bundle: Path) -> Mapping[str, Any]:
    known = read_json(bundle / "configs/train.json", "bundle")
    wrong = [name for name in changes if name in told or name not in known]
    if wrong:
        raise ValueError(
            f"changes {', '.join(wrong)}: expected entries of {bundle / 'configs/train.json'}, but for {sorted(told)}, "
            "which are known."
        )
    return changes


def _told(checkpoint: str | Path, task: str) -> dict[str, Any]:
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f"{checkpoint}: no such checkpoint.")
    settings = trained_settings(checkpoint, task=task)
    if not settings:
        raise ValueError(f"{checkpoint}: expected a checkpoint of this project's bundles, this one tells no settings.")
    return settings


def _not_of_the_bundle(bundle: Path) -> Callable[[str, list[str]], set[str]]:
    return lambda folder, names: set(names) - PARTS if Path(folder) == bundle else set()


def _place(source: str | Path, target: Path) -> None:
    target.parent.mkdir(parents=True)
    shutil.copy(source, target)


def _write_settings(configs: Path, task: str, settings: Mapping[str, Any], *, start: bool) -> None:
    """Make ``train.json`` and ``metadata.json`` agree with the checkpoints."""
    train: dict[str, Any] = read_json(configs / "train.json", "bundle")
    train |= {key: value for key, value in settings.items() if key in train}
    if task == SEGMENTATION:
        handlers = train["train"]["handlers"]
        (beginning,) = (handler for handler in handlers if handler["_target_"].endswith(".PretrainedWeights"))
        beginning["_disabled_"] = f"${_HAS_MODEL}"
        handlers.insert(0, _LOADER)
        if start:
            train["pretrained"] = f"$@bundle_root + '/{PRETRAINED}'"
    write_json(configs / "train.json", train)
    if task != PRETRAINING:
        metadata = read_json(configs / "metadata.json", "bundle")
        write_json(configs / "metadata.json", _described(metadata, {**train, **settings}, task))


def _described(metadata: dict[str, Any], settings: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Return the metadata with the names of the classes and the shapes that MONAI Label shows."""
    names = list(settings["classes"]) if task == CLASSIFICATION else ["background", *settings["classes"]]
    formats = metadata["network_data_format"]
    image, pred = formats["inputs"]["image"], formats["outputs"]["pred"]
    size = _size(settings)
    if size is not None:
        image["spatial_shape"] = size
    image["num_channels"] = settings["in_channels"]
    pred["num_channels"] = len(names)
    pred["channel_def"] = {str(number): name for number, name in enumerate(names)}
    if task == SEGMENTATION:
        pred["spatial_shape"] = image["spatial_shape"]
    return metadata


def _size(settings: Mapping[str, Any]) -> list[int] | None:
    """Return the voxels of a window, with as many axes as the images have; ``None`` where the bundle works it out."""
    size, dims = settings.get("crop_size", settings.get("image_size")), settings["spatial_dims"]
    if isinstance(size, str):
        return None
    flat = dims == 2 and settings["modality"] != "image2d"
    return [*ensure_tuple_rep(size, dims), *[1] * flat]


def _check_weights(bundle: Path, checkpoint: str | Path) -> None:
    """Load them as inference does.

    Raises:
        ValueError: they do not fit.
    """
    try:
        inference_of(bundle, checkpoint).get_parsed_content("checkpointloader")()
    except RuntimeError as error:  # MONAI wraps what its expressions raise
        raise ValueError(str(behind_monai(error))) from error
