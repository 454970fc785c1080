# SPDX-License-Identifier: Apache-2.0
"""Formulas for episodes of a few discrete actions, as pure functions: no state, no random numbers, no modules.

Shapes: ``B`` episodes of ``T`` steps, ``A`` actions. ``valid`` marks the actions that a state admits; scores of the
others are ``-inf``. ``live`` marks the steps that were taken: a prefix of each episode, its last one being terminal.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ahm_networks.rl.functional import FORBIDDEN, masked_mean

__all__ = [
    "action_log_prob",
    "best_action",
    "bootstrap_value",
    "discounted_returns",
    "dueling",
    "episode_policy_loss",
    "epsilon_greedy",
    "td_loss",
    "td_target",
]


def dueling(advantage: Tensor, value: Tensor, valid: Tensor) -> Tensor:
    r"""Join the two streams of a dueling network (Wang et al., ICML 2016), ``[..., A]``.

    .. math:: Q(s, a) = V(s) + Adv(s, a) - \\frac{1}{|valid|} \sum_{a' \in valid} Adv(s, a')

    Args:
        advantage: ``[..., A]``.
        value: ``[...]``.
        valid: ``[..., A]`` bool.

    Example:
        >>> valid = torch.tensor([[True, True, False]])
        >>> dueling(torch.tensor([[1.0, 3.0, 50.0]]), torch.tensor([10.0]), valid)[valid].tolist()
        [9.0, 11.0]
    """
    return (value - masked_mean(advantage, valid)).unsqueeze(-1) + advantage


def best_action(scores: Tensor, valid: Tensor) -> Tensor:
    """Valid action of the highest score, ``[...]``; the first one where no action is valid."""
    return scores.masked_fill(~valid, float("-inf")).argmax(-1)


def epsilon_greedy(scores: Tensor, valid: Tensor, epsilon: float, draws: Tensor) -> Tensor:
    """Take the best valid action or, with probability ``epsilon``, any valid one.

    Args:
        scores: ``[B, A]``.
        valid: ``[B, A]`` bool.
        epsilon: in [0, 1].
        draws: ``[B, A + 1]`` uniform numbers: the last decides whether to explore, the others what to take then.

    Returns:
        ``[B]`` action numbers.
    """
    explore = draws[:, -1:] < epsilon
    return best_action(torch.where(explore, draws[:, :-1], scores), valid)


def action_log_prob(logits: Tensor, actions: Tensor) -> Tensor:
    """Log-probability of each action under ``softmax(logits)``; ``-inf`` logits take no part.

    Args:
        logits: ``[..., A]``; a row of ``-inf`` alone gives a finite number without gradient.
        actions: ``[...]``.
    """
    log_p = logits.clamp_min(FORBIDDEN).log_softmax(-1)
    return log_p.gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def discounted_returns(rewards: Tensor, gamma: float) -> Tensor:
    r"""Reward to go, :math:`R_t = r_t + \gamma R_{t+1}`; ``[B, T]``, 0 after the end of an episode.

    Example:
        >>> discounted_returns(torch.tensor([[1.0, 2.0, 4.0]]), 0.5).tolist()
        [[3.0, 4.0, 4.0]]
    """
    returns, ahead = [], torch.zeros_like(rewards[:, 0])
    for reward in rewards.unbind(1)[::-1]:
        ahead = reward + gamma * ahead
        returns.append(ahead)
    return torch.stack(returns[::-1], dim=1)


def bootstrap_value(target: Tensor, online: Tensor | None, valid: Tensor) -> Tensor:
    """What the states after each step are worth, ``[B, T]``; 0 where no action is valid, and after the last step.

    Args:
        target: ``[B, T - 1, A]`` scores of the target network for the steps after the first.
        online: the same of the online network, which then chooses the action (double Q-learning, van Hasselt et al.,
            AAAI 2016); ``None`` lets the target network choose.
        valid: ``[B, T - 1, A]`` bool; no action is valid once an episode is over.
    """
    action = best_action(target if online is None else online, valid)
    value = target.gather(2, action.unsqueeze(2)).squeeze(2)
    return torch.nn.functional.pad(torch.where(valid.any(2), value, 0.0), (0, 1))


def td_target(rewards: Tensor, next_value: Tensor, gamma: float) -> Tensor:
    r"""One-step target :math:`r_t + \gamma V(s_{t+1})`, without gradient; the value after a terminal step is 0."""
    return (rewards + gamma * next_value).detach()


def td_loss(scores: Tensor, actions: Tensor, target: Tensor, live: Tensor, loss: Callable[..., Tensor]) -> Tensor:
    """Mean ``loss`` between the scores of the actions taken and their targets; 0 where no step was taken.

    Args:
        scores: ``[B, T, A]``.
        actions: ``[B, T]``.
        target: ``[B, T]``.
        live: ``[B, T]`` bool.
        loss: such as ``torch.nn.functional.smooth_l1_loss``.
    """
    taken = torch.where(live, scores.gather(2, actions.unsqueeze(2)).squeeze(2), 0.0)
    return masked_mean(loss(taken, target, reduction="none").flatten(), live.flatten())


def episode_policy_loss(log_prob: Tensor, advantage: Tensor, live: Tensor, gamma: float) -> Tensor:
    r"""REINFORCE for episodes, :math:`-\sum_t \gamma^t A_t \log \pi_t` over the number of steps, mean over episodes.

    With the factor :math:`\gamma^t`, often left out, it follows the discounted return exactly. The divisor must not
    depend on how long an episode was: the actions decide that.
    """
    steps = log_prob.shape[1]
    weight = gamma ** torch.arange(steps, device=log_prob.device)
    return -torch.where(live, weight * advantage.detach() * log_prob, 0.0).sum(1).mean() / steps
