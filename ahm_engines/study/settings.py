# SPDX-License-Identifier: Apache-2.0
"""What a study is: data, arms, label fractions, seeds, and the options of its bundle runs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

__all__ = ["STUDY_VERSION", "Arm", "Study", "preset_names", "read_study"]

STUDY_VERSION = 1
TASKS = ("segmentation", "classification")
SIZES = ("small", "full")
PARTS = ("test", "validation")
PRESETS = files("ahm_engines.study") / "presets"
BASE, ARMS = "base", "arms"

# options under "data": those of both bundles, and those that only tell where labels come from
COMMON = ("modality", "spatial_dims", "in_channels", "spacing_mm", "window_hu")
LABELS = ("labels_dir", "label_values", "allow_empty_labels", "class_pattern", "labels_csv")
FINDING = ("dataset_dir", "datalist", "slices", "classes", "patient_pattern", "skip_bad", "unit")


@dataclass(frozen=True)
class Arm:
    """One way to get the weights that finetuning starts from.

    Attributes:
        title: in tables.
        pretrain: options of the pretraining run; ``None`` for none, that is, from scratch.
        finetune: options of the finetuning run.
        overlays: configuration files of ``ahm_pretrain`` to lay over ``train.json``.
        equal_time: the arm whose pretraining time this one gets; its epochs follow from the measured times of a step.
        compare_with: the arms to compare it with.
    """

    title: str
    pretrain: dict[str, Any] | None = None
    finetune: dict[str, Any] = field(default_factory=dict)
    overlays: list[str] = field(default_factory=list)
    equal_time: str | None = None
    compare_with: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Study:
    """All that decides the numbers of a study; ``study.json`` is this.

    Attributes:
        name: in the report.
        task: ``segmentation`` or ``classification``.
        data: where images and labels are and how they are read: options of the bundles.
        arms: by name, in the order of the tables.
        seeds: by label fraction, ascending. A seed is one split of the patients, one choice of those with labels, one
            pretraining and one finetuning.
        pretrain: options of all pretraining runs.
        finetune: options of all finetuning runs.
        val_fraction: share of the patients for validation.
        test_fraction: share of the patients for the test.
        evaluate_on: ``test``, or ``validation`` as long as settings are chosen.

    Raises:
        ValueError: for settings that make no study.
    """

    name: str
    task: str
    data: dict[str, Any]
    arms: dict[str, Arm]
    seeds: dict[float, list[int]]
    pretrain: dict[str, Any] = field(default_factory=dict)
    finetune: dict[str, Any] = field(default_factory=dict)
    val_fraction: float = 0.2
    test_fraction: float = 0.2
    evaluate_on: str = "test"

    def __post_init__(self) -> None:
        _expect("task", self.task, TASKS)
        _expect("evaluate_on", self.evaluate_on, PARTS)
        _known("data", self.data, (*COMMON, *LABELS, *FINDING))
        if not isinstance(self.data.get("classes"), list) or not self.data["classes"]:
            raise ValueError(f"data.classes: expected a list of names, got {self.data.get('classes')!r}.")
        if not self.data.get("dataset_dir") and not self.data.get("datalist"):
            raise ValueError("data: expected a dataset_dir or a datalist, got neither.")
        if not self.arms or not self.seeds or not all(self.seeds.values()):
            raise ValueError("expected at least one arm, one label fraction and one seed for each fraction.")
        for name in ("val_fraction", "test_fraction"):
            if not isinstance(getattr(self, name), int | float):
                raise ValueError(f"{name}: expected a number, got {getattr(self, name)!r}.")
        if list(self.seeds) != sorted(set(self.seeds)) or not all(0 < fraction <= 1 for fraction in self.seeds):
            raise ValueError(f"seeds: expected ascending label fractions in (0, 1], got {list(self.seeds)}.")
        for name, arm in self.arms.items():
            self._check_arm(name, arm)

    def _check_arm(self, name: str, arm: Arm) -> None:
        if not re.fullmatch(r"[\w.+-]+", name):
            raise ValueError(f"arms: expected a name that can be part of a folder's, got {name!r}.")
        others = [*arm.compare_with, *([arm.equal_time] if arm.equal_time else [])]
        absent = [other for other in others if other not in self.arms]
        if absent:
            raise ValueError(f"arm {name!r} needs the arm(s) {absent}, the study has {list(self.arms)}.")
        if arm.equal_time and (arm.pretrain is None or self.arms[arm.equal_time].pretrain is None):
            raise ValueError(f"arm {name!r}: equal_time needs two arms that pretrain.")
        if arm.equal_time:
            if self.arms[arm.equal_time].equal_time:
                raise ValueError(f"arm {name!r}: {arm.equal_time!r} is given the time of another arm itself.")
            self.timed_by(name)
        for stage in ("finetune", "pretrain") if arm.pretrain is not None else ("finetune",):
            self.epochs(stage, arm)

    def epochs(self, stage: str, arm: Arm) -> int:
        """Epochs of an arm's pretraining or finetuning."""
        options = {**getattr(self, stage), **(getattr(arm, stage) or {})}
        epochs = options.get("max_epochs")
        if not isinstance(epochs, int) or epochs < 1:
            raise ValueError(f"{stage}.max_epochs: expected a whole number from 1 on, got {epochs!r}.")
        return epochs

    def timed_by(self, name: str) -> str:
        """The arm whose steps take as long as those of an arm with ``equal_time``: the same without it."""
        arm = self.arms[name]
        wanted = (arm.pretrain, arm.overlays, None)
        same = (other for other, its in self.arms.items() if (its.pretrain, its.overlays, its.equal_time) == wanted)
        found = next(same, None)
        if found is None:
            raise ValueError(f"arm {name!r}: its time per step is not known without an arm of the same pretraining.")
        return found

    @property
    def all_seeds(self) -> list[int]:
        """Every seed that some fraction uses."""
        return sorted({seed for seeds in self.seeds.values() for seed in seeds})

    @property
    def key_metric(self) -> str:
        """The metric that the report is about."""
        return "dice" if self.task == "segmentation" else "accuracy"

    @property
    def metrics(self) -> list[str]:
        """Columns of an evaluation, key metric first."""
        if self.task == "classification":
            return ["accuracy", "balanced_accuracy", "macro_f1", "auroc", *_each("f1", self.data["classes"])]
        distance = f"hd95_{self.data.get('unit') or ('px' if self.data.get('modality') == 'image2d' else 'mm')}"
        return ["dice", distance, "surface_dice", *_each("dice", self.data["classes"])]

    def to_json(self) -> dict[str, Any]:
        """As ``study.json`` holds it."""
        content = asdict(self) | {"version": STUDY_VERSION, "key_metric": self.key_metric, "metrics": self.metrics}
        return content | {"seeds": {str(fraction): seeds for fraction, seeds in self.seeds.items()}}


def preset_names() -> dict[str, list[str]]:
    """Names of the data sets and of the ablations that come with the package."""
    found = sorted(Path(entry.name).stem for entry in PRESETS.iterdir() if entry.name.endswith(".json"))
    ablations = [name.removeprefix("ablation_") for name in found if name.startswith("ablation_")]
    data = [name for name in found if not name.startswith("ablation_") and name not in (BASE, ARMS)]
    return {"preset": data, "ablation": ablations}


def read_study(
    preset: str | None = None,
    *,
    size: str = "small",
    ablation: str | None = None,
    config: str | Path | None = None,
    data_dir: str | Path | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Study:
    """Put a study together: base, preset, its size, ablation, file, changes; what comes later wins.

    Args:
        preset: a data set's name, see `preset_names`.
        size: ``small`` or ``full``.
        ablation: name of a question, which brings its own arms.
        config: JSON file with the same entries as a preset.
        data_dir: folder that relative paths of ``data`` start from.
        changes: single entries, such as ``{"finetune.max_epochs": 20}``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown name or entry, or settings that make no study.
    """
    _expect("size", size, SIZES)
    layers = [_load(BASE)]
    layers += [_shipped(name, kind) for name, kind in ((preset, "preset"), (ablation, "ablation")) if name]
    layers += [_read(Path(config))] if config else []
    content: dict[str, Any] = {}
    for layer in layers:
        content = _merged(content, _sized(layer, size))
    for key, value in (changes or {}).items():
        content = _merged(content, _nested(key.split("."), value))
    content.setdefault("name", "-".join(word for word in (preset or "study", ablation, size) if word))
    try:
        return _study(content, Path(data_dir) if data_dir else None)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"study: an entry is of another kind than in the presets ({error}).") from error


def _study(content: dict[str, Any], data_dir: Path | None) -> Study:
    fields = set(Study.__dataclass_fields__)
    _known("study", content, fields)
    data = {key: _placed(key, value, data_dir) for key, value in content.get("data", {}).items()}
    seeds = {_fraction(fraction): _seeds(value) for fraction, value in content.get("seeds", {}).items()}
    ordered = {fraction: seeds[fraction] for fraction in sorted(seeds)}
    return Study(**content | {"data": data, "seeds": ordered, "arms": _arms(content.get("arms", []))})


def _arms(chosen: Sequence[str] | Mapping[str, Any]) -> dict[str, Arm]:
    """From names on the shelf, or from definitions, which build on the shelf's arm of that name or of ``like``."""
    shelf = _load(ARMS)
    entries = chosen if isinstance(chosen, Mapping) else {name: {} for name in chosen}
    arms: dict[str, Arm] = {}
    for name, entry in entries.items():
        like = entry.get("like", name)
        defined = "like" not in entry and ("pretrain" in entry or "finetune" in entry)
        if like not in shelf and not defined:
            raise ValueError(f"arms: expected names of {', '.join(sorted(shelf))}, got {like!r}.")
        whole = _merged(shelf.get(like, {}), {key: value for key, value in entry.items() if key != "like"})
        _known(f"arms.{name}", whole, set(Arm.__dataclass_fields__))
        whole["compare_with"] = whole.get("compare_with") or []
        if "compare_with" not in entry:
            whole["compare_with"] = [other for other in whole["compare_with"] if other in entries and other != name]
        arms[name] = Arm(**{"title": name.replace("_", " "), **whole})
    return arms


def _shipped(name: str, kind: str) -> dict[str, Any]:
    _expect(kind, name, preset_names()[kind])
    return _load(name if kind == "preset" else f"ablation_{name}")


def _load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((PRESETS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"config {path} does not exist.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"config {path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"config {path}: expected a JSON object, got {type(content).__name__}.")
    return content


def _sized(layer: dict[str, Any], size: str) -> dict[str, Any]:
    plain = {key: value for key, value in layer.items() if key != "sizes"}
    return _merged(plain, layer.get("sizes", {}).get(size, {}))


WHOLE = ("arms", "seeds", "backbone_args", "architecture_args", "decoder_args")  # replaced, not merged


def _merged(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(low[key], value) if key not in WHOLE and _dicts(low.get(key), value) else value
        for key, value in high.items()
    }
    return {**low, **both}


def _dicts(*values: Any) -> bool:
    return all(isinstance(value, Mapping) for value in values)


def _nested(path: list[str], value: Any) -> dict[str, Any]:
    return {path[0]: value if len(path) == 1 else _nested(path[1:], value)}


def _placed(key: str, value: Any, data_dir: Path | None) -> Any:
    if key not in ("dataset_dir", "datalist", "labels_dir", "labels_csv") or value is None:
        return value
    return str((data_dir / value if data_dir else Path(value)).absolute())


def _seeds(value: Any) -> list[int]:
    """A number of seeds, or their list."""
    seeds = range(value) if isinstance(value, int) else value
    if isinstance(seeds, str) or not all(isinstance(seed, int) for seed in seeds):
        raise ValueError(f"seeds: expected a number of seeds or a list of whole numbers, got {value!r}.")
    return sorted(set(seeds))


def _fraction(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"seeds: expected label fractions in (0, 1], got {text!r}.") from None


def _each(measure: str, classes: Sequence[str]) -> list[str]:
    return [f"{measure}_{name}" for name in classes]


def _expect(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}.")


def _known(where: str, given: Mapping[str, Any], names: Any) -> None:
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise ValueError(f"{where}: unknown entries {unknown}, expected some of {sorted(names)}.")
