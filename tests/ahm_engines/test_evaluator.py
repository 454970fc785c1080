# SPDX-License-Identifier: Apache-2.0
"""The evaluator judges networks on the same masks, says what a masker learned, and leaves both as they were."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.engines import IterationEvents
from torch import Tensor, nn

from ahm_engines.evaluator import MaskedEvaluator
from ahm_engines.events import MaskedEvents, MaskedKeys
from ahm_engines.losses import MaskedLoss
from ahm_engines.metrics import hidden_psnr
from ahm_networks.maskers import (
    ActorCriticMasker,
    CurriculumMasker,
    Decision,
    LossPredictionMasker,
    Masker,
    UniformMasker,
)
from ahm_networks.nets import ReconstructionUNet
from ahm_transforms.masking.functional import choose_cells, image_to_cells

PATCH, RATIO = 4, 0.25
METRICS = {"psnr", "ssim", "random_psnr", "random_ssim", "hardness", "foreground_share", "rank_correlation"}


class HideBright(Masker):
    """Hides the brightest cells, and says so in its policy map."""

    def forward(self, image: Tensor, *, mask_ratio: float | None = None, foreground: Tensor | None = None) -> Decision:
        score = image_to_cells(image, self.patch_size)
        ratio = self.mask_ratio if mask_ratio is None else mask_ratio
        cells = choose_cells(score, self.count(ratio, score.shape[2:], None))
        return Decision(mask=self.expand(cells, image), cells=cells, policy_map=score)


class HideRight(UniformMasker):
    """Hides the last columns."""

    def forward(self, image: Tensor, *, mask_ratio: float | None = None, foreground: Tensor | None = None) -> Decision:
        decision = super().forward(image, mask_ratio=mask_ratio, foreground=foreground)
        cells = torch.zeros_like(decision.cells)
        cells[..., -1] = True
        return replace(decision, cells=cells, mask=self.expand(cells, image))


def batches(dims: int = 2) -> list[dict[str, Tensor]]:
    """Images with a hard part: a tenth of the cells are bright, all others nearly black."""
    generator = torch.Generator().manual_seed(1)
    cells = (torch.rand(6, 1, *[8] * dims, generator=generator) < 0.1).float()
    images = nn.functional.interpolate(0.02 + 0.9 * cells, scale_factor=PATCH)
    images += 0.05 * torch.rand(images.shape, generator=generator)
    return [{"image": images[:4]}, {"image": images[4:]}]


def zero_fill(dims: int = 2) -> nn.Module:
    """Rebuilds hidden voxels as 0, so that the error of a voxel is its intensity."""
    return ReconstructionUNet(dims, backbone=nn.Identity())


def evaluate(masker: Masker, *, epochs: int = 1, **options: Any) -> tuple[MaskedEvaluator, list[dict[str, Any]]]:
    """Run some validations; returns the evaluator and the output of every iteration."""
    network = options.pop("network", None) or zero_fill(masker.spatial_dims)
    evaluator = MaskedEvaluator("cpu", batches(masker.spatial_dims), network, masker, **options)
    outputs: list[dict[str, Any]] = []
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: outputs.append(engine.state.output))
    for epoch in range(1, epochs + 1):
        evaluator.run(epoch)
    return evaluator, outputs


def every_masker() -> list[Masker]:
    inner = ActorCriticMasker(2, PATCH, RATIO)
    return [
        UniformMasker(2, PATCH, RATIO),
        HideBright(2, PATCH, RATIO),
        LossPredictionMasker(2, PATCH, RATIO),
        inner,
        CurriculumMasker(inner),
    ]


@pytest.mark.parametrize("dims", [2, 3])
def test_metrics_are_those_of_the_docstring_and_scalars(dims: int) -> None:
    evaluator, _ = evaluate(HideBright(dims, PATCH, RATIO))
    assert set(evaluator.state.metrics) == METRICS
    assert all(type(value) is float for value in evaluator.state.metrics.values())


@pytest.mark.parametrize("masker", every_masker(), ids=lambda masker: type(masker).__name__)
def test_every_masker_is_evaluated_with_its_own_diagnostics_and_without_nan(masker: Masker) -> None:
    evaluator, outputs = evaluate(masker)
    values = evaluator.state.metrics
    decision = outputs[0][MaskedKeys.DECISION]
    expected = METRICS | set(masker.diagnostics(decision))
    if decision.policy_map is None:
        expected.remove("rank_correlation")
    assert set(values) == expected
    assert torch.isfinite(torch.tensor(list(values.values()))).all()


def test_uniform_masks_are_the_same_in_every_epoch_and_for_every_masker() -> None:
    first = torch.cat([output[MaskedKeys.RANDOM_MASK] for output in evaluate(UniformMasker(2, PATCH, RATIO))[1]])
    assert len(first.unique(dim=0)) == len(first)  # but not for every image
    for masker in every_masker():
        masker.set_random_state(99)
        masks = [output[MaskedKeys.RANDOM_MASK] for output in evaluate(masker, epochs=2)[1]]
        assert torch.equal(torch.cat(masks), torch.cat([first, first]))


def test_random_scores_compare_networks_whatever_the_masker() -> None:
    scores = [evaluate(masker)[0].state.metrics["random_psnr"] for masker in every_masker()]
    assert scores == pytest.approx([scores[0]] * len(scores))
    assert evaluate(UniformMasker(2, PATCH, RATIO), seed=1)[0].state.metrics["random_psnr"] != scores[0]


@pytest.mark.parametrize("masker", every_masker(), ids=lambda masker: type(masker).__name__)
def test_masker_goes_on_with_the_random_numbers_that_it_would_have_drawn(masker: Masker) -> None:
    image = batches()[0]["image"]
    masker.train()
    masker.set_random_state(5)
    masker(image)
    state = deepcopy(masker.state_dict())
    evaluate(masker)
    after = masker.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(state[name], after[name]) for name in state)


def test_network_keeps_weights_and_buffers_and_gets_no_gradient() -> None:
    backbone = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1))
    network = ReconstructionUNet(2, backbone=backbone)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    evaluate(HideBright(2, PATCH, RATIO), network=network)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("dims", [2, 3])
def test_hardness_is_far_above_1_for_a_masker_that_finds_the_planted_cells_and_1_for_uniform_masks(dims: int) -> None:
    assert evaluate(HideBright(dims, PATCH, RATIO))[0].state.metrics["hardness"] > 2.0
    assert evaluate(UniformMasker(dims, PATCH, RATIO))[0].state.metrics["hardness"] == pytest.approx(1.0)


def test_hardness_and_psnr_by_hand() -> None:
    """Voxels are 1 in the last column of cells and 0.5 elsewhere; the reconstruction is 0."""
    image = torch.full((1, 1, 8, 8), 0.5)
    image[..., 4:] = 1.0
    evaluator = MaskedEvaluator("cpu", [{"image": image}], zero_fill(), HideRight(2, PATCH, 0.5))
    masks: list[Tensor] = []
    evaluator.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: masks.append(engine.state.output[MaskedKeys.RANDOM_MASK])
    )
    evaluator.run()
    values, random = evaluator.state.metrics, image[masks[0]]
    assert values["psnr"] == pytest.approx(0.0, abs=1e-5)
    assert values["random_psnr"] == pytest.approx(float(-10 * random.square().mean().log10()), abs=1e-4)
    assert values["hardness"] == pytest.approx(1.0 / float(random.mean()), abs=1e-5)
    assert values["foreground_share"] == 1.0


def test_rank_correlation_is_1_when_the_policy_map_orders_cells_by_their_error() -> None:
    assert evaluate(HideBright(2, PATCH, RATIO))[0].state.metrics["rank_correlation"] == pytest.approx(1.0, abs=1e-3)


def test_foreground_share_counts_hidden_voxels_above_the_threshold() -> None:
    masker = HideBright(2, PATCH, RATIO)
    low = evaluate(masker, foreground_threshold=0.5)[0].state.metrics["foreground_share"]
    bright = torch.cat([batch["image"] for batch in batches()]) > 0.5
    assert low == pytest.approx(float(bright.flatten(1).sum(1).div(64 * RATIO * PATCH**2).mean()))


def test_a_threshold_above_all_intensities_is_told(caplog: pytest.LogCaptureFixture) -> None:
    for threshold in (None, 0.5):
        evaluate(UniformMasker(2, PATCH, RATIO, foreground_threshold=threshold), foreground_threshold=threshold or 0.05)
    assert not caplog.records
    evaluate(UniformMasker(2, PATCH, RATIO, foreground_threshold=40), foreground_threshold=40)
    assert [record.getMessage() for record in caplog.records if "no image has a cell above 40" in record.getMessage()]


def test_metrics_are_means_over_images_not_over_batches() -> None:
    evaluator, outputs = evaluate(HideBright(2, PATCH, RATIO))
    psnr = torch.cat([output[MaskedKeys.STATS]["psnr"] for output in outputs])
    assert len(psnr) == 6
    assert evaluator.state.metrics["psnr"] == pytest.approx(float(psnr.mean()))


def test_images_in_which_nothing_is_hidden_do_not_count() -> None:
    image = torch.rand(3, 1, 16, 16)
    image[1] = 0.0
    image[1, :, 0, 0] = 1.0  # one cell of foreground, of which a ratio below a half hides nothing
    masker = UniformMasker(2, PATCH, 0.4, foreground_threshold=0.0)
    assert masker(image).mask.flatten(1).any(1).tolist() == [True, False, True]
    names = ("psnr", "ssim", "random_psnr", "random_ssim", "hardness", "foreground_share")
    evaluator = MaskedEvaluator("cpu", [{"image": image}], zero_fill(), masker)
    evaluator.run()
    output = evaluator.state.output
    assert [len(output[MaskedKeys.STATS][name]) for name in names] == [2] * 6
    psnr = hidden_psnr(output[MaskedKeys.PRED], image, output[MaskedKeys.MASK])
    assert evaluator.state.metrics["psnr"] == pytest.approx(float(psnr[[0, 2]].mean()))
    nothing = MaskedEvaluator("cpu", [{"image": image[1:2]}], zero_fill(), masker)
    nothing.run()
    assert all(math.isnan(nothing.state.metrics[name]) for name in names)
    nothing.masker.mask_ratio = 0.6
    nothing.run(2)
    assert nothing.state.best_metric_epoch == 2 and nothing.state.best_metric == nothing.state.metrics["random_psnr"]


def test_key_metric_is_random_psnr_and_the_best_is_kept() -> None:
    class Improves(nn.Module):
        scale = 0.0

        def forward(self, image: Tensor, mask: Tensor) -> Tensor:
            return image * self.scale

    network = Improves()
    evaluator = MaskedEvaluator("cpu", batches(), network, UniformMasker(2, PATCH, RATIO))
    scores = {}
    for epoch, network.scale in ((2, 0.1), (4, 0.9), (6, 0.5)):
        evaluator.run(epoch)
        scores[epoch] = evaluator.state.metrics["random_psnr"]
    assert evaluator.state.key_metric_name == "random_psnr"
    assert evaluator.state.best_metric_epoch == 4
    assert evaluator.state.best_metric == scores[4] == max(scores.values())


def test_normalised_targets_are_undone_before_anything_is_measured() -> None:
    class PerfectTarget(nn.Module):
        def forward(self, image: Tensor, mask: Tensor) -> Tensor:
            return loss.error(torch.full_like(image, -10.0), image) - 10.0

    loss = MaskedLoss("l1", patch_size=PATCH)
    evaluator, outputs = evaluate(UniformMasker(2, PATCH, RATIO), network=PerfectTarget(), loss_function=loss)
    assert evaluator.state.metrics["psnr"] > 80.0
    image = torch.cat([output[MaskedKeys.IMAGE] for output in outputs])
    assert torch.allclose(torch.cat([output[MaskedKeys.PRED] for output in outputs]), image, atol=1e-4)


def test_bfloat16_runs_the_network_in_half_precision_and_measures_in_float32() -> None:
    seen = []
    conv = nn.Conv2d(1, 1, 3, padding=1)
    conv.register_forward_hook(lambda module, args, result: seen.append(result.dtype))
    network = ReconstructionUNet(2, backbone=conv)
    options = {"network": network, "amp_kwargs": {"dtype": torch.bfloat16}}
    half, outputs = evaluate(ActorCriticMasker(2, PATCH, RATIO), amp=True, **options)
    assert set(seen) == {torch.bfloat16}
    assert outputs[0][MaskedKeys.PRED].dtype == outputs[0][MaskedKeys.ERROR].dtype == torch.float32
    full, _ = evaluate(ActorCriticMasker(2, PATCH, RATIO), network=network)
    assert half.state.metrics["random_psnr"] == pytest.approx(full.state.metrics["random_psnr"], abs=0.2)


def test_events_fire_when_their_part_of_the_output_is_there() -> None:
    evaluator = MaskedEvaluator("cpu", batches(), zero_fill(), UniformMasker(2, PATCH, RATIO))
    keys: list[set[str]] = []
    for event in (MaskedEvents.MASK_CHOSEN, IterationEvents.FORWARD_COMPLETED, IterationEvents.MODEL_COMPLETED):
        evaluator.add_event_handler(event, lambda engine: keys.append({str(key) for key in engine.state.output}))
    evaluator.run()
    assert keys[0] == {"image", "decision", "mask"}
    assert keys[1] == keys[0] | {"pred", "random_mask", "random_pred"}
    assert keys[2] == keys[1] | {"error", "stats"}


def test_batch_without_an_image_is_named() -> None:
    evaluator = MaskedEvaluator("cpu", [{"label": torch.zeros(1)}], zero_fill(), UniformMasker(2, PATCH, RATIO))
    with pytest.raises(TypeError, match=r"'image', got \['label'\]"):
        evaluator.run()
