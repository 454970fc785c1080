# SPDX-License-Identifier: Apache-2.0
"""The training config: every masker, every kind of data, and what a run leaves behind."""

from __future__ import annotations

import json
import math
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ahm_engines.handlers import Checkpoints
from ahm_engines.reports import provenance
from tests.bundles.running import (
    SHELF,
    TINY,
    assert_same_state,
    checkpoint,
    read_bundle,
    run_bundle,
    train,
    write_cases,
)
from tests.fixtures_data import OBLIQUE, PATIENT_ID, PATIENT_NAME, real_data, write_series

OBJECTS = {"model", "masker", "optimizer", "lr_scheduler", "trainer", "best", "provenance"}


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cases(tmp_path_factory.mktemp("volumes"))


def weights_are_finite(state: dict[str, object]) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in tensors(state))


def tensors(state: dict[str, object]) -> Iterator[torch.Tensor]:
    yield from (value for value in state.values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("masker", SHELF)
def test_every_masker_trains(volumes: Path, tmp_path: Path, masker: str, dims: int) -> None:
    train(volumes, tmp_path, masker=masker, spatial_dims=dims)

    last, best = checkpoint(tmp_path / "models/last.pt"), checkpoint(tmp_path / "models/model.pt")
    learns = masker not in ("uniform", "teacher_error")  # by gradient
    for content in (last, best):
        assert content.keys() == OBJECTS | ({"masker_optimizer"} if learns else set())
        assert weights_are_finite(content["model"])
    assert last["trainer"] == {"epoch": 2, "iteration": 6, "epoch_length": 3, "max_epochs": 2}
    assert math.isfinite(best["best"]["metric"])
    assert best["best"]["name"] == "random_psnr"
    assert any(name.endswith("weight") for name in last["masker"]) == (masker != "uniform")
    assert sorted(path.name for path in (tmp_path / "panels").iterdir()) == [
        "panel_epoch0001.png",
        "panel_epoch0002.png",
    ]
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["epoch0001.npz", "epoch0002.npz"]
    assert json.loads((tmp_path / "costs.json").read_text())["steps"] == 6


@pytest.mark.parametrize("masker", SHELF)
def test_every_masker_resumes_as_if_it_had_never_stopped(volumes: Path, tmp_path: Path, masker: str) -> None:
    options: dict[str, Any] = {"masker": masker, "spatial_dims": 2, "warm_up": 0.0, "max_epochs": 3}
    train(volumes, tmp_path / "unbroken", **options)
    given = {**TINY, **options, "dataset_dir": str(volumes), "output_dir": str(tmp_path / "stopped")}
    stopped = read_bundle("train.json", **given)
    trainer = stopped.parser.get_parsed_content("train#trainer")
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=1), trainer.terminate)
    stopped.run()
    assert checkpoint(tmp_path / "stopped/models/last.pt")["trainer"]["epoch"] == 1
    run_bundle("train.json", **given, resume=True)

    ends = [checkpoint(tmp_path / name / "models/last.pt") for name in ("unbroken", "stopped")]
    assert [end["trainer"]["epoch"] for end in ends] == [3, 3]
    for part in ("model", "masker"):
        assert_same_state(ends[0][part], ends[1][part])


def test_run_record_says_how_to_repeat_the_run(volumes: Path, tmp_path: Path) -> None:
    train(volumes, tmp_path, seed=5)
    record = json.loads((tmp_path / "run_record.json").read_text())
    assert record["seed"] == 5
    assert record["versions"]["monai"] and record["versions"]["torch"]
    assert (record["data"]["training_cases"], record["data"]["validation_cases"]) == (3, 1)
    assert record["data"]["images_3d"]["shape_min"] == [20, 24, 18]
    assert "LoadCased" in record["preprocessing"]
    assert checkpoint(tmp_path / "models/model.pt")["provenance"] == provenance(record)


def test_tensorboard_holds_losses_metrics_and_panels(volumes: Path, tmp_path: Path) -> None:
    train(volumes, tmp_path, min_epoch_length=5)  # a point every 10 iterations
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = events.Tags()["scalars"]
    expected = ("train/loss", "train/masker_loss", "masking/policy_entropy", "validation/random_psnr")
    assert {*expected, "validation/overlap_images"} <= set(scalars)
    assert events.Tags()["images"] == ["masking/panel", "masking/policy_map"]


def test_masker_and_network_both_learn(volumes: Path, tmp_path: Path) -> None:
    train(volumes, tmp_path / "still", learning_rate=0.0, masker_learning_rate=0.0)
    train(volumes, tmp_path / "moved")
    still, moved = (checkpoint(tmp_path / name / "models/last.pt") for name in ("still", "moved"))
    for name in ("model", "masker"):
        weights = [key for key in still[name] if key.endswith("weight")]
        assert weights and not any(torch.equal(still[name][key], moved[name][key]) for key in weights)


def test_one_seed_gives_one_result(volumes: Path, tmp_path: Path) -> None:
    for name, seed in (("first", 3), ("second", 3), ("other", 4)):
        train(volumes, tmp_path / name, seed=seed)
    first, second, other = (checkpoint(tmp_path / name / "models/last.pt") for name in ("first", "second", "other"))
    assert_same_state(first["model"], second["model"])
    assert_same_state(first["masker"], second["masker"])
    assert any(not torch.equal(a, b) for a, b in zip(tensors(first["model"]), tensors(other["model"]), strict=True))


def test_cases_that_memory_does_not_hold_train_alike(volumes: Path, tmp_path: Path) -> None:
    for name, rate in (("held", 1.0), ("half", 0.5), ("none", 0.0)):
        train(volumes, tmp_path / name, cache_rate=rate)
    held, half, none = (checkpoint(tmp_path / name / "models/last.pt") for name in ("held", "half", "none"))
    assert_same_state(held["model"], half["model"])
    assert_same_state(held["model"], none["model"])


def test_cases_prepared_on_disk_train_alike(volumes: Path, tmp_path: Path) -> None:
    for name in ("memory", "written", "read"):
        folder = None if name == "memory" else str(tmp_path / "cache")
        train(volumes, tmp_path / name, cache_dir=folder, cache_rate=0.5)
    memory, *others = (checkpoint(tmp_path / name / "models/last.pt") for name in ("memory", "written", "read"))
    for other in others:
        assert_same_state(memory["model"], other["model"])
        assert memory["best"] == other["best"]
    assert len(list((tmp_path / "cache").glob("*.pt"))) >= 2


def test_cases_are_read_in_the_background(volumes: Path, tmp_path: Path) -> None:
    options = {"train#dataset#keep_free": 1.0, "num_workers": 2}
    train(volumes, tmp_path, **options)
    assert checkpoint(tmp_path / "models/last.pt")["trainer"]["epoch"] >= 1


def test_nothing_written_names_the_patient(tmp_path: Path) -> None:
    for number in range(2):
        write_series(
            tmp_path / "data" / f"{PATIENT_ID}_{number}", slices=18, size=(20, 20), PatientID=f"{PATIENT_ID}{number}"
        )
    train(tmp_path / "data", tmp_path / "run")
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) >= 5
    for path in written:
        for secret in (PATIENT_NAME, PATIENT_ID):
            assert secret not in path.name
            assert secret.encode() not in path.read_bytes(), path.name


@pytest.mark.parametrize("dims", [2, 3])
def test_default_data_need_no_folder(tmp_path: Path, dims: int) -> None:
    pytest.importorskip("nilearn")
    train(None, tmp_path, spatial_dims=dims, max_epochs=1, min_epoch_length=1)
    assert (tmp_path / "models/model.pt").is_file()


def test_series_of_one_patient_train(tmp_path: Path) -> None:
    write_series(tmp_path / "data" / "a", slices=18, size=(20, 20), orientation=OBLIQUE)
    train(tmp_path / "data", tmp_path / "run", spacing_mm=1.5)
    assert (tmp_path / "run/models/model.pt").is_file()


def test_patients_are_kept_apart(tmp_path: Path) -> None:
    for name in ("p1_a", "p1_b", "p2_a", "p2_b"):
        write_cases(tmp_path / "data" / name, 1)
    run = train(tmp_path / "data", tmp_path / "run", patient_pattern=r"(p\d)", val_fraction=0.5, max_epochs=1)
    cases = run.parser.get_parsed_content("cases")
    sides = [{case["patient_id"] for case in part} for part in (cases.training, cases.validation)]
    assert sorted(map(len, sides)) == [1, 1]
    assert not sides[0] & sides[1]


def test_model_is_written_even_if_no_epoch_was_validated(volumes: Path, tmp_path: Path) -> None:
    train(volumes, tmp_path, val_interval=5)
    assert (tmp_path / "models/model.pt").is_file()


def test_real_mr_volumes(tmp_path: Path) -> None:
    images = sorted(real_data("hippocampus_mr/images").glob("*.nii.gz"))[:4]
    (tmp_path / "data").mkdir()
    for image in images:
        (tmp_path / "data" / image.name).symlink_to(image)
    train(tmp_path / "data", tmp_path / "run", crop_size=32, patch_size=8)
    assert checkpoint(tmp_path / "run/models/model.pt")["provenance"]["data"]["training_cases"] == 3


def test_real_dicom_series(tmp_path: Path) -> None:
    with tarfile.open(real_data("dicom/mr_t1_mprage_192slices.tgz")) as archive:
        archive.extractall(tmp_path / "data", filter="data")
    train(tmp_path / "data", tmp_path / "run", spacing_mm=4, crop_size=32, patch_size=8, max_epochs=1)
    assert checkpoint(tmp_path / "run/models/model.pt")["provenance"]["data"]["training_cases"] == 1


def test_real_pictures(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for picture in sorted(real_data("busi_ultrasound/images").glob("*.png"))[:5]:
        shutil.copy(picture, tmp_path / "data")
    train(tmp_path / "data", tmp_path / "run", modality="image2d", spatial_dims=2, crop_size=64, patch_size=16)
    data = checkpoint(tmp_path / "run/models/model.pt")["provenance"]["data"]
    assert (data["training_cases"], data["validation_cases"], data["modality"]) == (4, 1, "image2d")


def test_paper_preset_learns_in_stages(volumes: Path, tmp_path: Path) -> None:
    tiny = {**TINY, "backbone_args": {"features": [4] * 6}, "crop_size": 32, "max_epochs": 5}
    run = run_bundle(
        ["train.json", "ahm_paper.json"],
        dataset_dir=str(volumes),
        output_dir=str(tmp_path),
        **{**tiny, "patch_size": 8, "cases_per_batch": 2, "learning_rate": 0.001},
    )
    trainer = run.parser.get_parsed_content("train#trainer")
    assert trainer.optimizer.param_groups[0]["lr"] == 0.001
    assert trainer.masker.mask_ratio == 0.75
    content = checkpoint(tmp_path / "models/last.pt")
    steps = [int(entry["step"]) for entry in content["masker_optimizer"]["state"].values()]
    assert set(steps) == {3}  # epoch 3 of 5 alone
    steps = [int(entry["step"]) for entry in content["optimizer"]["state"].values()]
    assert set(steps) == {12}  # the other four


def test_switches_take_numbers(volumes: Path, tmp_path: Path) -> None:
    """As somebody types them: ``--resume 1``."""
    places = {"dataset_dir": str(volumes), "output_dir": str(tmp_path)}
    run = read_bundle("train.json", **TINY, **places, resume=1, amp=0, skip_bad=1)
    handlers = run.parser.get_parsed_content("train#handlers")
    assert [handler.resume for handler in handlers if isinstance(handler, Checkpoints)] == [True]
    assert run.parser.get_parsed_content("train#trainer").amp is False
