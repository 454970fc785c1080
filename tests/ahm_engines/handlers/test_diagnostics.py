# SPDX-License-Identifier: Apache-2.0
"""Overlaps tell a masker that looks at the image from one that does not."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from ignite.engine import Engine
from torch import Tensor, nn

from ahm_engines.evaluator import MaskedEvaluator
from ahm_engines.events import MaskedKeys
from ahm_engines.handlers.diagnostics import MaskOverlap
from ahm_networks.maskers import Decision, UniformMasker
from ahm_networks.nets import ReconstructionUNet


def decision(*hidden: Sequence[int], cells: int = 8, allowed: Sequence[Sequence[int]] | None = None) -> Decision:
    """One image per list of hidden places, on a grid of ``cells / 2`` by 2."""
    grid = _marked(hidden, cells)
    return Decision(mask=grid, cells=grid, allowed=None if allowed is None else _marked(allowed, cells))


def _marked(places: Sequence[Sequence[int]], cells: int) -> Tensor:
    marked = torch.zeros(len(places), cells, dtype=torch.bool)
    for image, where in enumerate(places):
        marked[image, list(where)] = True
    return marked.view(len(places), 1, cells // 2, 2)


def engine_with(handler: MaskOverlap) -> Engine:
    engine = Engine(lambda engine, batch: {MaskedKeys.DECISION: batch})
    handler.attach(engine)
    return engine


def measure(*validations: list[Decision], max_images: int = 64) -> dict[str, float]:
    """Metrics after the last of some validations."""
    engine = engine_with(MaskOverlap(max_images=max_images))
    for batches in validations:
        engine.state.metrics = {}
        engine.run(batches)
    return engine.state.metrics


def test_masker_that_ignores_the_image_overlaps_fully_and_always_hides_the_same_places() -> None:
    values = measure([decision([0, 1], [0, 1]), decision([0, 1])])
    assert values["overlap_images"] == pytest.approx(1.0)
    assert values["position_entropy"] == pytest.approx(math.log(2) / math.log(8))
    both = 2 * 2 / 8  # cells that two uniform draws of 2 out of 8 share on average
    assert values["overlap_chance"] == pytest.approx(both / (4 - both))


def test_disjoint_masks_overlap_nowhere_and_cover_all_places() -> None:
    values = measure([decision([0, 1], [2, 3]), decision([4, 5], [6, 7])])
    assert values["overlap_images"] == 0.0
    assert values["position_entropy"] == pytest.approx(1.0)


def test_overlap_of_images_is_the_mean_over_all_pairs_of_all_batches() -> None:
    values = measure([decision([0, 1], [1, 2]), decision([2, 3])])
    assert values["overlap_images"] == pytest.approx((1 / 3 + 1 / 3 + 0) / 3)


def test_chance_knows_which_cells_were_allowed() -> None:
    apart = measure([decision([0], [4], allowed=[[0, 1, 2, 3], [4, 5, 6, 7]])])
    together = measure([decision([0], [1], allowed=[[0, 1], [0, 1]])])
    assert apart["overlap_chance"] == 0.0
    assert together["overlap_chance"] == pytest.approx(0.5 / 1.5)


@pytest.mark.parametrize("ratio", [0.25, 0.75])
def test_uniform_masks_overlap_as_chance_says(ratio: float) -> None:
    masker = UniformMasker(2, 4, ratio)
    values = measure([masker(torch.zeros(64, 1, 32, 32))])
    assert values["overlap_images"] == pytest.approx(values["overlap_chance"], rel=0.03)
    assert values["position_entropy"] > 0.97


def test_first_validation_has_no_overlap_with_the_one_before() -> None:
    assert "overlap_epochs" not in measure([decision([0], [1])])


def test_overlap_of_epochs_compares_every_image_with_itself() -> None:
    before = [decision([0, 1], [2, 3]), decision([4, 5])]
    after = [decision([0, 1], [3, 4]), decision([6, 7])]
    assert measure(before, after)["overlap_epochs"] == pytest.approx((1.0 + 1 / 3 + 0.0) / 3)
    assert measure(before, after, after)["overlap_epochs"] == 1.0


def test_other_grids_are_left_out_of_what_cannot_be_compared() -> None:
    small, large = decision([0, 1], [0, 1]), decision([2], [3], cells=12)
    values = measure([small, large], [decision([0, 1], [0, 1]), decision([5], [6], cells=10)])
    assert values["overlap_epochs"] == 1.0  # the second batch has another grid now
    assert values["overlap_images"] == pytest.approx((1.0 + 0.0) / 2)  # one pair of each grid


def test_single_image_has_nothing_to_be_compared_with() -> None:
    assert set(measure([decision([0, 1])])) == {"position_entropy"}


def test_only_the_first_images_are_compared_with_each_other() -> None:
    batches = [decision([0], [0], [7]), decision([6])]
    assert measure(batches, max_images=2)["overlap_images"] == 1.0
    assert measure(batches)["overlap_images"] == pytest.approx(1 / 6)


def test_nothing_hidden_gives_no_nan() -> None:
    values = measure([decision([], [])], [decision([], [])])
    assert all(math.isfinite(value) for value in values.values())


def test_on_an_evaluator_numbers_stand_beside_its_metrics_and_uniform_masks_repeat() -> None:
    batches = [{"image": torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))}]
    network = ReconstructionUNet(2, backbone=nn.Identity())
    evaluator = MaskedEvaluator("cpu", batches, network, UniformMasker(2, 8, 0.5), val_handlers=[MaskOverlap()])
    evaluator.run(1)
    evaluator.run(2)
    assert {"psnr", "overlap_images", "overlap_chance", "position_entropy"} < set(evaluator.state.metrics)
    assert evaluator.state.metrics["overlap_epochs"] == 1.0
    assert all(type(value) is float for value in evaluator.state.metrics.values())


def test_fewer_than_two_images_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="max_images: expected at least 2, got 1"):
        MaskOverlap(max_images=1)
