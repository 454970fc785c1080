# SPDX-License-Identifier: Apache-2.0
"""AdaMAE's sampling: what is drawn is shown, and what was hard while hidden is more likely to be shown."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from ahm_networks import CurriculumMasker
from ahm_networks.maskers import VisibleSamplingMasker
from ahm_networks.maskers.visible_sampling import VisibleSamplingDecision
from ahm_transforms.masking.functional import cells_to_image

P = torch.tensor([[0.1, 0.2, 0.3, 0.4]])  # of the cells of a 2 x 2 grid
IMAGE = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Fixed(nn.Module):
    """A scorer with known logits."""

    def __init__(self, p: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(p.log() + 5.0)  # a constant changes nothing

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"visible": self.logits.expand(image.shape[0], -1).view(-1, 1, 2, 2)}


def masker_with(p: Tensor = P, ratio: float = 0.5, **options: object) -> VisibleSamplingMasker:
    masker = VisibleSamplingMasker(2, 4, ratio, **options)
    masker.scorer = Fixed(p)
    return masker


def error_map(cells: Tensor) -> Tensor:
    return cells_to_image(cells.view(-1, 1, 2, 2), 4, (8, 8))


def hide(decision: VisibleSamplingDecision, *numbers: int) -> VisibleSamplingDecision:
    """The same decision with those cells hidden."""
    cells = torch.zeros_like(decision.cells).flatten(1)
    cells[:, list(numbers)] = True
    return dataclasses.replace(decision, cells=cells.view_as(decision.cells))


class TestChoice:
    def test_visible_cells_are_drawn_by_their_probabilities(self) -> None:
        """With three of four hidden, one draw decides what is seen."""
        cells = masker_with(ratio=0.75)(IMAGE.expand(8000, -1, -1, -1)).cells.flatten(1)
        assert (cells.sum(1) == 3).all()
        assert torch.allclose((~cells).float().mean(0), P[0], atol=0.02)

    def test_drawn_without_replacement(self) -> None:
        """Two of four shown: the last cell's chance is p4 + sum over j of p_j p4 / (1 - p_j)."""
        cells = masker_with()(IMAGE.expand(8000, -1, -1, -1)).cells.flatten(1)
        assert (cells.sum(1) == 2).all()
        expected = 0.4 + sum(p * 0.4 / (1 - p) for p in (0.1, 0.2, 0.3))
        assert float((~cells[:, 3]).float().mean()) == pytest.approx(expected, abs=0.02)

    def test_the_least_probable_are_hidden_in_eval(self) -> None:
        assert masker_with().eval()(IMAGE).cells.flatten().tolist() == [True, True, False, False]

    def test_policy_map_by_hand(self) -> None:
        """One minus the chance to be one of two shown, by enumeration; the estimate is meant for many cells."""
        exact = torch.tensor([0.765, 0.559, 0.392, 0.284])
        policy_map = masker_with()(IMAGE).policy_map.flatten()
        torch.testing.assert_close(policy_map, exact, atol=0.03, rtol=0)
        x = 0.741271  # of the race, whose rates are 1 to 4: the root of x + x^2 + x^3 + x^4 = 2
        torch.testing.assert_close(policy_map, torch.tensor([x, x**2, x**3, x**4]))

    def test_forbidden_cells_are_shown_and_share_no_probability(self) -> None:
        foreground = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        foreground[..., 4:, 4:] = False  # the last cell
        decision = masker_with(ratio=2 / 3).eval()(IMAGE, foreground=foreground)
        assert decision.cells.flatten().tolist() == [True, True, False, False]
        exact = torch.tensor([5 / 6, 4 / 6, 3 / 6, 0.0])
        policy_map = decision.policy_map.flatten()
        torch.testing.assert_close(policy_map, exact, atol=0.035, rtol=0)
        x = 0.810536  # the root of x + x^2 + x^3 = 2
        torch.testing.assert_close(policy_map, torch.tensor([x, x**2, x**3, 0.0]))

    def test_a_cell_looks_at_the_whole_image(self) -> None:
        """Without attention, a cell would see its neighbours only; the group norms, which see all, are taken out."""
        masker, image = VisibleSamplingMasker(2, 8), torch.rand(1, 1, 64, 64)
        layers = masker.scorer.features.features.layers
        for number, layer in enumerate(layers):
            if isinstance(layer, nn.GroupNorm):
                layers[number] = nn.Identity()
        changed = image.clone()
        changed[..., -8:, -8:] = 0.0
        first, second = masker(image).logits, masker(changed).logits
        assert first[0, 0] != second[0, 0]


class TestLoss:
    def test_by_hand(self) -> None:
        """Cells 0 and 2 hidden, with errors 1 and 3: over their mean, 1/2 and 3/2."""
        masker = masker_with()
        decision = hide(masker(IMAGE), 0, 2)
        loss = masker.loss([(decision, error_map(torch.tensor([1.0, 100.0, 3.0, 100.0])))])
        expected = -(P[0, 0].log() * 0.5 + P[0, 2].log() * 1.5) / 2
        assert loss.item() == pytest.approx(float(expected))

    def test_gradient_is_that_of_the_formula(self) -> None:
        r"""\partial L / \partial s_j = -(e_j [j hidden] - p_j \sum e) / k, with the scaled errors of hidden cells."""
        masker = masker_with()
        decision = hide(masker(IMAGE), 0, 2)
        masker.loss([(decision, error_map(torch.tensor([1.0, 0.0, 3.0, 0.0])))]).backward()
        scaled = torch.tensor([0.5, 0.0, 1.5, 0.0])
        assert torch.allclose(masker.scorer.logits.grad, -(scaled - P * scaled.sum()) / 2, atol=1e-6)

    def test_the_hard_cell_becomes_more_likely_to_be_shown(self) -> None:
        masker = masker_with(torch.full((1, 4), 0.25))
        optimizer = torch.optim.SGD(masker.parameters(), 0.1)
        decision = hide(masker(IMAGE), 0, 1, 2)
        masker.loss([(decision, error_map(torch.tensor([0.1, 5.0, 0.1, 0.0])))]).backward()
        optimizer.step()
        p = masker(IMAGE).logits.softmax(1)[0]
        assert p[1] > 0.25 and p[0] < 0.25 and p[2] < 0.25

    def test_probabilities_settle_in_proportion_to_the_errors(self) -> None:
        """With everything hidden the loss is a cross-entropy with the errors: it does not run away."""
        masker = masker_with(torch.full((1, 4), 0.25))
        optimizer = torch.optim.Adam(masker.parameters(), 0.05)
        for _ in range(300):
            optimizer.zero_grad()
            masker.loss([(hide(masker(IMAGE), 0, 1, 2, 3), error_map(torch.tensor([1.0, 2.0, 3.0, 4.0])))]).backward()
            optimizer.step()
        assert torch.allclose(masker(IMAGE).logits.softmax(1), P, atol=1e-3)

    def test_the_scale_of_the_errors_does_not_matter(self) -> None:
        losses = []
        for scale in (1.0, 1000.0):
            masker, error = masker_with(), torch.tensor([1.0, 0.0, 3.0, 0.0])
            decision = hide(masker(IMAGE), 0, 2)
            losses += [masker.loss([(decision, scale * factor * error_map(error))]).item() for factor in (1.0, 2.0)]
        assert losses[:2] == pytest.approx(losses[2:], rel=1e-4)
        assert losses[1] == pytest.approx(losses[0] * 2 / 1.5, rel=1e-4)  # the running mean, not the batch's own

    def test_rewards_below_zero_count_as_zero(self) -> None:
        """Their mean would be negative, and turn the sign of the loss."""
        losses = []
        for worst in (-9.0, 0.0):
            masker = masker_with()
            reward = error_map(torch.tensor([worst, 0.0, 3.0, 0.0]))
            losses.append(masker.loss([(hide(masker(IMAGE), 0, 2), reward)]).item())
        assert losses[0] == losses[1] > 0

    def test_images_count_alike_and_steps_too(self) -> None:
        masker = masker_with(ratio=0.25)
        decision = hide(masker(IMAGE.expand(2, -1, -1, -1)), 0)
        more = decision.cells.clone()
        more[1, 0, 1, 0] = True  # cell 2 of the second image
        decision = dataclasses.replace(decision, cells=more)
        error = error_map(torch.ones(2, 4))
        expected = -(P[0, 0].log() + (P[0, 0].log() + P[0, 2].log()) / 2) / 2
        assert masker.loss([(decision, error)] * 2).item() == pytest.approx(float(expected), rel=1e-5)

    def test_forbidden_cells_get_no_gradient(self) -> None:
        foreground = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        foreground[..., 4:, 4:] = False
        masker = masker_with()
        masker.loss([(masker(IMAGE, foreground=foreground), error_map(torch.ones(4)))]).backward()
        gradient = masker.scorer.logits.grad[0]
        assert torch.isfinite(gradient).all()
        assert gradient[3] == 0 and gradient[:3].any()

    def test_cells_hidden_at_random_by_a_curriculum_take_part(self) -> None:
        inner = masker_with(ratio=0.75)
        masker = CurriculumMasker(inner, warm_up=0.2)  # at its start: nothing is chosen
        decision = masker(IMAGE)
        assert decision.cells.sum() == 3
        loss = masker.loss([(decision, error_map(torch.ones(4)))])
        assert loss.item() == pytest.approx(-float(P.log()[decision.cells.flatten(1)].mean()), rel=1e-5)

    def test_nothing_hidden_is_nothing_learned(self) -> None:
        masker = masker_with()
        loss = masker.loss([(masker(IMAGE, mask_ratio=0.0), error_map(torch.ones(4)))])
        loss.backward()
        assert loss == 0.0
        assert not masker.scorer.logits.grad.any()
        assert masker.error_moments.steps == 0


def test_entropy_is_a_share_of_its_largest_value() -> None:
    for p, expected in ((torch.full((1, 4), 0.25), 1.0), (torch.tensor([[0.5, 0.5, 1e-12, 1e-12]]), 0.5)):
        masker = masker_with(p)
        assert float(masker.diagnostics(masker(IMAGE))["policy_entropy"]) == pytest.approx(expected, abs=1e-4)


def test_unknown_features() -> None:
    with pytest.raises(ValueError, match="features: expected 'strided' or 'vgg16', got 'nonsense'"):
        VisibleSamplingMasker(2, 8, features="nonsense")
