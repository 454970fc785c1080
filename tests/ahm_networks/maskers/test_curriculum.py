# SPDX-License-Identifier: Apache-2.0
"""The wrapper that lets a masker choose a growing share of each mask."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from ahm_networks import ActorCriticMasker, CurriculumMasker, LossPredictionMasker, Masker, UniformMasker
from ahm_networks.maskers.base import Decision
from ahm_transforms.masking.functional import cell_count, cells_to_image

CELLS = 64
IMAGE = torch.rand(5, 1, 64, 64, generator=torch.Generator().manual_seed(0))


class Corner(Masker):
    """Always hides the first cells of the grid, as many as asked for."""

    def forward(self, image: Tensor, *, mask_ratio: float | None = None, foreground: Tensor | None = None) -> Decision:
        grid = self.check_image(image)
        count = self.count(self.mask_ratio if mask_ratio is None else mask_ratio, grid, None)
        cells = (torch.arange(CELLS) < count).view(1, 1, *grid).expand(len(image), -1, -1, -1)
        return Decision(mask=self.expand(cells, image), cells=cells)


def corner(progress: float, **options: object) -> CurriculumMasker:
    masker = CurriculumMasker(Corner(2, 8, 0.5), **options)
    masker.set_progress(progress)
    return masker


def chosen(count: int) -> Tensor:
    return (torch.arange(CELLS) < count).view(1, 1, 8, 8)


def test_masks_are_random_during_the_warm_up() -> None:
    cells = corner(0.19, warm_up=0.2)(IMAGE.repeat(400, 1, 1, 1)).cells
    assert (cells.float().mean(0) - 0.5).abs().max() < 0.06  # every cell equally often, the corner too


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.0), (0.19, 0.0), (0.2, 0.1), (0.6, 0.3), (1.0, 0.5)])
def test_share_ramps_after_the_warm_up(progress: float, share: float) -> None:
    assert corner(progress, warm_up=0.2, policy_share=(0.1, 0.5)).share == pytest.approx(share)


@pytest.mark.parametrize(("progress", "ratio"), [(0.0, 0.25), (0.5, 0.5), (1.0, 0.75)])
def test_ratio_follows_its_schedule(progress: float, ratio: float) -> None:
    masker = corner(progress, mask_ratio=(0.25, 0.75))
    assert masker.mask_ratio == pytest.approx(ratio)
    assert (masker(IMAGE).cells.flatten(1).sum(1) == ratio * CELLS).all()


def test_ratio_of_the_inner_masker_is_the_default() -> None:
    assert [corner(progress).mask_ratio for progress in (0.0, 0.5, 1.0)] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_chosen_cells_stay_hidden_and_the_count_is_exact(share: float) -> None:
    masker = corner(1.0, policy_share=(share, share))
    decisions = [masker(IMAGE) for _ in range(20)]
    own = chosen(cell_count(0.5 * share, CELLS))
    for decision in decisions:
        assert (decision.cells | ~own).all()
        assert (decision.cells.flatten(1).sum(1) == CELLS // 2).all()
        assert (decision.mask.flatten(1).sum(1) == CELLS // 2 * 64).all()
    rest = torch.stack([decision.cells for decision in decisions]).float().mean((0, 1))[~own[0]]
    expected = (0.5 - 0.5 * share) / (1 - 0.5 * share)
    assert (rest - expected).abs().max() < 0.25  # 100 draws of each


def test_what_bernoulli_agents_choose_beyond_the_count_stays_hidden() -> None:
    masker = CurriculumMasker(ActorCriticMasker(2, 8, 0.5, mode="bernoulli"), policy_share=(1.0, 1.0), warm_up=0.0)
    decision = masker(IMAGE.repeat(10, 1, 1, 1))
    assert decision.draw.cells.sum(1).max() > CELLS // 2
    assert (decision.cells.flatten(1) | ~decision.draw.cells).all()


class Row(Corner):
    """Hides the first row whatever the ratio, and wants cells the more the later they come."""

    def forward(self, image: Tensor, *, mask_ratio: float | None = None, foreground: Tensor | None = None) -> Decision:
        decision = super().forward(image, mask_ratio=8 / CELLS)
        wanted = torch.linspace(0, 1, CELLS).view(1, 1, 8, 8).expand(len(image), -1, -1, -1)
        return dataclasses.replace(decision, policy_map=wanted)


def test_in_eval_mode_the_most_wanted_cells_fill_the_ratio() -> None:
    decision = CurriculumMasker(Row(2, 8, 0.5), policy_share=(0.0, 0.0)).eval()(IMAGE)
    expected = chosen(8) | ~chosen(CELLS - 24)
    assert torch.equal(decision.cells, expected.expand_as(decision.cells))
    assert torch.equal(decision.mask, cells_to_image(decision.cells, 8, IMAGE.shape[2:]))


def test_count_is_exact_within_the_foreground() -> None:
    foreground = torch.zeros(5, 1, 64, 64, dtype=torch.bool)
    foreground[..., :24, :40] = True  # 15 cells
    masker = CurriculumMasker(LossPredictionMasker(2, 8, 0.6), policy_share=(0.5, 0.5), warm_up=0.0)
    cells = masker(IMAGE, foreground=foreground).cells
    assert (cells.flatten(1).sum(1) == 9).all()
    assert not cells[..., 3:, :].any()
    assert not cells[..., 5:].any()


def test_the_masker_chooses_everything_in_eval() -> None:
    masker = corner(0.0, warm_up=0.5).eval()
    assert torch.equal(masker(IMAGE).cells, chosen(32).expand(5, -1, -1, -1))


def test_eval_uses_the_scheduled_ratio_unless_told_otherwise() -> None:
    masker = corner(1.0, mask_ratio=(0.25, 0.75)).eval()
    assert masker(IMAGE).cells.sum() == 5 * 48
    assert masker(IMAGE, mask_ratio=0.125).cells.sum() == 5 * 8


class TestLearning:
    def warm_up_gradients(self, **options: object) -> dict[str, Tensor]:
        torch.manual_seed(0)
        masker = CurriculumMasker(ActorCriticMasker(2, 8, 0.5, **options), warm_up=0.2)
        masker.set_progress(0.1)
        masker.loss([(masker(IMAGE), torch.rand(5, 1, 64, 64)) for _ in range(masker.num_samples)]).backward()
        policy, value = 0, 1  # the heads in their order; 1 x heads x width x ...
        weight = masker.masker.scorer.heads.weight.grad
        return {"policy": weight[:, policy], "value": weight[:, value]}

    @pytest.mark.parametrize(
        "options",
        [{}, {"credit": "patch"}, {"baseline": "leave_one_out", "num_samples": 2}],
        ids=["set", "patch", "leave_one_out"],
    )
    def test_only_the_value_map_learns_in_the_warm_up(self, options: dict[str, object]) -> None:
        gradients = self.warm_up_gradients(entropy_floor=0.0, entropy_weight=(0.0, 0.0), **options)
        assert gradients["value"].any()
        assert not gradients["policy"].any()

    def test_bernoulli_agents_learn_nothing_before_they_act(self) -> None:
        gradients = self.warm_up_gradients(entropy_floor=0.0, entropy_weight=(0.0, 0.0), mode="bernoulli")
        assert not any(g.any() for g in gradients.values())

    def test_the_entropy_bonus_acts_in_the_warm_up_already(self) -> None:
        gradients = self.warm_up_gradients(entropy_floor=0.0, entropy_weight=(1.0, 1.0))
        assert gradients["policy"].any()

    def test_value_map_learns_from_the_randomly_hidden_cells(self) -> None:
        """Trained in the warm-up only, it tells the bright cells whose error is large."""
        torch.manual_seed(0)
        masker = CurriculumMasker(ActorCriticMasker(2, 8, 0.5), warm_up=0.5)
        optimizer = torch.optim.Adam(masker.parameters(), 3e-3)
        bright = torch.zeros(16, 1, 64, 64)
        bright[:8, :, :32], bright[8:, :, 32:] = 1.0, 1.0
        for _ in range(30):
            optimizer.zero_grad()
            masker.loss([(masker(bright), bright)]).backward()
            optimizer.step()
        value, hard = masker(bright).value, bright[..., ::8, ::8].flatten(1) > 0
        assert value[hard].mean() > value[~hard].mean() + 0.5

    def test_loss_and_samples_are_those_of_the_inner_masker(self) -> None:
        masker = CurriculumMasker(ActorCriticMasker(2, 8, 0.5, num_samples=3, in_channels=2))
        assert (masker.num_samples, masker.in_channels) == (3, 2)
        random = CurriculumMasker(UniformMasker(2, 8, 0.5))
        assert random.loss([(random(IMAGE), IMAGE)]) is None

    def test_diagnostics_tell_the_share(self) -> None:
        masker = CurriculumMasker(ActorCriticMasker(2, 8, 0.5), policy_share=(0.5, 0.5), warm_up=0.0)
        diagnostics = masker.diagnostics(masker(IMAGE))
        assert float(diagnostics["policy_share"]) == 0.5
        assert "policy_entropy" in diagnostics

    def test_progress_reaches_the_inner_schedules(self) -> None:
        masker = CurriculumMasker(ActorCriticMasker(2, 8, 0.5))
        masker.set_progress(0.4)
        assert masker.masker.progress == 0.4


def test_the_two_generators_differ() -> None:
    """Else the random rest would repeat the draw of the inner masker."""
    masker = CurriculumMasker(LossPredictionMasker(2, 8, 0.5, seed=3))
    for generators in (masker.generators(), masker.set_random_state(11).generators()):
        states = [generator.get_state() for generator in generators]
        assert len(states) == 2
        assert not torch.equal(*states)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy_share": (0.0, 1.5)}, r"policy_share: expected two numbers in \[0, 1\]"),
        ({"policy_share": (-0.1, 0.5)}, r"policy_share: expected two numbers in \[0, 1\]"),
        ({"policy_share": 0.5}, r"policy_share: expected two numbers in \[0, 1\], got 0.5"),
        ({"mask_ratio": 0.5}, r"mask_ratio: expected two numbers in \[0, 1\], got 0.5"),
        ({"warm_up": 1.0}, r"warm_up: expected a number in \[0, 1\)"),
        ({"warm_up": -0.1}, r"warm_up: expected a number in \[0, 1\)"),
        ({"mask_ratio": (0.5, 1.0)}, "mask_ratio: expected a number between 0 and 1"),
    ],
)
def test_shares_and_ratios_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CurriculumMasker(UniformMasker(2, 8), **options)
