# SPDX-License-Identifier: Apache-2.0
"""Expected gradient of the actor-critic over boxes, by enumeration of all episodes, against the true gradient.

A row of four cells, boxes of one or two of them, three cells at most, two steps: the second may be impossible. Every
episode is one image of a batch; its gradient is weighted with its probability, worked out apart from the code.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ahm_networks.maskers.box_actions import box_actions
from ahm_networks.maskers.box_actor_critic import ActorCriticLearner
from ahm_networks.maskers.box_feedback import BoxReward
from ahm_networks.maskers.box_learner import BoxDecision, Episode
from ahm_networks.nets.box_scorer import BoxState
from ahm_networks.rl.running import RunningMoments

GRID, SIZES, BUDGET, LARGEST = (1, 4), ((1, 1), (1, 2)), 3, 2
BOXES = [(0,), (1,), (2,), (3,), (0, 1), (1, 2), (2, 3), None]  # by action number; the last does not fit
INFLUENCE = 0.2


def valid(hidden: set[int]) -> list[int]:
    fresh = [set() if box is None else set(box) - hidden for box in BOXES]
    return [n for n, new in enumerate(fresh) if 0 < len(new) <= BUDGET - len(hidden)]


def episodes() -> list[tuple[int, int | None]]:
    """All pairs of actions; the second is ``None`` where no box fits any more."""
    found = []
    for first in valid(set()):
        found += [(first, second) for second in valid(set(BOXES[first])) or [None]]
    return found


def box_cells(episode: tuple[int, int | None]) -> Tensor:
    first, second = (set() if n is None else set(BOXES[n]) for n in episode)
    return torch.tensor([[i in first for i in range(4)], [i in second - first for i in range(4)]])


class Instance:
    """Random logits of each state, a wrong value of each state, and rewards that may depend on what else is hidden."""

    def __init__(self, seed: int, context: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.first, self.second = (torch.randn(*shape, generator=generator) for shape in ((8,), (8, 8)))
        self.value = torch.randn(9, generator=generator)
        error, others = torch.rand(4, generator=generator), torch.rand(4, 4, generator=generator)
        self.cells = torch.stack([box_cells(episode) for episode in episodes()])
        self.hidden = self.cells.any(1)
        self.error = error + INFLUENCE * context * self.hidden.float() @ others
        self.rewards = frozen_reward()(self.error, self.hidden, self.cells)

    def probability(self, first: Tensor, second: Tensor) -> Tensor:
        """Of each episode, step by step."""
        found = []
        for a, b in episodes():
            p = first[valid(set())].exp()
            p = first[a].exp() / p.sum()
            if b is not None:
                row = second[a]
                p = p * row[b].exp() / row[valid(set(BOXES[a]))].exp().sum()
            found.append(p)
        return torch.stack(found)

    def true_gradient(self, gamma: float) -> Tensor:
        leaves = self.first.clone().requires_grad_(), self.second.clone().requires_grad_()
        objective = (self.probability(*leaves) * (self.rewards[:, 0] + gamma * self.rewards[:, 1])).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(objective, leaves)])

    def expected_gradient(self, gamma: float) -> Tensor:
        leaves = self.first.clone().requires_grad_(), self.second.clone().requires_grad_()
        learner = ActorCriticLearner(gamma=gamma, entropy_weight=(0.0, 0.0), entropy_floor=0.0, value_weight=0.0)
        freeze(learner.advantage_moments, 0.0, 0.7)
        chance, total = self.probability(self.first, self.second), torch.zeros(())
        for number in range(len(chance)):
            decision = self.decision(number, *leaves)
            loss = learner.loss(None, decision, self.rewards[number : number + 1], torch.zeros(1))
            total = total + chance[number] * loss
        return -torch.cat([g.flatten() for g in torch.autograd.grad(total, leaves)])

    def decision(self, number: int, first: Tensor, second: Tensor) -> BoxDecision:
        """As the masker builds it, with the validity that its actions tell."""
        a, b = episodes()[number]
        boxes = box_actions(SIZES, GRID, torch.device("cpu"))
        free = torch.stack([torch.ones(4, dtype=torch.bool), ~self.cells[number, 0]])
        admitted = boxes.valid(free, torch.tensor([BUDGET, BUDGET - int(self.cells[number, 0].sum())])).unsqueeze(0)
        scores = torch.stack([first, second[a]]).unsqueeze(0).masked_fill(~admitted, float("-inf"))
        nothing = torch.zeros(1, 2, 4, dtype=torch.bool)
        actions = torch.tensor([[a, b or 0]])
        episode = Episode(nothing, BoxState(nothing, torch.zeros(1, 2, 2)), admitted, actions, admitted.any(2))
        cells = self.hidden[number].view(1, 1, 1, 4)
        value = torch.stack([self.value[8], self.value[a]]).unsqueeze(0)
        fields = {
            "mask": cells,
            "cells": cells,
            "box_cells": self.cells[number : number + 1],
            "predicted": None,
            "ratio": 0.75,
        }
        return BoxDecision(episode=episode, scores=scores, value=value, **fields)


def freeze(moments: RunningMoments, mean: float, std: float) -> None:
    moments.decay = 1.0
    moments.mean.fill_(mean)
    moments.var.fill_(std**2)
    moments.steps.fill_(1e12)


def frozen_reward() -> BoxReward:
    reward = BoxReward(1.0, LARGEST)
    freeze(reward.moments, 0.4, 0.5)
    return reward


def test_episodes_are_what_the_masker_admits() -> None:
    """Else the enumeration would prove nothing: 7 first boxes; after one of two cells a single cell is left."""
    boxes = box_actions(SIZES, GRID, torch.device("cpu"))
    everywhere = torch.ones(1, 4, dtype=torch.bool)
    assert boxes.valid(everywhere, torch.tensor([BUDGET]))[0].nonzero().flatten().tolist() == valid(set())
    for first in valid(set()):
        hidden = boxes.cells(torch.tensor([first]))
        after = boxes.valid(~hidden, torch.tensor([BUDGET]) - hidden.sum(1))[0]
        assert after.nonzero().flatten().tolist() == valid(set(BOXES[first]))
    assert len(set(episodes())) == len(list(itertools.chain(episodes())))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_the_estimator_is_exact(gamma: float) -> None:
    """Also with a value that is wrong: it is a function of the state alone."""
    for seed in range(10):
        instance = Instance(seed, context=False)
        true, found = instance.true_gradient(gamma), instance.expected_gradient(gamma)
        assert torch.cosine_similarity(found, true, dim=0) > 0.999
        ratio = found.norm() / true.norm()
        assert float(ratio) == pytest.approx(1 / (2 * 0.7), rel=1e-3)  # over two steps, and the running deviation


def test_what_a_later_box_changes_in_earlier_ones_is_left_out() -> None:
    """All rewards come from one reconstruction, so a later box moves earlier rewards: a small bias, by design."""
    cosines = torch.stack(
        [
            torch.cosine_similarity(instance.expected_gradient(0.9), instance.true_gradient(0.9), dim=0)
            for instance in (Instance(seed, context=True) for seed in range(10))
        ]
    )
    assert 0.9 < cosines.mean() < 0.9999
