# SPDX-License-Identifier: Apache-2.0
"""Expected gradient of every estimator, by exact enumeration of all draws, against the gradient of the true objective.

The objective is the expected sum of the rewards of the hidden cells. Small cases (5 or 6 cells, 3 hidden), random
instances, with rewards that do or do not depend on what else is hidden. Each draw is one image of a batch; its gradient
is weighted with its probability.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ahm_networks.maskers.drawing import Draw
from ahm_networks.maskers.policies import ActorCriticDecision, BernoulliPolicy, Policy, SetPolicy
from ahm_networks.rl import functional as rl

K = 3
INSTANCES = 60
INFLUENCE = 0.2
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits [B, N], orders [B, K], rewards [B, N]


@functools.cache
def all_orders(cells: int) -> Tensor:
    return torch.tensor(list(itertools.permutations(range(cells), K)))


def brute_force_log_prob(logits: Tensor, orders: Tensor) -> Tensor:
    """Step by step over what is left, independent of the function under test: ``[B]``."""
    weights = logits.exp().expand(len(orders), -1)
    left, log_prob = torch.ones_like(weights), torch.zeros(len(orders))
    for cell in orders.split(1, dim=1):
        log_prob = log_prob + (weights.gather(1, cell).squeeze(1) / (weights * left).sum(1)).log()
        left = left.scatter(1, cell, 0.0)
    return log_prob


@functools.cache
def random_instance(seed: int, context: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``[N]``, all orders ``[B, K]``, and each cell's reward under each order ``[B, N]``, 0 where visible."""
    generator = torch.Generator().manual_seed(seed)
    cells = 5 + seed % 2
    logits, orders = torch.randn(cells, generator=generator), all_orders(cells)
    hidden = torch.zeros(len(orders), cells, dtype=torch.bool).scatter(1, orders, True)
    own = torch.rand(cells, generator=generator)
    # What else is hidden raises a cell's reward.
    influence = INFLUENCE * torch.rand(cells, cells, generator=generator) * context
    rewards = torch.where(hidden, own + hidden.float() @ influence, 0.0)
    return logits, orders, rewards


def true_gradient(logits: Tensor, orders: Tensor, rewards: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    objective = (brute_force_log_prob(leaf, orders).exp() * rewards.sum(1)).sum()
    return torch.autograd.grad(objective, leaf)[0]


def expected_gradient(loss: Loss, logits: Tensor, orders: Tensor, rewards: Tensor) -> Tensor:
    """Descent direction in expectation over the draws; ``loss`` is a mean over the batch of all of them."""
    batch = logits.expand(len(orders), -1).clone().requires_grad_()
    gradient = torch.autograd.grad(loss(batch, orders, rewards), batch)[0]
    chance = brute_force_log_prob(logits, orders).exp()
    return -(chance.unsqueeze(1) * gradient).sum(0)


def cosines(make_loss: Callable[[int], Loss], context: bool) -> Tensor:
    found = []
    for seed in range(INSTANCES):
        instance = random_instance(seed, context)
        estimate = expected_gradient(make_loss(seed), *instance)
        found.append(torch.cosine_similarity(estimate, true_gradient(*instance), dim=0))
    return torch.stack(found)


def decide(logits: Tensor, value: Tensor, draw: Draw) -> ActorCriticDecision:
    cells = draw.cells.view(len(logits), 1, 1, -1)
    chance = rl.inclusion_probability(logits, draw.drawn.sum(1)).view(cells.shape)
    return ActorCriticDecision(
        mask=cells, cells=cells, policy_map=chance, logits=logits, value=value, draw=draw, ratio=0.5
    )


def ordered_draw(orders: Tensor, cells: int) -> Draw:
    hidden = torch.zeros(len(orders), cells, dtype=torch.bool).scatter(1, orders, True)
    return Draw(hidden, orders, torch.ones_like(orders, dtype=torch.bool))


def frozen_moments(policy: Policy, mean: float, std: float) -> None:
    """Set the running moments to constants, as after very many steps: then no draw of the batch moves them."""
    policy.advantage_moments.decay = 1.0
    policy.advantage_moments.mean.fill_(mean)
    policy.advantage_moments.var.fill_(std**2)
    policy.advantage_moments.steps.fill_(1e12)


def set_policy_loss(credit: str, baseline: str) -> Callable[[int], Loss]:
    def make(seed: int) -> Loss:
        policy = SetPolicy(credit, baseline)
        frozen_moments(policy, mean=0.3, std=0.7)

        def loss(logits: Tensor, orders: Tensor, rewards: Tensor) -> Tensor:
            value = torch.rand(logits.shape[1], generator=torch.Generator().manual_seed(seed)).expand_as(logits)
            return policy.loss([decide(logits, value, ordered_draw(orders, logits.shape[1]))], [rewards])

        return loss

    return make


def constant_baseline_loss(constant: float) -> Callable[[int], Loss]:
    def loss(logits: Tensor, orders: Tensor, rewards: Tensor) -> Tensor:
        advantage = rewards.sum(1) / K - constant
        log_prob = rl.plackett_luce_log_prob(logits, orders)
        return rl.set_reinforce_loss(log_prob, advantage, torch.ones_like(orders, dtype=torch.bool))

    return lambda seed: loss


def converged_patch_value_loss(seed: int) -> Loss:
    """Reward of a cell minus its own expected reward given that it is hidden: what is *not* used."""

    def loss(logits: Tensor, orders: Tensor, rewards: Tensor) -> Tensor:
        chance = brute_force_log_prob(logits[0].detach(), orders).exp().unsqueeze(1)
        hidden = torch.zeros_like(rewards).scatter(1, orders, 1.0)
        value = (chance * rewards).sum(0) / (chance * hidden).sum(0)
        advantage = (rewards - value).gather(1, orders)
        log_prob = rl.plackett_luce_log_prob(logits, orders)
        return rl.patch_credit_loss(log_prob, advantage, torch.ones_like(orders, dtype=torch.bool))

    return loss


both_contexts = pytest.mark.parametrize("context", [False, True], ids=["independent", "context"])


@both_contexts
@pytest.mark.parametrize("constant", [-2.0, 0.0, 0.5, 5.0])
def test_set_reward_minus_any_constant_is_exact(context: bool, constant: float) -> None:
    assert cosines(constant_baseline_loss(constant), context).min() > 0.99


@both_contexts
@pytest.mark.parametrize("baseline", ["value", "running_mean"])
def test_set_policy_is_exact(context: bool, baseline: str) -> None:
    """Also with a value map that is wrong: a baseline that sees only the image cannot bias the gradient."""
    assert cosines(set_policy_loss("set", baseline), context).min() > 0.99


@both_contexts
def test_leave_one_out_is_exact(context: bool) -> None:
    """Two draws for the same image: every pair of them is one image of the batch."""
    policy = SetPolicy("set", "leave_one_out")
    frozen_moments(policy, mean=-0.2, std=1.3)
    for seed in range(4):
        logits, orders, rewards = random_instance(seed, context)
        first, second = torch.cartesian_prod(torch.arange(len(orders)), torch.arange(len(orders))).unbind(1)
        leaves = [logits.expand(len(first), -1).clone().requires_grad_() for _ in range(2)]
        decisions = [
            decide(leaf, torch.zeros_like(leaf), ordered_draw(orders[rows], len(logits)))
            for leaf, rows in zip(leaves, (first, second), strict=True)
        ]
        gradients = torch.autograd.grad(policy.loss(decisions, [rewards[first], rewards[second]]), leaves)
        chance = brute_force_log_prob(logits, orders).exp()
        expected = -((chance[first] * chance[second]).unsqueeze(1) * sum(gradients)).sum(0)
        assert torch.cosine_similarity(expected, true_gradient(logits, orders, rewards), dim=0) > 0.99


@both_contexts
def test_patch_credit_is_biased_but_points_the_right_way(context: bool) -> None:
    found = cosines(set_policy_loss("patch", "value"), context)
    assert 0.75 < found.mean() < 0.99


@both_contexts
def test_patch_reward_minus_converged_patch_value_gives_no_direction(context: bool) -> None:
    """The value of a hidden cell depends on the action, so it is no baseline: why patch credit leaves it out."""
    assert cosines(converged_patch_value_loss, context).mean().abs() < 0.5


def test_value_baseline_takes_off_what_the_image_alone_explains() -> None:
    """Where all cells of an image pay the same and the value map knows it, no draw is better than another."""
    rewards = torch.tensor([[1.0] * 5, [10.0] * 5])
    orders = torch.tensor([[0, 3, 1], [4, 2, 0]])
    found = {}
    for baseline in ("value", "running_mean"):
        policy = SetPolicy("set", baseline)
        frozen_moments(policy, mean=0.0, std=1.0)
        found[baseline] = policy.loss([decide(torch.randn(2, 5), rewards, ordered_draw(orders, 5))], [rewards])
    assert found["value"].item() == pytest.approx(0.0, abs=1e-5)
    assert found["running_mean"].item() > 1.0


class TestBernoulliPolicy:
    cells = 6
    actions = torch.tensor(list(itertools.product([False, True], repeat=cells)))

    def expected_gradient(self, logits: Tensor, value: Tensor, own: Tensor) -> Tensor:
        batch = logits.expand(len(self.actions), -1).clone().requires_grad_()
        none = torch.zeros(len(self.actions), 0, dtype=torch.long)
        decision = decide(batch, value.expand_as(batch), Draw(self.actions, none, none.bool()))
        loss = BernoulliPolicy().loss([decision], [torch.where(self.actions, own, 0.0)])
        gradient = torch.autograd.grad(loss, batch)[0]
        return -(self.chance(logits).unsqueeze(1) * gradient).sum(0)

    def chance(self, logits: Tensor) -> Tensor:
        p = logits.sigmoid()
        return torch.where(self.actions, p, 1 - p).prod(1)

    @pytest.mark.parametrize("critic", ["wrong", "converged"])
    def test_per_agent_credit_is_exact_for_independent_rewards(self, critic: str) -> None:
        for seed in range(INSTANCES):
            generator = torch.Generator().manual_seed(seed)
            logits, own, wrong = torch.randn(3, self.cells, generator=generator)
            value = wrong if critic == "wrong" else logits.sigmoid() * own
            leaf = logits.clone().requires_grad_()
            objective = (self.chance(leaf) * torch.where(self.actions, own, 0.0).sum(1)).sum()
            true = torch.autograd.grad(objective, leaf)[0]
            estimate = self.expected_gradient(logits, value, own)
            assert torch.cosine_similarity(estimate, true, dim=0) > 0.99

    def test_a_critic_that_knows_the_outcome_leaves_nothing_to_learn(self) -> None:
        own = torch.rand(len(self.actions), self.cells)
        none = torch.zeros(len(self.actions), 0, dtype=torch.long)
        draw = Draw(self.actions, none, none.bool())
        decision = decide(torch.zeros_like(own), torch.where(self.actions, own, 0.0), draw)
        assert BernoulliPolicy().loss([decision], [own]).item() == 0.0

    def test_gradient_uses_the_action_taken(self) -> None:
        """A cell that pays is pushed up, one that costs is pushed down."""
        own = torch.tensor([1.0, -1.0, 0.0, 2.0, -2.0, 0.0])
        estimate = self.expected_gradient(torch.zeros(self.cells), torch.zeros(self.cells), own)
        torch.testing.assert_close(estimate.sign(), own.sign(), atol=1e-6, rtol=0)
