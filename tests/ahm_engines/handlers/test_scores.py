# SPDX-License-Identifier: Apache-2.0
"""Scores on MONAI's evaluator: which epoch is best, what is written, and several processes."""

from __future__ import annotations

import csv
import json
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.data import DataLoader, Dataset, DistributedSampler, MetaTensor
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import ValidationHandler
from torch import Tensor, distributed, nn

from ahm_engines.handlers import Checkpoints, ClassificationScores, SegmentationScores, load_checkpoint


def stripes(width: int) -> Tensor:
    """Class 1 in the first columns of a picture of 8."""
    values = torch.zeros(1, 8, 8)
    values[..., :width] = 1
    return MetaTensor(values)


class Shown(nn.Module):
    """Predicts what it is shown."""

    def forward(self, image: Tensor) -> Tensor:
        return image


def cases(*widths: tuple[int, int], ids: bool = True) -> list[dict[str, Any]]:
    """Pairs of what is predicted and what is right; the last case comes first in the alphabet."""
    entries = [{"image": stripes(pred), "label": stripes(label)} for pred, label in widths]
    names = [{"case_id": f"case{9 - n}", "patient_id": "secret"} if ids else {} for n in range(len(widths))]
    return [entry | name for entry, name in zip(entries, names, strict=True)]


def evaluator_with(scores: Any, data: list[dict[str, Any]], key: str | None = None, **options: Any) -> Any:
    how: dict[str, Any] = {"val_handlers": [scores]} if key is None else {"key_val_metric": {key: scores}}
    loader = DataLoader(Dataset(data), batch_size=2)
    return SupervisedEvaluator("cpu", loader, options.pop("network", Shown()), **how, **options)


def test_means_over_cases_stand_in_the_metrics_as_plain_numbers() -> None:
    evaluator = evaluator_with(SegmentationScores(["a"], unit="px"), cases((4, 4), (2, 4), (0, 4), (4, 0)))
    evaluator.run()
    metrics = evaluator.state.metrics
    assert metrics["dice"] == metrics["dice_a"] == pytest.approx((1 + 2 / 3 + 0 + 0) / 4)
    assert metrics["hd95_px"] == pytest.approx((0 + 2) / 2)
    assert metrics["hd95_missing"] == 1.0  # no network has a distance where the label has nothing
    assert all(type(value) is float for value in metrics.values())


def test_the_mean_is_over_cases_of_the_mean_over_their_classes() -> None:
    data = cases((4, 4), (4, 4))
    data[0]["label"][..., 4:] = 2  # class b is missed here, and nowhere else to be seen
    evaluator = evaluator_with(SegmentationScores(["a", "b"], unit="px"), data)
    evaluator.run()
    assert evaluator.state.metrics["dice"] == pytest.approx(((1 + 0) / 2 + 1) / 2)
    assert evaluator.state.metrics["dice_b"] == 0.0


def test_a_second_run_starts_anew() -> None:
    evaluator = evaluator_with(SegmentationScores(["a"], unit="px"), cases((4, 4), (2, 4)))
    evaluator.run(1)
    first = dict(evaluator.state.metrics)
    evaluator.run(2)
    assert evaluator.state.metrics == first


def test_table_and_summary_hold_what_was_measured_and_nothing_of_the_patient(tmp_path: Path) -> None:
    scores = SegmentationScores(["a"], tmp_path / "scores", unit="px", surface_tolerance=0.5)
    evaluator_with(scores, cases((4, 4), (2, 4), (0, 4), (0, 0))).run()
    assert sorted(path.name for path in (tmp_path / "scores").iterdir()) == ["scores.csv", "scores.json"]
    with open(tmp_path / "scores" / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ["dice", "hd95_px", "surface_dice"]
    assert list(rows[0]) == ["case_id", *columns, *(f"{c}_a" for c in columns), "label_px_a", "pred_px_a"]
    assert [row["case_id"] for row in rows] == ["case6", "case7", "case8", "case9"]
    assert [row["dice"] for row in rows] == ["", "0.0", rows[2]["dice"], "1.0"]
    assert float(rows[2]["dice"]) == pytest.approx(2 / 3)
    assert (rows[2]["label_px_a"], rows[2]["pred_px_a"]) == ("32.0", "16.0")
    report = json.loads((tmp_path / "scores" / "scores.json").read_text(), parse_constant=pytest.fail)
    assert (report["cases"], report["classes"], report["unit"], report["surface_tolerance"]) == (4, ["a"], "px", 0.5)
    assert report["hd95_missing"] == {"a": 1}
    dice = report["scores"]["dice_a"]
    assert dice["count"] == 3 and dice["median"] == pytest.approx(2 / 3)
    assert dice["mean"] == pytest.approx(5 / 9) and dice["std"] == pytest.approx((7 / 27) ** 0.5)


def test_what_nobody_can_know_is_null_in_the_summary(tmp_path: Path) -> None:
    evaluator_with(SegmentationScores(["a", "b"], tmp_path, unit="px"), cases((2, 4))).run()
    report = json.loads((tmp_path / "scores.json").read_text(), parse_constant=pytest.fail)
    assert report["scores"]["dice_b"] == {"mean": None, "std": None, "median": None, "count": 0}


def test_classification_is_written_with_its_confusion_matrix(tmp_path: Path) -> None:
    pairs = [(0, [2.0, 0.0]), (1, [0.0, 2.0]), (1, [2.0, 0.0])]
    data = [{"image": torch.tensor(p), "label": y, "case_id": f"c{n}"} for n, (y, p) in enumerate(pairs)]
    evaluator = evaluator_with(ClassificationScores(["no", "yes"], tmp_path), data, "macro_f1")
    evaluator.run()
    assert evaluator.state.best_metric == evaluator.state.metrics["macro_f1"] == pytest.approx(2 / 3)
    report = json.loads((tmp_path / "scores.json").read_text())
    assert report["confusion_matrix"] == [[1, 0], [1, 1]]
    assert report["scores"]["accuracy"] == pytest.approx(2 / 3)
    with open(tmp_path / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["case_id", "label", "predicted", "probability_no", "probability_yes"]
    assert [row["predicted"] for row in rows] == ["no", "yes", "no"]


def test_cases_without_an_identity_are_numbered(tmp_path: Path) -> None:
    evaluator_with(SegmentationScores(["a"], tmp_path, unit="px"), cases((4, 4), (2, 4), ids=False)).run()
    with open(tmp_path / "scores.csv", newline="") as file:
        assert [row["case_id"] for row in csv.DictReader(file)] == ["00000", "00001"]


def test_two_cases_of_one_name_are_refused() -> None:
    data = [entry | {"case_id": "same"} for entry in cases((4, 4), (2, 4))]
    with pytest.raises(ValueError, match="case_id: 'same' came twice"):
        evaluator_with(SegmentationScores(["a"], unit="px"), data).run()


def test_output_that_is_not_decollated_is_refused() -> None:
    with pytest.raises(TypeError, match="decollate=True"):
        evaluator_with(SegmentationScores(["a"], unit="px"), cases((4, 4)), decollate=False).run()


class Weighing(nn.Module):
    """Weighs the image; the weight is what is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.0))

    def forward(self, image: Tensor) -> Tensor:
        return (image * self.weight).round() if not self.training else image * self.weight


def test_the_best_epoch_of_the_key_metric_is_the_checkpoint_that_stays(tmp_path: Path) -> None:
    """Each step adds 1 to the weight, and 1 is right: the first epoch is the best."""
    network = Weighing()
    scores = SegmentationScores(["a", "b", "c"], unit="px", distances=False)
    evaluator = evaluator_with(scores, cases((4, 4), (2, 4)), "dice", network=network)
    trainer = SupervisedTrainer(
        "cpu",
        3,
        DataLoader(Dataset(cases((4, 4))), batch_size=1),
        network,
        torch.optim.SGD(network.parameters(), 1.0),
        lambda pred, label: -network.weight,
        decollate=False,
        train_handlers=[
            ValidationHandler(1, evaluator),
            Checkpoints(tmp_path, {"model": network}, evaluator=evaluator),
        ],
    )
    trainer.run()
    assert evaluator.state.best_metric_epoch == 1
    best = load_checkpoint(tmp_path / "model.pt")
    assert best["best"] == {"metric": pytest.approx((1 + 2 / 3) / 2), "epoch": 1, "name": "dice"}
    assert float(best["model"]["weight"]) == 1.0
    assert float(load_checkpoint(tmp_path / "last.pt")["model"]["weight"]) == 3.0


def test_a_class_can_be_the_key_and_unknown_names_are_refused() -> None:
    scores = SegmentationScores(["a"], unit="px")
    evaluator = evaluator_with(scores, cases((2, 4)), "dice_a")
    evaluator.run()
    assert evaluator.state.best_metric == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match=r"key metric: expected one of \['dice', .*, got 'mean_dice'"):
        evaluator_with(scores, cases((2, 4)), "mean_dice")


@pytest.mark.filterwarnings("ignore:Key metric is not a scalar")
def test_a_key_metric_that_cannot_be_known_is_never_the_best() -> None:
    evaluator = evaluator_with(SegmentationScores(["a"], unit="px"), cases((0, 0)), "dice")
    evaluator.run()
    assert evaluator.state.metrics["dice"] is None
    assert evaluator.state.best_metric_epoch == -1


def score_in_one_of_two(rank: int, folder: Path, answers: Any) -> None:
    """Score three cases in two processes of two each: one is there twice."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    dataset = Dataset(cases((4, 4), (2, 4), (0, 4)))
    loader = DataLoader(dataset, sampler=DistributedSampler(dataset, even_divisible=True, shuffle=False))
    scores: Any = SegmentationScores(["a"], folder, unit="px", distances=False)
    evaluator = SupervisedEvaluator("cpu", loader, Shown(), key_val_metric={"dice": scores})
    evaluator.run()
    answers.put((len(loader), evaluator.state.best_metric))


def test_two_processes_gather_their_cases_and_count_none_twice(tmp_path: Path) -> None:
    context = get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=score_in_one_of_two, args=(rank, tmp_path, answers)) for rank in (0, 1)]
    for process in processes:
        process.start()
    try:
        assert [answers.get(timeout=60) for _ in processes] == [(2, pytest.approx((1 + 2 / 3 + 0) / 3))] * 2
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    with open(tmp_path / "scores.csv", newline="") as file:
        assert [row["case_id"] for row in csv.DictReader(file)] == ["case7", "case8", "case9"]


def test_several_processes_need_identities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ignite.distributed.get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="several processes cannot tell repeated cases"):
        evaluator_with(SegmentationScores(["a"], unit="px"), cases((4, 4), ids=False)).run()
