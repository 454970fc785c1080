# SPDX-License-Identifier: Apache-2.0
"""Training and evaluation of classifiers: what they start from, what they learn, what a run leaves behind."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ahm_engines.reports import provenance
from tests.bundles.ahm_classification.classifying import (
    CLASSES,
    LEARNING,
    PICTURES,
    TINY_NET,
    evaluate,
    message_of,
    read,
    train,
    write_masked,
    write_pictures,
    write_volumes,
)
from tests.bundles.running import TINY_INFERENCE, assert_same_state, checkpoint, read_bundle, run_bundle
from tests.fixtures_data import real_data

OBJECTS = {"model", "optimizer", "lr_scheduler", "trainer", "best", "provenance"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_volumes(tmp_path_factory.mktemp("volumes"))


@pytest.fixture(scope="module")
def pretrained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of the pretraining bundle."""
    output = tmp_path_factory.mktemp("pretrained")
    tiny = {**TINY_INFERENCE, **PICTURES, "masker": "uniform", "max_epochs": 1, "min_epoch_length": 1}
    run_bundle("train.json", dataset_dir=str(pictures), output_dir=str(output), **tiny)
    return output / "models/model.pt"


def trained(pictures: Path, output: Path, **overrides: Any) -> dict[str, Any]:
    """Train on pictures and return the last checkpoint."""
    train(pictures, output, **{**PICTURES, **overrides})
    return checkpoint(output / "models/last.pt")


def encoder(model: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in model.items() if key.startswith("encoder.")}


def changed(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> set[str]:
    """Return the top-level parts of a network that differ."""
    assert first.keys() == second.keys()
    return {key.split(".")[0] for key in first if not torch.equal(first[key], second[key])}


@pytest.mark.parametrize("head", ["linear", "conv", "stages"])
def test_training_from_scratch_leaves_checkpoints_and_a_record(pictures: Path, tmp_path: Path, head: str) -> None:
    network = {**TINY_NET, "head": head}
    train(pictures, tmp_path, **PICTURES, architecture_args=network, max_epochs=2, min_epoch_length=3, seed=5)

    for name in ("last.pt", "model.pt"):
        content = checkpoint(tmp_path / "models" / name)
        assert content.keys() == OBJECTS
        assert all(bool(value.isfinite().all()) for value in content["model"].values())
        assert content["best"]["name"] == "macro_f1" and math.isfinite(content["best"]["metric"])
    assert checkpoint(tmp_path / "models/last.pt")["trainer"] == {
        "epoch": 2,
        "iteration": 6,
        "epoch_length": 3,
        "max_epochs": 2,
    }
    record = json.loads((tmp_path / "run_record.json").read_text())
    assert (record["seed"], record["settings"]["task"], record["settings"]["classes"]) == (5, "classification", CLASSES)
    assert record["settings"]["architecture_args"] == network
    assert record["data"]["training_cases_by_class"] == {"rows": 3, "columns": 3}
    assert content["provenance"] == provenance(record)
    assert json.loads((tmp_path / "costs.json").read_text())["steps"] == 6
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert "validation/macro_f1" in events.Tags()["scalars"] and events.Tags()["images"] == ["validation/prediction"]


def test_pretrained_weights_arrive(pictures: Path, pretrained: Path, tmp_path: Path) -> None:
    model = trained(pictures, tmp_path / "a", pretrained=str(pretrained), learning_rate=0.0)["model"]
    scratch = trained(pictures, tmp_path / "b", learning_rate=0.0)["model"]
    source = checkpoint(pretrained)["model"]
    assert len(encoder(model)) >= 4
    for key, value in encoder(model).items():
        assert torch.equal(value, source[key.replace("encoder.", "backbone.", 1)]), key
    assert changed(model, scratch) == {"encoder"}


def test_cases_prepared_on_disk_train_alike(pictures: Path, tmp_path: Path) -> None:
    memory = trained(pictures, tmp_path / "memory")
    for name in ("written", "read"):
        other = trained(pictures, tmp_path / name, cache_dir=str(tmp_path / "cache"), cache_rate=0.5)
        assert_same_state(memory["model"], other["model"])
        assert memory["best"] == other["best"]
    assert list((tmp_path / "cache").glob("*.pt"))


def test_frozen_encoder_stays_and_the_head_learns(pictures: Path, pretrained: Path, tmp_path: Path) -> None:
    options = {"pretrained": str(pretrained), "min_epoch_length": 3, "max_epochs": 2}
    start = trained(pictures, tmp_path / "start", **options, learning_rate=0.0)["model"]
    frozen = trained(pictures, tmp_path / "frozen", **options, freeze_epochs=-1)["model"]
    thawed = trained(pictures, tmp_path / "thawed", **options, freeze_epochs=1)["model"]
    assert changed(start, frozen) == {"head"}
    assert changed(start, thawed) == {"head", "encoder"}


def test_step_gets_smaller_towards_the_input(pictures: Path, tmp_path: Path) -> None:
    groups = read(pictures, tmp_path, **PICTURES, layer_decay=0.5).get_parsed_content("optimizer").param_groups
    assert [group["lr"] for group in groups] == pytest.approx([3e-4, 1.5e-4, 0.75e-4])


@pytest.mark.parametrize("architecture", ["vgg16", "densenet121"])
def test_other_architectures_train(pictures: Path, tmp_path: Path, architecture: str) -> None:
    content = trained(pictures, tmp_path, architecture=architecture, architecture_args={}, image_size=32)
    assert content["trainer"]["iteration"] == 2
    assert content["provenance"]["settings"]["architecture"] == architecture


def test_rare_classes_weigh_more_in_the_loss(tmp_path: Path) -> None:
    write_pictures(tmp_path / "data", 9, CLASSES[:1])
    write_pictures(tmp_path / "data/more", 3, CLASSES[1:])
    options = {**PICTURES, "test_fraction": 0.0, "val_fraction": 0.34}
    weight = read(tmp_path / "data", tmp_path, **options).get_parsed_content("loss").weight
    assert weight.tolist() == pytest.approx([8 / (2 * 6), 8 / (2 * 2)])
    assert read(tmp_path / "data", tmp_path, **options, class_weights="false").get_parsed_content("loss").weight is None


def test_patients_stay_together_classes_are_shared_out_and_fractions_nest(tmp_path: Path) -> None:
    for patient in range(20):
        write_pictures(tmp_path / f"data/p{patient:02}", 2, CLASSES[patient % 2 :][:1])
    options = {**PICTURES, "patient_pattern": r"p\d+"}
    cases = read(tmp_path / "data", tmp_path, **options).get_parsed_content("cases")
    parts = (cases.training, cases.validation, cases.test)
    patients = [{case["patient_id"] for case in part} for part in parts]
    assert [len(part) for part in patients] == [12, 4, 4] and len(set.union(*patients)) == 20
    assert [sum(case["label"] for case in part) for part in parts] == [12, 4, 4]
    few = read(tmp_path / "data", tmp_path, **options, label_fraction=0.34).get_parsed_content("cases")
    other = read(tmp_path / "data", tmp_path, **options, label_fraction=0.34, seed=1).get_parsed_content("cases")
    chosen, others = ({case["patient_id"] for case in each.training} for each in (few, other))
    assert len(chosen) == 4 and chosen < patients[0]
    assert few.test == other.test == cases.test
    assert chosen != others


def test_pretraining_with_classes_of_some_pictures_keeps_away_from_the_same_test_pictures(tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "data", 10)
    write_pictures(tmp_path / "data/unknown", 5, "ab")
    options = {**PICTURES, "val_fraction": 0.2, "test_fraction": 0.3, "split_seed": 3, "classes": CLASSES}
    classified = read(data, tmp_path, **options, skip_bad=True).get_parsed_content("cases")
    everyone = read_bundle("train.json", dataset_dir=str(data), **options).parser.get_parsed_content("cases")
    ids = [
        [{case["case_id"] for case in part} for part in (each.training, each.validation, each.test)]
        for each in (classified, everyone)
    ]
    assert ids[1] == [ids[0][0] | {f"unknown_{kind}_{number}" for kind in "ab" for number in range(5)}, *ids[0][1:]]


@pytest.mark.parametrize("name", ["accuracy", "auroc", "balanced_accuracy", "f1_rows"])
def test_best_epoch_is_that_of_the_chosen_metric(pictures: Path, tmp_path: Path, name: str) -> None:
    best = trained(pictures, tmp_path, key_metric=name)["best"]
    assert best["name"] == name and 0 <= best["metric"] <= 1


def test_resumed_training_equals_an_unbroken_one(pictures: Path, tmp_path: Path) -> None:
    options = {"schedule": "step", "min_epoch_length": 3}  # the cosine would depend on the number of epochs
    trained(pictures, tmp_path / "broken", **options, max_epochs=1)
    broken = trained(pictures, tmp_path / "broken", **options, max_epochs=3, resume="true")
    unbroken = trained(pictures, tmp_path / "unbroken", **options, max_epochs=3)
    assert_same_state(broken["model"], unbroken["model"])
    for part in ("optimizer", "lr_scheduler", "trainer", "best"):
        assert str(broken[part]) == str(unbroken[part])


def test_more_epochs_than_before_do_not_raise_the_rate(pictures: Path, tmp_path: Path) -> None:
    options = {"schedule": "cosine", "min_epoch_length": 1}
    trained(pictures, tmp_path / "longer", **options, max_epochs=2)
    longer = trained(pictures, tmp_path / "longer", **options, max_epochs=4, resume="true")
    unbroken = trained(pictures, tmp_path / "unbroken", **options, max_epochs=4)
    assert longer["lr_scheduler"] == unbroken["lr_scheduler"] and longer["lr_scheduler"]["T_max"] == 4


def test_patients_who_were_trained_on_are_counted_where_pictures_were_added(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_pictures(tmp_path / "data")
    train(data, tmp_path, **PICTURES)
    evaluate(data, tmp_path)
    assert "have names" not in caplog.text
    before = {case["patient_id"] for case in read(data, tmp_path, **PICTURES).get_parsed_content("cases").training}
    write_pictures(tmp_path / "data", 12)
    scored = {case["patient_id"] for case in read(data, tmp_path, **PICTURES).get_parsed_content("cases").test}
    evaluate(data, tmp_path)
    assert before & scored
    assert f"{len(before & scored)} of {len(scored)} test patients have names of patients whom model.pt" in caplog.text


def test_training_stops_early(pictures: Path, tmp_path: Path) -> None:
    last = trained(pictures, tmp_path, learning_rate=0.0, max_epochs=5, patience=2)
    assert last["trainer"]["epoch"] == 3


@pytest.mark.filterwarnings("ignore:`dataloader` is empty")
@pytest.mark.parametrize("options", [{"val_fraction": 0}, {"val_interval": 5}], ids=["no cases", "no epoch"])
def test_without_validation_the_last_state_is_the_model(
    pictures: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    last = trained(pictures, tmp_path, **options, max_epochs=2)
    assert_same_state(last["model"], checkpoint(tmp_path / "models/model.pt")["model"])
    assert last["trainer"]["epoch"] == checkpoint(tmp_path / "models/model.pt")["trainer"]["epoch"] == 2


def test_schedules(pictures: Path, tmp_path: Path) -> None:
    ends = {
        name: trained(pictures, tmp_path / name, schedule=name, max_epochs=3)["lr_scheduler"]["_last_lr"][0]
        for name in ("step", "cosine")
    }
    assert ends == {"step": pytest.approx(2.7e-4), "cosine": pytest.approx(0.0)}


@pytest.mark.parametrize("dims", [2, 3])
def test_planted_classes_are_learned_and_scored(pictures: Path, volumes: Path, tmp_path: Path, dims: int) -> None:
    data, options = (pictures, PICTURES) if dims == 2 else (volumes, {})
    train(data, tmp_path, **{**options, **LEARNING, "test_fraction": 0.4})
    report = evaluate(data, tmp_path)

    scores = report["scores"]
    assert {name: scores[name] for name in ("accuracy", "macro_f1", "auroc", "balanced_accuracy")} == {
        "accuracy": 1.0,
        "macro_f1": 1.0,
        "auroc": 1.0,
        "balanced_accuracy": 1.0,
    }
    assert report["confusion_matrix"] == [[2, 0], [0, 2]]
    rows = list(csv.DictReader((tmp_path / "evaluation/scores.csv").open()))
    assert [row["label"] for row in rows] == [row["predicted"] for row in rows] == ["columns"] * 2 + ["rows"] * 2
    for row in rows:
        assert row["case_id"].startswith(row["label"])
        assert float(row["probability_rows"]) + float(row["probability_columns"]) == pytest.approx(1)


def test_evaluation_of_the_validation_part_repeats_the_best_metric(pictures: Path, tmp_path: Path) -> None:
    trained(pictures, tmp_path, key_metric="auroc", max_epochs=2, min_epoch_length=3)
    report = evaluate(pictures, tmp_path, evaluate_cases="validation", key_metric="auroc")
    assert report["cases"] == 2
    assert report["scores"]["auroc"] == checkpoint(tmp_path / "models/model.pt")["best"]["metric"]


def test_mask_is_one_more_channel_and_is_learned_from(tmp_path: Path, pretrained: Path) -> None:
    images, masks = write_masked(tmp_path / "data")
    options = {**PICTURES, **LEARNING, "masks_dir": str(masks)}
    train(images, tmp_path / "run", **options, pretrained=str(pretrained))
    content = checkpoint(tmp_path / "run/models/model.pt")
    assert content["model"]["encoder.model.0.conv.weight"].shape[1] == 2
    assert content["provenance"]["settings"]["mask_channel"] is True
    assert evaluate(images, tmp_path / "run", masks_dir=str(masks))["scores"]["accuracy"] == 1
    assert "no mask" in message_of(evaluate, images, tmp_path / "run")


def test_masks_of_a_datalist_are_used_if_asked_for(tmp_path: Path) -> None:
    images, masks = write_masked(tmp_path / "data")
    entries = [
        {"image": str(path), "label": path.name.split("_")[0], "mask": str(masks / path.name)}
        for path in sorted(images.iterdir())
    ]
    (tmp_path / "list.json").write_text(json.dumps({"training": entries}))
    for asked, channels in (("true", 2), ("false", 1)):
        options = {**PICTURES, "datalist": str(tmp_path / "list.json"), "with_mask": asked}
        train(None, tmp_path / asked, **options)
        content = checkpoint(tmp_path / asked / "models/model.pt")
        assert content["model"]["encoder.model.0.conv.weight"].shape[1] == channels


def test_classes_from_a_table_and_by_a_pattern(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number, path in enumerate(sorted(pictures.iterdir())):
        shutil.copy(path, tmp_path / f"data/{path.name[0]}{number}.png")
    rows = [f"{path.name},{'rows' if path.name[0] == 'r' else 'columns'}" for path in (tmp_path / "data").iterdir()]
    (tmp_path / "labels.csv").write_text("\n".join(["image,label", *rows]))
    table = read(tmp_path / "data", tmp_path, **PICTURES, labels_csv=str(tmp_path / "labels.csv"))
    pattern = read(tmp_path / "data", tmp_path, **PICTURES, class_pattern="^[rc]", classes=["r", "c"])
    first, second = (parser.get_parsed_content("cases") for parser in (table, pattern))
    assert first.training == second.training
    assert first.count_classes("training") == {"rows": 3, "columns": 3}
    assert all((case["label"] == 0) == Path(case["image"]).name.startswith("r") for case in first.training)


def test_default_data_need_no_folder(tmp_path: Path) -> None:
    pytest.importorskip("nilearn")
    train(None, tmp_path, classes=["anterior", "posterior"], label_fraction=0.2)
    data = checkpoint(tmp_path / "models/model.pt")["provenance"]["data"]
    assert [data[f"{part}_cases"] for part in ("training", "validation", "test")] == [5, 12, 12]


def test_real_pictures(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("normal", "benign", "malignant"):
        for number in range(1, 6):
            source = real_data(f"busi_ultrasound/images/{name}_{number}.png")
            (tmp_path / "data" / source.name).symlink_to(source)
    classes = ["normal", "benign", "malignant"]
    content = trained(tmp_path / "data", tmp_path / "run", classes=classes, image_size=32)
    assert content["provenance"]["data"]["test_cases_by_class"] == dict.fromkeys(classes, 1)


def test_flips_that_swap_what_classes_are_called_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sides = ["left", "right"]
    data = write_pictures(tmp_path / "data", classes=sides)
    train(data, tmp_path / "none", **PICTURES, classes=sides, flip_axes=[])
    assert "flips along" not in caplog.text
    train(data, tmp_path / "default", **PICTURES, classes=sides)
    assert "flips along axis 0 swap these" in caplog.text and "leave these flips out: flip_axes=[]." in caplog.text
