# SPDX-License-Identifier: Apache-2.0
"""Which views are compared with which, and that the numbers are those of pencil and paper."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.losses import ContrastiveLoss
from torch import Tensor, nn

from ahm_engines import PairedContrastiveLoss, pair_scores, prepare_views
from ahm_engines.handlers import ContrastiveScores

CPU = torch.device("cpu")
# two crops, two views of each; only directions count, so the lengths are arbitrary
FIRST, SECOND = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[0.6, 0.8], [0.0, 1.0]])
# cosines: a1 a2 0, a1 b1 0.6, a1 b2 0, a2 b1 0.8, a2 b2 1, b1 b2 0.8; at temperature 0.5 doubled
A1 = math.log(math.exp(1.2) + 2) - 1.2  # its partner b1, and a2 and b2 with exp(0)
A2 = math.log(math.exp(2.0) + 1 + math.exp(1.6)) - 2.0
B1 = math.log(math.exp(1.2) + 2 * math.exp(1.6)) - 1.2
B2 = math.log(math.exp(2.0) + 1 + math.exp(1.6)) - 2.0
EXPECTED = (A1 + A2 + B1 + B2) / 4  # 0.75888


def loss_of(*rows: Tensor) -> float:
    return float(PairedContrastiveLoss(0.5)(torch.cat(rows)))


class TestLoss:
    def test_two_pairs_by_hand(self) -> None:
        assert pytest.approx(0.75888, abs=1e-5) == EXPECTED
        assert loss_of(FIRST, SECOND) == pytest.approx(EXPECTED, abs=1e-6)
        assert loss_of(SECOND, FIRST) == pytest.approx(EXPECTED, abs=1e-6)  # no view comes first

    def test_other_pairs_have_another_loss(self) -> None:
        mispaired = loss_of(FIRST, SECOND.flip(0))
        partners = [(0.0, A1 + 1.2), (1.6, A2 + 2.0), (1.6, B1 + 1.2), (0.0, B2 + 2.0)]
        assert mispaired == pytest.approx(sum(total - own for own, total in partners) / 4, abs=1e-6)
        assert mispaired > EXPECTED + 0.5
        beside_each_other = loss_of(FIRST[:1], SECOND[:1], FIRST[1:], SECOND[1:])
        assert abs(beside_each_other - EXPECTED) > 0.1

    def test_lengths_do_not_count(self) -> None:
        assert loss_of(FIRST * 7, SECOND / 3) == pytest.approx(EXPECTED, abs=1e-6)

    @pytest.mark.parametrize("pairs", [2, 5])
    def test_vectors_all_alike_have_the_loss_of_chance(self, pairs: int) -> None:
        assert loss_of(torch.ones(2 * pairs, 3)) == pytest.approx(math.log(2 * pairs - 1), abs=1e-5)

    @pytest.mark.parametrize("temperature", [0.1, 0.02, 0.001])
    def test_low_temperatures_keep_their_gradient(self, temperature: float) -> None:
        """Partners look away from each other, and others the same way."""
        pred = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.2], [-1.0, -0.2]], requires_grad=True)
        loss = PairedContrastiveLoss(temperature)(pred)
        (gradient,) = torch.autograd.grad(loss, pred)
        exact = pred.detach().double().requires_grad_()
        views = nn.functional.normalize(exact, dim=1)
        scaled = (views @ views.T / temperature).masked_fill(torch.eye(4, dtype=torch.bool), -torch.inf)
        (expected,) = torch.autograd.grad((scaled.logsumexp(1) - scaled[range(4), [2, 3, 0, 1]]).mean(), exact)
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-5)

    def test_it_is_the_loss_of_monai(self) -> None:
        pred = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(PairedContrastiveLoss(0.1)(pred), ContrastiveLoss(0.1)(*pred.chunk(2)))

    def test_half_precision_is_left_behind(self) -> None:
        pred = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = PairedContrastiveLoss()(pred)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, PairedContrastiveLoss()(pred))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = PairedContrastiveLoss()(pred.bfloat16())
        assert torch.equal(rounded, PairedContrastiveLoss()(pred.bfloat16().float()))

    @pytest.mark.parametrize(
        ("shape", "told"),
        [
            ((2, 4), "views of at least 2 crops, got 1: a crop alone has no negatives"),
            ((5, 4), "two views of each crop, got shape (5, 4)"),
            ((4, 4, 2), "expected [2B, D]"),
        ],
    )
    def test_batch_that_cannot_be_compared(self, shape: tuple[int, ...], told: str) -> None:
        with pytest.raises(ValueError) as error:
            PairedContrastiveLoss()(torch.rand(shape))
        assert told in str(error.value)

    @pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
    def test_temperature_out_of_range(self, temperature: float) -> None:
        with pytest.raises(ValueError, match="temperature: expected a positive number"):
            PairedContrastiveLoss(temperature)


class TestViews:
    def test_first_views_come_first_and_in_order(self) -> None:
        image, view = torch.arange(3.0).view(3, 1, 1, 1), torch.arange(10.0, 13.0).view(3, 1, 1, 1)
        views, label = prepare_views({"image": image, "view": view, "case_id": ["a", "b", "c"]}, CPU)
        assert views.flatten().tolist() == [0, 1, 2, 10, 11, 12]
        assert label is None

    def test_further_arguments_are_those_of_to(self) -> None:
        batch = {key: torch.rand(2, 3, 4, 4) for key in ("image", "view")}
        views, _ = prepare_views(batch, CPU, True, memory_format=torch.channels_last)
        assert views.is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize("batch", [{"image": torch.rand(2, 1, 4, 4)}, torch.rand(2, 1, 4, 4)])
    def test_batch_without_views(self, batch: Any) -> None:
        with pytest.raises(TypeError, match="expected a dictionary with image and view"):
            prepare_views(batch, CPU)


class TestScores:
    def test_two_pairs_by_hand(self) -> None:
        """Of b1, both a2 and b2 are nearer than its partner."""
        scores = pair_scores(FIRST, SECOND, 0.5)
        assert scores["retrieval"] == 0.75
        assert scores["alignment"] == pytest.approx(0.8)
        assert scores["contrastive_loss"] == pytest.approx(EXPECTED, abs=1e-6)

    @pytest.mark.parametrize("temperature", [0.1, 0.5])
    def test_loss_is_that_of_training(self, temperature: float) -> None:
        first, second = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
        expected = PairedContrastiveLoss(temperature)(torch.cat([first, second]))
        assert pair_scores(first, second, temperature)["contrastive_loss"] == pytest.approx(float(expected), abs=1e-5)

    def test_vectors_all_alike_are_aligned_and_not_found(self) -> None:
        scores = pair_scores(torch.ones(6, 2), torch.ones(6, 2), 0.1)
        assert scores["alignment"] == pytest.approx(1.0)
        assert scores["retrieval"] <= 1 / 6
        assert scores["contrastive_loss"] == pytest.approx(math.log(11), abs=1e-5)


def batches(size: int, count: int = 6) -> list[dict[str, Tensor]]:
    first, second = torch.randn(2, count, 1, 3, generator=torch.Generator().manual_seed(0))
    second = first + second
    return [{"image": first[n : n + size], "view": second[n : n + size]} for n in range(0, count, size)]


def evaluator(loader: list[dict[str, Tensor]], key: str = "contrastive_loss") -> SupervisedEvaluator:
    return SupervisedEvaluator(
        CPU,
        loader,
        nn.Flatten(),
        prepare_batch=prepare_views,
        key_val_metric={key: ContrastiveScores(0.5)},
        metric_cmp_fn=lambda loss, best: loss < best,
        decollate=False,
    )


class TestHandler:
    def test_scores_do_not_depend_on_the_batches(self) -> None:
        whole = batches(6)[0]
        expected = pair_scores(whole["image"].flatten(1), whole["view"].flatten(1), 0.5)
        for size in (1, 2, 4, 6):
            engine = evaluator(batches(size))
            engine.run()
            assert engine.state.metrics == pytest.approx(expected)

    def test_every_run_starts_anew(self) -> None:
        engine = evaluator(batches(2))
        engine.run()
        first = dict(engine.state.metrics)
        engine.run()
        assert engine.state.metrics == first

    def test_lowest_loss_is_best(self) -> None:
        loader = batches(6)
        engine = evaluator(loader)
        engine.run(1)
        before = engine.state.best_metric
        loader[0]["view"] = -loader[0]["image"]
        engine.run(2)
        assert (engine.state.best_metric, engine.state.best_metric_epoch) == (before, 1)
        loader[0]["view"] = loader[0]["image"].clone()
        engine.run(3)
        assert engine.state.best_metric < before and engine.state.best_metric_epoch == 3

    @pytest.mark.filterwarnings("ignore:Key metric is not a scalar")
    def test_single_crop_has_no_scores(self, caplog: pytest.LogCaptureFixture) -> None:
        engine = evaluator(batches(1, count=1))
        engine.run()
        assert engine.state.metrics["contrastive_loss"] is None
        assert math.isnan(engine.state.metrics["retrieval"])
        assert engine.state.best_metric_epoch == -1
        assert "One crop to validate on" in caplog.text

    def test_unknown_key_metric(self) -> None:
        with pytest.raises(ValueError, match=r"key metric: expected one of .*, got 'dice'"):
            evaluator(batches(2), key="dice")


def test_trainer_lowers_the_loss_of_the_batch_it_sees() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
    losses: list[float] = []
    trainer = SupervisedTrainer(
        CPU,
        40,
        batches(6),
        network,
        torch.optim.Adam(network.parameters(), 0.02),
        PairedContrastiveLoss(0.5),
        prepare_batch=prepare_views,
        decollate=False,
    )
    whole = batches(6)[0]
    start = PairedContrastiveLoss(0.5)(network(torch.cat([whole["image"], whole["view"]])))
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: losses.append(float(engine.state.output["loss"]))
    )
    trainer.run()
    assert losses[0] == pytest.approx(float(start))
    assert losses[-1] < 0.7 * losses[0]
