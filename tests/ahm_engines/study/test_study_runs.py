# SPDX-License-Identifier: Apache-2.0
"""Whole studies of tiny pictures by the command line: what they leave, and that they go on."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from ahm_engines import cli
from ahm_engines.monai_label import ReconstructionError
from ahm_engines.study.finished import read_finished
from benchmarks.frozen_features import _network as frozen_network
from benchmarks.frozen_features import _weights as frozen_weights
from benchmarks.frozen_features import report as report_frozen
from tests.fixtures_study import planted_study, write_results
from tests.fixtures_study_runs import TINY_RUN, TINY_UNET, patients_of, rows_of, table, write_blobs

ROOT = Path(__file__).parents[3]
PICTURES = {"modality": "image2d", "spatial_dims": 2}
PRETRAIN = {**TINY_RUN, "backbone_args": TINY_UNET, "crop_size": 16, "patch_size": 4, "samples_per_case": 1}
BROKEN: dict[str, Any] = {"title": "broken", "pretrain": {"masker": "nonsense"}, "compare_with": ["random"]}
MENDED: dict[str, Any] = {"title": "mended", "like": "random", "compare_with": ["random"]}
ARMS: dict[str, Any] = {"scratch": {}, "random": {}, "random_equal_time": {}, "a3c": {}}
LABELS = "1 of the labels, seed "
FIGURES = ("label_fractions", "differences", "learning_curves", "mask_maps")


class Ran(NamedTuple):
    """A folder of a study, and how its last command ended."""

    folder: Path
    exit_code: int
    output: str

    def rows(self, stage: str, status: str = "done") -> dict[tuple[str, str], dict[str, str]]:
        """Rows by arm and seed, of the first draw."""
        rows = [row for row in rows_of(self.folder) if (row["stage"], row["status"]) == (stage, status)]
        return {(row["arm"], row["seed"]): row for row in rows if row["draw"] == "0"}


def command(folder: Path, images: Path, settings: Mapping[str, Any], *words: str) -> Ran:
    config = folder.with_suffix(".json")
    config.write_text(json.dumps(settings))
    given = ["study", "--config", str(config), "--dataset_dir", str(images), "--output_dir", str(folder)]
    result = CliRunner().invoke(cli.app, [*given, "--workers", "1", *words])
    return Ran(folder, result.exit_code, result.output)


def segmentation(arms: Mapping[str, Any]) -> dict[str, Any]:
    finetune = {**TINY_RUN, "max_epochs": 2, "backbone_args": TINY_UNET, "crop_size": 16, "samples_per_case": 1}
    return {
        **{"name": "squares", "data": {**PICTURES, "classes": ["square"]}, "arms": arms, "seeds": {"1.0": 2}},
        **{"pretrain": PRETRAIN, "finetune": finetune},
    }


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return write_blobs(folder, [f"p{number}" for number in range(8)], unlabelled=["q0", "q1"])


@pytest.fixture(scope="module")
def first(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """A study of which one arm cannot run."""
    folder = tmp_path_factory.mktemp("segmentation") / "study"
    return command(folder, images, segmentation(ARMS | {"own": BROKEN}))


@pytest.fixture(scope="module")
def texts(first: Ran) -> dict[str, str]:
    """Reports of the first study, before anybody goes on with it."""
    return {name: (first.folder / name).read_text() for name in ("report.md", "report.html", "results.csv")}


@pytest.fixture(scope="module")
def second(images: Path, first: Ran, texts: dict[str, str]) -> Ran:
    """The same study with that arm mended, and another draw of one."""
    return command(first.folder, images, segmentation(ARMS | {"own": MENDED, "scratch": {"draws": 2}}))


def test_a_trial_tells_which_arm_cannot_run(images: Path, tmp_path: Path) -> None:
    """Its folder stays then, with what the run printed."""
    ran = command(tmp_path / "study", images, segmentation({"random": {}, "own": BROKEN}), "--trial")
    assert ran.exit_code == 1 and "2 cells finished, 2 failed, 0 to go." in ran.output, ran.output
    assert "failed pretrain own, seed 0: " in ran.output and "All runs" not in ran.output
    (folder,) = tmp_path.glob("study_trial_*")
    assert {row["steps"] for row in rows_of(folder) if row["status"] == "done"} == {"2"}
    assert "nonsense" in (folder / "runs/pretrain/own_seed0/log.txt").read_text()
    assert not (tmp_path / "study").exists()


def test_a_trial_of_arms_that_run_leaves_nothing(images: Path, tmp_path: Path) -> None:
    ran = command(tmp_path / "study", images, segmentation({"scratch": {}, "a3c": {}}), "--trial")
    assert ran.exit_code == 0 and "3 cells finished, 0 failed, 0 to go." in ran.output, ran.output
    assert [path.name for path in tmp_path.iterdir()] == ["study.json"]  # its settings


def test_a_failed_arm_does_not_stop_the_others(first: Ran, texts: dict[str, str]) -> None:
    assert first.exit_code == 1, first.output
    assert "14 cells finished, 4 failed, 0 to go." in first.output
    lines = [line for line in first.output.splitlines() if line.startswith("failed ")]
    assert [line.split(":")[0] for line in lines] == [
        *("failed pretrain own, seed 0", "failed pretrain own, seed 1"),
        *("failed finetune own, 1 of the labels, seed 0", "failed finetune own, 1 of the labels, seed 1"),
    ]
    assert "masker" in lines[0] and "'nonsense'" in lines[0] and "Failed to" not in lines[0]
    rows = texts["results.csv"].splitlines()
    assert [sum(f",{status}," in row for row in rows) for status in ("done", "failed")] == [14, 4]


def test_every_finished_cell_has_all_its_numbers(first: Ran) -> None:
    """Columns without a number are those that the arm has nothing for."""
    pretrained, tuned = first.rows("pretrain"), first.rows("finetune")
    costs = ("epochs", "steps", "seconds", "step_seconds", "memory_mib", "device", "config_hash", "torch")
    for row in pretrained.values():
        assert all(row[name] for name in (*costs, "random_psnr", "random_ssim", "hardness", "overlap_images")), row
    assert all(pretrained["a3c", seed]["policy_entropy"] for seed in "01")
    for row in tuned.values():
        assert all(row[name] for name in (*costs, "dice", "hd95_px", "surface_dice", "dice_square", "validation")), row
        assert row["dice"] == row["dice_square"] and (row["labelled_patients"], row["evaluated_on"]) == ("4", "test")
        assert (row["epochs"], row["steps"]) == ("2", "4")
    assert pretrained["random", "0"]["steps"] == "3"
    hashes = [row["config_hash"] for (arm, *_), row in tuned.items() if arm != "random_equal_time"]  # may be random's
    assert len(set(hashes)) == len(hashes) == 6


def test_equal_time_holds_in_the_real_study(first: Ran) -> None:
    pretrained = first.rows("pretrain")
    one, other = (min(float(pretrained[arm, s]["step_seconds"]) for s in "01") for arm in ("a3c", "random"))
    epochs = {int(pretrained["random_equal_time", seed]["epochs"]) for seed in "01"}
    assert epochs == {max(1, math.ceil(one / other))}


def test_scores_are_those_of_the_test_patients(first: Ran) -> None:
    """And those were not pretrained on."""
    for seed in ("0", "1"):
        run = first.folder / f"runs/finetune/a3c_labels1_seed{seed}"
        held = patients_of(first.folder / f"splits/seed{seed}_labels1.json", "test")
        scored = {line[0] for line in table(run / "evaluation/scores.csv")[1:]}
        assert held <= scored and len(held) == 2
        scores = json.loads((run / "evaluation/scores.json").read_text())["scores"]
        row = first.rows("finetune")["a3c", seed]
        assert float(row["dice"]) == pytest.approx(scores["dice"]["mean"], rel=1e-5)
        pretrained = patients_of(first.folder / f"splits/seed{seed}_pretrain.json", "training")
        assert {"q0", "q1"} <= pretrained and not held & pretrained


def test_curves_hold_the_validations_and_their_best_is_in_the_table(first: Ran) -> None:
    curves = table(first.folder / "curves.csv")[1:]
    for (arm, seed), row in first.rows("finetune").items():
        points = [(line[4], float(line[5])) for line in curves if line[:3] == [arm, "1.0", seed]]
        assert [step for step, _ in points] == ["2", "4"]  # two epochs of two steps
        assert max(value for _, value in points) == pytest.approx(float(row["validation"]), rel=1e-4)


def test_finetuning_starts_from_the_pretrained_weights(first: Ran) -> None:
    """Arms differ in nothing else, so their results would be equal otherwise."""
    for seed in "01":
        log = (first.folder / f"runs/finetune/random_labels1_seed{seed}/log.txt").read_text()
        assert f"runs/pretrain/random_seed{seed}/models/model.pt" in log
    curves = table(first.folder / "curves.csv")[1:]
    values = {arm: [line[5] for line in curves if line[0] == arm] for arm in ("scratch", "random", "a3c")}
    assert values["scratch"] != values["random"] != values["a3c"]


def test_the_report_agrees_with_the_table(first: Ran, texts: dict[str, str]) -> None:
    tuned = first.rows("finetune")
    for arm in ("scratch", "a3c"):
        points = 100 * np.mean([float(tuned[arm, seed]["dice"]) for seed in "01"])
        assert f"{points:.1f} ±" in texts["report.md"] and f"{points:.1f} ±" in texts["report.html"]
    assert "# Study squares" in texts["report.md"] and "Failed cells" in texts["report.md"]
    assert "needs pretrain own, seed 0, which has failed" in texts["report.md"]
    for name in FIGURES:
        for suffix in ("png", "pdf"):
            assert (first.folder / f"figures/{name}.{suffix}").stat().st_size > 1000
        assert f"figures/{name}.png" in texts["report.md"]


def test_only_what_is_needed_stays(first: Ran, second: Ran) -> None:
    left = {path.relative_to(second.folder).as_posix() for path in second.folder.rglob("*.pt")}
    arms = ("random", "random_equal_time", "a3c", "own")
    assert left == {f"runs/pretrain/{arm}_seed{seed}/models/model.pt" for arm in arms for seed in "01"}


def test_the_same_command_goes_on_with_the_mended_arm(first: Ran, second: Ran, texts: dict[str, str]) -> None:
    assert second.exit_code == 0, second.output
    done = [line for line in second.output.splitlines() if line.startswith("done ")]
    assert [line.split(":")[0].removeprefix("done ") for line in done] == [
        *("pretrain own, seed 0", "pretrain own, seed 1"),
        *(f"finetune {what}" for seed in "01" for what in (f"own, {LABELS}{seed}", f"scratch, {LABELS}{seed}, draw 1")),
    ]
    assert "20 cells finished, 0 failed, 0 to go." in second.output
    assert (second.folder / "results.csv").read_text().startswith(texts["results.csv"])
    report = (second.folder / "report.md").read_text()
    assert "Failed cells" not in report and "mended" in report and "differ by their draw alone" in report


def test_draws_differ_in_chance_alone(second: Ran) -> None:
    drawn = [row for row in rows_of(second.folder) if (row["stage"], row["arm"]) == ("finetune", "scratch")]
    assert [(row["seed"], row["draw"]) for row in drawn] == [("0", "0"), ("1", "0"), ("0", "1"), ("1", "1")]
    for same in ("steps", "labelled_patients"):
        assert len({row[same] for row in drawn}) == 1
    assert len({row["config_hash"] for row in drawn}) == len({row["dice"] for row in drawn}) == 4


def test_a_pretraining_chooses_who_has_the_labels(images: Path, tmp_path: Path) -> None:
    arms = {"a3c": {}, "a3c_least_understood": {}}
    ran = command(tmp_path / "study", images, segmentation(arms) | {"seeds": {"0.5": [0]}})
    assert ran.exit_code == 0, ran.output
    assert "3 cells finished, 0 failed" in ran.output  # they share a pretraining
    assert {row["labelled_patients"] for row in ran.rows("finetune").values()} == {"2"}
    pool = ran.folder / "splits/seed0_pool.json"
    chosen = ran.folder / "runs/finetune/a3c_least_understood_labels0.5_seed0/datalist.json"
    scans = json.loads(pool.read_text())["training"]
    error = ReconstructionError(ROOT / "bundles/ahm_pretrain", ran.folder / "runs/pretrain/a3c_seed0/models/model.pt")
    worst = sorted(scans, key=lambda scan: error(scan["image"]))[-2:]
    assert patients_of(chosen, "training") == {scan["patient_id"] for scan in worst} < patients_of(pool, "training")
    assert patients_of(chosen, "validation", "test") == patients_of(pool, "validation", "test")
    report = (ran.folder / "report.md").read_text()
    assert "to choose from, where their pretraining chooses who has the labels" in report
    again = command(ran.folder, images, segmentation(arms) | {"seeds": {"0.5": [0]}})
    assert again.exit_code == 0 and "done " not in again.output


def test_equal_settings_give_equal_numbers(second: Ran) -> None:
    """The mended arm is the random one by another name."""
    for stage, names in (("pretrain", ("random_psnr", "hardness")), ("finetune", ("dice", "validation", "hd95_px"))):
        rows = second.rows(stage)
        for seed in "01":
            own, random = rows["own", seed], rows["random", seed]
            assert [own[name] for name in names] == [random[name] for name in names]
            assert own["config_hash"] == random["config_hash"]


def test_a_study_of_classes(tmp_path: Path) -> None:
    """Grades in folders, and pretraining that only the encoder goes on from."""
    images = tmp_path / "images"
    for grade in (1, 2):
        (images / str(grade)).mkdir(parents=True)
        for number in range(5):
            noise = np.random.default_rng(10 * grade + number).integers(0, 40, (24, 24))
            stripes = 100 * (grade - 1) * (np.arange(24) % 2)
            Image.fromarray((stripes + noise).astype(np.uint8)).save(images / str(grade) / f"{number}.png")
    finetune = {**TINY_RUN, "architecture_args": {"backbone_args": TINY_UNET}, "image_size": 16}
    settings = {
        **{"task": "classification", "seeds": {"1.0": [3]}, "arms": ["scratch", "random"], "pretrain": PRETRAIN},
        **{"data": {**PICTURES, "classes": ["1", "2"], "class_pattern": r"^(\d)/"}, "finetune": finetune},
    }
    ran = command(tmp_path / "study", images, settings)
    assert ran.exit_code == 0, ran.output
    rows = ran.rows("finetune")
    for row in rows.values():
        assert all(row[name] for name in ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "f1_1", "f1_2")), row
        assert (row["labelled_patients"], row["validation"] != "") == ("6", True)
    scored = table(tmp_path / "study/runs/finetune/random_labels1_seed3/evaluation/scores.csv")
    assert "accuracy" in (tmp_path / "study/report.md").read_text().lower() and len(scored) > 2

    assert frozen_features(ran.folder) == {"untrained": {"3": 100.0}, "random": {"3": 100.0}}


def frozen_features(study: Path) -> dict[str, dict[str, float]]:
    words = [sys.executable, "-m", "benchmarks.frozen_features", str(study)]
    told = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return json.loads(told.splitlines()[-1])


def test_frozen_features_wait_for_pretrainings_to_end(tmp_path: Path) -> None:
    """One that goes on has a best checkpoint as well."""
    folder = planted_study(tmp_path, seeds={"1.0": [0]}, gain=lambda *_: 0.0)
    rows = [row for row in rows_of(folder) if (row["stage"], row["arm"]) != ("pretrain", "a3c")]
    write_results(folder, rows)
    study = read_finished(folder)
    for cell in study.planned():
        if cell.stage == "pretrain":
            model = folder / cell.folder / "models" / "model.pt"
            model.parent.mkdir(parents=True)
            model.touch()
            if cell.arm == "random":
                assert frozen_weights(study, cell) == model
            else:
                with pytest.raises(SystemExit, match="let the study finish its pretrainings"):
                    frozen_weights(study, cell)


def test_frozen_features_leave_out_seeds_without_a_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = read_finished(planted_study(tmp_path, seeds={"1.0": [0, 1, 2]}, gain=lambda *_: 0.0))
    scores = {seed: {"untrained": 70.0, "a3c": [80.0, 81.0, math.nan][seed]} for seed in range(3)}
    report_frozen(study, scores, 1.0)
    told = capsys.readouterr().out
    assert "a3c - untrained: 1 seed(s) left out" in told and "a3c - untrained: +10.5 [" in told


def test_single_voxels_are_classified_by_frozen_features(second: Ran) -> None:
    """Bright squares are found by any features; equal weights give equal scores."""
    found = frozen_features(second.folder)
    assert list(found) == ["untrained", "random", "random_equal_time", "a3c", "own"]
    assert found["own"] == found["random"] != found["a3c"]
    assert all(85 < score <= 100 for scores in found.values() for score in scores.values()), found


def test_frozen_features_of_a_transformer_know_the_size_of_its_crops() -> None:
    """UNETR alone has to be told, and a checkpoint of pretraining does not repeat it among its arguments."""
    backbone = {"backbone": "unetr", "backbone_args": {"hidden_size": 24, "mlp_dim": 48, "num_heads": 2}}
    network = frozen_network({"spatial_dims": 2, "in_channels": 1, "crop_size": 32, **backbone}, None, 0)
    features = network(torch.rand(2, 1, 32, 32))
    assert features.ndim == 2 and len(features) == 2 and features.isfinite().all()
    assert backbone["backbone_args"].keys() == {"hidden_size", "mlp_dim", "num_heads"}
