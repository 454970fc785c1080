# SPDX-License-Identifier: Apache-2.0
"""Two processes under torchrun do what one does with as many images; one that fails or is killed ends the job.

Starting torchrun takes longer than training, so that all trainings that end well share one start.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from tests.bundles.ahm_classification import classifying
from tests.bundles.ahm_segmentation import segmenting
from tests.bundles.running import (
    CLASSIFICATION,
    PRETRAIN,
    SEGMENTATION,
    TINY,
    assert_same_state,
    checkpoint,
    command,
    finish,
    run_bundle,
    start,
    wait_for,
)
from tests.integration.distributed_jobs import watched

TWO = ["-m", "torch.distributed.run", "--standalone", "--nnodes=1", "--nproc_per_node=2"]
TRAIN, EVALUATE = ("train.json", "multi_gpu_train.json"), ("train.json", "evaluate.json", "multi_gpu_evaluate.json")
SIDE = 16  # of images and crops, so that there is one crop only
# Adam divides a gradient by its own size, also one that is rounding and nothing else
GRADIENT_DESCENT = {"optimizer": "$torch.optim.SGD(@network.parameters(), 0.1)"}
PRETRAINING = {
    **TINY,
    **GRADIENT_DESCENT,
    "masker": "loss_prediction",
    "masker_optimizer": "$torch.optim.SGD(@masker_weights, 0.1)",
    "mask_ratio": 0.999,  # all of the foreground, so that nothing is left to chance
    "samples_per_case": 1,
    "val_fraction": 0.43,  # 3 of 7
    "train#random_transforms": "$list(recipes.random_crops(spatial_dims=3, crop_size=16, flip_prob=0).transforms)",
    "training": watched(network="@network_def", masker="@curriculum"),
}
CHANCE = {**TINY, "masker": "a3c", "max_epochs": 3, "min_epoch_length": 12, "val_interval": 2, "val_fraction": 0.5}
CONTRASTIVE = {
    **TINY,
    "backbone_args": {**TINY["backbone_args"], "norm": "batch"},  # the one with buffers
    "cases_per_batch": 1,
    "val_fraction": 0.43,  # 2 batches for one process and 1 for the other
    "training": watched(network="@network_def"),
}
SEGMENTING = {
    **segmenting.TINY,
    **GRADIENT_DESCENT,
    "max_epochs": 2,
    "min_epoch_length": 3,
    "samples_per_case": 1,
    "augment": False,
    "flip_axes": [],
    "val_fraction": 0.2,  # 2 of 9, and 3 to test
    "test_fraction": 0.34,
    "freeze_epochs": 1,  # parameters come and go, which distributed training must be told
    "training": watched(network="@network_def"),
}
CLASSIFYING = {
    **classifying.TINY,
    **classifying.PICTURES,
    **GRADIENT_DESCENT,
    **{"architecture_args": classifying.LEARNING["architecture_args"], "augment": False, "flip_axes": []},
    "max_epochs": 2,
    "min_epoch_length": 3,
    "val_fraction": 0.2,  # 3 of 13, and 6 to train, of which 4 are rows
    "test_fraction": 0.3,
    "training": watched(network="@network_def"),
}
JUDGING = {"evaluate_cases": "validation", "cases_per_batch": 1}  # a batch of two is rounded in another way


def job(bundle: Path, files: Sequence[str], options: Mapping[str, Any], run_id: str = "training") -> dict[str, Any]:
    """Return the arguments of ``monai.bundle.run``."""
    kept = {key: value for key, value in options.items() if run_id == "training" or key != "training"}
    return {"run_id": run_id, "config_file": [str(bundle / "configs" / name) for name in files], **kept}


def start_jobs(jobs: Sequence[Mapping[str, Any]], folder: Path) -> subprocess.Popen[str]:
    """Run jobs in two processes, one job after the other."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    return start([sys.executable, *TWO, "tests/integration/distributed_jobs.py", str(path)])


def alone(bundle: Path, files: Sequence[str], options: Mapping[str, Any], run_id: str = "training") -> None:
    """Run the same in this process."""
    given = job(bundle, files, options, run_id)
    run = {"run": given.pop(run_id)} if run_id == "training" else {}
    run_bundle(given.pop("config_file"), **{key: value for key, value in given.items() if key != "run_id"}, **run)


def write_scans(folder: Path, count: int = 7) -> Path:
    """Write volumes whose foreground grows from one to the next."""
    folder.mkdir(parents=True)
    for number in range(count):
        values, side = np.zeros((SIDE, SIDE, SIDE), np.int16), 4 + 2 * (number % 6)
        noise = np.random.default_rng(number).integers(300, 1000, (side, side, 12))
        values[:side, :side, 2:14] = noise
        nib.save(nib.Nifti1Image(values, np.eye(4)), folder / f"scan{number}.nii.gz")
    return folder


def write_data(root: Path) -> dict[str, dict[str, Any]]:
    """Write the data of all bundles and return the options that name them."""
    for number in range(9):
        segmenting.write_case(root / "labelled", f"scan{number}", segmenting.planted(number, [SIDE] * 3))
    classifying.write_pictures(root / "pictures", 8)
    for number in (5, 6, 7):  # classes of unequal size have unequal weights
        (root / f"pictures/columns_{number}.png").unlink()
    scans = {"dataset_dir": str(write_scans(root / "scans"))}
    twins = root / "twins"
    twins.mkdir()
    for number in range(4):
        os.link(root / "scans/scan4.nii.gz", twins / f"twin{number}.nii.gz")
    return {
        "pretraining": PRETRAINING | scans,
        "contrastive": CONTRASTIVE | scans,
        "chance": CHANCE | {"dataset_dir": str(twins)},
        "segmentation": SEGMENTING
        | {"dataset_dir": str(root / "labelled/images"), "labels_dir": str(root / "labelled/labels")},
        "classification": CLASSIFYING | {"dataset_dir": str(root / "pictures")},
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def options(root: Path) -> dict[str, dict[str, Any]]:
    return write_data(root)


@pytest.fixture(scope="module")
def log(root: Path, options: dict[str, dict[str, Any]]) -> str:
    """Train and evaluate with every bundle in two processes, and train in one with batches twice as large."""
    given = {name: {**option, "output_dir": str(root / "two" / name)} for name, option in options.items()}
    pretraining, segmentation = given["pretraining"], given["segmentation"]
    classification = given["classification"]
    contrastive = ("train.json", "contrastive.json", "multi_gpu_train.json")
    watching = {"training": watched(network="@network_def", masker="@curriculum")}
    process = start_jobs(
        [
            job(PRETRAIN, TRAIN, {**pretraining, "cases_per_batch": 2}),
            job(PRETRAIN, EVALUATE, {**pretraining, "cases_per_batch": 2}, "evaluating"),
            job(PRETRAIN, TRAIN, {**given["chance"], **watching}),
            job(PRETRAIN, contrastive, given["contrastive"]),
            job(SEGMENTATION, TRAIN, {**segmentation, "cases_per_batch": 2}),
            job(SEGMENTATION, EVALUATE, segmentation, "evaluating"),
            job(CLASSIFICATION, TRAIN, {**classification, "cases_per_batch": 3}),
            job(CLASSIFICATION, EVALUATE, {**classification, **JUDGING}, "evaluating"),
        ],
        root,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for bundle, name, batch in (
        (PRETRAIN, "pretraining", 4),
        (SEGMENTATION, "segmentation", 4),
        (CLASSIFICATION, "classification", 6),
    ):
        more = {"cases_per_batch": batch, "output_dir": str(root / "one" / name)}
        alone(bundle, ["train.json"], {**options[name], **more})
    torch.set_num_threads(threads)
    return finish(process, timeout=300)


def seen(root: Path, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What one process saw, and what each of two did."""
    return (
        checkpoint(root / f"one/{name}/rank0.pt"),
        [checkpoint(root / f"two/{name}/rank{rank}.pt") for rank in (0, 1)],
    )


def test_pretraining_has_the_losses_of_one_process(root: Path, log: str) -> None:
    one, two = seen(root, "pretraining")
    hidden = [[int(mask.sum()) for mask in process["mask"]] for process in two]
    assert all(first != second for first, second in zip(*hidden, strict=True))  # a mean of means would differ
    assert [sum(pair) for pair in zip(*hidden, strict=True)] == [int(mask.sum()) for mask in one["mask"]]
    for name in ("loss", "masker_loss"):
        expected = torch.stack(one[name])
        for process in two:
            report(f"pretraining, {name}", expected, torch.stack(process[name]))
            torch.testing.assert_close(torch.stack(process[name]), expected, rtol=1e-4, atol=0)
    for part in ("network", "masker"):
        assert_close(two[0][part], one[part])


@pytest.mark.parametrize("name", ["segmentation", "classification"])
def test_finetuning_has_the_losses_of_one_process(root: Path, log: str, name: str) -> None:
    one, two = seen(root, name)
    expected, own = torch.stack(one["loss"]), torch.stack([torch.stack(process["loss"]) for process in two])
    assert not torch.allclose(own[0], own[1], rtol=1e-5)  # each process has other cases
    report(name, expected, own.mean(0))
    torch.testing.assert_close(own.mean(0), expected, rtol=1e-4, atol=0)
    assert_close(two[0]["network"], one["network"])


def report(name: str, one: torch.Tensor, two: torch.Tensor) -> None:
    """For the log of a run with ``-s``."""
    print(f"{name}: one process {one.tolist()}, two {two.tolist()}, difference {float((one - two).abs().max()):.2g}")


def assert_close(state: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Compare weights; a sum of four gradients may be rounded in another order."""
    for name, value in expected.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["pretraining", "chance", "contrastive", "segmentation", "classification"])
def test_both_processes_end_with_the_same_weights(root: Path, log: str, name: str) -> None:
    first, second = (checkpoint(root / f"two/{name}/rank{rank}.pt") for rank in (0, 1))
    assert_same_state(first["network"], second["network"])
    assert_same_state(*(without_generators(end.get("masker", {})) for end in (first, second)))


def without_generators(state: Mapping[str, Any]) -> dict[str, Any]:
    """All of a masker but its random numbers, which must differ."""
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


def test_each_process_draws_masks_of_its_own(root: Path, log: str) -> None:
    """Of one and the same scan, from the seed of the run."""
    first, second = (checkpoint(root / f"two/chance/rank{rank}.pt")["mask"] for rank in (0, 1))
    assert not any(torch.equal(*masks) for masks in zip(first, second, strict=True))


def test_evaluation_scores_every_case_once(root: Path, options: dict[str, dict[str, Any]], log: str) -> None:
    """One process finds the same for the same checkpoint, though three cases do not divide by two."""
    for bundle, name, more in (
        (PRETRAIN, "pretraining", {}),
        (SEGMENTATION, "segmentation", {}),
        (CLASSIFICATION, "classification", JUDGING),
    ):
        folders = {"output_dir": str(root / "judge" / name), "ckpt_dir": str(root / f"two/{name}/models")}
        alone(bundle, ["train.json", "evaluate.json"], {**options[name], **folders, **more}, "evaluating")
    for name in ("segmentation", "classification"):
        one, two = (read_scores(root / kind / name / "evaluation/scores.csv") for kind in ("judge", "two"))
        assert two == (one[0], pytest.approx(one[1], rel=1e-5))
    one, two = (json.loads((root / kind / "pretraining/evaluation.json").read_text()) for kind in ("judge", "two"))
    assert two == pytest.approx(one, rel=1e-6)


def read_scores(path: Path) -> tuple[list[str], list[float]]:
    """Read the words and the numbers; the last digits of these depend on the order in which a process adds."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert len(rows) == 1 + 3
    words, numbers = [], []
    for cell in chain.from_iterable(rows):
        try:
            numbers.append(float(cell))
        except ValueError:
            words.append(cell)
    return words, numbers


def test_only_the_first_process_writes(root: Path, log: str) -> None:
    first, second = (json.loads((root / f"written{rank}.json").read_text()) for rank in (0, 1))
    assert second == []
    for name in ("run_record.json", "costs.json", "last.pt", "model.pt", "panel_epoch0001.png", "scores.csv"):
        assert any(name in path for path in first), name
    one, two = (files(root / kind / "segmentation") for kind in ("one", "two"))
    assert two == sorted([*one, "rank1.pt", "evaluation/scores.csv", "evaluation/scores.json"])
    assert log.count("Key metric: random_psnr") == 2 + 2  # one for each validation of two trainings
    assert log.count("Key metric: contrastive_loss") == 2


def files(folder: Path) -> list[str]:
    """All files, without the time and process in the names of TensorBoard's."""
    places = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return sorted(place.split(".tfevents")[0] for place in places)


def test_killed_process_ends_the_job_and_the_job_resumes(
    root: Path, options: dict[str, dict[str, Any]], log: str, tmp_path: Path
) -> None:
    """And a scan that only the second process reads ends it, too, with what is wrong with that scan."""
    given = {**options["chance"], "output_dir": str(tmp_path / "killed")}
    files = str([str(PRETRAIN / "configs" / name) for name in TRAIN])
    words = command(given, files=files)
    process = start([words[0], *TWO, *words[1:]])
    kill_second(process, tmp_path / "killed/models/last.pt")
    text = failure(process)
    assert "Signal 9 (SIGKILL) received by PID" in text and "rank      : 1" in text
    assert checkpoint(tmp_path / "killed/models/last.pt")["trainer"]["epoch"] < 3

    lost = write_scans(tmp_path / "lost", 4)
    process = start_jobs(
        [job(PRETRAIN, TRAIN, {**given, "resume": True}), job(PRETRAIN, TRAIN, losing(lost, tmp_path))], tmp_path
    )
    text = failure(process)
    ends = [checkpoint(folder / "models/last.pt") for folder in (root / "two/chance", tmp_path / "killed")]
    assert ends[1]["trainer"] == {"epoch": 3, "iteration": 36, "epoch_length": 12, "max_epochs": 3}
    for part in ("model", "masker"):
        assert_same_state(ends[0][part], ends[1][part])
    for part in ("optimizer", "masker_optimizer", "lr_scheduler", "best"):
        assert str(ends[0][part]) == str(ends[1][part])

    assert any(line.startswith("[rank1]:") and "scan3.nii.gz" in line for line in text.splitlines())
    assert "rank      : 1" in text[text.index("Root Cause (first observed failure)") :]


def failure(process: subprocess.Popen[str]) -> str:
    """Wait for a command to end badly and return what it wrote."""
    try:
        text = process.communicate(timeout=150)[0]
    finally:
        process.kill()
    assert process.returncode not in (0, None), text[-4000:]
    return text


def losing(scans: Path, folder: Path) -> dict[str, Any]:
    """Return options of a training that loses its second scan to validate on after it has looked at all of them."""
    listed = {
        "training": [{"image": f"scan{number}.nii.gz"} for number in (0, 1)],
        "validation": [{"image": f"scan{number}.nii.gz"} for number in (2, 3)],
    }
    (folder / "list.json").write_text(json.dumps(listed))
    steps = [
        "$@train#trainer.logger",  # builds all there is
        "$torch.distributed.barrier()",
        f"$pathlib.Path({str(scans / 'scan3.nii.gz')!r}).unlink(missing_ok=True)",
        "$@train#trainer.run()",
    ]
    given = {"dataset_dir": str(scans), "datalist": str(folder / "list.json"), "output_dir": str(folder / "losing")}
    return {**TINY, **given, "cache_rate": 0.0, "training": steps}


def kill_second(process: subprocess.Popen[str], last: Path) -> None:
    """End the process of rank 1 with SIGKILL soon after the first checkpoint."""
    wait_for(process, last)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    second = [child for child in children if "RANK=1" in Path(f"/proc/{child}/environ").read_text().split("\0")]
    os.kill(int(second[0]), signal.SIGKILL)
