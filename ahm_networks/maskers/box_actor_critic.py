# SPDX-License-Identifier: Apache-2.0
"""An actor with a critic over episodes of boxes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ahm_networks.maskers.box_learner import BoxDecision, BoxLearner
from ahm_networks.nets.box_scorer import BoxScorer
from ahm_networks.processes import share_of_batch
from ahm_networks.rl import functional as rl
from ahm_networks.rl import q_learning as ql
from ahm_networks.rl.running import RunningMoments
from ahm_networks.rl.schedules import LinearSchedule, check_share

__all__ = ["ActorCriticLearner"]


class ActorCriticLearner(BoxLearner):
    """Policy gradient with the value of the state as its baseline.

    The advantage is divided by its running deviation, a constant that no action moves by itself.

    Args:
        gamma: discount.
        entropy_weight: of the entropy bonus at the start and at the end of the training.
        entropy_floor: share of the largest entropy below which a penalty acts.
        value_weight: weight of the value loss.

    Raises:
        ValueError: for a gamma that is not in [0, 1].
    """

    def __init__(
        self, *, gamma: float, entropy_weight: tuple[float, float], entropy_floor: float, value_weight: float = 0.5
    ) -> None:
        super().__init__()
        self.gamma = check_share("gamma", gamma)
        self.entropy_weight = LinearSchedule(*entropy_weight)
        self.entropy_floor = entropy_floor
        self.value_weight = value_weight
        self.advantage_moments = RunningMoments()

    def read(self, scores: Tensor, value: Tensor | None, valid: Tensor) -> Tensor:
        """See :meth:`BoxLearner.read`."""
        return scores.masked_fill(~valid, float("-inf"))

    def act(self, scores: Tensor, valid: Tensor, draws: Tensor) -> Tensor:
        """See :meth:`BoxLearner.act`."""
        return ql.best_action(scores + rl.gumbel(draws[:, :-1]), valid)

    def loss(self, scorer: BoxScorer, decision: BoxDecision, rewards: Tensor, draws: Tensor) -> Tensor:
        """See :meth:`BoxLearner.loss`."""
        episode, value = decision.episode, decision.value
        if value is None:
            raise ValueError("value: an actor-critic needs a dueling network, got none.")
        returns = ql.discounted_returns(rewards, self.gamma)
        advantage = returns - value.detach()
        self.advantage_moments.update(advantage, episode.live)
        log_prob = ql.action_log_prob(decision.scores, episode.actions)
        scaled = advantage / (self.advantage_moments.std + rl.EPS)
        policy = ql.episode_policy_loss(log_prob, scaled, episode.live, self.gamma)
        value_loss = F.smooth_l1_loss(value, returns, reduction="none")
        critic = rl.masked_mean(value_loss.flatten(), episode.live.flatten())
        share = share_of_batch(episode.live)
        return policy + share * (self.value_weight * critic + self._entropy_loss(decision))

    def diagnostics(self, decision: BoxDecision) -> dict[str, Tensor]:
        """Policy entropy as a share of its largest value, mean over the steps taken, and the advantage's spread."""
        entropy = rl.masked_mean(_entropy(decision).detach().flatten(), decision.episode.live.flatten())
        return {"policy_entropy": entropy, "advantage_std": self.advantage_moments.std}

    def _entropy_loss(self, decision: BoxDecision) -> Tensor:
        loss = rl.entropy_loss(_entropy(decision), self.entropy_weight(self.progress), self.entropy_floor)
        return rl.masked_mean(loss.flatten(), decision.episode.live.flatten())


def _entropy(decision: BoxDecision) -> Tensor:
    """Of each step, as a share of its largest value: ``[B, T]``."""
    valid = decision.episode.valid
    return rl.categorical_entropy(decision.scores.flatten(0, 1), valid.flatten(0, 1)).unflatten(0, valid.shape[:2])
