# SPDX-License-Identifier: Apache-2.0
"""The command line: what it hands on, how it ends, and what it says when it cannot go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ahm_engines import cli
from ahm_engines.study import Progress, Study
from ahm_engines.study.cells import Cell, stages
from tests.fixtures_study import planted_study
from tests.fixtures_study_runs import blobs, bytes_below

DATA = ["--classes", "square", "--set", "data.modality=image2d", "--set", "data.spatial_dims=2"]


def ahm(*words: object) -> Any:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def lines(result: Any) -> list[str]:
    return [line for line in result.output.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return blobs(tmp_path_factory.mktemp("data"))


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command hands to the study, which does not run."""
    given: dict[str, Any] = {}

    def run_study(study: Study, folder: Path, **options: Any) -> Progress:
        given.update(study=study, folder=folder, **options)
        return Progress(finished=1)

    monkeypatch.setattr(cli, "run_study", run_study)
    monkeypatch.setattr(cli, "report", lambda folder: None)
    return given


@pytest.mark.parametrize("line", ["_", "-"])
def test_options_are_handed_on_however_they_are_spelled(called: dict[str, Any], tmp_path: Path, line: str) -> None:
    options = {"dataset_dir": tmp_path, "labels_dir": "truth", "output_dir": tmp_path / "o", "bundles_dir": "b"}
    words = [word for name, value in options.items() for word in ("--" + name.replace("_", line), value)]
    words += [f"--keep{line}models", "--arms", "scratch, a3c", "--minutes", "2.5", "--workers", "3", *DATA]
    result = ahm("study", *words, "--fractions", "1=2,0.25=[5]")
    assert result.exit_code == 0, result.output
    study = called["study"]
    assert study.data["dataset_dir"] == str(tmp_path)
    assert study.data["labels_dir"] == str(Path("truth").absolute()) and study.data["classes"] == ["square"]
    assert list(study.arms) == ["scratch", "a3c"] and study.seeds == {0.25: [5], 1.0: [0, 1]}
    assert (called["minutes"], called["keep_models"], called["folder"].name) == (2.5, True, "o")
    assert (len(called["devices"]), called["bundles_dir"].name) == (3, "b")


@pytest.mark.parametrize("option", ["--data_dir", "--data-dir"])
def test_the_data_folder_is_where_a_preset_looks(tmp_path: Path, option: str) -> None:
    result = ahm("study", "--preset", "hippocampus", option, tmp_path, "--output-dir", tmp_path / "study")
    assert result.exit_code == 1
    assert f"FileNotFoundError: dataset_dir {tmp_path / 'hippocampus_mr/images'} is not a folder." in lines(result)


def test_the_data_folder_may_come_from_the_environment(
    called: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AHM_DATA", str(tmp_path))
    assert ahm("study", "--preset", "hippocampus", "--size", "full").exit_code == 0
    assert called["study"].data["dataset_dir"] == str(tmp_path / "hippocampus_mr/images")
    assert called["study"].name == "hippocampus-full" and called["folder"] == Path("study")


def test_entries_are_json_or_else_text(called: dict[str, Any], tmp_path: Path) -> None:
    entries = ["finetune.max_epochs=3", "finetune.augment=false", "pretrain.patch_size=[4,8]", "finetune.schedule=step"]
    more = ["pretrain.mask_ratio=null", "data.patient_pattern=^(p=\\d+)"]
    result = ahm("study", "--dataset_dir", tmp_path, *DATA, *(w for entry in entries + more for w in ("--set", entry)))
    assert result.exit_code == 0, result.output
    study = called["study"]
    assert (study.finetune["max_epochs"], study.finetune["augment"], study.finetune["schedule"]) == (3, False, "step")
    assert (study.pretrain["patch_size"], study.pretrain["mask_ratio"]) == ([4, 8], None)
    assert study.data["patient_pattern"] == "^(p=\\d+)"


@pytest.mark.parametrize(
    ("words", "devices"),
    [
        (["--devices", "0,3"], ["0", "3"]),
        (["--devices", "0,3", "--workers", "2"], ["0", "3", "0", "3"]),
        (["--devices", "1", "--workers", "1"], ["1"]),
        (["--devices", " 0, GPU-8a,"], ["0", "GPU-8a"]),
    ],
)
def test_every_gpu_has_as_many_cells_as_workers(
    called: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], devices: list[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert ahm("study", "--dataset_dir", tmp_path, *DATA, *words).exit_code == 0
    assert called["devices"] == devices and called["threads"] >= 1


@pytest.mark.parametrize(("visible", "devices"), [("2,5", ["2", "5"]), ("MIG-a,MIG-b,MIG-c", ["MIG-a", "MIG-b"])])
def test_only_gpus_that_the_environment_shows_are_used(
    called: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, devices: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert ahm("study", "--dataset_dir", tmp_path, *DATA).exit_code == 0
    assert called["devices"] == devices


@pytest.mark.parametrize(("count", "visible"), [(0, None), (2, None), (1, "3")])
@pytest.mark.parametrize("devices", ["7", "cpu", "0,2", ","])
def test_gpus_that_are_not_there_are_told(
    called: dict[str, Any], monkeypatch: pytest.MonkeyPatch, count: int, visible: str | None, devices: str
) -> None:
    """CUDA would run on the CPU instead, without a word."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    result = ahm("study", "--dataset_dir", "data", *DATA, "--devices", devices)
    assert result.exit_code == 1 and not called
    assert "--devices: expected some of the visible GPUs" in result.output and repr(devices) in result.output


def test_the_pattern_of_patients_is_an_option(called: dict[str, Any], tmp_path: Path) -> None:
    assert ahm("study", "--dataset_dir", tmp_path, *DATA, "--patient_pattern", "(p\\d+)").exit_code == 0
    assert called["study"].data["patient_pattern"] == "(p\\d+)"


@pytest.mark.parametrize(("named", "threads"), [("7", 7), ("0", 6), ("2,1", 6)])
def test_cells_have_the_threads_that_the_environment_names(
    called: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, threads: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", named)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)), raising=False)
    assert ahm("study", "--dataset_dir", tmp_path, *DATA, "--workers", "1").exit_code == 0
    assert called["threads"] == threads


@pytest.mark.parametrize(
    ("progress", "code", "text"),
    [
        (Progress(finished=4), 0, "4 cells finished, 0 failed, 0 to go."),
        (Progress(finished=3, failed=["x"]), 1, "3 cells finished, 1 failed, 0 to go."),
        (Progress(finished=1, failed=["x"], open=2), 3, "Stopped before the end; the same command goes on."),
    ],
)
def test_the_exit_code_tells_how_it_ended(
    called: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    progress: Progress,
    code: int,
    text: str,
) -> None:
    monkeypatch.setattr(cli, "run_study", lambda *_, **__: progress)
    result = ahm("study", "--dataset_dir", tmp_path, *DATA)
    assert result.exit_code == code and text in lines(result)


def test_a_trial_is_short_and_leaves_nothing(called: dict[str, Any], tmp_path: Path) -> None:
    words = ["study", "--dataset_dir", tmp_path, "--output_dir", tmp_path / "of/study", *DATA]
    arms = ["--arms", "scratch,random,random_equal_time,a3c,contrastive", "--set", "arms.a3c.pretrain.max_epochs=7"]
    result = ahm(
        *words, *arms, "--fractions", "0.1=[4],1=3", "--set", "draws=3", "--set", "draw_labels=true", "--trial"
    )
    assert result.exit_code == 0, result.output
    assert lines(result)[-1].startswith("All runs of the study work")
    study = called["study"]
    assert (study.name, study.evaluate_on) == ("trial of study-small", "validation")
    assert [(cell.arm, cell.seed, cell.fraction) for cells in stages(study) for cell in cells] == [
        *((arm, 4, None) for arm in ("random", "random_equal_time", "a3c", "contrastive")),
        *((arm, 4, 0.1) for arm in study.arms),
    ]
    for arm in study.arms.values():
        assert arm.pretrain is None or (arm.pretrain["max_epochs"], arm.pretrain["train#epoch_length"]) == (1, 2)
        assert (arm.finetune["max_epochs"], arm.finetune["train#epoch_length"]) == (1, 2)
    assert study.arms["contrastive"].finetune["pretrained_part"] == "encoder"
    assert called["folder"].parent == tmp_path / "of" and not list((tmp_path / "of").iterdir())


def test_a_trial_of_what_cannot_be_done_leaves_nothing(tmp_path: Path) -> None:
    result = ahm("study", "--dataset_dir", tmp_path / "none", *DATA, "--output_dir", tmp_path / "study", "--trial")
    assert result.exit_code == 1 and lines(result)[-1].startswith("FileNotFoundError: dataset_dir ")
    assert not list(tmp_path.iterdir())


def test_a_trial_cannot_be_stopped_and_continued(tmp_path: Path) -> None:
    output = ("--output_dir", tmp_path / "study")
    result = ahm("study", "--dataset_dir", tmp_path, *DATA, *output, "--trial", "--minutes", "9")
    assert result.exit_code == 1 and lines(result)[-1].startswith("ValueError: minutes: a trial is not continued")
    assert not list(tmp_path.iterdir())


def test_each_cell_is_told_as_it_ends(called: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_study(*_: Any, listener: Callable[..., None], **__: Any) -> Progress:
        done = {"status": "done", "seconds": "12.4", "dice": "0.71239", "random_psnr": ""}
        listener(Cell("finetune", "a3c", 1, 0.25), done)
        listener(Cell("pretrain", "a3c", 1), {"status": "failed", "error": "no [mask] in [/data]"})
        return Progress(finished=1, failed=["x"])

    monkeypatch.setattr(cli, "run_study", run_study)
    told = lines(ahm("study", "--dataset_dir", tmp_path, *DATA))
    assert "done finetune a3c, 0.25 of the labels, seed 1: dice 0.712, 12 s" in told
    assert "failed pretrain a3c, seed 1: no [mask] in [/data]" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "nonsense"], "ValueError: preset: expected one of acdc, "),
        (["--size", "large"], "ValueError: size: expected one of small, full, got 'large'."),
        (["--ablation", "nonsense"], "ValueError: ablation: expected one of "),
        (["--config", "missing.json"], "FileNotFoundError: config missing.json does not exist."),
        ([], "ValueError: data.classes: expected a list of names, got None."),
        (["--classes", "a"], "ValueError: data: expected a dataset_dir or a datalist, got neither."),
        ([*DATA, "--dataset_dir", "missing"], "FileNotFoundError: dataset_dir "),
        ([*DATA, "--dataset_dir", ".", "--arms", "scratch,nonsense"], "ValueError: arms: expected names of a3c, "),
        ([*DATA, "--dataset_dir", ".", "--fractions", "0.5"], "ValueError: expected name=value, got '0.5'."),
        ([*DATA, "--dataset_dir", ".", "--fractions", "0.5=two"], "ValueError: seeds: expected a number of seeds or"),
        (
            [*DATA, "--dataset_dir", ".", "--fractions", "50%=2"],
            "ValueError: seeds: expected label fractions in (0, 1]",
        ),
        ([*DATA, "--dataset_dir", ".", "--set", "finetune.max_epochs"], "ValueError: expected name=value, got 'fine"),
        ([*DATA, "--dataset_dir", ".", "--set", "finetune=3"], "ValueError: study: an entry is of another kind"),
        ([*DATA, "--dataset_dir", ".", "--bundles_dir", "missing"], "FileNotFoundError: no bundles in missing: run "),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = ahm("study", *words, "--output_dir", "out")
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    last = lines(result)[-1]
    assert last.startswith(message) and "Traceback" not in result.output
    assert len(lines(result)) <= 2  # what the study is, and why it does not run


def test_time_that_is_up_at_once_leaves_a_study_that_can_go_on(images: Path, tmp_path: Path) -> None:
    words = ["study", "--dataset_dir", images, *DATA, "--arms", "scratch,random", "--fractions", "1=2"]
    result = ahm(*words, "--output_dir", tmp_path / "study", "--minutes", 0)
    assert result.exit_code == 3, result.output
    assert "0 cells finished, 0 failed, 6 to go." in lines(result)
    for name in ("study.json", "report.md", "report.html", "splits/seed1_labels1.json"):
        assert (tmp_path / "study" / name).is_file()
    before = bytes_below(tmp_path / "study")
    other = ahm(*words, "--output_dir", tmp_path / "study", "--minutes", 0, "--set", "finetune.overlap=0.1")
    assert other.exit_code == 1 and "is another study: finetune was" in lines(other)[-1]
    assert bytes_below(tmp_path / "study") == before


def test_patients_that_do_not_suffice_are_told(tmp_path: Path) -> None:
    result = ahm("study", "--dataset_dir", blobs(tmp_path, 2), *DATA, "--output_dir", tmp_path / "study")
    assert result.exit_code == 1
    assert lines(result)[-1].startswith("ValueError: study-small: 2 patient(s) with labels do not suffice")


def test_a_report_is_written_anew(tmp_path: Path) -> None:
    folder = planted_study(tmp_path / "study", seeds={"0.25": [0, 1]}, gain=lambda *_: 0.0)
    result = ahm("report", folder)
    assert result.exit_code == 0, result.output
    assert str(folder / "report.md") in result.output and (folder / "report.md").is_file()


def test_a_folder_without_a_study_has_no_report(tmp_path: Path) -> None:
    result = ahm("report", tmp_path)
    assert result.exit_code == 1 and "study.json: no such file" in result.output and len(lines(result)) == 1


def test_a_study_that_cannot_be_read_has_no_report(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text(json.dumps({"version": 99}))
    result = ahm("report", tmp_path)
    assert result.exit_code == 1 and "Traceback" not in result.output
