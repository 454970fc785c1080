# SPDX-License-Identifier: Apache-2.0
"""Which cells run, in what order, and what becomes of those that fail; the runs themselves are fakes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ahm_engines.study import Progress, Study, run_study, runner
from ahm_engines.study.cells import Cell, finetuning_cells, pretraining_cells
from tests.fixtures_study_runs import (
    FOUR_ARMS,
    FakeRuns,
    blobs,
    bytes_below,
    rows_of,
    study_of,
    table,
    wait_until,
)

BUNDLES = Path(__file__).parents[3] / "bundles"
FORK = multiprocessing.get_context("fork")
SMALL: dict[str, Any] = {"arms": FOUR_ARMS, "seeds": {"0.5": 1, "1.0": 2}, "pretrain.max_epochs": 3}
RANDOM, A3C = Cell("pretrain", "random", 0), Cell("pretrain", "a3c", 0)
TUNED = Cell("finetune", "random", 0, 1.0)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return blobs(tmp_path_factory.mktemp("data"))


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRuns:
    """Processes are forked, so that they know the fake."""
    runs = FakeRuns(tmp_path / "notes.txt")
    monkeypatch.setattr(runner, "run_job", runs)
    monkeypatch.setattr(runner, "_context", lambda: FORK)
    return runs


def run(study: Study, folder: Path, **options: Any) -> Progress:
    return run_study(study, folder / "study", bundles_dir=BUNDLES, **options)


def statuses(folder: Path) -> list[str]:
    return [row["status"] for row in rows_of(folder / "study")]


def all_cells(study: Study) -> list[Cell]:
    pretraining = [cell for late in (False, True) for cell in pretraining_cells(study, equal_time=late)]
    return [*pretraining, *finetuning_cells(study)]


def names(cells: Sequence[Cell]) -> list[str]:
    return [str(cell) for cell in cells]


def test_cells_run_in_the_order_of_stages_and_each_has_one_row(images: Path, tmp_path: Path, fake: FakeRuns) -> None:
    study = study_of(images, SMALL)
    told: list[tuple[Cell, str]] = []
    progress = run(study, tmp_path, listener=lambda cell, row: told.append((cell, row["status"])))
    cells = all_cells(study)
    assert len(cells) == 18 and fake.begun() == names(cells)
    assert (progress.finished, progress.failed, progress.open) == (18, [], 0)
    assert told == [(cell, "done") for cell in cells]
    rows = rows_of(tmp_path / "study")
    assert [(row["stage"], row["arm"], row["seed"], row["status"]) for row in rows] == [
        (cell.stage, cell.arm, str(cell.seed), "done") for cell in cells
    ]


def test_rows_hold_what_was_measured(images: Path, tmp_path: Path, fake: FakeRuns) -> None:
    run(study_of(images, SMALL), tmp_path)
    rows = {(row["stage"], row["arm"], row["fraction"], row["seed"]): row for row in rows_of(tmp_path / "study")}
    tuned, pretrained = rows["finetune", "random", "1.0", "1"], rows["pretrain", "random", "", "0"]
    assert (tuned["dice"], tuned["validation"], tuned["labelled_patients"]) == ("0.6", "0.75", "6")
    assert (tuned["steps"], tuned["seconds"], tuned["step_seconds"], tuned["epochs"]) == ("4", "2", "0.5", "10")
    assert (tuned["evaluated_on"], tuned["memory_mib"], tuned["device"]) == ("test", "10", "cpu")
    assert (pretrained["random_psnr"], pretrained["epochs"], pretrained["labelled_patients"]) == ("20", "3", "")
    assert rows["finetune", "scratch", "0.5", "0"]["labelled_patients"] == "3"
    for name in ("ahm", "monai", "torch", "created", "config_hash"):
        assert tuned[name]
    curves = table(tmp_path / "study/curves.csv")
    assert curves[0] == ["arm", "fraction", "seed", "draw", "step", "value"]
    assert [line for line in curves if line[:3] == ["random", "1.0", "1"]] == [
        ["random", "1.0", "1", "0", step, value] for step, value in (("2", "0.25"), ("4", "0.75"), ("6", "0.5"))
    ]
    assert len(curves) == 1 + 3 * 12


def test_a_second_call_runs_nothing(images: Path, tmp_path: Path, fake: FakeRuns) -> None:
    run(study_of(images, SMALL), tmp_path)
    before, begun = bytes_below(tmp_path / "study"), fake.begun()
    assert run(study_of(images, SMALL), tmp_path) == Progress(finished=18)
    assert fake.begun() == begun and bytes_below(tmp_path / "study") == before


def die_after(count: int, cell: Cell, row: Mapping[str, str]) -> None:
    """Kill the process of the study when it is told of its last but so many cells."""
    told.append(cell)
    if len(told) == count:
        os.kill(os.getpid(), signal.SIGKILL)


told: list[Cell] = []


def test_a_killed_study_goes_on(images: Path, tmp_path: Path, fake: FakeRuns) -> None:
    study = study_of(images, SMALL)
    target = partial(run, study, tmp_path, listener=partial(die_after, 5))
    process = FORK.Process(target=target)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and statuses(tmp_path) == ["done"] * 5
    assert run(study, tmp_path).finished == 18
    assert fake.begun() == names(all_cells(study)) and statuses(tmp_path) == ["done"] * 18


def test_failed_pretraining_takes_its_finetunings_along_and_no_others(
    images: Path, tmp_path: Path, fake: FakeRuns
) -> None:
    study = study_of(images, {"arms": ["scratch", "random", "a3c"], "seeds": {"0.5": 1, "1.0": 2}})
    fake.outcomes[RANDOM] = {"error": "out of memory"}
    progress = run(study, tmp_path)
    failed = [row for row in rows_of(tmp_path / "study") if row["status"] == "failed"]
    assert [(row["stage"], row["arm"], row["fraction"], row["seed"]) for row in failed] == [
        *(("pretrain", "random", "", "0"), ("finetune", "random", "0.5", "0"), ("finetune", "random", "1.0", "0"))
    ]
    assert [row["error"] for row in failed] == [
        *("out of memory", *["needs pretrain random, seed 0, which has failed."] * 2)
    ]
    assert (progress.finished, len(progress.failed), progress.open) == (10, 3, 0)
    assert progress.failed[0] == "pretrain random, seed 0: out of memory"
    assert str(TUNED) not in fake.begun() and "finetune random, 1 of the labels, seed 1" in fake.begun()


def test_failed_cells_are_tried_again_and_the_others_not(images: Path, tmp_path: Path, fake: FakeRuns) -> None:
    study = study_of(images, {"arms": ["scratch", "random"], "seeds": {"1.0": 2}})
    fake.outcomes[RANDOM] = {"error": "out of memory"}
    run(study, tmp_path)
    fake.outcomes.clear()
    first = len(fake.begun())
    assert run(study, tmp_path) == Progress(finished=6)
    assert fake.begun()[first:] == names([RANDOM, TUNED])
    assert statuses(tmp_path).count("failed") == 2 and len(statuses(tmp_path)) == 8


def test_a_run_that_stopped_goes_on_from_its_checkpoint(images: Path, tmp_path: Path, fake: FakeRuns) -> None:
    study = study_of(images, {"arms": ["random"]})
    fake.outcomes[RANDOM] = {"error": "power cut"}
    run(study, tmp_path)
    fake.outcomes.clear()
    run(study, tmp_path)
    assert [line[:2] for line in fake.lines() if line[0] != "end"] == [
        *(["begin", str(RANDOM)], ["again", str(RANDOM)], ["begin", str(TUNED)])
    ]


def test_a_run_with_other_settings_does_not_go_on_from_a_checkpoint(
    images: Path, tmp_path: Path, fake: FakeRuns
) -> None:
    """Its numbers would come from the settings before."""
    fake.outcomes[RANDOM] = {"error": "learning rate too high"}
    run(study_of(images, {"arms": ["random"]}), tmp_path)
    fake.outcomes.clear()
    mended = {"arms": {"random": {"pretrain": {"learning_rate": 0.0001}}}}
    assert run(study_of(images, mended), tmp_path).failed == []
    assert [line[0] for line in fake.lines() if line[1] == str(RANDOM)] == ["begin", "end", "begin", "end"]


def test_a_process_that_is_killed_is_a_failed_cell(images: Path, tmp_path: Path, fake: FakeRuns) -> None:
    fake.dying.add(Cell("finetune", "scratch", 0, 1.0))
    progress = run(study_of(images), tmp_path)
    row = next(row for row in rows_of(tmp_path / "study") if row["status"] == "failed")
    assert (row["arm"], row["seconds"]) == ("scratch", "")
    assert row["error"].startswith("the process ended with signal 9, perhaps for want of memory; see log.txt")
    assert (progress.finished, len(progress.failed)) == (2, 1)


def test_an_old_outcome_is_not_taken_for_a_new_one(images: Path, tmp_path: Path, fake: FakeRuns) -> None:
    """A cell that wrote its outcome and was not recorded runs again; if it dies, it has failed."""
    fake.outcomes[RANDOM] = {"error": "first"}
    study = study_of(images, {"arms": ["random"]})
    run(study, tmp_path)
    fake.dying.add(RANDOM)
    assert "signal 9" in run(study, tmp_path).failed[0]


@pytest.mark.parametrize(
    ("random", "a3c", "epochs"),
    [
        ((0.2, 0.9, 0.3), (0.7, 0.5, 0.6), 8),  # 2.5 times 3 epochs, rounded up; two of three seeds had company
        ((0.2, 0.2, 0.2), (0.4, 0.4, 0.4), 6),
        ((0.4, 0.4, 0.4), (0.1, 0.1, 0.1), 3),  # never fewer than the others
    ],
)
def test_equal_time_is_epochs_by_the_measured_times_of_a_step(
    images: Path, tmp_path: Path, fake: FakeRuns, random: Sequence[float], a3c: Sequence[float], epochs: int
) -> None:
    for name, times in (("random", random), ("a3c", a3c)):
        fake.outcomes |= {Cell("pretrain", name, seed): {"step_seconds": time} for seed, time in enumerate(times)}
    run(study_of(images, SMALL | {"seeds": {"1.0": 3}}), tmp_path)
    ran = {(line[1].split(",")[0], line[2]) for line in fake.lines() if line[0] == "begin"}
    assert {pair for pair in ran if pair[0].startswith("pretrain")} == {
        *(("pretrain random", "3"), ("pretrain a3c", "3"), ("pretrain random_equal_time", str(epochs)))
    }
    rows = [row for row in rows_of(tmp_path / "study") if row["stage"] == "pretrain"]
    assert {row["epochs"] for row in rows if row["arm"] == "random_equal_time"} == {str(epochs)}


def test_equal_time_follows_the_epochs_of_the_other_arm(images: Path, tmp_path: Path, fake: FakeRuns) -> None:
    arms = {"random": {}, "random_equal_time": {}, "a3c": {"pretrain": {"max_epochs": 5}}}
    fake.outcomes |= {RANDOM: {"step_seconds": 0.25, "steps": 12}, A3C: {"steps": 20}}
    run(study_of(images, SMALL | {"arms": arms, "seeds": {"1.0": 1}}), tmp_path)
    assert ["begin", "pretrain random_equal_time, seed 0", "10", ""] in fake.lines()


def test_seeds_that_come_later_get_the_epochs_of_those_before(images: Path, tmp_path: Path, fake: FakeRuns) -> None:
    fake.outcomes |= {RANDOM: {"step_seconds": 0.2}, A3C: {"step_seconds": 0.4}}
    run(study_of(images, SMALL | {"seeds": {"1.0": 1}}), tmp_path)
    fake.outcomes |= {Cell("pretrain", "random", 1): {"step_seconds": 0.1}}  # its machine is faster
    run(study_of(images, SMALL | {"seeds": {"1.0": 2}}), tmp_path)
    rows = [row for row in rows_of(tmp_path / "study") if row["stage"] == "pretrain"]
    assert [row["epochs"] for row in rows if row["arm"] == "random_equal_time"] == ["6", "6"]


def test_equal_time_is_no_more_than_a_shorter_pretraining_took(images: Path, tmp_path: Path, fake: FakeRuns) -> None:
    arms = {"random": {}, "random_equal_time": {}, "a3c": {"pretrain": {"max_epochs": 1}}}
    fake.outcomes |= {RANDOM: {"step_seconds": 0.5, "steps": 12}, A3C: {"step_seconds": 0.6, "steps": 4}}
    run(study_of(images, SMALL | {"arms": arms, "seeds": {"1.0": 1}}), tmp_path)
    assert ["begin", "pretrain random_equal_time, seed 0", "2", ""] in fake.lines()


@pytest.mark.parametrize("place", [".", "study", "deep/study"])
def test_a_study_among_its_images_is_refused(tmp_path: Path, fake: FakeRuns, place: str) -> None:
    images = blobs(tmp_path)
    before = bytes_below(tmp_path)
    with pytest.raises(ValueError, match="output_dir: expected a folder outside of the images in"):
        run_study(study_of(images, SMALL), images / place, bundles_dir=BUNDLES)
    assert bytes_below(tmp_path) == before


def test_equal_time_knows_that_epochs_differ_in_steps(images: Path, tmp_path: Path, fake: FakeRuns) -> None:
    """Half as many steps that take twice as long each are no more time."""
    fake.outcomes |= {RANDOM: {"step_seconds": 0.5, "steps": 12}, A3C: {"step_seconds": 1.0, "steps": 6}}
    run(study_of(images, SMALL | {"seeds": {"1.0": 1}}), tmp_path)
    assert ["begin", "pretrain random_equal_time, seed 0", "3", ""] in fake.lines()


def test_equal_time_without_a_measured_time_fails_and_says_why(images: Path, tmp_path: Path, fake: FakeRuns) -> None:
    fake.outcomes[A3C] = {"error": "no such masker"}
    progress = run(study_of(images, SMALL | {"seeds": {"1.0": 1}}), tmp_path)
    assert [line.split(": ", 1)[0] for line in progress.failed] == [
        "pretrain a3c, seed 0",
        "pretrain random_equal_time, seed 0",
        "finetune random_equal_time, 1 of the labels, seed 0",
        "finetune a3c, 1 of the labels, seed 0",
    ]
    assert "arm a3c: no pretraining has finished" in progress.failed[1]
    assert progress.finished == 3


def test_time_is_up_before_the_first_cell(images: Path, tmp_path: Path, fake: FakeRuns) -> None:
    assert run(study_of(images, SMALL), tmp_path, minutes=0) == Progress(open=18)
    assert fake.begun() == [] and rows_of(tmp_path / "study") == []


def test_a_cell_that_runs_when_time_is_up_is_stopped_and_open(
    images: Path, tmp_path: Path, fake: FakeRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that stands still until that cell has begun."""
    clock = SimpleNamespace(monotonic=lambda: 0.0 if len(fake.begun()) < 2 else 10.0)
    monkeypatch.setattr(runner, "time", clock)
    study = study_of(images, {"arms": ["random"], "seeds": {"1.0": 2}})
    fake.lasting.add(Cell("pretrain", "random", 1))
    progress = run(study, tmp_path, minutes=0.5 / 60)
    assert (progress.finished, progress.failed, progress.open) == (1, [], 3)
    assert statuses(tmp_path) == ["done"] and len(fake.begun()) == 2
    assert not multiprocessing.active_children() and fake.lines()[-1][0] == "begin"
    fake.lasting.clear()
    assert run(study, tmp_path) == Progress(finished=4)
    assert fake.lines()[3][:2] == ["again", "pretrain random, seed 1"]


@pytest.mark.parametrize("workers", [2, 3])
def test_as_many_cells_as_devices_run_at_the_same_time(
    images: Path, tmp_path: Path, fake: FakeRuns, workers: int
) -> None:
    study = study_of(images, {"arms": ["scratch"], "seeds": {"1.0": workers}})
    fake.together.update(finetuning_cells(study))
    devices = [str(10 + index) for index in range(workers)]
    assert run(study, tmp_path, devices=devices).finished == workers
    assert sorted(line[3] for line in fake.lines() if line[0] == "begin") == devices


def test_one_device_runs_one_cell_at_a_time(images: Path, tmp_path: Path, fake: FakeRuns) -> None:
    run(study_of(images, {"seeds": {"1.0": 3}}), tmp_path)
    kinds = [line[0] for line in fake.lines()]
    assert kinds == ["begin", "end"] * 9


def test_arms_fractions_and_seeds_may_come_later(images: Path, tmp_path: Path, fake: FakeRuns) -> None:
    run(study_of(images), tmp_path)
    more = study_of(images, {"arms": ["scratch", "random", "a3c"], "seeds": {"0.5": 1, "1.0": 2}})
    assert run(more, tmp_path).finished == len(all_cells(more)) == 13
    assert sorted(fake.begun()) == sorted(names(all_cells(more)))
    assert json.loads((tmp_path / "study/study.json").read_text())["seeds"] == {"0.5": [0], "1.0": [0, 1]}


def test_draws_of_other_labels_may_come_later_but_not_in_place_of_the_same(
    images: Path, tmp_path: Path, fake: FakeRuns
) -> None:
    few = {"arms": ["scratch"], "seeds": {"0.5": 1}}
    run(study_of(images, few), tmp_path)
    assert run(study_of(images, {**few, "draws": 2, "draw_labels": True}), tmp_path).finished == 2
    assert len(fake.begun()) == 2
    results = tmp_path / "study/results.csv"
    before = results.read_bytes()
    with pytest.raises(ValueError, match="seed 0, draw 1 was run with other settings, patients or another pretraining"):
        run(study_of(images, {**few, "draws": 2}), tmp_path)
    assert results.read_bytes() == before and len(fake.begun()) == 2


SHARING = {
    "scratch": {},
    "random_encoder": {"like": "random", "pretrained_by": "random", "finetune": {"pretrained_part": "encoder"}},
    "random": {},
}


def test_arms_that_differ_only_in_finetuning_share_a_pretraining(images: Path, tmp_path: Path, fake: FakeRuns) -> None:
    run(study_of(images, {"arms": SHARING, "seeds": {"1.0": 1}}), tmp_path)
    begun = ["pretrain random, seed 0"]
    begun += [f"finetune {name}, 1 of the labels, seed 0" for name in ("scratch", "random_encoder", "random")]
    assert fake.begun() == begun
    options = {name: tmp_path / f"study/runs/finetune/{name}_labels1_seed0/options.json" for name in SHARING}
    started = {name: json.loads(path.read_text()).get("pretrained") for name, path in options.items()}
    assert started["scratch"] is None
    assert started["random_encoder"] == started["random"] == str(tmp_path / f"study/{RANDOM.folder}/models/model.pt")


def test_a_shared_pretraining_that_fails_takes_all_its_finetunings_along(
    images: Path, tmp_path: Path, fake: FakeRuns
) -> None:
    fake.outcomes[RANDOM] = {"error": "out of memory"}
    progress = run(study_of(images, {"arms": SHARING, "seeds": {"1.0": 1}}), tmp_path)
    assert (progress.finished, len(progress.failed)) == (1, 3)
    assert all("needs pretrain random, seed 0" in failure for failure in progress.failed[1:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "other"}, "is another study: name was tiny, is other"),
        ({"finetune.max_epochs": 11}, r"study.json is another study: finetune was \{.*10.*\}, is \{.*11"),
        ({"data.spacing_mm": 2, "evaluate_on": "validation"}, "another study: data was .*; evaluate_on was test, is"),
        ({"val_fraction": 0.3}, "another study: val_fraction was 0.2, is 0.3"),
        ({"arms": {"scratch": {}, "random": {"pretrain": {"norm": "l2"}}}}, "pretrain random, seed 0 was run with oth"),
        ({"arms": {"scratch": {"finetune": {"overlap": 0.2}}}}, "finetune scratch, 1 of the labels, seed 0 was run"),
        ({"arms": {"scratch": {"pretrain": {}}}}, "finetune scratch, 1 of the labels, seed 0 was run with other"),
    ],
)
def test_a_folder_of_another_study_stays_as_it_is(
    images: Path, tmp_path: Path, fake: FakeRuns, changes: dict[str, Any], message: str
) -> None:
    run(study_of(images), tmp_path)
    before, begun = bytes_below(tmp_path / "study"), fake.begun()
    with pytest.raises(ValueError, match=message):
        run(study_of(images, changes), tmp_path)
    assert bytes_below(tmp_path / "study") == before and fake.begun() == begun


@pytest.mark.parametrize("file", ["study.json", "results.csv"])
def test_a_study_of_another_version_stays_as_it_is(images: Path, tmp_path: Path, fake: FakeRuns, file: str) -> None:
    run(study_of(images), tmp_path)
    path = tmp_path / "study" / file
    text = path.read_text()
    old = text.replace('"version": 1', '"version": 0') if file == "study.json" else text.replace(",device,", ",gpu,", 1)
    path.write_text(old)
    with pytest.raises(ValueError, match=f"{file}: written by another version of ahm"):
        run(study_of(images), tmp_path)
    assert path.read_text() == old != text


def run_until_interrupted(study: Study, folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in what they run in the background
    run(study, folder)


def test_two_studies_at_a_time_keep_out_of_one_folder(images: Path, tmp_path: Path, fake: FakeRuns) -> None:
    study = study_of(images, {"arms": ["scratch"], "seeds": {"1.0": 2}})
    fake.lasting.add(Cell("finetune", "scratch", 1, 1.0))
    process = FORK.Process(target=partial(run_until_interrupted, study, tmp_path))
    process.start()
    try:
        assert wait_until(lambda: len(fake.begun()) == 2)
        before = bytes_below(tmp_path / "study")
        with pytest.raises(BlockingIOError, match="another process is at work in this folder"):
            run(study, tmp_path)
        assert bytes_below(tmp_path / "study") == before and len(fake.begun()) == 2
    finally:
        while process.is_alive():  # Python drops an interrupt that comes in a hook behind a fork
            os.kill(process.pid or 0, signal.SIGINT)  # as Ctrl-C does: it stops its cells, too
            process.join(20)
    fake.lasting.clear()
    assert run(study, tmp_path).finished == 2


@pytest.mark.parametrize("keep", [False, True])
def test_checkpoints_that_nothing_needs_are_removed(images: Path, tmp_path: Path, fake: FakeRuns, keep: bool) -> None:
    fake.outcomes[Cell("finetune", "scratch", 0, 1.0)] = {"error": "late"}
    run(study_of(images), tmp_path, keep_models=keep)
    runs = tmp_path / "study/runs"
    left = {path.relative_to(runs).as_posix() for path in runs.rglob("*.pt")}
    failed = {"finetune/scratch_labels1_seed0/models/last.pt", "finetune/scratch_labels1_seed0/models/model.pt"}
    kept = {"finetune/random_labels1_seed0/models/model.pt"} if keep else set()
    assert left == failed | kept | {"pretrain/random_seed0/models/model.pt"}


def test_unusable_data_leave_no_study(tmp_path: Path, fake: FakeRuns) -> None:
    images = blobs(tmp_path, 2)
    with pytest.raises(ValueError, match="do not suffice"):
        run(study_of(images), tmp_path)
    assert not (tmp_path / "study/study.json").exists() and fake.begun() == []


ALL_AXES = {"arms.random.finetune": {"flip_axes": [0, 1]}}


@pytest.mark.parametrize(
    ("flips", "told"),
    [
        ({}, ["[1], or [] for none"]),  # the bundle's own: all axes
        ({"finetune.flip_axes": [1]}, []),
        ({"finetune.flip_axes": [1], **ALL_AXES}, ["[1], or [] for none"]),
        ({"finetune.flip_axes": [0], **ALL_AXES}, ["[]", "[1], or [] for none"]),
    ],
)
def test_flips_that_swap_what_classes_are_called_are_told(
    images: Path,
    tmp_path: Path,
    fake: FakeRuns,
    flips: dict[str, Any],
    told: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Once for each setting of the study and its arms."""
    run(study_of(images, {"data.classes": ["left or right square"], **flips}), tmp_path, minutes=0)
    messages = [message for message in caplog.messages if "flips along" in message]
    assert [message.partition("flip_axes=")[2] for message in messages] == [f"{axes}." for axes in told]
