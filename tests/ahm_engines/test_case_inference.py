# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.inferers import SliceInferer
from monai.transforms import Activationsd, Compose, Lambdad
from PIL import Image
from torch import nn

from ahm_engines.case_inference import CaseInference, IncompleteInferenceError, TolerantDataset
from ahm_engines.handlers.predictions import ClassificationResults
from ahm_engines.handlers.quick_look import QuickLookd
from ahm_transforms.io import LeftOut
from ahm_transforms.io._types import LeftOutCase
from ahm_transforms.io.find import find_inputs
from ahm_transforms.recipes import deterministic
from tests.fixtures_data import PATIENT_ID, write_nifti

SECRET = PATIENT_ID  # folders are often called after patients


class Recorder:
    """Handler that keeps what it finds in the output."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        self.seen.append([item["case_id"] for item in engine.state.output])


class Identity(nn.Module):
    """Returns its input; fails at one call, or multiplies the second image with a bad value."""

    def __init__(self, fail_at: int | None = None, bad_value: float | None = None) -> None:
        super().__init__()
        self.fail_at, self.bad_value, self.calls = fail_at, bad_value, 0
        self.training_modes: list[bool] = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.training_modes.append(self.training)
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("out of memory")
        return image * self.bad_value if self.calls == 2 and self.bad_value else image * 1


def write_cases(folder: Path, count: int = 3) -> list[dict[str, Any]]:
    for number in range(count):
        write_nifti(folder / SECRET / f"scan{number}.nii.gz", (8, 9, 7))
    cases = find_inputs(folder).cases
    for number, case in enumerate(cases):
        case["case_id"] = f"case{number}"
    return cases


def prepare(cases: Sequence[Any], out: Path, network: nn.Module | None = None, **options: Any) -> CaseInference:
    workers = options.pop("num_workers", 0)
    chain = deterministic("mr", spatial_dims=3)
    loader = DataLoader(TolerantDataset(cases, chain), batch_size=1, num_workers=workers)
    return CaseInference("cpu", loader, network or Identity(), out, **options)


def statuses(out: Path) -> list[str]:
    return [case["status"] for case in json.loads((out / "results.json").read_text())["cases"]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_file_that_cannot_be_read_does_not_stop_the_others(tmp_path: Path, num_workers: int) -> None:
    cases = write_cases(tmp_path / "in")
    Path(cases[1]["image"]).write_bytes(b"no image")
    recorder = Recorder()
    inference = prepare(cases, tmp_path / "out", num_workers=num_workers, val_handlers=[recorder])
    with pytest.raises(IncompleteInferenceError) as caught:
        inference.run()

    assert recorder.seen == [["case0"], [], ["case2"]]
    report = json.loads((tmp_path / "out/results.json").read_text())
    assert (report["done"], report["failed"]) == (2, 1)
    assert [case["status"] for case in report["cases"]] == ["ok", "failed", "ok"]
    reason = report["cases"][1]["reason"]
    assert reason.startswith("OSError: scan1.nii.gz cannot be read: ")
    lines = str(caught.value).splitlines()
    assert lines[0] == f"1 of 3 case(s) failed, the others are in {tmp_path / 'out'}:"
    assert len(lines) == 3
    assert lines[2].startswith("  case1")
    assert reason in lines[2]


@pytest.mark.parametrize("value", [7.0, math.nan])
def test_an_image_that_shows_nothing_is_a_failure_and_not_predicted_on(tmp_path: Path, value: float) -> None:
    cases = write_cases(tmp_path / "in")
    nib.save(nib.Nifti1Image(np.full((8, 9, 7), value, np.float32), np.eye(4)), cases[1]["image"])
    with pytest.raises(IncompleteInferenceError, match=r"case1 +failed .*it has one value everywhere"):
        prepare(cases, tmp_path / "out").run()
    assert statuses(tmp_path / "out") == ["ok", "failed", "ok"]


def test_a_case_that_the_network_fails_on_does_not_stop_the_others(tmp_path: Path) -> None:
    with pytest.raises(IncompleteInferenceError, match="RuntimeError: out of memory"):
        prepare(write_cases(tmp_path / "in"), tmp_path / "out", Identity(fail_at=1)).run()
    assert statuses(tmp_path / "out") == ["failed", "ok", "ok"]


def test_a_case_that_cannot_be_saved_does_not_stop_the_others(tmp_path: Path) -> None:
    def save(data: dict[str, Any]) -> dict[str, Any]:
        if data["case_id"] == "case0":
            raise OSError(f"{data['files'][0]}: disk full")
        return data

    recorder = Recorder()
    inference = prepare(
        write_cases(tmp_path / "in"), tmp_path / "out", postprocessing=Compose([save]), val_handlers=[recorder]
    )
    with pytest.raises(IncompleteInferenceError, match=r"OSError: scan0\.nii\.gz: disk full"):
        inference.run()
    assert recorder.seen == [[], ["case1"], ["case2"]]
    assert statuses(tmp_path / "out") == ["failed", "ok", "ok"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_output_that_is_no_number_is_a_failure_not_an_empty_segmentation(tmp_path: Path, value: float) -> None:
    with pytest.raises(IncompleteInferenceError, match="NaN or infinite"):
        prepare(write_cases(tmp_path / "in"), tmp_path / "out", Identity(bad_value=value)).run()
    assert statuses(tmp_path / "out") == ["ok", "failed", "ok"]


def test_what_the_search_found_damaged_counts_as_failed(tmp_path: Path) -> None:
    bad = [LeftOut("series 3 in a", "slices are missing")]
    with pytest.raises(IncompleteInferenceError, match=r"1 of 4 .*\n.*\n  series 3 in a  failed .* slices are missing"):
        prepare(write_cases(tmp_path / "in"), tmp_path / "out", bad=bad).run()
    assert statuses(tmp_path / "out") == ["failed", "ok", "ok", "ok"]


def test_what_is_skipped_is_told_and_fails_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    skipped = [LeftOutCase(f"series 1 in {SECRET}", "a localizer", "series-12ab"), LeftOut("labels/", "labels")]
    with caplog.at_level(logging.INFO, logger="ahm_engines"):
        prepare(write_cases(tmp_path / "in", 1), tmp_path / "out", skipped=skipped).run()
    text = (tmp_path / "out/results.json").read_text()
    report = json.loads(text)
    assert (report["done"], report["failed"], report["skipped"]) == (1, 0, 2)
    assert [case["case_id"] for case in report["cases"]] == ["series-12ab", "labels/", "case0"]
    assert statuses(tmp_path / "out") == ["skipped", "skipped", "ok"]
    assert SECRET not in text
    assert "1 case(s) done, 0 failed, 2 skipped:" in caplog.text
    assert f"  series 1 in {SECRET}  skipped      0.0  series-12ab: a localizer" in caplog.text


@pytest.mark.filterwarnings("error")
def test_nothing_but_damaged_cases(tmp_path: Path) -> None:
    inference = CaseInference("cpu", [], Identity(), tmp_path, bad=[LeftOut("a", "broken")])
    with pytest.raises(IncompleteInferenceError, match="1 of 1"):
        inference.run()
    assert statuses(tmp_path) == ["failed"]


def test_all_well_is_told_in_a_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = Identity().train()
    with caplog.at_level(logging.INFO, logger="ahm_engines"):
        prepare(write_cases(tmp_path / "in", 2), tmp_path / "out", network).run()
    assert network.training_modes == [False, False]
    (message,) = [record.getMessage() for record in caplog.records]
    first, header, *rows = message.splitlines()
    assert first == "2 case(s) done, 0 failed:"
    assert header.split() == ["case_id", "status", "seconds", "reason"]
    assert [row.split()[:2] for row in rows] == [["case0", "ok"], ["case1", "ok"]]
    assert len({row.index("ok") for row in rows} | {header.index("status")}) == 1


def test_no_name_of_a_folder_and_no_traceback_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cases = write_cases(tmp_path / "in")
    Path(cases[0]["image"]).unlink()
    with caplog.at_level(logging.INFO), pytest.raises(IncompleteInferenceError) as caught:
        prepare(cases, tmp_path / "out").run()
    told = caplog.text + str(caught.value) + (tmp_path / "out/results.json").read_text()
    assert "scan0.nii.gz" in told
    assert SECRET not in told
    assert "Traceback" not in told


def test_no_name_of_a_mask_s_folder_is_told(tmp_path: Path) -> None:
    cases = [case | {"mask": str(tmp_path / SECRET / "mask.png")} for case in write_cases(tmp_path / "in", 1)]
    chain = deterministic("mr", spatial_dims=3, keys=["image", "mask"])
    item = TolerantDataset(cases, chain)[0]
    assert item["failure"].startswith("OSError: mask.png cannot be read")
    assert SECRET not in item["failure"]


def test_traceback_is_there_for_who_asks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), pytest.raises(IncompleteInferenceError):
        prepare(write_cases(tmp_path / "in", 1), tmp_path / "out", Identity(fail_at=1)).run()
    assert "Traceback (most recent call last)" in caplog.text
    assert "in forward" in caplog.text


def test_a_run_that_breaks_off_reports_what_is_done(tmp_path: Path) -> None:
    def stop(data: dict[str, Any]) -> dict[str, Any]:
        if data["case_id"] == "case1":
            raise KeyboardInterrupt
        return data

    inference = prepare(write_cases(tmp_path / "in"), tmp_path / "out", postprocessing=Compose([stop]))
    with pytest.raises(KeyboardInterrupt):
        inference.run()
    assert statuses(tmp_path / "out") == ["ok"]


def test_several_cases_in_a_batch_are_refused(tmp_path: Path) -> None:
    batch = {"image": torch.zeros(2, 1, 4, 4), "case_id": ["a", "b"]}
    with pytest.raises(ValueError, match="expected batch_size=1, got 2 cases"):
        CaseInference("cpu", [batch], Identity(), tmp_path).run()


def test_a_second_run_starts_anew(tmp_path: Path) -> None:
    inference = prepare(write_cases(tmp_path / "in", 2), tmp_path / "out")
    inference.run()
    inference.run()
    assert len(statuses(tmp_path / "out")) == 2


def test_two_dimensional_network_goes_through_volumes(tmp_path: Path) -> None:
    outputs = {}

    def keep(data: dict[str, Any]) -> dict[str, Any]:
        outputs[data["case_id"]] = data
        return data

    inference = prepare(
        write_cases(tmp_path / "in", 1),
        tmp_path / "out",
        nn.Conv2d(1, 3, 3, padding=1),
        inferer=SliceInferer(roi_size=(16, 16), spatial_dim=2),
        postprocessing=Compose([keep]),
    )
    inference.run()
    data = outputs["case0"]
    assert data["pred"].shape == (3, 8, 9, 7)
    assert data["image"].shape == (1, 8, 9, 7)
    assert [Path(name).name for name in data["files"]] == ["scan0.nii.gz"]


def test_autocast_reaches_the_network_and_the_output_is_float32(tmp_path: Path) -> None:
    kinds = []

    class Look(nn.Conv3d):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            output = super().forward(image)
            kinds.append(output.dtype)
            return output

    after = Lambdad("pred", lambda pred: kinds.append(pred.dtype))
    for amp in (False, True):
        prepare(write_cases(tmp_path / "in", 1), tmp_path / "out", Look(1, 2, 3), amp=amp, postprocessing=after).run()
    assert kinds == [torch.float32, torch.float32, torch.bfloat16, torch.float32]


def test_pictures_are_classified(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (20, 30), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"in/p{number}.png")
    (tmp_path / "in/p1.png").write_bytes(b"broken")
    classes = ["benign, small", "malignant", "normal"]
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 3))
    nn.init.constant_(network[2].weight, 0)
    network[2].bias.data = torch.tensor([0.2, 0.5, 0.3]).log()

    loader = DataLoader(
        TolerantDataset(find_inputs(tmp_path / "in").cases, deterministic("image2d", spatial_dims=2)), batch_size=1
    )
    after = Compose([Activationsd("pred", softmax=True), QuickLookd(tmp_path / "out", classes)])
    handler = ClassificationResults(tmp_path / "out", classes)
    inference = CaseInference("cpu", loader, network, tmp_path / "out", postprocessing=after, val_handlers=[handler])
    for _ in range(2):  # a second run starts anew
        with pytest.raises(IncompleteInferenceError):
            inference.run()

    assert (tmp_path / "out/predictions.csv").read_text().splitlines() == [
        'case_id,predicted,"benign, small",malignant,normal',
        "p0,malignant,0.2,0.5,0.3",
        "p2,malignant,0.2,0.5,0.3",
    ]
    content = json.loads((tmp_path / "out/predictions.json").read_text())
    assert content["classes"] == classes
    assert content["cases"][1] == {
        "case_id": "p2",
        "predicted": "malignant",
        "probabilities": {"benign, small": 0.2, "malignant": 0.5, "normal": 0.3},
    }
    assert (tmp_path / "out/p0/p0_quicklook.png").is_file()


@pytest.mark.parametrize("pred", [[0.5, 1.5], [0.2, 0.3, 0.5], [-0.5, 1.5]])
def test_what_is_no_probability_is_refused(tmp_path: Path, pred: list[float]) -> None:
    batch = {"image": torch.zeros(1, 1, 4, 4), "case_id": ["a"]}
    after = Lambdad("pred", lambda _: torch.tensor(pred))
    handler = ClassificationResults(tmp_path, ["a", "b"])
    inference = CaseInference("cpu", [batch], Identity(), tmp_path, postprocessing=after, val_handlers=[handler])
    with pytest.raises(ValueError, match=r"expected probabilities of \['a', 'b'\].*softmax=True"):
        inference.run()
