# SPDX-License-Identifier: Apache-2.0
"""What a study is: data, arms, label fractions, seeds, and the options of its bundle runs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

__all__ = ["RANDOM", "STUDY_VERSION", "Arm", "Study", "expect_choice", "expect_known", "scratch_like"]

STUDY_VERSION = 1
TASKS = ("segmentation", "classification")
PARTS = ("test", "validation")

# options under "data": those of both bundles, and those that only tell where the labels of a task come from
COMMON = ("modality", "spatial_dims", "in_channels", "spacing_mm", "window_hu")
LABELS = {
    "segmentation": ("labels_dir", "label_values", "allow_empty_labels"),
    "classification": ("class_pattern", "labels_csv"),
}
MOST_DRAWS = 1000
TRIAL = {"max_epochs": 1, "val_interval": 1, "train#epoch_length": 2}
RANDOM = "random"
STRATEGIES = (RANDOM, "least_understood")
PATTERNS = ("patient_pattern", "class_pattern")
NETWORK = ("architecture", "architecture_args", "backbone", "backbone_args", "spacing_mm")  # of finetuning
FINDING = ("dataset_dir", "datalist", "slices", "classes", "patient_pattern", "skip_bad", "unit")


@dataclass(frozen=True)
class Arm:
    """One way to get the weights that finetuning starts from.

    Attributes:
        title: in tables.
        pretrain: options of the pretraining run; ``None`` for none, that is, from scratch.
        finetune: options of the finetuning run.
        overlays: configuration files of ``ahm_pretrain`` to lay over ``train.json``.
        pretrained_by: the arm whose pretraining this one shares; they differ only in finetuning.
        equal_time: the arm whose pretraining time this one gets; its epochs follow from the measured times of a step.
        draws: finetunings of each of its pretrainings; ``None`` for those of the study.
        labels: whose labels it trains on: of ``random`` patients, the same for all such arms, or of as many that its
            own pretraining rebuilds worst, ``least_understood``, which our app for MONAI Label hands out first.
        compare_with: the arms to compare it with.
    """

    title: str
    pretrain: dict[str, Any] | None = None
    finetune: dict[str, Any] = field(default_factory=dict)
    overlays: list[str] = field(default_factory=list)
    pretrained_by: str | None = None
    equal_time: str | None = None
    draws: int | None = None
    labels: str = RANDOM
    compare_with: list[str] = field(default_factory=list)

    def finetunes_like(self, other: Arm) -> bool:
        """Whether both finetune the same network at the same spacing, so that their scores can be compared."""
        return self._network() == other._network()

    def trial(self) -> Arm:
        """The same with two steps of each training, whose time says nothing, and one finetuning."""
        pretrain = None if self.pretrain is None else self.pretrain | TRIAL
        return replace(self, pretrain=pretrain, finetune=self.finetune | TRIAL, equal_time=None, draws=None)

    def _network(self) -> dict[str, Any]:
        """Options of finetuning that decide its network, with single entries such as ``architecture_args#head``."""
        return {
            key: value for key, value in self.finetune.items() if key.split("#")[0] in NETWORK and value is not None
        }


def scratch_like(arm: Arm, arms: Mapping[str, Arm]) -> list[str]:
    """Names of the arms from scratch that finetune the network of an arm."""
    return [name for name, other in arms.items() if other.pretrain is None and other.finetunes_like(arm)]


@dataclass(frozen=True)
class Study:
    """All that decides the numbers of a study; ``study.json`` is this.

    Attributes:
        name: in the report.
        task: ``segmentation`` or ``classification``.
        data: where images and labels are and how they are read: options of the bundles.
        arms: by name, in the order of the tables.
        seeds: by label fraction, ascending. A seed is one split of the patients, one choice of those with labels, one
            pretraining and ``draws`` finetunings.
        draws: finetunings of each pretraining, with other draws of what chance decides (new weights, order and cuts of
            images). They are averaged, so that less of a difference is luck.
        draw_labels: whether other patients have the labels in each of these draws, the same for all arms.
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
    draws: int = 1
    draw_labels: bool = False
    pretrain: dict[str, Any] = field(default_factory=dict)
    finetune: dict[str, Any] = field(default_factory=dict)
    val_fraction: float = 0.2
    test_fraction: float = 0.2
    evaluate_on: str = "test"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(f"name: expected a text, got {self.name!r}.")
        expect_choice("task", self.task, TASKS)
        expect_choice("evaluate_on", self.evaluate_on, PARTS)
        labels = LABELS[self.task] + (LABELS["segmentation"] if "slices" in self.data else ())
        expect_known(f"data of a {self.task}", self.data, (*COMMON, *labels, *FINDING))
        for name in PATTERNS:
            _expect_pattern(f"data.{name}", self.data.get(name))
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
        _expect_draws("draws", self.draws)
        if not isinstance(self.draw_labels, bool):
            raise ValueError(f"draw_labels: expected true or false, got {self.draw_labels!r}.")
        if "key_metric" in self.finetune:
            expect_choice("finetune.key_metric", self.key_metric, self.metrics)
        for name, arm in self.arms.items():
            self._check_arm(name, arm)
        titles = Counter(arm.title for arm in self.arms.values())
        if same := [title for title, count in titles.items() if count > 1]:
            raise ValueError(f"arms: expected a title of its own for each, several are called {same}.")

    def _check_arm(self, name: str, arm: Arm) -> None:
        if not re.fullmatch(r"[\w.+-]+", name):
            raise ValueError(f"arms: expected a name that can be part of a folder's, got {name!r}.")
        if not isinstance(arm.title, str):
            raise ValueError(f"arms.{name}.title: expected a text, got {arm.title!r}.")
        if arm.draws is not None:
            _expect_draws(f"arms.{name}.draws", arm.draws)
            if self.draw_labels and arm.draws != self.draws:
                raise ValueError(
                    f"arms.{name}.draws: expected {self.draws} as for all arms, since draw_labels gives each draw "
                    f"labelled patients of its own, got {arm.draws}."
                )
        expect_choice(f"arms.{name}.labels", arm.labels, STRATEGIES)
        if arm.labels != RANDOM and arm.pretrain is None:
            raise ValueError(f"arms.{name}.labels: expected {RANDOM} without pretraining, got {arm.labels}.")
        if "key_metric" in arm.finetune:
            raise ValueError(f"arm {name!r}: key_metric is the same for all arms; give it under finetune.")
        others = [*arm.compare_with, *filter(None, (arm.equal_time, arm.pretrained_by))]
        absent = [other for other in others if other not in self.arms]
        if absent:
            raise ValueError(f"arm {name!r} needs the arm(s) {absent}, the study has {list(self.arms)}.")
        if arm.pretrained_by:
            its = self.arms[arm.pretrained_by]
            wanted = (arm.pretrain, arm.overlays, arm.equal_time, None)
            if arm.pretrain is None or (its.pretrain, its.overlays, its.equal_time, its.pretrained_by) != wanted:
                raise ValueError(f"arm {name!r}: pretrained_by needs an arm that runs the same pretraining itself.")
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
        if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
            raise ValueError(f"{stage}.max_epochs: expected a whole number from 1 on, got {epochs!r}.")
        return epochs

    def timed_by(self, name: str) -> str:
        """The arm whose steps take as long as those of an arm with ``equal_time``: the same without it."""
        arm = self.arms[name]
        wanted = (arm.pretrain, arm.overlays, None)
        same = (other for other, its in self.arms.items() if (its.pretrain, its.overlays, its.equal_time) == wanted)
        found = next(same, None)
        if found is None:
            raise ValueError(
                f"arm {name!r}: its time per step is not known without an arm of the same pretraining; add one without "
                "equal_time ('random', for 'random_equal_time')."
            )
        return found

    @property
    def all_seeds(self) -> list[int]:
        """Every seed that some fraction uses."""
        return sorted({seed for seeds in self.seeds.values() for seed in seeds})

    @property
    def key_metric(self) -> str:
        """The metric that the report is about, and that chooses checkpoints."""
        return str(self.finetune.get("key_metric", "dice" if self.task == "segmentation" else "accuracy"))

    @property
    def metrics(self) -> list[str]:
        """Columns of an evaluation."""
        if self.task == "classification":
            return ["accuracy", "balanced_accuracy", "macro_f1", "auroc", *_each("f1", self.data["classes"])]
        distance = f"hd95_{self.data.get('unit') or ('px' if self.data.get('modality') == 'image2d' else 'mm')}"
        return ["dice", distance, "hd95_missing", "surface_dice", *_each("dice", self.data["classes"])]

    def trial(self) -> Study:
        """The same with one seed of the fewest labels and two steps of each training, to see whether all runs work.

        It is scored on validation patients: no test patient is looked at.
        """
        fewest = min(self.seeds)
        arms = {name: arm.trial() for name, arm in self.arms.items()}
        return replace(
            self,
            name=f"trial of {self.name}",
            arms=arms,
            seeds={fewest: self.seeds[fewest][:1]},
            draws=1,
            draw_labels=False,
            evaluate_on="validation",
        )

    def to_json(self) -> dict[str, Any]:
        """As ``study.json`` holds it."""
        content = asdict(self) | {"version": STUDY_VERSION, "key_metric": self.key_metric, "metrics": self.metrics}
        return content | {"seeds": {str(fraction): seeds for fraction, seeds in self.seeds.items()}}


def _each(measure: str, classes: Sequence[str]) -> list[str]:
    return [f"{measure}_{name}" for name in classes]


def _expect_draws(name: str, draws: Any) -> None:
    if not isinstance(draws, int) or isinstance(draws, bool) or not 1 <= draws <= MOST_DRAWS:
        raise ValueError(f"{name}: expected a whole number from 1 to {MOST_DRAWS}, got {draws!r}.")


def _expect_pattern(name: str, pattern: Any) -> None:
    try:
        re.compile(pattern or "")
    except (re.error, TypeError) as error:
        raise ValueError(f"{name}: expected a regular expression, got {pattern!r} ({error}).") from error


def expect_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise ValueError unless a value is one of those that there are."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}.")


def expect_known(where: str, given: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise ValueError when entries are given that nothing reads."""
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise ValueError(f"{where}: unknown entries {unknown}, expected some of {sorted(names)}.")
