# SPDX-License-Identifier: Apache-2.0
"""What a study is made of, and what is refused."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser

from ahm_engines.study import Study, preset_names, read_study
from ahm_engines.study import reading as module
from tests.bundles.running import PRETRAIN

NAMES = preset_names()
DATA = {"data.dataset_dir": "/data", "data.classes": ["a", "b"]}


def read(**changes: Any) -> Study:
    """A study of no preset; two underscores stand for a dot."""
    return read_study(changes=DATA | {key.replace("__", "."): value for key, value in changes.items()})


def write(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("preset", "size", "ablation"),
    list(product([*NAMES["preset"], None], ["small", "full"], [None, *NAMES["ablation"]])),
)
def test_all_that_comes_with_the_package_makes_a_study(preset: str | None, size: str, ablation: str | None) -> None:
    study = read_study(preset, size=size, ablation=ablation, data_dir="/data", changes={} if preset else DATA)
    assert study.name == "-".join(filter(None, [preset or "study", ablation, size]))
    assert study.arms and study.all_seeds
    assert json.loads(json.dumps(study.to_json()))["metrics"] == study.metrics


@pytest.mark.parametrize("name", NAMES["preset"])
def test_full_is_larger_than_small(name: str) -> None:
    small, full = (read_study(name, size=size) for size in ("small", "full"))
    assert sum(map(len, full.seeds.values())) > sum(map(len, small.seeds.values()))
    assert full.finetune["max_epochs"] > small.finetune["max_epochs"]


def test_what_comes_later_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base, preset, size, ablation, file, changes: every layer changes what the one before has set."""
    data = {"dataset_dir": "x", "classes": ["a"]}
    keys = ("from_base", "from_preset", "from_size", "from_ablation", "from_file", "from_change")
    low = {"task": "segmentation", "data": data, "seeds": {"1.0": 1}, "finetune": {"max_epochs": 1}}
    write(tmp_path, "base.json", low | {"pretrain": dict.fromkeys(keys, "base")})
    for index, name in enumerate(("mine.json", "size", "ablation_why.json", "file.json")):
        layer = {"pretrain": dict.fromkeys(keys[1 + index :], name)}
        if name == "size":
            path = tmp_path / "mine.json"
            write(tmp_path, "mine.json", json.loads(path.read_text()) | {"sizes": {"small": layer, "full": {}}})
        else:
            write(tmp_path, name, layer | ({"arms": ["scratch"]} if "ablation" in name else {}))
    write(tmp_path, "arms.json", {"scratch": {"title": "from scratch"}})
    monkeypatch.setattr(module, "PRESETS", tmp_path)
    study = read_study(
        "mine", ablation="why", config=tmp_path / "file.json", changes={"pretrain.from_change": "change"}
    )
    values = [study.pretrain[key] for key in keys]
    assert values == ["base", "mine.json", "size", "ablation_why.json", "file.json", "change"]


def test_arms_and_seeds_are_replaced_and_options_merged(tmp_path: Path) -> None:
    config = write(tmp_path, "c.json", {"arms": ["random"], "seeds": {"0.5": [3, 1]}, "finetune": {"overlap": 0.25}})
    study = read_study(config=config, changes=DATA)
    assert list(study.arms) == ["random"] and study.seeds == {0.5: [1, 3]} and study.all_seeds == [1, 3]
    assert study.finetune["overlap"] == 0.25 and study.finetune["schedule"] == "cosine"


def test_a_number_of_seeds_counts_from_zero_and_fractions_ascend() -> None:
    study = read(seeds={"1.0": 1, "0.25": [4, 4, 2], "0.5": 2})
    assert list(study.seeds.items()) == [(0.25, [2, 4]), (0.5, [0, 1]), (1.0, [0])]
    assert study.all_seeds == [0, 1, 2, 4]


def test_arms_by_name_come_from_the_shelf_in_the_order_given() -> None:
    study = read(arms=["a3c", "scratch"])
    assert list(study.arms) == ["a3c", "scratch"]
    assert study.arms["a3c"].pretrain == {"masker": "a3c"} and study.arms["scratch"].pretrain is None


def test_compare_with_holds_arms_of_the_study_only() -> None:
    study = read(arms=["scratch", "random", "a3c"])
    assert study.arms["a3c"].compare_with == ["scratch", "random"]
    assert study.arms["random"].compare_with == ["scratch"]


def test_an_arm_like_another_changes_what_it_says() -> None:
    arms = {
        "scratch": {},
        "a3c": {"pretrain": {"mask_ratio": 0.9}},
        "less": {"like": "a3c", "title": "less", "pretrain": {"mask_ratio": 0.3}},
        "lesser": {"like": "less", "title": "lesser", "finetune": {"freeze_epochs": 1}},
        "my_own": {"pretrain": {"masker": "boxes"}},
    }
    study = read(arms=arms)
    assert study.arms["a3c"].pretrain == {"masker": "a3c", "mask_ratio": 0.9} and study.arms["a3c"].title == "A3C"
    assert study.arms["less"].pretrain == {"masker": "a3c", "mask_ratio": 0.3}
    assert (study.arms["less"].title, study.arms["less"].compare_with) == ("less", ["scratch"])
    assert (study.arms["lesser"].pretrain, study.arms["lesser"].finetune) == (
        study.arms["less"].pretrain,
        {"freeze_epochs": 1},
    )
    assert study.arms["less"].finetune == {} and study.arms["lesser"].compare_with == ["scratch"]
    assert (study.arms["my_own"].title, study.arms["my_own"].compare_with) == ("my own", ["scratch"])


def test_titles_tell_arms_apart() -> None:
    """Reports name arms by their titles alone."""
    arms = {"a3c": {}, "random": {}, "a3c_encoder": {"like": "a3c"}, "random_equal_time": {"equal_time": "a3c_encoder"}}
    titles = [arm.title for arm in read(arms=arms).arms.values()]
    assert titles == ["A3C", "random masks", "a3c encoder", "random equal time"]
    with pytest.raises(ValueError, match=r"arms: expected a title of its own for each, several are called \['A3C'\]"):
        read(arms={"a3c": {}, "other": {"like": "a3c", "title": "A3C"}})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"name": 2024}, "name: expected a text, got 2024"),
        ({"arms": {"a3c": {"title": 7}}}, "arms.a3c.title: expected a text, got 7"),
        (
            {"arms": {"a3c": {"compare_with": "scratch"}}},
            "arms.a3c.compare_with: expected a list of arms, got 'scratch'",
        ),
        ({"arms": "scratch,random"}, "arms: expected a list of names or definitions by name, got 'scratch,random'"),
        ({"pretrain.max_epochs": True}, "pretrain.max_epochs: expected a whole number from 1 on, got True"),
    ],
)
def test_entries_of_another_kind_are_told(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        read(**changes)


def test_sizes_of_another_kind_are_told(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps({"sizes": 5}))
    with pytest.raises(ValueError, match="study: an entry is of another kind than in the presets"):
        read_study("lgg", config=tmp_path / "own.json", data_dir="/data")


def test_an_arm_is_compared_with_scratch_of_its_own_network(caplog: pytest.LogCaptureFixture) -> None:
    own = {"pretrain": {"masker": "a3c"}, "finetune": {"backbone": "unetr", "backbone_args": {}}}
    arms = read(arms={"scratch": {}, "scratch_unetr": {}, "mine": own}).arms
    assert arms["mine"].compare_with == ["scratch_unetr"] and not caplog.text
    headed = {"pretrain": {"masker": "a3c"}, "finetune": {"architecture_args#head": "stages"}}
    arms = read(arms={"scratch": {}, "scratch_headed": {"finetune": headed["finetune"]}, "mine": headed}).arms
    assert arms["mine"].compare_with == ["scratch_headed"] and not caplog.text
    assert read(arms=["random", "a3c"]).arms["a3c"].compare_with == ["random"] and not caplog.text
    assert read(arms=["scratch", "mae"]).arms["mae"].compare_with == []
    assert "arm 'mae' is compared with no other arm" in caplog.text


def test_names_choose_among_the_arms_of_a_file_and_of_an_ablation(tmp_path: Path) -> None:
    defined = {
        "arms": {
            "a3c": {"pretrain": {"mask_ratio": 0.9}},
            "less": {"like": "a3c", "pretrain": {"mask_ratio": 0.3}, "compare_with": ["scratch", "a3c", "random"]},
            "least": {"like": "less", "pretrain": {"mask_ratio": 0.1}},
        }
    }
    config = write(tmp_path, "c.json", defined)
    arms = read_study(config=config, changes=DATA | {"arms": ["scratch", "least", "less"]}).arms
    assert list(arms) == ["scratch", "least", "less"]
    assert arms["least"].pretrain == {"masker": "a3c", "mask_ratio": 0.1}
    assert arms["less"].compare_with == ["scratch"] and arms["least"].compare_with == ["scratch"]

    own = {"arms": {"a3c": {"like": "least", "title": "mine"}}}
    assert read_study(config=config, changes=DATA | own).arms["a3c"].pretrain == arms["least"].pretrain
    ratios = read_study("hippocampus", ablation="mask_ratio", changes={"arms": ["scratch", "random_30"]}).arms
    assert list(ratios) == ["scratch", "random_30"] and (ratios["random_30"].pretrain or {})["mask_ratio"] == 0.3


def test_null_and_false_are_values(tmp_path: Path) -> None:
    config = write(tmp_path, "c.json", {"arms": {"random": {"pretrain": {"patch_size": None, "amp": False}}}})
    arm = read_study(config=config, changes=DATA).arms["random"]
    assert arm.pretrain == {"masker": "uniform", "foreground_threshold": None, "patch_size": None, "amp": False}


@pytest.mark.parametrize(("name", "last"), [("random_boxes", 1.0), ("boxes", 0.05)])
def test_random_boxes_are_boxes_that_are_never_chosen(name: str, last: float) -> None:
    """The bundle takes the arm's options, and the masker draws at random to the end of the training."""
    parser = ConfigParser()
    parser.read_config(PRETRAIN / "configs/train.json")
    parser.update({**read(arms=[name]).arms[name].pretrain, "spatial_dims": 2, "patch_size": 4})
    curriculum = parser.get_parsed_content("curriculum")
    for progress, expected in ((0.0, 1.0), (1.0, last)):
        curriculum.set_progress(progress)
        found = curriculum.diagnostics(curriculum(torch.rand(1, 1, 32, 32)))["epsilon"]
        assert found == pytest.approx(expected)


def test_an_entry_of_one_arm_changes_it_and_leaves_the_others_in(tmp_path: Path) -> None:
    arms = {"scratch": {}, "random": {"title": "mine"}, "more": {"like": "random", "pretrain": {"mask_ratio": 0.9}}}
    config = write(tmp_path, "c.json", {"arms": arms})
    changes = {"arms.random.pretrain.max_epochs": 7, "arms.random.pretrain.mask_ratio": 0.5, "arms.more.title": "most"}
    found = read_study(config=config, changes=DATA | changes).arms
    assert list(found) == ["scratch", "random", "more"]
    assert found["random"].title == "mine" and found["random"].compare_with == ["scratch"]
    masker = {"masker": "uniform", "foreground_threshold": None}
    assert found["random"].pretrain == {**masker, "max_epochs": 7, "mask_ratio": 0.5}
    assert found["more"].pretrain == {**masker, "mask_ratio": 0.9} and found["more"].title == "most"
    chosen = DATA | {"arms": ["scratch", "more"], "arms.more.compare_with": []}
    assert read_study(config=config, changes=chosen).arms["more"].compare_with == []
    with pytest.raises(ValueError, match=r"arms: unknown entries \['random'\], expected some of \['more', 'scratch'\]"):
        read_study(config=config, changes=chosen | {"arms.random.title": "x"})


def test_epochs_are_the_arms_own_or_those_of_all() -> None:
    study = read(arms={"scratch": {"finetune": {"max_epochs": 3}}, "a3c": {}}, finetune__max_epochs=7)
    assert [study.epochs("finetune", arm) for arm in study.arms.values()] == [3, 7]


def test_an_arm_of_equal_time_is_timed_by_the_same_pretraining() -> None:
    study = read(arms=["scratch", "loss_prediction", "random", "random_equal_time", "a3c"])
    assert study.timed_by("random_equal_time") == "random"


def test_overlays_are_part_of_the_pretraining() -> None:
    """A contrastive pretraining has no option of its own, and takes another time than one that has none at all."""
    arms = {"contrastive": {}, "plain": {"pretrain": {}}, "a3c": {}, "more": {"pretrain": {}, "equal_time": "a3c"}}
    assert read(arms=arms).timed_by("more") == "plain"


def test_paths_of_data_start_from_the_data_folder(tmp_path: Path) -> None:
    changes = {"data.classes": ["a"], "data.dataset_dir": "images", "data.labels_dir": "/elsewhere"}
    data = read_study(changes=changes, data_dir=tmp_path).data
    assert (data["dataset_dir"], data["labels_dir"]) == (str(tmp_path / "images"), "/elsewhere")
    assert read_study(changes=changes).data["dataset_dir"] == str(Path("images").absolute())


@pytest.mark.parametrize(
    ("changes", "metrics"),
    [
        ({}, ["dice", "hd95_mm", "hd95_missing", "surface_dice", "dice_a", "dice_b"]),
        ({"data__modality": "image2d"}, ["dice", "hd95_px", "hd95_missing", "surface_dice", "dice_a", "dice_b"]),
        ({"data__unit": "px"}, ["dice", "hd95_px", "hd95_missing", "surface_dice", "dice_a", "dice_b"]),
        ({"task": "classification"}, ["accuracy", "balanced_accuracy", "macro_f1", "auroc", "f1_a", "f1_b"]),
    ],
)
def test_metrics_follow_from_task_and_unit(changes: dict[str, Any], metrics: list[str]) -> None:
    study = read(**changes)
    assert study.metrics == metrics and study.key_metric == metrics[0]


def test_a_classification_may_be_about_another_of_its_metrics() -> None:
    study = read(task="classification", finetune__key_metric="macro_f1")
    assert study.key_metric == "macro_f1" and study.to_json()["key_metric"] == "macro_f1"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "regression"}, "task: expected one of segmentation, classification, got 'regression'"),
        ({"evaluate_on": "training"}, "evaluate_on: expected one of test, validation, got 'training'"),
        ({"epochs": 3}, r"study: unknown entries \['epochs'\], expected some of \['arms'"),
        (
            {"data__dataset": "x"},
            r"data of a segmentation: unknown entries .'dataset'\], expected some of .*'dataset_dir",
        ),
        (
            {"data__labels_dir": "x", "task": "classification"},
            "data of a classification: unknown entries .'labels_dir'",
        ),
        ({"data__labels_csv": "x"}, r"data of a segmentation: unknown entries \['labels_csv'\], expected some of"),
        ({"data__patient_pattern": "(p"}, r"data.patient_pattern: expected a regular expression, got '\(p' \(missing"),
        ({"finetune__key_metric": "f2"}, "finetune.key_metric: expected one of dice, hd95_mm, .*, got 'f2'"),
        ({"arms": {"scratch": {"finetune": {"key_metric": "dice"}}}}, "arm 'scratch': key_metric is the same for all"),
        *(
            ({"arms": {"scratch": {"draws": draws}}}, "arms.scratch.draws: expected a whole number")
            for draws in (0, 0.5, True, 10**6)
        ),
        (
            {"arms": {"a3c": {"labels": "best"}}},
            "arms.a3c.labels: expected one of random, least_understood, got 'best'",
        ),
        ({"arms": {"scratch": {"labels": "least_understood"}}}, "arms.scratch.labels: expected random without pre"),
        ({"draw_labels": "yes"}, "draw_labels: expected true or false, got 'yes'"),
        (
            {"draw_labels": True, "draws": 3, "arms": {"scratch": {"draws": 5}}},
            "arms.scratch.draws: expected 3 as for all arms, since draw_labels gives each draw .*, got 5",
        ),
        ({"data__classes": "a"}, "data.classes: expected a list of names, got 'a'"),
        ({"data__classes": []}, "data.classes: expected a list"),
        ({"data__dataset_dir": None}, "data: expected a dataset_dir or a datalist"),
        ({"arms": []}, "at least one arm"),
        ({"arms": ["scratch", "nonsense"]}, "arms: expected names of a3c, .*scratch.*, got 'nonsense'"),
        ({"arms": {"mine": {"like": "nonsense", "pretrain": {}}}}, "arms: expected names of a3c, .*, got 'nonsense'"),
        ({"arms": {"a3c": {"pretraining": {}}}}, r"arms.a3c: unknown entries \['pretraining'\].*'pretrain'"),
        ({"arms": {"../a": {"pretrain": {}}}}, "arms: expected a name that can be part of a folder's, got '../a'"),
        ({"arms": {"a3c": {"compare_with": ["x"]}}}, r"arm 'a3c' needs the arm\(s\) \['x'\], the study has \['a3c'\]"),
        ({"arms": ["scratch", "random", "random_equal_time"]}, r"'random_equal_time' needs the arm\(s\) \['a3c'\]"),
        ({"arms": ["a3c", "random_equal_time"]}, "'random_equal_time': its time per step is not known"),
        ({"arms": {"random_equal_time": {"equal_time": "scratch"}, "scratch": {}}}, "equal_time needs two arms that"),
        (
            {"arms": {"random": {}, "random_equal_time": {"equal_time": "random_equal_time"}}},
            "'random_equal_time' is given the time of another arm itself",
        ),
        ({"arms": {"mine": {"like": "random", "pretrained_by": "a3c"}}}, r"'mine' needs the arm\(s\) \['a3c'\]"),
        (
            {"arms": {"a3c": {}, "mine": {"like": "random", "pretrained_by": "a3c"}}},
            "'mine': pretrained_by needs an arm that runs the same pretraining itself",
        ),
        (
            {"arms": {"scratch": {}, "mine": {"like": "scratch", "pretrained_by": "scratch"}}},
            "'mine': pretrained_by needs an arm that runs",
        ),
        ({"arms": {"random": {"pretrained_by": "random"}}}, "'random': pretrained_by needs an arm that runs"),
        ({"seeds": {}}, "one label fraction"),
        ({"seeds": {"0.5": 0}}, "one seed for each fraction"),
        ({"seeds": {"1.5": 1}}, r"seeds: expected ascending label fractions in \(0, 1\], got \[1.5\]"),
        ({"seeds": {"half": 1}}, r"seeds: expected label fractions in \(0, 1\], got 'half'"),
        ({"seeds": {"0.5": "two"}}, "seeds: expected a number of seeds or a list of whole numbers, got 'two'"),
        ({"finetune__max_epochs": 0}, "finetune.max_epochs: expected a whole number from 1 on, got 0"),
        ({"pretrain__max_epochs": "10"}, "pretrain.max_epochs: expected a whole number from 1 on, got '10'"),
        ({"test_fraction": "a fifth"}, "test_fraction: expected a number, got 'a fifth'"),
        ({"seeds": 3}, "study: an entry is of another kind than in the presets"),
        ({"finetune": 3}, "study: an entry is of another kind than in the presets"),
        ({"arms": {"a3c": None}}, "study: an entry is of another kind than in the presets"),
    ],
)
def test_settings_that_make_no_study_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(**changes)


def test_unknown_names_are_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"preset: expected one of .*hippocampus.*, got 'nonsense'"):
        read_study("nonsense")
    with pytest.raises(ValueError, match="size: expected one of small, full, got 'large'"):
        read_study("hippocampus", size="large")
    with pytest.raises(ValueError, match=r"ablation: expected one of .*mask_ratio.*, got 'why'"):
        read_study("hippocampus", ablation="why")


@pytest.mark.parametrize("name", ["base", "arms", "ablation_mask_ratio"])
def test_files_that_are_no_preset_are_none(name: str) -> None:
    assert name not in NAMES["preset"]
    with pytest.raises(ValueError, match="preset: expected one of"):
        read_study(name, changes=DATA)


@pytest.mark.parametrize(("text", "message"), [("{", "c.json is not valid JSON"), ("[]", "expected a JSON object")])
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_study(config=tmp_path / "c.json")


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing.json does not exist"):
        read_study(config=tmp_path / "missing.json")
