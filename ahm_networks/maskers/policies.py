# SPDX-License-Identifier: Apache-2.0
"""How the actor-critic acts and learns: as one draw of a set, or as one agent per cell."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ahm_networks.maskers.base import Decision
from ahm_networks.maskers.drawing import Draw, draw_in_order
from ahm_networks.rl import functional as rl
from ahm_networks.rl.running import RunningMoments
from ahm_transforms.masking.functional import cell_count

__all__ = ["ActorCriticDecision", "BernoulliPolicy", "Policy", "SetPolicy"]


@dataclass(frozen=True, kw_only=True)
class ActorCriticDecision(Decision):
    """What the policy needs to learn from the outcome.

    Attributes:
        policy_map: ``[B, 1, *G]``, each cell's chance to be hidden by the policy.
        logits: ``[B, N]`` policy logits with their gradient, ``-inf`` where forbidden.
        value: ``[B, N]`` value map with its gradient: the scaled reward expected of a cell.
        draw: the cells that the policy itself chose to hide.
        ratio: share of the cells that the policy was asked for; 0 while masks are random.
    """

    policy_map: Tensor
    logits: Tensor
    value: Tensor
    draw: Draw
    ratio: float


class Policy(nn.Module, ABC):
    """Maps logits to an action, and the action's rewards to a loss."""

    default_reward_scale: str

    def __init__(self) -> None:
        super().__init__()
        self.advantage_moments = RunningMoments()

    def prepare(self, logits: Tensor, ratio: float) -> Tensor:
        """Turn the network's scores into the logits of the policy."""
        return logits

    @abstractmethod
    def act(self, logits: Tensor, uniform: Tensor, ratio: float, count: int | Tensor) -> Draw:
        """Draw an action from uniform numbers ``[B, N]``."""

    @abstractmethod
    def chance(self, logits: Tensor, count: int | Tensor) -> Tensor:
        """Each cell's chance to be hidden, ``[B, N]``."""

    @abstractmethod
    def loss(self, decisions: Sequence[ActorCriticDecision], rewards: Sequence[Tensor]) -> Tensor:
        """Policy-gradient loss; ``rewards`` are scaled cell maps ``[B, N]``, 0 where nothing was hidden."""

    @abstractmethod
    def value_target(self, decision: ActorCriticDecision, reward: Tensor) -> tuple[Tensor, Tensor]:
        """What the value map should say, ``[B, N]``, and where that is known, bool."""

    @abstractmethod
    def entropy(self, logits: Tensor) -> Tensor:
        """Entropy as a share of its largest value, ``[B]``."""


class SetPolicy(Policy):
    """Draw cells without replacement; the exact log-probability meets the advantage of the set.

    Args:
        credit: ``set``, or ``patch`` for each draw's own reward minus the mean of the set.
        baseline: ``value``, ``leave_one_out`` or ``running_mean``, for set credit.
    """

    default_reward_scale = "running"

    def __init__(self, credit: str = "set", baseline: str = "value") -> None:
        super().__init__()
        self.credit = credit
        self.baseline = baseline

    def act(self, logits: Tensor, uniform: Tensor, ratio: float, count: int | Tensor) -> Draw:
        """See :meth:`Policy.act`."""
        return draw_in_order(logits, rl.gumbel(uniform), count, int(cell_count(ratio, logits.shape[1])))

    def chance(self, logits: Tensor, count: int | Tensor) -> Tensor:
        """See :meth:`Policy.chance`."""
        return rl.inclusion_probability(logits, count)

    def entropy(self, logits: Tensor) -> Tensor:
        """See :meth:`Policy.entropy`."""
        return rl.categorical_entropy(logits, torch.isfinite(logits))

    def value_target(self, decision: ActorCriticDecision, reward: Tensor) -> tuple[Tensor, Tensor]:
        """A hidden cell's reward, known for whatever was hidden, by the policy or at random."""
        return reward, decision.cells.flatten(1)

    def loss(self, decisions: Sequence[ActorCriticDecision], rewards: Sequence[Tensor]) -> Tensor:
        """See :meth:`Policy.loss`."""
        sets = torch.stack([rl.masked_mean(r, d.draw.cells) for r, d in zip(rewards, decisions, strict=True)])
        advantages = self._set_advantages(decisions, sets)
        losses = []
        for decision, reward, mean, advantage in zip(decisions, rewards, sets, advantages, strict=True):
            draw = decision.draw
            log_prob = rl.plackett_luce_log_prob(decision.logits, draw.order, draw.drawn)
            if self.credit == "patch":
                own = reward.gather(1, draw.order) - mean.unsqueeze(1)
                losses.append(rl.patch_credit_loss(log_prob, self._standardised(own, draw.drawn), draw.drawn))
            else:
                scaled = self._standardised(advantage, draw.drawn.any(1))
                losses.append(rl.set_reinforce_loss(log_prob, scaled, draw.drawn))
        return torch.stack(losses).mean()

    @torch.no_grad()
    def _set_advantages(self, decisions: Sequence[ActorCriticDecision], sets: Tensor) -> Tensor:
        if self.credit == "patch" or self.baseline == "running_mean":
            return sets
        if self.baseline == "leave_one_out":
            return rl.leave_one_out_advantage(sets)
        return sets - torch.stack([_expected_value(decision) for decision in decisions])

    def _standardised(self, advantage: Tensor, where: Tensor) -> Tensor:
        """Take off the running mean and divide by the running deviation, constants that no draw moves by itself."""
        self.advantage_moments.update(advantage, where)
        return (advantage - self.advantage_moments.mean) / (self.advantage_moments.std + rl.EPS)


class BernoulliPolicy(Policy):
    """One agent per cell decides to hide it or not (PixelRL, Furuta et al., AAAI 2019; AHM's figure).

    The logits are shifted so that the expected share of hidden cells is the asked one. A cell's value covers both of
    its actions, so reward minus value is a sound advantage here.
    """

    default_reward_scale = "zscore"

    def prepare(self, logits: Tensor, ratio: float) -> Tensor:
        """See :meth:`Policy.prepare`."""
        return rl.centred_logits(logits, ratio)

    def act(self, logits: Tensor, uniform: Tensor, ratio: float, count: int | Tensor) -> Draw:
        """See :meth:`Policy.act`; the draw has no order, and no place of one that counts."""
        cells = (uniform < logits.sigmoid()) & (ratio > 0)
        none = torch.zeros(logits.shape[0], 0, dtype=torch.long, device=logits.device)
        return Draw(cells, none, none.bool())

    def chance(self, logits: Tensor, count: int | Tensor) -> Tensor:
        """See :meth:`Policy.chance`."""
        return logits.sigmoid()

    def entropy(self, logits: Tensor) -> Tensor:
        """See :meth:`Policy.entropy`."""
        return rl.bernoulli_entropy(logits)

    def value_target(self, decision: ActorCriticDecision, reward: Tensor) -> tuple[Tensor, Tensor]:
        """The reward of the action taken, 0 for showing a cell; nothing is known while the agents do not act."""
        return torch.where(decision.draw.cells, reward, 0.0), torch.isfinite(decision.logits) & (decision.ratio > 0)

    def loss(self, decisions: Sequence[ActorCriticDecision], rewards: Sequence[Tensor]) -> Tensor:
        """See :meth:`Policy.loss`."""
        losses = []
        for decision, reward in zip(decisions, rewards, strict=True):
            target, known = self.value_target(decision, reward)
            advantage = target - decision.value.detach()
            self.advantage_moments.update(advantage, known)
            log_prob = rl.bernoulli_log_prob(decision.logits, decision.draw.cells)
            losses.append(-rl.masked_mean(advantage * log_prob, known).mean())
        return torch.stack(losses).mean()


def _expected_value(decision: ActorCriticDecision) -> Tensor:
    """Value of the set that the policy is expected to draw, ``[B]``: a function of the image alone."""
    chance = decision.policy_map.flatten(1)
    return (chance * decision.value.detach()).sum(1) / chance.sum(1).clamp_min(1.0)
