# SPDX-License-Identifier: Apache-2.0
"""From a cell to the run of a bundle, and the hash of what decides its numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser

from ahm_engines.study import Study, preset_names, read_study
from ahm_engines.study.cells import (
    Cell,
    Job,
    check_options,
    draws_of,
    finetuning_cells,
    make_job,
    pretraining_cells,
)
from ahm_engines.study.settings import COMMON
from ahm_engines.study.splits import make_splits
from tests.fixtures_study_runs import FOUR_ARMS, blobs, patients_of, study_of

ROOT = Path(__file__).parents[3]
RANDOM = Cell("pretrain", "random", 0)
TUNED = Cell("finetune", "random", 0, 1.0)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return blobs(tmp_path_factory.mktemp("data"))


def job_of(cell: Cell, images: Path, folder: Path, changes: Mapping[str, Any] | None = None, **more: Any) -> Job:
    study = study_of(images, {"arms": FOUR_ARMS, **(changes or {})})
    splits = make_splits(study, folder / "splits")
    return make_job(cell, study, splits, folder, ROOT / "bundles", **{"epochs": 2, "before": None, **more})


def test_stages_hold_each_cell_once_seed_by_seed(images: Path) -> None:
    study = study_of(images, {"arms": FOUR_ARMS, "seeds": {"0.5": 2, "1.0": [0]}})
    assert list(map(str, pretraining_cells(study, equal_time=False))) == [
        *("pretrain random, seed 0", "pretrain a3c, seed 0", "pretrain random, seed 1", "pretrain a3c, seed 1")
    ]
    assert [(cell.arm, cell.seed) for cell in pretraining_cells(study, equal_time=True)] == [
        *(("random_equal_time", 0), ("random_equal_time", 1))
    ]
    cells = [(cell.seed, cell.fraction, cell.arm) for cell in finetuning_cells(study)]
    assert cells == [(s, f, arm) for s, f in ((0, 0.5), (0, 1.0), (1, 0.5)) for arm in FOUR_ARMS]


def test_folders_tell_stage_arm_fraction_and_seed() -> None:
    assert Cell("pretrain", "a3c", 3).folder == "runs/pretrain/a3c_seed3"
    assert Cell("finetune", "a3c", 3, 0.06).folder == "runs/finetune/a3c_labels0.06_seed3"
    assert Cell("finetune", "a3c", 3, 1.0).folder == "runs/finetune/a3c_labels1_seed3"
    assert Cell("finetune", "a3c", 3, 1.0, 2).folder == "runs/finetune/a3c_labels1_seed3_draw2"


def test_pretraining_has_the_options_of_study_and_arm(images: Path, tmp_path: Path) -> None:
    changes = {"pretrain.mask_ratio": 0.5, "pretrain.patch_size": 4, "data.spacing_mm": None, "data.window_hu": [0, 9]}
    arms = {"random": {"pretrain": {"patch_size": 8, "amp": None}}}
    job = job_of(RANDOM, images, tmp_path, changes | {"arms": arms}, epochs=7)
    options = job.options
    assert (options["masker"], options["mask_ratio"], options["patch_size"]) == ("uniform", 0.5, 8)
    assert (options["max_epochs"], options["seed"], options["resume"]) == (7, 0, True)
    assert (options["modality"], options["spatial_dims"], options["window_hu"]) == ("image2d", 2, [0, 9])
    for name in ("foreground_threshold", "amp", "spacing_mm"):
        assert name in options and options[name] is None
    assert not {"classes", "pretrained", "evaluate_cases", "labels_dir"} & options.keys()
    assert options["output_dir"] == str(tmp_path / "runs/pretrain/random_seed0") == str(job.folder)
    assert (job.bundle.name, job.overlays) == ("ahm_pretrain", ())
    assert "test" not in json.loads(Path(options["datalist"]).read_text())


def test_finetuning_goes_on_from_its_own_pretraining(images: Path, tmp_path: Path) -> None:
    changes = {"finetune.crop_size": 16, "data.label_values": [1], "data.unit": "mm", "evaluate_on": "validation"}
    job = job_of(TUNED, images, tmp_path, changes, before="abc")
    options = job.options
    assert options["pretrained"] == str(tmp_path / RANDOM.folder / "models/model.pt")
    assert (options["classes"], options["label_values"], options["unit"]) == (["square"], [1], "mm")
    assert (options["crop_size"], options["evaluate_cases"]) == (16, "validation")
    assert patients_of(Path(options["datalist"])) == {f"p{number:02d}" for number in range(10)}
    assert "masker" not in options and job.bundle.name == "ahm_segmentation"


def test_scratch_starts_from_no_weights(images: Path, tmp_path: Path) -> None:
    assert "pretrained" not in job_of(Cell("finetune", "scratch", 0, 1.0), images, tmp_path).options


def test_classification_runs_its_own_bundle_for_the_key_metric_of_the_study(images: Path, tmp_path: Path) -> None:
    names = ["p00", "p01", "p02", "p03", "p04", "p05", "p06", "p07", "p08", "p09"]
    rows = "".join(f"{name},{'ab'[index % 2]}\n" for index, name in enumerate(names))
    (tmp_path / "labels.csv").write_text("case_id,label\n" + rows)
    own = {"task": "classification", "data.classes": ["a", "b"], "data.labels_csv": str(tmp_path / "labels.csv")}
    job = job_of(TUNED, images, tmp_path, own)
    assert job.bundle.name == "ahm_classification"
    assert (job.options["key_metric"], job.options["classes"]) == ("accuracy", ["a", "b"])
    assert "labels_csv" not in job.options


def test_overlays_come_between_the_bundles_file_and_the_options(images: Path, tmp_path: Path) -> None:
    cell = Cell("pretrain", "contrastive", 0)
    job = job_of(cell, images, tmp_path, {"arms": ["contrastive"]})
    names = [Path(name).name for name in job.config_files()]
    assert names == ["train.json", "contrastive.json", "options.json"]
    assert job.config_files()[-1] == str(tmp_path / cell.folder / "options.json")
    tuned = job_of(Cell("finetune", "contrastive", 0, 1.0), images, tmp_path, {"arms": ["contrastive"]}, before="x")
    assert [Path(name).name for name in tuned.config_files("evaluate.json")] == [
        *("train.json", "evaluate.json", "options.json")
    ]


def test_a_further_draw_is_another_seed_of_the_finetuning(images: Path, tmp_path: Path) -> None:
    changes = {"arms": ["scratch", "random"], "seeds": {"1.0": [3]}, "draws": 3}
    cells = [Cell("finetune", "random", 3, 1.0, draw) for draw in range(3)]
    jobs = [job_of(cell, images, tmp_path, changes) for cell in cells]
    assert [job.options["seed"] for job in jobs] == [3, 1_000_003, 2_000_003]
    for name in ("datalist", "pretrained"):  # the same labelled patients and weights
        assert len({job.options[name] for job in jobs}) == 1
    assert len({job.config_hash for job in jobs}) == len({job.folder for job in jobs}) == 3
    alone = job_of(cells[0], images, tmp_path, {**changes, "draws": 1})
    assert (alone.config_hash, alone.folder) == (jobs[0].config_hash, jobs[0].folder)


def test_each_draw_has_labelled_patients_of_its_own_where_labels_are_drawn_too(images: Path, tmp_path: Path) -> None:
    changes = {"arms": ["scratch", "random"], "seeds": {"0.5": [3]}, "draws": 3, "draw_labels": True}
    cells = [Cell("finetune", "random", 3, 0.5, draw) for draw in range(3)]
    jobs = [job_of(cell, images, tmp_path, changes) for cell in cells]
    lists = [json.loads(Path(job.options["datalist"]).read_text(encoding="utf-8")) for job in jobs]
    first, second, third = ({entry["patient_id"] for entry in each["training"]} for each in lists)
    assert first and not first & second and third & (first | second)  # the two halves, and from the beginning
    assert lists[0]["test"] == lists[1]["test"] and lists[0]["validation"] == lists[1]["validation"]
    assert len({job.options["pretrained"] for job in jobs}) == 1
    beside = job_of(replace(cells[1], arm="scratch"), images, tmp_path, changes)
    assert beside.options["datalist"] == jobs[1].options["datalist"]
    alone = job_of(cells[0], images, tmp_path, {**changes, "draws": 1, "draw_labels": False})
    assert (alone.config_hash, alone.folder) == (jobs[0].config_hash, jobs[0].folder)


def test_an_arm_that_chooses_its_labels_has_the_pool_and_not_their_datalist(images: Path, tmp_path: Path) -> None:
    changes = {"arms": ["a3c", "a3c_least_understood"], "seeds": {"0.5": [3]}}
    given, choosing = (
        job_of(Cell("finetune", name, 3, 0.5), images, tmp_path, changes, before="x") for name in changes["arms"]
    )
    assert given.choosing is None and choosing.choosing is not None
    assert choosing.options["datalist"] == str(choosing.folder / "datalist.json")
    assert choosing.options["pretrained"] == given.options["pretrained"]
    few, pool = (patients_of(Path(path), "training") for path in (given.options["datalist"], choosing.choosing.pool))
    assert choosing.choosing.count == len(few) and few < pool
    other = job_of(Cell("finetune", "a3c_least_understood", 3, 0.5), images, tmp_path, changes, before="y")
    assert len({job.config_hash for job in (given, choosing, other)}) == 3


def test_an_arm_has_the_draws_of_the_study_or_its_own() -> None:
    arms = {"scratch": {"draws": 3}, "random": {}}
    study = read_study(changes={"data.dataset_dir": "x", "data.classes": ["a"], "arms": arms, "seeds": {"1.0": [3]}})
    assert [(cell.arm, cell.draw) for cell in finetuning_cells(study)] == [
        *(("scratch", 0), ("random", 0), ("scratch", 1), ("scratch", 2))
    ]
    twice = replace(study, draws=2)
    assert [draws_of(twice, name) for name in arms] == [3, 2]
    assert [str(cell) for cell in finetuning_cells(twice)][-1] == "finetune scratch, 1 of the labels, seed 3, draw 2"


def test_all_cells_share_a_cache_wherever_it_is(images: Path, tmp_path: Path) -> None:
    without, there = job_of(TUNED, images, tmp_path), job_of(TUNED, images, tmp_path, cache_dir=tmp_path / "cache")
    assert (without.options["cache_dir"], there.options["cache_dir"]) == (None, str(tmp_path / "cache"))
    assert without.config_hash == there.config_hash


@pytest.mark.parametrize(
    "changes",
    [
        {"pretrain.mask_ratio": 0.5},
        {"data.window_hu": [0, 1]},
        {"arms": {"random": {"pretrain": {"foreground_threshold": 0.1}}}},
        {"arms": {"random": {"overlays": ["ahm_paper.json"]}}},
        {"test_fraction": 0.3},
    ],
)
def test_the_hash_tells_options_overlays_and_patients(images: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    assert job_of(RANDOM, images, tmp_path / "a").config_hash != (
        job_of(RANDOM, images, tmp_path / "b", changes).config_hash
    )


def test_the_hash_tells_epochs_seed_arm_fraction_and_pretraining(images: Path, tmp_path: Path) -> None:
    seeds = {"seeds": {"0.5": 2, "1.0": 2}}
    hashes = [
        job_of(RANDOM, images, tmp_path, seeds).config_hash,
        job_of(RANDOM, images, tmp_path, seeds, epochs=3).config_hash,
        job_of(Cell("pretrain", "random", 1), images, tmp_path, seeds).config_hash,
        job_of(Cell("pretrain", "a3c", 0), images, tmp_path, seeds).config_hash,
        job_of(TUNED, images, tmp_path, seeds).config_hash,
        job_of(TUNED, images, tmp_path, seeds, before="abc").config_hash,
        job_of(TUNED, images, tmp_path, seeds, before="xyz").config_hash,
        job_of(Cell("finetune", "random", 0, 0.5), images, tmp_path, seeds).config_hash,
    ]
    assert len(set(hashes)) == len(hashes)


def test_the_hash_does_not_tell_folders_titles_and_other_arms(images: Path, tmp_path: Path) -> None:
    moved = blobs(tmp_path / "moved")
    first = job_of(TUNED, images, tmp_path / "a", before="abc")
    other = {"name": "other", "arms": {"random": {"title": "other", "compare_with": []}}}
    assert job_of(TUNED, moved, tmp_path / "b", other, before="abc").config_hash == first.config_hash


def networks_of(study: Study) -> dict[str, str]:
    """Kind of the network of every arm's runs, built without memory for its weights."""
    kinds = {}
    for name, arm in study.arms.items():
        for stage, bundle in (("pretrain", "ahm_pretrain"), ("finetune", f"ahm_{study.task}")):
            if getattr(arm, stage) is None:
                continue
            folder = ROOT / "bundles" / bundle / "configs"
            overlays = arm.overlays if stage == "pretrain" else []
            parser = ConfigParser(
                ConfigParser.load_config_files([str(folder / file) for file in ("train.json", *overlays)])
            )
            common = {key: study.data[key] for key in COMMON if key in study.data}
            labels = {"classes": study.data["classes"]} if stage == "finetune" else {}
            parser.update(common | labels | getattr(study, stage) | getattr(arm, stage))
            with torch.device("meta"):
                network = parser.get_parsed_content("network_def")
                of_classifier = stage == "finetune" and study.task == "classification"
                kinds[f"{name} {stage}"] = type(network.encoder if of_classifier else network).__name__
    return kinds


@pytest.mark.parametrize("size", ["small", "full"])
@pytest.mark.parametrize("ablation", preset_names()["ablation"])
@pytest.mark.parametrize("preset", ["hippocampus", "lgg"])
def test_networks_of_every_ablation_can_be_built_in_3d_and_2d(preset: str, ablation: str, size: str) -> None:
    study = read_study(preset, size=size, ablation=ablation, data_dir="/data")
    check_options(study, ROOT / "bundles")
    kinds = networks_of(study)
    expected = {"MaskedAutoencoder", "UNETR"} if ablation == "decoder_depth" else {"ReconstructionUNet", "UNet"}
    expected |= {"ContrastiveEncoder"} if ablation == "masked_contrastive" else set()
    assert set(kinds.values()) == expected


@pytest.mark.parametrize(("preset", "size"), [("lgg", "small"), ("lgg", "full"), ("busi", "small"), ("acdc", "full")])
def test_arms_with_another_network_do_not_take_the_arguments_of_the_presets_own(preset: str, size: str) -> None:
    study = read_study(preset, size=size, data_dir="/data", changes={"arms": ["random", "scratch_unetr", "mae"]})
    assert networks_of(study) == {
        "random pretrain": "ReconstructionUNet",
        "random finetune": "UNet",
        "scratch_unetr finetune": "UNETR",
        "mae pretrain": "MaskedAutoencoder",
        "mae finetune": "UNETR",
    }


@pytest.mark.parametrize("size", ["small", "full"])
@pytest.mark.parametrize("preset", ["busi_classes", "lgg_slices"])
def test_transformers_classify_as_well(preset: str, size: str) -> None:
    study = read_study(preset, size=size, data_dir="/data", changes={"arms": ["scratch", "scratch_unetr", "mae"]})
    check_options(study, ROOT / "bundles")
    kinds = networks_of(study)
    assert kinds.pop("mae pretrain") == "MaskedAutoencoder"
    assert kinds == {
        "scratch finetune": "UNet",
        "scratch_unetr finetune": "UNETR",
        "mae finetune": "UNETR",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"finetune.max_epoch": 3},
            "finetune: ahm_segmentation has no option 'max_epoch'; did you mean max_epochs?",
        ),
        (
            {"pretrain.train#epoch_lenght": 3, "pretrain.nonsense": 1},
            "pretrain: ahm_pretrain has no option 'nonsense'.",
        ),
        (
            {"arms": {"mine": {"like": "random", "pretrain": {"mask_rato": 0.3}}}},
            "arms.mine.pretrain: ahm_pretrain has no option 'mask_rato'; did you mean mask_ratio?",
        ),
        (
            {"finetune.overlap": 0.5, "preset": "busi_classes"},
            "finetune: ahm_classification has no option 'overlap'",
        ),
    ],
)
def test_options_that_a_bundle_would_ignore_are_refused(changes: dict[str, Any], message: str) -> None:
    study = read_study(changes.pop("preset", "lgg"), data_dir="/data", changes=changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_options(study, ROOT / "bundles")


@pytest.mark.parametrize(
    ("entry", "where"),
    [
        ("pretrain.seed", "seeds"),
        ("finetune.label_fraction", "seeds"),
        ("finetune.classes", "data.classes"),
        ("finetune.pretrained", "arms"),
        ("pretrain.output_dir", "--output_dir"),
        ("arms.a3c.pretrain.test_fraction", "test_fraction"),
        ("arms.scratch.finetune.dataset_dir", "data.dataset_dir"),
    ],
)
def test_options_that_the_study_decides_are_refused(entry: str, where: str) -> None:
    study = read_study("lgg", data_dir="/data", changes={entry: 1})
    stage, name = entry.rsplit(".", 1)
    with pytest.raises(ValueError, match=f"^{stage}: {name} is decided by the study .* give it as {where}[.]$"):
        check_options(study, ROOT / "bundles")


def test_bad_images_are_left_out_of_pretraining_alone(images: Path, tmp_path: Path) -> None:
    """What is too small for a patch is found there first; labelled images were checked before."""
    skipping = {"data.skip_bad": True}
    assert job_of(RANDOM, images, tmp_path, skipping).options["skip_bad"] is True
    assert "skip_bad" not in job_of(TUNED, images, tmp_path, skipping, before="abc").options
    assert "skip_bad" not in job_of(RANDOM, images, tmp_path).options


def test_options_of_an_overlay_are_known_to_its_arm_alone() -> None:
    arms = {"contrastive": {"pretrain": {"temperature": 0.2}}, "random": {}}
    check_options(read_study("lgg", data_dir="/data", changes={"arms": arms}), ROOT / "bundles")
    arms["random"] = {"pretrain": {"temperature": 0.2}}
    with pytest.raises(ValueError, match=r"arms\.random\.pretrain: ahm_pretrain has no option 'temperature'"):
        check_options(read_study("lgg", data_dir="/data", changes={"arms": arms}), ROOT / "bundles")
