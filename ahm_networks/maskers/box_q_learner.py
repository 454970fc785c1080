# SPDX-License-Identifier: Apache-2.0
"""Deep Q-learning over episodes of boxes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ahm_networks.maskers.box_learner import BoxDecision, BoxLearner, Episode
from ahm_networks.nets.box_scorer import BoxScorer
from ahm_networks.processes import share_of_batch
from ahm_networks.rl import q_learning as ql
from ahm_networks.rl.functional import masked_mean
from ahm_networks.rl.replay import EpisodeReplay
from ahm_networks.rl.schedules import LinearSchedule

__all__ = ["TD_LOSSES", "QLearner"]

TD_LOSSES: dict[str, Callable[..., Tensor]] = {"huber": F.smooth_l1_loss, "mse": F.mse_loss}


class QLearner(BoxLearner):
    """Deep Q-learning, optionally double and with a target network.

    Args:
        scorer: the network; copied if there is to be a target network.
        epsilon: chance to explore, over the progress of the training.
        gamma: discount.
        double: whether the online network chooses the action whose value the target network tells.
        target_decay: of the exponential mean of weights that is the target network; 0 for none.
        td_loss: ``huber`` or ``mse``.
        replay: episodes to keep; 0 for none.

    Raises:
        ValueError: for an unknown loss or numbers out of range.
    """

    def __init__(
        self,
        scorer: BoxScorer,
        *,
        epsilon: LinearSchedule,
        gamma: float,
        double: bool,
        target_decay: float,
        td_loss: str,
        replay: int,
    ) -> None:
        super().__init__()
        if td_loss not in TD_LOSSES:
            raise ValueError(f"td_loss: expected one of {', '.join(TD_LOSSES)}, got {td_loss!r}.")
        if not (0.0 <= gamma <= 1.0 and 0.0 <= target_decay < 1.0):
            raise ValueError(f"gamma, target_decay: expected [0, 1] and [0, 1), got {gamma!r} and {target_decay!r}.")
        self.epsilon = epsilon
        self.gamma = gamma
        self.double_q = double
        self.target_decay = target_decay
        self.td_loss = TD_LOSSES[td_loss]
        self.target = copy.deepcopy(scorer).requires_grad_(False) if target_decay else None
        self.replay = EpisodeReplay(replay) if replay else None

    def read(self, scores: Tensor, value: Tensor | None, valid: Tensor) -> Tensor:
        """See :meth:`BoxLearner.read`."""
        q = scores if value is None else ql.dueling(scores, value, valid)
        return q.masked_fill(~valid, float("-inf"))

    def act(self, scores: Tensor, valid: Tensor, draws: Tensor) -> Tensor:
        """See :meth:`BoxLearner.act`."""
        return ql.epsilon_greedy(scores, valid, self.epsilon(self.progress), draws)

    def loss(self, scorer: BoxScorer, decision: BoxDecision, rewards: Tensor, draws: Tensor) -> Tensor:
        """See :meth:`BoxLearner.loss`; as many old episodes as new ones take part once there are any."""
        losses = [self._loss(decision.episode, decision.scores, rewards)]
        if self.replay is not None and self.training:
            if len(self.replay):
                losses.append(self._replayed_loss(scorer, self.replay.sample(draws)))
            if decision.ratio > 0:  # else nothing was tried
                self.replay.add(decision.episode.packed() | {"rewards": rewards})
        return torch.stack(losses).mean()

    def diagnostics(self, decision: BoxDecision) -> dict[str, Tensor]:
        """Chance to explore, and the spread of the Q-values over the boxes of the first step."""
        q, valid = decision.scores.detach()[:, 0], decision.episode.valid[:, 0]
        deviation = q - masked_mean(q, valid).unsqueeze(1)
        spread = masked_mean(deviation.square(), valid).sqrt().mean()
        return {"epsilon": torch.tensor(self.epsilon(self.progress)), "q_spread": spread}

    @torch.no_grad()
    def follow(self, scorer: BoxScorer) -> None:
        """See :meth:`BoxLearner.follow`."""
        if self.target is not None:
            for trailing, weight in zip(self.target.parameters(), scorer.parameters(), strict=True):
                trailing.lerp_(weight, 1.0 - self.target_decay)

    def _replayed_loss(self, scorer: BoxScorer, packed: Mapping[str, Tensor]) -> Tensor:
        """Episodes of the past, seen with the network of today; what they earned is what they earned then."""
        episode = Episode.unpacked(packed)
        scores, value = scorer(scorer.look(episode.image), episode.state)
        return self._loss(episode, self.read(scores, value, episode.valid), packed["rewards"])

    def _loss(self, episode: Episode, scores: Tensor, rewards: Tensor) -> Tensor:
        next_value = self._next_value(episode, scores.detach()[:, 1:])
        target = ql.td_target(rewards, next_value, self.gamma)
        loss = ql.td_loss(scores, episode.actions, target, episode.live, self.td_loss)
        return loss * share_of_batch(episode.live)

    @torch.no_grad()
    def _next_value(self, episode: Episode, online: Tensor) -> Tensor:
        """What the states after each step are worth, ``[B, T]``, from the online scores of the later steps."""
        valid, judge = episode.valid[:, 1:], online
        if self.target is not None and valid.shape[1]:
            scores, value = self.target(self.target.look(episode.image), episode.state.steps(1))
            judge = self.read(scores, value, valid)
        return ql.bootstrap_value(judge, online if self.double_q else None, valid)
