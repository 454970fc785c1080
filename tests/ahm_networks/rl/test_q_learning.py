# SPDX-License-Identifier: Apache-2.0
"""Formulas for episodes against numbers worked out by hand and brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from ahm_networks.rl import q_learning as ql

INF = float("inf")


class TestDueling:
    def test_by_hand(self) -> None:
        """Row 1: mean of 1, 2, 6 is 3, so Q = 10 + (-2, -1, 3). Row 2: only 4 and 6 are valid, mean 5, Q = -1 + 1."""
        advantage = torch.tensor([[1.0, 2.0, 6.0], [4.0, 900.0, 6.0]])
        valid = torch.tensor([[True, True, True], [True, False, True]])
        q = ql.dueling(advantage, torch.tensor([10.0, 0.0]), valid)
        assert q[0].tolist() == [8.0, 9.0, 13.0]
        assert q[1, [0, 2]].tolist() == [-1.0, 1.0]

    def test_the_mean_over_valid_actions_is_the_value(self) -> None:
        advantage, value = torch.randn(2, 3, 7), torch.randn(2, 3)
        valid = torch.rand(2, 3, 7) < 0.7
        valid[..., 0] = True
        q = ql.dueling(advantage, value, valid)
        means = torch.where(valid, q, 0.0).sum(-1) / valid.sum(-1)
        torch.testing.assert_close(means, value)

    def test_gradient_of_one_q_value(self) -> None:
        """dQ_0/dAdv = (1 - 1/2, -1/2) over the two valid actions, and nothing for the third; dQ_0/dV = 1."""
        advantage, value = torch.zeros(1, 3, requires_grad=True), torch.zeros(1, requires_grad=True)
        ql.dueling(advantage, value, torch.tensor([[True, True, False]]))[0, 0].backward()
        assert advantage.grad is not None
        assert value.grad is not None
        assert advantage.grad.tolist() == [[0.5, -0.5, 0.0]]
        assert value.grad.tolist() == [1.0]

    def test_no_valid_action_stays_finite(self) -> None:
        q = ql.dueling(torch.ones(1, 2), torch.ones(1), torch.zeros(1, 2, dtype=torch.bool))
        assert torch.isfinite(q).all()


class TestBootstrapValue:
    """Two episodes of three steps and three actions; action 2 is not valid in the second state of the first one."""

    target = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [[-1.0, -2.0, -3.0], [7.0, 8.0, 9.0]]])
    online = torch.tensor([[[9.0, 0.0, 99.0], [0.0, 9.0, 0.0]], [[0.0, 0.0, 9.0], [9.0, 9.0, 9.5]]])
    valid = torch.tensor([[[True, True, False], [True, True, True]], [[True, True, True], [False, False, False]]])

    def test_the_target_network_chooses(self) -> None:
        """Largest valid target values: 2 and 6; -1, then nothing is valid: 0. After the last step: 0."""
        assert ql.bootstrap_value(self.target, None, self.valid).tolist() == [[2.0, 6.0, 0.0], [-1.0, 0.0, 0.0]]

    def test_double_lets_the_online_network_choose(self) -> None:
        """Online chooses actions 0 (2 is not valid), 1; then 2: the target network says 1, 5; then -3."""
        assert ql.bootstrap_value(self.target, self.online, self.valid).tolist() == [[1.0, 5.0, 0.0], [-3.0, 0.0, 0.0]]

    def test_a_single_step_has_no_later_value(self) -> None:
        none = torch.zeros(2, 0, 4)
        assert ql.bootstrap_value(none, none, none.bool()).tolist() == [[0.0], [0.0]]


def test_td_target_by_hand() -> None:
    """1 + 0.5 * 4 = 3, 2 + 0.5 * -2 = 1, and the terminal step keeps its reward."""
    rewards, later = torch.tensor([[1.0, 2.0, 5.0]]), torch.tensor([[4.0, -2.0, 0.0]], requires_grad=True)
    target = ql.td_target(rewards, later, 0.5)
    assert target.tolist() == [[3.0, 1.0, 5.0]]
    assert not target.requires_grad


class TestTdLoss:
    scores = torch.tensor([[[1.0, -INF], [4.0, 2.0]], [[-INF, 3.0], [-INF, -INF]]])
    actions = torch.tensor([[0, 1], [1, 0]])
    target = torch.tensor([[0.0, 2.5], [3.0, 77.0]])
    live = torch.tensor([[True, True], [True, False]])

    @pytest.mark.parametrize(
        ("loss", "expected"),
        [
            (F.mse_loss, (1.0 + 0.25 + 0.0) / 3),  # errors 1, -0.5 and 0; the last step was not taken
            (F.smooth_l1_loss, (0.5 + 0.125 + 0.0) / 3),  # half the square below 1
        ],
    )
    def test_by_hand(self, loss, expected: float) -> None:
        found = ql.td_loss(self.scores, self.actions, self.target, self.live, loss)
        assert found.item() == pytest.approx(expected)

    def test_only_the_actions_taken_get_a_gradient(self) -> None:
        """d/dq of (q - y)^2 / 3: 2 * 1 / 3, 2 * -0.5 / 3, 0."""
        scores = self.scores.clone().requires_grad_()
        ql.td_loss(scores, self.actions, self.target, self.live, F.mse_loss).backward()
        assert scores.grad is not None
        expected = torch.tensor([[[2 / 3, 0.0], [0.0, -1 / 3]], [[0.0, 0.0], [0.0, 0.0]]])
        torch.testing.assert_close(scores.grad, expected)

    def test_no_step_taken(self) -> None:
        scores = torch.full((1, 2, 3), -INF, requires_grad=True)
        loss = ql.td_loss(scores, torch.zeros(1, 2).long(), torch.zeros(1, 2), torch.zeros(1, 2).bool(), F.mse_loss)
        loss.backward()
        assert loss.item() == 0.0
        assert scores.grad is not None
        assert not scores.grad.any()


class TestDiscountedReturns:
    def test_by_hand(self) -> None:
        """R_3 = 3, R_2 = 2 + 0.9 * 3 = 4.7, R_1 = 1 + 0.9 * 4.7 = 5.23."""
        returns = ql.discounted_returns(torch.tensor([[1.0, 2.0, 3.0], [5.0, 0.0, 0.0]]), 0.9)
        torch.testing.assert_close(returns, torch.tensor([[5.23, 4.7, 3.0], [5.0, 0.0, 0.0]]))

    def test_nothing_ahead_counts_at_gamma_zero(self) -> None:
        rewards = torch.randn(3, 5)
        assert torch.equal(ql.discounted_returns(rewards, 0.0), rewards)


class TestActionLogProb:
    def test_by_hand(self) -> None:
        """Weights 1, 2, 5 and one that is not valid: 2 of 8."""
        logits = torch.tensor([[1.0, 2.0, 5.0, 0.0]]).log()
        assert ql.action_log_prob(logits, torch.tensor([1])).exp().item() == pytest.approx(2 / 8)

    def test_agrees_with_brute_force_and_sums_to_one(self) -> None:
        logits = torch.randn(2, 3, 5).masked_fill(torch.tensor([False, True, False, False, True]), -INF)
        found = torch.stack([ql.action_log_prob(logits, torch.full((2, 3), a)) for a in range(5)], dim=2).exp()
        torch.testing.assert_close(found, logits.exp() / logits.exp().sum(2, keepdim=True))
        torch.testing.assert_close(found.sum(2), torch.ones(2, 3))

    def test_no_valid_action_is_finite_without_gradient(self) -> None:
        logits = torch.full((1, 4), -INF, requires_grad=True)
        log_prob = ql.action_log_prob(logits, torch.tensor([0]))
        log_prob.sum().backward()
        assert torch.isfinite(log_prob).all()
        assert logits.grad is not None
        assert not logits.grad.any()


class TestEpsilonGreedy:
    scores = torch.tensor([[5.0, 9.0, 7.0, -INF]]).expand(6000, -1)
    valid = torch.tensor([[True, False, True, False]]).expand(6000, -1)
    draws = torch.rand(6000, 5, generator=torch.Generator().manual_seed(0))

    @pytest.mark.parametrize(("epsilon", "share"), [(0.0, 0.0), (0.4, 0.2), (1.0, 0.5)])
    def test_share_of_each_action(self, epsilon: float, share: float) -> None:
        """Action 2 is the best valid one. Action 0 is taken in half of the explorations, the others never."""
        taken = ql.epsilon_greedy(self.scores, self.valid, epsilon, self.draws)
        counts = F.one_hot(taken, 4).float().mean(0)
        torch.testing.assert_close(counts, torch.tensor([share, 0.0, 1.0 - share, 0.0]), atol=0.02, rtol=0)

    def test_exploring_is_uniform_over_valid_actions(self) -> None:
        valid = torch.tensor([[True, True, False, True]]).expand(6000, -1)
        counts = F.one_hot(ql.epsilon_greedy(self.scores, valid, 1.0, self.draws), 4).float().mean(0)
        torch.testing.assert_close(counts, torch.tensor([1 / 3, 1 / 3, 0.0, 1 / 3]), atol=0.02, rtol=0)


class TestEpisodePolicyLoss:
    def test_by_hand(self) -> None:
        """Row 1: -(1 * 2 * -0.5 + 0.5 * 4 * -1) / 2 = 1.5; row 2 ends after a step: -(1 * 3 * -2) / 2 = 3."""
        log_prob = torch.tensor([[-0.5, -1.0], [-2.0, -9.0]])
        advantage = torch.tensor([[2.0, 4.0], [3.0, 7.0]])
        live = torch.tensor([[True, True], [True, False]])
        assert ql.episode_policy_loss(log_prob, advantage, live, 0.5).item() == pytest.approx((1.5 + 3.0) / 2)

    @pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
    def test_expected_gradient_is_exact(self, gamma: float) -> None:
        """Two steps; the logits of the second depend on the first action, which may end the episode. By enumeration."""
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            logits = torch.randn(4, 3, generator=generator)  # row 0: first step; rows 1 to 3: after each first action
            first_reward, second_reward = torch.randn(3, generator=generator), torch.randn(3, 3, generator=generator)
            baseline = torch.randn(4, generator=generator)  # wrong, but a function of the state alone
            leaf = logits.clone().requires_grad_()
            p, later = leaf[0].softmax(0), leaf[1:].softmax(1)
            second_reward[0] = 0.0  # action 0 ends the episode
            objective = (p * (first_reward + gamma * (later * second_reward).sum(1))).sum()
            exact = torch.autograd.grad(objective, leaf)[0]
            estimate = self.enumerated(logits, first_reward, second_reward, baseline, gamma)
            torch.testing.assert_close(estimate, exact, atol=1e-5, rtol=1e-4)

    def enumerated(self, logits, first_reward, second_reward, baseline, gamma: float) -> torch.Tensor:
        leaf = logits.clone().requires_grad_()
        total = torch.zeros(())
        for a, b in itertools.product(range(3), range(3)):
            live = torch.tensor([[True, a != 0]])
            steps, actions = torch.stack([leaf[0], leaf[1 + a]]).unsqueeze(0), torch.tensor([[a, b]])
            log_prob = ql.action_log_prob(steps, actions)
            rewards = torch.stack([first_reward[a], second_reward[a, b]]).unsqueeze(0)
            returns = ql.discounted_returns(rewards, gamma)
            advantage = returns - torch.stack([baseline[0], baseline[1 + a]])
            loss = ql.episode_policy_loss(log_prob, advantage, live, gamma)
            total = total + log_prob.sum().exp().detach() * loss
        return -2 * torch.autograd.grad(total, leaf)[0]  # the loss is a mean over the two steps
