# SPDX-License-Identifier: Apache-2.0
"""Patients of a study: none of them is trained on and tested on."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ahm_engines.study.splits import Splits, make_splits
from tests.fixtures_study_runs import blobs, bytes_below, patients_of, study_of, write_blobs

TEN = [f"p{number:02d}" for number in range(10)]
CLASSES = {"task": "classification", "data.classes": ["dark", "bright"]}


def splits_of(images: Path, folder: Path, changes: Mapping[str, Any] | None = None) -> Splits:
    return make_splits(study_of(images, changes), folder)


def write_classes(folder: Path, counts: Mapping[str, int]) -> Path:
    """Write pictures in a folder for each class, grey values by class."""
    for place, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            values = np.full((16, 16), 100 * place + number, np.uint8)
            Image.fromarray(values).save(folder / name / f"{number}.png")
    return folder


SEVERAL = {"data.patient_pattern": r"^([pq]\d+)", "seeds": {"0.34": 3, "0.67": 2, "1.0": 3}}


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten patients with two labelled scans each; of every one and of three more a scan without a label."""
    scans = [f"{patient}_{scan}" for patient in TEN for scan in "ab"]
    unlabelled = [f"{patient}_c" for patient in [*TEN, "q0", "q1", "q2"]]
    return write_blobs(tmp_path_factory.mktemp("several"), scans, unlabelled=unlabelled, side=16)


@pytest.fixture(scope="module")
def splits(several: Path, tmp_path_factory: pytest.TempPathFactory) -> Splits:
    return splits_of(several, tmp_path_factory.mktemp("splits"), SEVERAL)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_patients_are_neither_pretrained_nor_trained_on(splits: Splits, seed: int) -> None:
    """Not with a second scan, and not with one that has no label."""
    for fraction in (0.34, 1.0):
        path = splits.finetune[fraction, seed, 0]
        parts = [patients_of(path, part) for part in ("training", "validation", "test")]
        assert [len(part) for part in parts[1:]] == [2, 2]
        assert len(set().union(*parts)) == sum(map(len, parts))
        assert not patients_of(splits.pretrain[seed], "training") & (parts[1] | parts[2])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pretraining_takes_all_other_images_and_the_same_validation_patients(splits: Splits, seed: int) -> None:
    lists = json.loads(splits.pretrain[seed].read_text())
    finetuning = splits.finetune[1.0, seed, 0]
    held = patients_of(finetuning, "validation", "test")
    expected = {f"{patient}_{scan}" for patient in TEN for scan in "abc" if patient not in held}
    assert {Path(entry["image"]).stem for entry in lists["training"]} == expected | {"q0_c", "q1_c", "q2_c"}
    assert patients_of(splits.pretrain[seed], "validation") == patients_of(finetuning, "validation")
    assert "test" not in lists and not any("label" in entry for part in lists.values() for entry in part)


def test_smaller_fractions_lie_within_larger_ones_and_the_held_out_are_the_same(splits: Splits) -> None:
    for seed in (0, 1):
        small, middle, all_of_them = (patients_of(splits.finetune[f, seed, 0], "training") for f in (0.34, 0.67, 1.0))
        assert small < middle < all_of_them
        held = [patients_of(splits.finetune[f, seed, 0], "validation", "test") for f in (0.34, 0.67, 1.0)]
        assert held[0] == held[1] == held[2]


def test_labelled_patients_are_counted_as_patients(splits: Splits) -> None:
    for (fraction, seed, choice), count in splits.patients.items():
        assert count == len(patients_of(splits.finetune[fraction, seed, choice], "training")) == round(6 * fraction)
    seeds = [(0.34, 0), (0.34, 1), (0.34, 2), (0.67, 0), (0.67, 1), (1.0, 0), (1.0, 1), (1.0, 2)]
    assert sorted(splits.patients) == [(*seed, 0) for seed in seeds]


def test_where_labels_are_drawn_each_draw_has_its_turn_and_the_first_is_as_without(
    several: Path, splits: Splits, tmp_path: Path
) -> None:
    drawn = splits_of(several, tmp_path, {**SEVERAL, "draws": 3, "draw_labels": True})
    assert sorted(drawn.patients) == [(*key[:2], draw) for key in sorted(splits.patients) for draw in range(3)]
    for fraction, seed, draw in drawn.finetune:
        path, before = drawn.finetune[fraction, seed, draw], splits.finetune[fraction, seed, 0]
        assert (path.read_text() == before.read_text()) == (draw == 0 or fraction == 1)
        assert patients_of(path, "validation", "test") == patients_of(before, "validation", "test")
    for seed in range(3):  # two of six each: all of them
        thirds = [patients_of(drawn.finetune[0.34, seed, draw], "training") for draw in range(3)]
        assert set.union(*thirds) == patients_of(drawn.finetune[1.0, seed, 0], "training")
        assert [len(third) for third in thirds] == [2, 2, 2]


def test_a_class_that_a_later_draw_lacks_is_refused(tmp_path: Path) -> None:
    images = write_classes(tmp_path / "images", {"dark": 2, "bright": 10})
    changes = {**CLASSES, "seeds": {"0.5": 5}, "draws": 6, "draw_labels": True, "data.classes": ["dark", "bright"]}
    with pytest.raises(ValueError, match=r"absent from the labelled patients of: .*seed \d, draw \d: \['dark'\]"):
        splits_of(images, tmp_path / "splits", changes)


def test_what_counts_as_a_patient_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = write_blobs(tmp_path / "data", [f"p{n}_{visit}" for n in range(5) for visit in "ab"], unlabelled=["p9_a"])
    with caplog.at_level(logging.INFO, "ahm_engines"):
        make_splits(study_of(images), tmp_path / "one")
        make_splits(study_of(images, {"data.patient_pattern": r"(p\d)"}), tmp_path / "other")
    assert "10 labelled images of 10 patients; 11 images of 11 patients in all." in caplog.text
    assert "10 labelled images of 5 patients; 11 images of 6 patients in all." in caplog.text


def test_seeds_divide_the_patients_differently(splits: Splits) -> None:
    held = [patients_of(splits.finetune[1.0, seed, 0], "test") for seed in range(3)]
    assert len({frozenset(patients) for patients in held}) > 1


def test_arms_change_nothing(several: Path, tmp_path: Path) -> None:
    """The datalists of a study with other arms are the same, byte for byte."""
    changes = {"data.patient_pattern": r"^([pq]\d+)", "seeds": {"0.5": 2}}
    for name, arms in (("one", ["scratch"]), ("other", ["scratch", "random", "a3c"])):
        splits_of(several, tmp_path / name, changes | {"arms": arms})
    one, other = (sorted((tmp_path / name).iterdir()) for name in ("one", "other"))
    assert [path.name for path in one] == [path.name for path in other]
    assert len(one) == 4 and all(a.read_bytes() == b.read_bytes() for a, b in zip(one, other, strict=True))


def test_label_maps_among_the_images_are_not_pretrained_on(tmp_path: Path) -> None:
    write_blobs(tmp_path, TEN, side=16)
    (tmp_path / "labels").rename(tmp_path / "images" / "truth")
    splits = splits_of(tmp_path / "images", tmp_path / "splits", {"data.labels_dir": str(tmp_path / "images/truth")})
    assert patients_of(splits.pretrain[0]) <= set(TEN)
    assert patients_of(splits.finetune[1.0, 0, 0]) == set(TEN)


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ({"0.05": 1, "1.0": 1}, r"\[0.05, 1.0\] of 6 training patients are \[0.3, 6.0\].*one patient at least"),
        ({"0.95": [1], "1.0": [1]}, r"\[5.7, 6.0\] patients.*different numbers for different fractions"),
    ],
)
def test_fractions_that_make_no_difference_are_refused(tmp_path: Path, seeds: Any, message: str) -> None:
    images = blobs(tmp_path)
    with pytest.raises(ValueError, match=message):
        splits_of(images, tmp_path / "splits", {"seeds": seeds})
    assert not (tmp_path / "splits").exists()


def test_fractions_may_choose_equally_many_for_different_seeds(tmp_path: Path) -> None:
    splits = splits_of(blobs(tmp_path), tmp_path / "splits", {"seeds": {"0.95": [0], "1.0": [1]}})
    assert splits.patients == {(0.95, 0, 0): 6, (1.0, 1, 0): 6}


@pytest.mark.parametrize("patients", [1, 2])
def test_too_few_patients_are_refused(tmp_path: Path, patients: int) -> None:
    images = blobs(tmp_path, patients)
    with pytest.raises(ValueError, match=rf"tiny: {patients} patient\(s\) with labels do not suffice"):
        splits_of(images, tmp_path / "splits")


def test_three_patients_suffice(tmp_path: Path) -> None:
    splits = splits_of(blobs(tmp_path, 3), tmp_path / "splits")
    lists = json.loads(splits.finetune[1.0, 0, 0].read_text())
    assert {part: len(entries) for part, entries in lists.items()} == {"training": 1, "validation": 1, "test": 1}


def test_a_class_that_the_labelled_patients_lack_is_refused(tmp_path: Path) -> None:
    """One picture of ten shows it: some seeds have it among the labelled patients, these do not."""
    images = blobs(tmp_path)
    rare = np.zeros((16, 16), np.uint8)
    rare[4:8, 4:8], rare[10:14, 10:14] = 1, 2
    Image.fromarray(rare).save(tmp_path / "labels" / "p03.png")
    changes = {"data.classes": ["square", "rare"], "seeds": {"0.34": 5, "1.0": 5}}
    with pytest.raises(ValueError, match=r"absent from the labelled patients of: .*fraction 0.34, seed \d: \['rare'\]"):
        splits_of(images, tmp_path / "splits", changes)
    assert not (tmp_path / "splits").exists()


def test_a_class_that_the_test_patients_lack_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = write_classes(tmp_path / "images", {"dark": 9, "bright": 1})
    content = {
        "training": [{"image": f"dark/{n}.png", "label": "dark"} for n in range(4)]
        + [{"image": "bright/0.png", "label": "bright"}],
        "validation": [{"image": f"dark/{n}.png", "label": "dark"} for n in (4, 5)],
        "test": [{"image": f"dark/{n}.png", "label": "dark"} for n in (6, 7)],
    }
    (tmp_path / "list.json").write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING, "ahm_engines"):
        splits_of(images, tmp_path / "splits", {**CLASSES, "data.datalist": str(tmp_path / "list.json")})
    assert "seed 0: class ['bright'] is absent from the test patients." in caplog.text


def own_lists(folder: Path, **parts: list[Any]) -> dict[str, str]:
    (folder / "list.json").write_text(json.dumps(parts))
    return {"data.datalist": str(folder / "list.json")}


def entries(*names: str, **more: str) -> list[dict[str, str]]:
    return [{"image": f"{name}.png", "label": f"../labels/{name}.png", **more} for name in names]


def test_lists_of_ones_own_are_kept_for_every_seed(tmp_path: Path) -> None:
    images = blobs(tmp_path)
    lists = own_lists(tmp_path, training=entries(*TEN[:6]), validation=entries(*TEN[6:8]), test=entries(*TEN[8:]))
    splits = splits_of(images, tmp_path / "splits", {**lists, "seeds": {"0.5": 4, "1.0": 2}})
    for path in splits.finetune.values():
        assert patients_of(path, "test") == set(TEN[8:]) and patients_of(path, "validation") == set(TEN[6:8])
        assert patients_of(path, "training") <= set(TEN[:6])
    assert len({frozenset(patients_of(splits.finetune[0.5, seed, 0], "training")) for seed in range(4)}) > 1
    for path in splits.pretrain.values():
        assert patients_of(path, "training") == set(TEN[:6]) and patients_of(path, "validation") == set(TEN[6:8])


def test_a_test_list_alone_leaves_validation_to_be_drawn(tmp_path: Path) -> None:
    images = blobs(tmp_path)
    lists = own_lists(tmp_path, training=entries(*TEN[:8]), test=entries(*TEN[8:]))
    splits = splits_of(images, tmp_path / "splits", {**lists, "seeds": {"1.0": 4}})
    drawn = {frozenset(patients_of(splits.finetune[1.0, seed, 0], "validation")) for seed in range(4)}
    assert len(drawn) > 1 and not set().union(*drawn) & set(TEN[8:])


@pytest.mark.parametrize("seed", range(4))
def test_own_lists_that_share_a_patient_are_refused(tmp_path: Path, seed: int) -> None:
    """Whether the patient would train, or validate on what the test is about."""
    images = blobs(tmp_path)
    training = entries(*TEN[1:4]) + entries("p00", patient_id="same")
    lists = own_lists(tmp_path, training=training, test=[*entries("p09", patient_id="same"), *entries("p08")])
    with pytest.raises(ValueError, match="different patients in training, validation and test, got 1 in more"):
        splits_of(images, tmp_path / "splits", {**lists, "seeds": {"1.0": [seed]}, "val_fraction": 0.5})


def test_going_on_with_the_same_data_changes_nothing(tmp_path: Path) -> None:
    images = blobs(tmp_path)
    first = splits_of(images, tmp_path / "splits")
    before = bytes_below(tmp_path / "splits")
    assert splits_of(images, tmp_path / "splits") == first
    assert bytes_below(tmp_path / "splits") == before


def test_more_seeds_and_fractions_leave_the_old_datalists(tmp_path: Path) -> None:
    images = blobs(tmp_path)
    splits_of(images, tmp_path / "splits")
    before = bytes_below(tmp_path / "splits")
    splits_of(images, tmp_path / "splits", {"seeds": {"0.5": 2, "1.0": 2}})
    after = bytes_below(tmp_path / "splits")
    assert len(before) == 2 and len(after) == 6 and before.items() <= after.items()


@pytest.mark.parametrize("kind", ["one more", "one less", "one more without label"])
def test_going_on_with_other_data_is_refused_and_nothing_changed(tmp_path: Path, kind: str) -> None:
    images = blobs(tmp_path)
    splits_of(images, tmp_path / "splits")
    before = bytes_below(tmp_path / "splits")
    if kind == "one less":
        (images / "p04.png").unlink()
    else:
        (images / "p99.png").write_bytes((images / "p04.png").read_bytes())
    if kind == "one more":
        (tmp_path / "labels/p99.png").write_bytes((tmp_path / "labels/p04.png").read_bytes())
    with pytest.raises(ValueError, match=r"seed0_.*json: the data have changed since the study began"):
        splits_of(images, tmp_path / "splits")
    assert bytes_below(tmp_path / "splits") == before


def test_classes_have_their_share_of_every_part(tmp_path: Path) -> None:
    images = write_classes(tmp_path / "images", {"dark": 10, "bright": 10})
    splits = splits_of(images, tmp_path / "splits", {**CLASSES, "seeds": {"0.34": 2, "1.0": 2}})
    for path in splits.finetune.values():
        for entries_of_part in json.loads(path.read_text()).values():
            labels = [entry["label"] for entry in entries_of_part]
            assert labels.count("dark") == labels.count("bright") > 0


@pytest.mark.parametrize("classes", [["1", "2", "3"], ["benign", "normal", "malignant"]])
def test_datalists_name_the_class_of_an_image(tmp_path: Path, classes: list[str]) -> None:
    """Grades, too: the index of grade 2 would be read as grade 1."""
    images = write_classes(tmp_path / "images", dict.fromkeys(classes, 5))
    changes = {"task": "classification", "data.classes": classes, "data.class_pattern": r"^(\w+)/"}
    splits = splits_of(images, tmp_path / "splits", changes)
    lists = json.loads(splits.finetune[1.0, 0, 0].read_text())
    assert all(entry["label"] == Path(entry["image"]).parent.name for part in lists.values() for entry in part)


def test_images_without_a_class_serve_for_pretraining_if_bad_ones_are_skipped(tmp_path: Path) -> None:
    images = write_classes(tmp_path / "images", {"dark": 5, "bright": 5, "unknown": 3})
    with pytest.raises(ValueError, match=r"unknown/0.png"):
        splits_of(images, tmp_path / "splits", CLASSES)
    splits = splits_of(images, tmp_path / "splits", {**CLASSES, "data.skip_bad": True})
    unknown = {f"unknown_{number}" for number in range(3)}
    assert unknown <= patients_of(splits.pretrain[0], "training")
    assert not unknown & patients_of(splits.finetune[1.0, 0, 0])


def test_label_maps_are_no_images_whichever_way_their_folder_is_spelled(tmp_path: Path) -> None:
    images = write_blobs(tmp_path / "real", TEN, side=16)
    (images.parent / "labels").rename(images / "truth")
    (tmp_path / "home").symlink_to(tmp_path / "real", target_is_directory=True)
    spelled = tmp_path / "home" / "images" / ".." / "images" / "truth"
    splits = splits_of(images, tmp_path / "splits", {"data.labels_dir": str(spelled)})
    lists = json.loads(splits.pretrain[0].read_text())
    assert {Path(entry["image"]).parent.name for part in lists.values() for entry in part} == {"images"}
