# SPDX-License-Identifier: Apache-2.0
"""The training config: what it learns, on whom, for how long, and what it leaves behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ahm_engines.reports import provenance
from ahm_networks.nets import backbone_network, encoder_stages
from ahm_transforms.io import Cases
from tests.bundles.ahm_segmentation.segmenting import (
    CLASSES,
    SHAPE,
    TINY,
    infer,
    message_of,
    planted,
    train,
    write_case,
    write_labelled,
)
from tests.bundles.running import SEGMENTATION, assert_same_state, checkpoint, read_bundle

SMALL_DYNUNET = {
    "filters": [4, 8, 8],
    "kernel_size": [3, 3, 3],
    "strides": [1, 2, 2],
    "deep_supervision": True,
    "deep_supr_num": 1,
}
SHELF: dict[str, dict[str, Any]] = {
    "unet": {"channels": [4, 8], "strides": [2]},
    "basicunet": {"features": [4] * 6},
    "dynunet": SMALL_DYNUNET,
    "segresnet": {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]},
    "unetr": {"img_size": 32, "feature_size": 4, "hidden_size": 24, "mlp_dim": 24, "num_heads": 2},
    "swinunetr": {"feature_size": 12, "depths": [1] * 4, "num_heads": [1, 1, 2, 2]},
}


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("volumes"))


def weights(folder: Path, name: str = "last.pt") -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = checkpoint(folder / "models" / name)["model"]
    return state


def moved(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {key for key in before if not torch.equal(before[key], after[key])}


def split(data: Path, **options: Any) -> Cases:
    given = {**TINY, "dataset_dir": str(data), **options}
    cases: Cases = read_bundle("train.json", bundle=SEGMENTATION, **given).parser.get_parsed_content("cases")
    return cases


def patients(cases: list[dict[str, Any]]) -> set[str]:
    return {case["patient_id"] for case in cases}


def test_run_leaves_checkpoints_record_and_curves(volumes: Path, tmp_path: Path) -> None:
    train(volumes, tmp_path, max_epochs=2, seed=5)
    last, best = (checkpoint(tmp_path / "models" / name) for name in ("last.pt", "model.pt"))
    assert last["trainer"] == {"epoch": 2, "iteration": 4, "epoch_length": 2, "max_epochs": 2}
    assert best["best"]["name"] == "dice" and 0 <= best["best"]["metric"] <= 1
    record = json.loads((tmp_path / "run_record.json").read_text())
    assert last["provenance"] == best["provenance"] == provenance(record)
    assert record["seed"] == 5
    assert record["data"]["training_cases"] == 4 and record["data"]["test_cases_by_class"] == {"box": 1, "slab": 1}
    settings = record["settings"]
    assert (settings["task"], settings["classes"], settings["crop_size"]) == ("segmentation", CLASSES, 16)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"validation/dice", "validation/dice_box"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["validation/prediction", "validation/label"]
    costs = (tmp_path / "costs.json").read_text()
    assert json.loads(costs)["steps"] == 4
    train(volumes, tmp_path, max_epochs=2, seed=5, resume=True)  # has nothing left to do
    assert (tmp_path / "costs.json").read_text() == costs


@pytest.mark.parametrize("dims", [2, 3])
def test_easy_structure_is_learned(tmp_path: Path, dims: int) -> None:
    """With a 2D network too, whose slices are scored as one volume."""
    data = write_labelled(tmp_path / "data", 4)
    train(
        *(data, tmp_path / "run"),
        spatial_dims=dims,
        backbone_args={"channels": [8, 16], "strides": [2], "num_res_units": 0, "norm": "batch"},
        samples_per_case=4,
        min_epoch_length=25,
        max_epochs=2,
        learning_rate=0.02,
    )
    best = checkpoint(tmp_path / "run/models/model.pt")["best"]
    assert best["metric"] > 0.9


@pytest.mark.parametrize("backbone", SHELF)
def test_every_backbone_trains_and_its_checkpoint_predicts(volumes: Path, tmp_path: Path, backbone: str) -> None:
    size = 64 if backbone == "swinunetr" else 32
    options = {"backbone": backbone, "backbone_args": SHELF[backbone], "crop_size": size, "spatial_dims": 2}
    train(volumes, tmp_path / "run", **options)
    one = tmp_path / "data/scan.nii.gz"
    one.parent.mkdir()
    one.symlink_to(volumes / "scan0.nii.gz")
    infer(one, tmp_path / "out", tmp_path / "run/models/model.pt")
    assert (tmp_path / "out/scan/scan_seg.nii.gz").is_file()


def test_deep_supervision_trains_the_heads(volumes: Path, tmp_path: Path) -> None:
    options = {"backbone": "dynunet", "backbone_args": SMALL_DYNUNET}
    train(volumes, tmp_path / "still", learning_rate=0.0, **options)
    train(volumes, tmp_path / "run", **options)
    changed = moved(weights(tmp_path / "still"), weights(tmp_path / "run"))
    assert any(key.startswith("deep_supervision_heads.0") for key in changed)
    assert any(key.startswith("output_block") for key in changed)


@pytest.mark.parametrize(("epochs", "encoder_moves"), [(-1, False), (2, False), (1, True), (0, True)])
def test_encoder_is_frozen_for_so_many_epochs(volumes: Path, tmp_path: Path, epochs: int, encoder_moves: bool) -> None:
    train(volumes, tmp_path / "still", learning_rate=0.0)
    train(volumes, tmp_path / "run", freeze_epochs=epochs, max_epochs=2)
    changed = moved(weights(tmp_path / "still"), weights(tmp_path / "run"))
    network = backbone_network("unet", 3, 1, 3, **TINY["backbone_args"])
    inside = {id(p) for stage in encoder_stages(network) for module in stage for p in module.parameters()}
    encoder = {key for key, value in network.named_parameters() if id(value) in inside}
    assert encoder and changed - encoder
    assert bool(changed & encoder) == encoder_moves


def test_layers_towards_the_input_learn_more_slowly(volumes: Path, tmp_path: Path) -> None:
    run = train(volumes, tmp_path, layer_decay=0.5, learning_rate=0.01, max_epochs=3)  # the schedule's first step
    groups = run.parser.get_parsed_content("optimizer").param_groups
    assert [group["lr"] for group in groups] == pytest.approx([0.009, 0.0045, 0.00225])


def test_step_schedule_lowers_the_rate_every_third_epoch(volumes: Path, tmp_path: Path) -> None:
    train(volumes, tmp_path, max_epochs=4, learning_rate=0.1)
    assert checkpoint(tmp_path / "models/last.pt")["lr_scheduler"]["_last_lr"] == pytest.approx([0.09])


def test_cosine_schedule_ends_at_nought(volumes: Path, tmp_path: Path) -> None:
    train(volumes, tmp_path, max_epochs=2, schedule="cosine")
    assert checkpoint(tmp_path / "models/last.pt")["lr_scheduler"]["_last_lr"] == pytest.approx([0.0], abs=1e-12)


def test_patience_ends_a_training_that_gets_no_better(volumes: Path, tmp_path: Path) -> None:
    train(volumes, tmp_path, learning_rate=0.0, max_epochs=9, val_interval=2, patience=2)
    assert checkpoint(tmp_path / "models/last.pt")["trainer"]["epoch"] == 6  # the best is epoch 2


def test_resumed_run_equals_one_never_stopped(volumes: Path, tmp_path: Path) -> None:
    train(volumes, tmp_path / "unbroken", max_epochs=3)
    train(volumes, tmp_path / "stopped", max_epochs=2)
    half = weights(tmp_path / "stopped")
    train(volumes, tmp_path / "stopped", max_epochs=3, resume=True)
    ends = [checkpoint(tmp_path / name / "models/last.pt") for name in ("unbroken", "stopped")]
    assert moved(half, ends[1]["model"])
    assert_same_state(ends[0]["model"], ends[1]["model"])
    for part in ("optimizer", "lr_scheduler", "best", "trainer"):
        assert str(ends[0][part]) == str(ends[1][part])


def test_cases_prepared_on_disk_train_alike(volumes: Path, tmp_path: Path) -> None:
    for name in ("memory", "written", "read"):
        folder = None if name == "memory" else str(tmp_path / "cache")
        train(volumes, tmp_path / name, cache_dir=folder, cache_rate=0.5, spacing_mm=1.5)
    memory, *others = (checkpoint(tmp_path / name / "models/last.pt") for name in ("memory", "written", "read"))
    for other in others:
        assert_same_state(memory["model"], other["model"])
        assert memory["best"] == other["best"]
    assert list((tmp_path / "cache").glob("*.pt"))


def test_seeds_decide(volumes: Path, tmp_path: Path) -> None:
    for name, seed in (("first", 3), ("second", 3), ("other", 4)):
        train(volumes, tmp_path / name, seed=seed)
    first, second, other = (weights(tmp_path / name) for name in ("first", "second", "other"))
    assert_same_state(first, second)
    assert moved(first, other)


@pytest.fixture(scope="module")
def pairs_of_scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    for number in range(10):
        for visit in ("a", "b"):
            write_case(folder, f"p{number}_{visit}", planted(number))
    return folder / "images"


def test_share_and_seed_choose_patients_for_training_alone(pairs_of_scans: Path) -> None:
    options = {"patient_pattern": r"(p\d)", "val_fraction": 0.2, "test_fraction": 0.2}
    whole = split(pairs_of_scans, **options)
    assert (len(patients(whole.training)), len(whole.training)) == (6, 12)
    chosen = [split(pairs_of_scans, **options, label_fraction=0.5, seed=seed) for seed in range(6)]
    for part in chosen:
        assert (len(patients(part.training)), len(part.training)) == (3, 6)
        assert patients(part.training) < patients(whole.training)
        assert (part.test, part.validation) == (whole.test, whole.validation)
    assert len({frozenset(patients(part.training)) for part in chosen}) > 1
    fewer = split(pairs_of_scans, **options, label_fraction=0.2, seed=5)
    assert patients(fewer.training) < patients(chosen[5].training)


def test_pretraining_keeps_away_from_the_same_test_patients(pairs_of_scans: Path) -> None:
    options = {"patient_pattern": r"(p\d)", "test_fraction": 0.3, "split_seed": 7, "dataset_dir": str(pairs_of_scans)}
    labelled = split(pairs_of_scans, **options, label_fraction=0.4, seed=9)
    unlabelled: Cases = read_bundle("train.json", **options).parser.get_parsed_content("cases")
    assert len(patients(labelled.test)) == 3
    assert patients(unlabelled.test) == patients(labelled.test)
    assert not patients(unlabelled.training + unlabelled.validation) & patients(labelled.test)


def test_pretraining_with_labels_of_some_scans_keeps_away_from_them_too(pairs_of_scans: Path, tmp_path: Path) -> None:
    for label in sorted((pairs_of_scans.parent / "labels").glob("p[0-5]_*")):
        shutil.copy(label, tmp_path)
    options = {"patient_pattern": r"(p\d)", "test_fraction": 0.3, "val_fraction": 0.2, "labels_dir": str(tmp_path)}
    labelled = split(pairs_of_scans, **options)
    everyone: Cases = read_bundle("train.json", dataset_dir=str(pairs_of_scans), **options).parser.get_parsed_content(
        "cases"
    )
    assert patients(labelled.test) and patients(everyone.test) == patients(labelled.test)
    assert patients(everyone.validation) == patients(labelled.validation)
    assert patients(everyone.training) == patients(labelled.training) | {"p6", "p7", "p8", "p9"}


def test_patients_for_testing_who_were_pretrained_on_are_told(
    volumes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(volumes, tmp_path / "first")
    options = {"test_fraction": 0.5, "val_fraction": 0.2, "pretrained": str(tmp_path / "first/models/model.pt")}
    assert "patients whom" not in caplog.text
    train(volumes, tmp_path / "second", **options)
    assert re.search(r"[1-9] of \d test patients have names of patients whom model.pt was trained on", caplog.text)


def test_loss_that_is_not_finite_ends_the_run_with_nothing_saved(volumes: Path, tmp_path: Path) -> None:
    message = message_of(train, volumes, tmp_path, learning_rate=1e30, min_epoch_length=4)
    assert "loss: expected a finite number" in message and "Lower the learning rate" in message
    assert not list((tmp_path / "models").glob("*.pt"))


def test_pictures_with_masks_of_255(tmp_path: Path) -> None:
    for number in range(4):
        label = planted(number).max(2)
        for folder, values in (("images", 90 * label), ("masks", 255 * (label == 1))):
            (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values.astype("uint8")).save(tmp_path / "data" / folder / f"p{number}.png")
    options = {"modality": "image2d", "spatial_dims": 2, "classes": ["box"], "label_values": [255]}
    train(tmp_path / "data/images", tmp_path / "run", **options)
    data = checkpoint(tmp_path / "run/models/model.pt")["provenance"]["data"]
    assert data["training_cases_by_class"] == {"box": 2}


def test_datalist_with_one_map_for_each_class(volumes: Path, tmp_path: Path) -> None:
    entries = []
    for number in range(4):
        for index, name in enumerate(CLASSES, 1):
            write_case(tmp_path / name, f"scan{number}", (planted(number) == index).astype("uint8"))
        maps = [str(tmp_path / name / f"labels/scan{number}.nii.gz") for name in CLASSES]
        entries.append({"image": str(volumes / f"scan{number}.nii.gz"), "label": maps})
    (tmp_path / "list.json").write_text(json.dumps({"training": entries[:2], "validation": [], "test": entries[2:]}))
    cases = split(volumes, dataset_dir=None, datalist=str(tmp_path / "list.json"))
    assert {case["case_id"].split("_")[-1] for case in cases.test} == {"scan2", "scan3"}
    assert cases.count_classes("test") == dict.fromkeys(CLASSES, 2)
    assert cases.geometry[cases.test[0]["case_id"]].shape == SHAPE


def test_default_data_are_gray_and_white_matter(tmp_path: Path) -> None:
    pytest.importorskip("nilearn")
    train(None, tmp_path, classes=["gray matter", "white matter"], val_interval=2, cache_rate=0.0)
    data = checkpoint(tmp_path / "models/model.pt")["provenance"]["data"]
    assert data["training_cases_by_class"] == {"gray matter": 4, "white matter": 4}
    assert data["test_cases"] == 2


def test_flips_that_swap_what_classes_are_called_are_told(
    volumes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(volumes, tmp_path / "some", classes=["left box", "right slab"], flip_axes=[1, 2])
    assert "flips along" not in caplog.text
    train(volumes, tmp_path / "all", classes=["left box", "right slab"])
    assert "flips along axis 0 swap these" in caplog.text and "flip_axes=[1, 2], or []" in caplog.text
