# SPDX-License-Identifier: Apache-2.0
"""Formulas against numbers worked out by hand, brute force and NumPy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from ahm_networks.rl import functional as rl
from ahm_networks.rl.running import RunningMoments

INF = float("inf")


def brute_force_probability(weights: list[float], order: tuple[int, ...]) -> float:
    left, probability = sum(weights), 1.0
    for cell in order:
        probability *= weights[cell] / left
        left -= weights[cell]
    return probability


def finite_gradient(value: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    (gradient,) = torch.autograd.grad(value, leaf)
    assert torch.isfinite(gradient).all(), gradient
    return gradient


class TestMaskedMean:
    def test_by_hand(self) -> None:
        values = torch.tensor([[1.0, 3.0, 100.0], [4.0, 5.0, 6.0]])
        where = torch.tensor([[True, True, False], [False, False, False]])
        assert rl.masked_mean(values, where).tolist() == [2.0, 0.0]

    def test_what_is_left_out_may_be_nan_or_infinite(self) -> None:
        values = torch.tensor([[2.0, INF, math.nan]], requires_grad=True)
        mean = rl.masked_mean(values, torch.tensor([[True, False, False]]))
        assert mean.tolist() == [2.0]
        assert finite_gradient(mean.sum(), values).tolist() == [[1.0, 0.0, 0.0]]


class TestPlackettLuceLogProb:
    def test_by_hand(self) -> None:
        logits = torch.tensor([[1.0, 2.0, 3.0]]).log()
        steps = rl.plackett_luce_log_prob(logits, torch.tensor([[2, 0]]))
        torch.testing.assert_close(steps.exp(), torch.tensor([[3 / 6, 1 / 3]]))

    @pytest.mark.parametrize(("cells", "k"), [(n, k) for n in range(1, 7) for k in range(1, n + 1)])
    def test_agrees_with_brute_force_and_sums_to_one(self, cells: int, k: int) -> None:
        logits = torch.randn(cells, generator=torch.Generator().manual_seed(cells * 10 + k)) * 2
        orders = list(itertools.permutations(range(cells), k))
        found = rl.plackett_luce_log_prob(logits.expand(len(orders), -1), torch.tensor(orders)).sum(1).exp()
        expected = [brute_force_probability(logits.exp().tolist(), order) for order in orders]
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-7)
        assert float(found.sum()) == pytest.approx(1.0, abs=1e-5)

    @pytest.mark.parametrize("k", [1, 2, 3])  # 3: every allowed cell is drawn
    def test_forbidden_cells_take_no_probability_and_no_gradient(self, k: int) -> None:
        logits = torch.tensor([0.5, -INF, -1.0, -INF, 2.0], requires_grad=True)
        orders = list(itertools.permutations([0, 2, 4], k))
        log_prob = rl.plackett_luce_log_prob(logits.expand(len(orders), -1), torch.tensor(orders)).sum(1)
        assert log_prob.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
        gradient = finite_gradient(log_prob[0], logits)
        assert gradient[[1, 3]].tolist() == [0.0, 0.0]
        assert gradient[[0, 2, 4]].any()

    def test_drawing_a_forbidden_cell_is_impossible(self) -> None:
        logits = torch.tensor([[0.0, -INF, 0.0]])
        assert rl.plackett_luce_log_prob(logits, torch.tensor([[1]])).exp().tolist() == [[0.0]]

    def test_only_the_drawn_prefix_counts(self) -> None:
        logits = torch.tensor([[0.3, -INF, 1.0, -INF]], requires_grad=True)
        order = torch.tensor([[2, 0, 1, 3]])  # the places after the second name forbidden cells
        drawn = torch.tensor([[True, True, False, False]])
        steps = rl.plackett_luce_log_prob(logits, order, drawn)
        alone = rl.plackett_luce_log_prob(logits, order[:, :2])
        torch.testing.assert_close(steps, torch.cat([alone, torch.zeros(1, 2)], dim=1))
        torch.testing.assert_close(finite_gradient(steps.sum(), logits), finite_gradient(alone.sum(), logits))

    def test_nothing_drawn(self) -> None:
        logits = torch.randn(2, 4, requires_grad=True)
        steps = rl.plackett_luce_log_prob(logits, torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3).bool())
        assert steps.tolist() == [[0.0] * 3] * 2
        assert finite_gradient(steps.sum(), logits).abs().sum() == 0
        assert rl.plackett_luce_log_prob(logits, torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0)

    def test_gradient_agrees_with_finite_differences(self) -> None:
        logits = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
        order = torch.tensor([[3, 0, 4], [1, 2, 0]])
        assert torch.autograd.gradcheck(lambda s: rl.plackett_luce_log_prob(s, order), logits)

    @pytest.mark.parametrize("largest", [80.0, 1e4, 65504.0])  # the last is the largest float16
    def test_extreme_logits_stay_finite(self, largest: float) -> None:
        logits = torch.tensor([[largest, -largest, 0.0, largest]], dtype=torch.float16).float().requires_grad_()
        for order in itertools.permutations(range(4)):
            log_prob = rl.plackett_luce_log_prob(logits, torch.tensor([order]))
            assert torch.isfinite(log_prob).all()
            assert (log_prob <= 0).all()
            finite_gradient(log_prob.sum(), logits)

    def test_a_constant_shift_changes_nothing(self) -> None:
        logits, order = torch.randn(1, 6), torch.tensor([[5, 1, 2]])
        shifted = rl.plackett_luce_log_prob(logits + 40.0, order)
        torch.testing.assert_close(shifted, rl.plackett_luce_log_prob(logits, order), rtol=1e-3, atol=1e-4)


class TestGumbelTopK:
    def test_gumbel_by_hand(self) -> None:
        draws = rl.gumbel(torch.tensor([math.exp(-1.0), math.exp(-math.e)]))
        torch.testing.assert_close(draws, torch.tensor([0.0, -1.0]), atol=1e-5, rtol=0)

    def test_gumbel_is_finite_at_both_ends(self) -> None:
        draws = rl.gumbel(torch.tensor([0.0, 1.0 - 2.0**-24, 1.0]))
        assert torch.isfinite(draws).all()
        assert draws[0] < draws[1]

    def test_without_noise_the_most_probable_come_first(self) -> None:
        logits = torch.tensor([[0.0, 3.0, -1.0, 2.0]])
        assert rl.gumbel_top_k(logits, torch.zeros_like(logits), 3).tolist() == [[1, 3, 0]]

    def test_frequencies_are_plackett_luce(self) -> None:
        weights, draws = [1.0, 2.0, 0.5, 4.0], 40_000
        logits = torch.tensor(weights).log().expand(draws, -1)
        uniform = torch.rand(draws, 4, generator=torch.Generator().manual_seed(0))
        orders = rl.gumbel_top_k(logits, rl.gumbel(uniform), 2)
        for order in itertools.permutations(range(4), 2):
            expected = brute_force_probability(weights, order)
            found = float((orders == torch.tensor(order)).all(1).float().mean())
            assert found == pytest.approx(expected, abs=4 * math.sqrt(expected / draws)), order

    def test_forbidden_cells_come_last(self) -> None:
        logits = torch.tensor([[-INF, 0.0, -INF, -5.0]])
        noise = rl.gumbel(torch.rand(50, 4, generator=torch.Generator().manual_seed(0)))
        assert set(rl.gumbel_top_k(logits.expand(50, -1), noise, 2).flatten().tolist()) == {1, 3}


class TestPolicyLosses:
    log_prob = torch.tensor([[-1.0, -2.0], [-3.0, -9.0]])
    drawn = torch.tensor([[True, True], [True, False]])

    def test_set_reinforce_by_hand(self) -> None:
        loss = rl.set_reinforce_loss(self.log_prob, torch.tensor([2.0, -0.5]), self.drawn)
        assert float(loss) == pytest.approx(-(2.0 * -1.5 + -0.5 * -3.0) / 2)

    def test_patch_credit_by_hand(self) -> None:
        loss = rl.patch_credit_loss(self.log_prob, torch.tensor([[1.0, -1.0], [2.0, 5.0]]), self.drawn)
        assert float(loss) == pytest.approx((-(-1.0 + 2.0) / 2 + 6.0) / 2)

    def test_no_gradient_passes_through_the_advantage(self) -> None:
        log_prob = self.log_prob.clone().requires_grad_()
        advantage = torch.ones(2, requires_grad=True)
        own = torch.ones(2, 2, requires_grad=True)
        loss = rl.set_reinforce_loss(log_prob, advantage, self.drawn) + rl.patch_credit_loss(log_prob, own, self.drawn)
        loss.backward()
        assert advantage.grad is None
        assert own.grad is None
        assert log_prob.grad is not None

    def test_leave_one_out_by_hand(self) -> None:
        advantage = rl.leave_one_out_advantage(torch.tensor([[3.0, 0.0], [1.0, 0.0], [5.0, 6.0]]))
        torch.testing.assert_close(advantage, torch.tensor([[0.0, -3.0], [-3.0, -3.0], [3.0, 6.0]]))

    def test_leave_one_out_needs_two_draws(self) -> None:
        with pytest.raises(ValueError, match="at least 2 draws"):
            rl.leave_one_out_advantage(torch.zeros(1, 4))


class TestBernoulli:
    def test_log_prob_by_hand(self) -> None:
        logits = torch.full((1, 2), math.log(3.0))
        log_prob = rl.bernoulli_log_prob(logits, torch.tensor([[True, False]]))
        torch.testing.assert_close(log_prob.exp(), torch.tensor([[0.75, 0.25]]))

    @pytest.mark.parametrize("action", [True, False])
    def test_forbidden_cells_count_nothing(self, action: bool) -> None:
        logits = torch.tensor([[-INF, 0.0]], requires_grad=True)
        log_prob = rl.bernoulli_log_prob(logits, torch.tensor([[action, action]]))
        torch.testing.assert_close(log_prob, torch.tensor([[0.0, -math.log(2.0)]]))
        assert finite_gradient(log_prob.sum(), logits).abs().tolist() == [[0.0, 0.5]]

    @pytest.mark.parametrize("largest", [100.0, 65504.0])
    def test_extreme_logits_stay_finite(self, largest: float) -> None:
        logits = torch.tensor([[largest, -largest]], dtype=torch.float16).float().requires_grad_()
        for action in ([True, True], [False, False]):
            finite_gradient(rl.bernoulli_log_prob(logits, torch.tensor([action])).sum(), logits)
        entropy = rl.bernoulli_entropy(logits)
        assert entropy.item() == pytest.approx(0.0, abs=1e-3)
        finite_gradient(entropy.sum(), logits)

    def test_entropy_by_hand(self) -> None:
        logits = torch.tensor([[0.3, 0.3, 0.3], [0.0, -100.0, -INF]])
        quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
        found = rl.bernoulli_entropy(logits)
        torch.testing.assert_close(found, torch.tensor([1.0, 0.5 * math.log(2.0) / quarter]), atol=1e-4, rtol=0)


class TestCategorical:
    def test_entropy_by_hand(self) -> None:
        logits = torch.tensor([[0.0, 0.0], [math.log(1.0), math.log(3.0)]])
        two = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2.0)
        torch.testing.assert_close(rl.categorical_entropy(logits), torch.tensor([1.0, two]))

    def test_entropy_over_allowed_cells(self) -> None:
        logits = torch.tensor([[1.0, 1.0, 1.0, -INF], [5.0, -INF, -INF, -INF]], requires_grad=True)
        entropy = rl.categorical_entropy(logits, torch.isfinite(logits))
        torch.testing.assert_close(entropy, torch.tensor([1.0, 0.0]))
        finite_gradient(entropy.sum(), logits)

    def test_entropy_of_extreme_logits(self) -> None:
        logits = torch.tensor([[65504.0, 0.0, -65504.0]], requires_grad=True)
        entropy = rl.categorical_entropy(logits)
        assert entropy.item() == 0.0
        finite_gradient(entropy.sum(), logits)

    def test_entropy_of_a_single_cell(self) -> None:
        assert rl.categorical_entropy(torch.tensor([[3.0]])).tolist() == [0.0]

    def test_inclusion_probability_by_hand(self) -> None:
        """Rates 1 and 2: with x = exp(-T) half, the chances 1 - x and 1 - x^2 add up to 1.25."""
        logits = torch.tensor([[1.0, 2.0], [3.0, 6.0]]).log()
        chance = rl.inclusion_probability(logits, 1.25)
        torch.testing.assert_close(chance, torch.tensor([[0.5, 0.75], [0.5, 0.75]]))
        torch.testing.assert_close(rl.inclusion_probability(logits, torch.tensor([1.25, 1.25])), chance)

    @pytest.mark.parametrize(("cells", "k"), [(16, 4), (64, 38), (64, 60), (512, 100)])
    def test_inclusion_probability_is_how_often_a_cell_is_drawn(self, cells: int, k: int) -> None:
        generator = torch.Generator().manual_seed(cells + k)
        logits = torch.randn(1, cells, generator=generator)
        noise = rl.gumbel(torch.rand(8000, cells, generator=generator))
        order = rl.gumbel_top_k(logits, noise, k)
        drawn = torch.zeros_like(noise).scatter(1, order, 1.0).mean(0)
        estimate = rl.inclusion_probability(logits, k)[0]
        torch.testing.assert_close(estimate, drawn, atol=0.03, rtol=0)
        assert estimate.sum().item() == pytest.approx(k, rel=1e-3)

    def test_inclusion_probability_with_forbidden_cells_and_a_number_of_draws_for_each_image(self) -> None:
        logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
        logits[:, ::2] = -INF
        chance = rl.inclusion_probability(logits, torch.tensor([0, 4, 10]))
        assert (chance[:, ::2] == 0).all()
        torch.testing.assert_close(chance.sum(1), torch.tensor([0.0, 4.0, 10.0]), atol=2e-3, rtol=0)
        assert chance[1, 1::2].max() < 1.0

    @pytest.mark.parametrize("spread", [0.0, 1.0, 3.0, 100.0])
    @pytest.mark.parametrize("k", [1, 30, 60, 64])
    def test_inclusion_probabilities_add_up_to_the_draws(self, spread: float, k: int) -> None:
        logits = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * spread
        chance = rl.inclusion_probability(logits, k)
        assert chance.min() >= 0.0 and chance.max() <= 1.0
        torch.testing.assert_close(chance.sum(1), torch.full((4,), float(k)), atol=0.05, rtol=0.01)


class TestCentredLogits:
    @pytest.mark.parametrize("spread", [0.0, 1.0, 5.0])
    @pytest.mark.parametrize("ratio", [0.05, 0.25, 0.6, 0.95])
    def test_the_mean_is_the_asked_one(self, spread: float, ratio: float) -> None:
        logits = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * spread + 3.0
        mean = rl.centred_logits(logits, ratio).sigmoid().mean(1)
        torch.testing.assert_close(mean, torch.full((4,), ratio), atol=1e-5, rtol=0)

    def test_forbidden_cells_stay_forbidden_and_are_not_counted(self) -> None:
        logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
        logits[:, ::2] = -INF
        centred = rl.centred_logits(logits, 0.3)
        assert (centred[:, ::2] == -INF).all()
        torch.testing.assert_close(centred[:, 1::2].sigmoid().mean(1), torch.full((3,), 0.3), atol=1e-5, rtol=0)

    def test_one_ratio_per_image(self) -> None:
        ratios = torch.tensor([0.2, 0.7])
        centred = rl.centred_logits(torch.randn(2, 30, generator=torch.Generator().manual_seed(0)), ratios)
        torch.testing.assert_close(centred.sigmoid().mean(1), ratios, atol=1e-5, rtol=0)

    def test_order_and_differences_are_kept(self) -> None:
        logits = torch.tensor([[0.0, 1.5, -2.0]])
        torch.testing.assert_close(rl.centred_logits(logits, 0.5).diff(), logits.diff())

    def test_gradient_agrees_with_finite_differences(self) -> None:
        logits = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda s: rl.centred_logits(s, 0.3), logits)

    def test_gradient_with_forbidden_cells_is_finite(self) -> None:
        logits = torch.tensor([[0.0, -INF, 2.0, -1.0]], requires_grad=True)
        centred = rl.centred_logits(logits, 0.4)
        gradient = finite_gradient(torch.where(torch.isfinite(centred), centred, 0.0).square().sum(), logits)
        assert gradient[0, 1] == 0.0
        assert gradient.abs().sum() > 0


class TestRewards:
    def test_zscore_by_hand(self) -> None:
        error = torch.tensor([[1.0, 3.0, 100.0], [5.0, 5.0, 0.0], [7.0, 1.0, 1.0]])
        hidden = torch.tensor([[True, True, False], [True, True, False], [True, False, False]])
        expected = torch.tensor([[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        torch.testing.assert_close(rl.zscore_reward(error, hidden), expected, atol=1e-5, rtol=0)

    def test_rank_by_hand(self) -> None:
        error = torch.tensor([[5.0, 1.0, 9.0, 3.0], [2.0, 8.0, 4.0, 6.0], [1.0, 2.0, 3.0, 4.0]])
        hidden = torch.tensor([[True, True, True, False], [True, True, True, True], [False, True, False, False]])
        expected = torch.tensor([[0.5, 0.0, 1.0, 0.0], [0.0, 1.0, 1 / 3, 2 / 3], [0.0, 0.0, 0.0, 0.0]])
        torch.testing.assert_close(rl.rank_reward(error, hidden), expected)

    def test_equal_errors_have_equal_ranks(self) -> None:
        error = torch.tensor([[2.0, 2.0, 2.0, 2.0, 9.0], [1.0, 5.0, 1.0, 3.0, 3.0]])
        hidden = torch.tensor([[True, True, True, True, False], [True] * 5])
        expected = torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.0], [0.125, 1.0, 0.125, 0.625, 0.625]])
        torch.testing.assert_close(rl.rank_reward(error, hidden), expected)

    @pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
    def test_both_ignore_the_scale_of_the_error(self, scale: float) -> None:
        error = torch.rand(2, 20, generator=torch.Generator().manual_seed(0)) + 1.0
        hidden = torch.arange(20).expand(2, -1) < 12
        for reward in (rl.zscore_reward, rl.rank_reward):
            torch.testing.assert_close(reward(error * scale, hidden), reward(error, hidden), atol=0.02, rtol=0)

    def test_nothing_hidden_gives_nothing(self) -> None:
        error, hidden = torch.rand(2, 5), torch.zeros(2, 5, dtype=torch.bool)
        assert rl.zscore_reward(error, hidden).abs().sum() == 0
        assert rl.rank_reward(error, hidden).abs().sum() == 0


class TestRunningMoments:
    def test_the_first_steps_are_a_plain_average(self) -> None:
        moments = RunningMoments(decay=0.99)
        batches = np.random.default_rng(0).normal(3.0, 2.0, size=(20, 50)).astype(np.float32)
        for batch in batches:
            moments.update(torch.from_numpy(batch))
        assert float(moments.mean) == pytest.approx(batches.mean(), rel=1e-4)
        assert float(moments.std) == pytest.approx(batches.std(), rel=1e-4)

    def test_then_the_past_fades(self) -> None:
        moments = RunningMoments(decay=0.5)
        for value in (1.0, 3.0, 10.0):  # weights 1/4, 1/4, 1/2
            moments.update(torch.tensor([value]))
        mean = 0.25 * 1 + 0.25 * 3 + 0.5 * 10
        assert float(moments.mean) == pytest.approx(mean)
        assert float(moments.var) == pytest.approx(0.25 * 1**2 + 0.25 * 3**2 + 0.5 * 10**2 - mean**2)

    def test_only_marked_values_count(self) -> None:
        moments = RunningMoments()
        moments.update(torch.tensor([[1.0, 3.0, 500.0]]), torch.tensor([[True, True, False]]))
        assert (float(moments.mean), float(moments.var)) == (2.0, 1.0)
        moments.update(torch.tensor([7.0]), torch.tensor([False]))
        assert (float(moments.mean), float(moments.var), float(moments.steps)) == (2.0, 1.0, 1.0)

    def test_what_is_not_marked_may_be_nan_or_infinite(self) -> None:
        moments = RunningMoments()
        moments.update(torch.tensor([1.0, 3.0, INF, math.nan]), torch.tensor([True, True, False, False]))
        assert (float(moments.mean), float(moments.var)) == (2.0, 1.0)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_values_of_another_precision(self, dtype: torch.dtype) -> None:
        moments = RunningMoments()
        moments.update(torch.tensor([1.0, 3.0], dtype=dtype).repeat(40_001))  # float16 does not count to 80002
        assert (float(moments.mean), float(moments.var)) == (pytest.approx(2.0), pytest.approx(1.0))
        assert moments.mean.dtype == torch.float32

    def test_travels_with_the_checkpoint(self) -> None:
        moments, other = RunningMoments(), RunningMoments()
        moments.update(torch.tensor([4.0, 8.0]))
        other.load_state_dict(moments.state_dict())
        assert float(other.std) == float(moments.std) == pytest.approx(2.0)

    def test_constant_values_leave_a_usable_deviation(self) -> None:
        moments = RunningMoments()
        moments.update(torch.full((4,), 2.0))
        assert float(moments.std) > 0


def test_centred_logits_hold_the_mean_for_logits_far_apart() -> None:
    logits = torch.tensor([[-60.0, -40.0, 35.0, 60.0], [0.0, 0.0, 0.0, 90.0]])
    for mean in (0.25, 0.6):
        centred = rl.centred_logits(logits, mean)
        torch.testing.assert_close(centred.sigmoid().mean(1), torch.full((2,), mean), atol=2e-3, rtol=0)
