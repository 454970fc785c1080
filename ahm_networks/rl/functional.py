# SPDX-License-Identifier: Apache-2.0
"""Reinforcement-learning formulas as pure functions: no state, no random numbers, no modules.

Shapes: ``B`` images, ``N`` cells, ``K`` draws. Forbidden cells carry a logit of ``-inf``. Everything is float32,
whatever the networks run in.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "bernoulli_entropy",
    "bernoulli_log_prob",
    "categorical_entropy",
    "centred_logits",
    "entropy_loss",
    "gumbel",
    "gumbel_top_k",
    "inclusion_probability",
    "leave_one_out_advantage",
    "masked_mean",
    "patch_credit_loss",
    "plackett_luce_log_prob",
    "rank_reward",
    "set_reinforce_loss",
    "zscore_reward",
]

EPS = 1e-6
ENTROPY_FLOOR_WEIGHT = 2.0
LEAST_LOG_RATE = -20.0
FORBIDDEN = -1e30  # stands for -inf where a gradient passes: exp of it is 0, and its differences stay finite


def _beside(values: Tensor, number: Tensor | float) -> Tensor:
    """A number or ``[B]`` as a tensor of the same type and device as ``values``, without waiting for the device."""
    return number.to(values.dtype) if isinstance(number, Tensor) else values.new_full((), number)


def masked_mean(values: Tensor, where: Tensor, dim: int = -1) -> Tensor:
    """Mean of ``values`` over the places that ``where`` marks; 0 where it marks none."""
    weight = where.to(values.dtype)
    return torch.where(where, values, 0.0).sum(dim) / weight.sum(dim).clamp_min(1.0)


def gumbel(uniform: Tensor) -> Tensor:
    """Turn uniform draws on [0, 1) into standard Gumbel draws, ``-log(-log u)``."""
    return -torch.log(-torch.log(uniform.clamp(1e-12, 1.0 - 1e-7)))


def gumbel_top_k(logits: Tensor, noise: Tensor, k: int) -> Tensor:
    """Draw ``k`` different cells in order, an exact Plackett-Luce draw (Kool et al., ICML 2019).

    Args:
        logits: ``[B, N]``.
        noise: ``[B, N]`` standard Gumbel draws; zeros give the ``k`` most probable cells.
        k: number of draws, at most ``N``.

    Returns:
        ``[B, k]`` cell numbers, first draw first.
    """
    return (logits + noise).topk(k, dim=1).indices


def plackett_luce_log_prob(logits: Tensor, order: Tensor, drawn: Tensor | None = None) -> Tensor:
    r"""Log-probability of each step of an ordered draw without replacement.

    .. math:: \log p_t = s_{i_t} - \log \sum_{j \notin \{i_1..i_{t-1}\}} \exp s_j

    Args:
        logits: ``[B, N]`` policy logits ``s``.
        order: ``[B, K]`` cell numbers in the order of their draw.
        drawn: ``[B, K]`` bool, a prefix of each row; later places were not drawn by the policy and count 0.

    Returns:
        ``[B, K]``; the sum over a row is the log-probability of the whole draw.
    """
    logits = logits.clamp_min(FORBIDDEN)
    chosen = logits.gather(1, order)
    # What is left after all draws, then one reverse cumulative logsumexp gives every denominator at once.
    left = logits.scatter(1, order, FORBIDDEN).logsumexp(1, keepdim=True)
    denominator = torch.cat([chosen, left], dim=1).flip(1).logcumsumexp(1).flip(1)[:, :-1]
    steps = chosen - denominator
    return steps if drawn is None else torch.where(drawn, steps, 0.0)


@torch.no_grad()
def inclusion_probability(logits: Tensor, k: Tensor | float, *, steps: int = 8) -> Tensor:
    r"""Each cell's chance to be among ``k`` draws without replacement: ``[B, N]``, without gradient.

    A Plackett-Luce draw is a race of exponential clocks with rates :math:`e^{s_i}`; the first ``k`` to ring are drawn.
    Of many clocks the ``k``-th rings at nearly the same time :math:`T` in every race, so

    .. math:: q_i = 1 - \exp(-T e^{s_i}), \qquad \sum_i q_i = k.

    The sum is concave in :math:`T`, so Newton's method from :math:`k / \sum_i e^{s_i}` on comes closer with every step
    and never passes the solution.

    Args:
        logits: ``[B, N]``, ``-inf`` where forbidden.
        k: number of draws, at most the allowed cells; one number or ``[B]``.
        steps: of Newton's method.

    Example:
        >>> inclusion_probability(torch.tensor([[1.0, 1.0, 1.0, float("-inf")]]), 1.5).tolist()
        [[0.5, 0.5, 0.5, 0.0]]
    """
    allowed = torch.isfinite(logits)
    safe = logits.clamp_min(FORBIDDEN)
    rates = (safe - safe.amax(1, keepdim=True)).clamp_min(LEAST_LOG_RATE).exp() * allowed
    count = _beside(logits, k).reshape(-1, 1)
    time = count / rates.sum(1, keepdim=True).clamp_min(EPS)
    for _ in range(steps):
        running = (-time * rates).exp()
        rung = ((1.0 - running) * allowed).sum(1, keepdim=True)
        time += (count - rung).clamp_min(0.0) / (rates * running).sum(1, keepdim=True).clamp_min(EPS**2)
    return torch.where(count < allowed.sum(1, keepdim=True), -torch.expm1(-time * rates), allowed.to(rates.dtype))


def categorical_entropy(logits: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Entropy of ``softmax(logits)`` over its largest value, the logarithm of the allowed cells: ``[B]`` in [0, 1]."""
    log_p = logits.clamp_min(FORBIDDEN).log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    if allowed is None:
        return entropy / max(math.log(logits.shape[1]), EPS)
    return entropy / allowed.sum(1).clamp_min(2).log()


def set_reinforce_loss(log_prob: Tensor, advantage: Tensor, drawn: Tensor) -> Tensor:
    """REINFORCE for a whole set: ``-A log p / k``, mean over images (Williams 1992; methods: set reward).

    Args:
        log_prob: ``[B, K]`` of the draws.
        advantage: ``[B]`` set reward minus a baseline that does not depend on the draw; no gradient passes.
        drawn: ``[B, K]`` bool, the draws that the policy made.
    """
    return -(advantage.detach() * masked_mean(log_prob, drawn)).mean()


def patch_credit_loss(log_prob: Tensor, advantage: Tensor, drawn: Tensor) -> Tensor:
    """Credit every draw with its own centred reward: less variance, some bias.

    Its mean cosine to the true gradient is about 0.9 on small cases, and falls as rewards depend more on each other.
    """
    return -masked_mean(advantage.detach() * log_prob, drawn).mean()


def leave_one_out_advantage(reward: Tensor) -> Tensor:
    """Reward minus the mean reward of the *other* draws for the same image (Kool et al. 2019).

    Args:
        reward: ``[M, B]`` for ``M >= 2`` draws.

    Raises:
        ValueError: for a single draw.

    Example:
        >>> leave_one_out_advantage(torch.tensor([[3.0], [1.0]])).flatten().tolist()
        [2.0, -2.0]
    """
    draws = reward.shape[0]
    if draws < 2:
        raise ValueError(f"reward: leave-one-out needs at least 2 draws per image, got {draws}.")
    return (reward - reward.mean(0)) * draws / (draws - 1)


def bernoulli_log_prob(logits: Tensor, action: Tensor) -> Tensor:
    """Log-probability of each cell's own hide-or-show decision, ``[B, N]``; 0 for forbidden cells."""
    signed = torch.where(action, logits, -logits)
    return torch.where(torch.isfinite(logits), torch.nn.functional.logsigmoid(signed), 0.0)


def bernoulli_entropy(logits: Tensor) -> Tensor:
    """Entropy of independent agents over the largest one with the same mean probability: ``[B]`` in [0, 1]."""
    allowed = torch.isfinite(logits)
    p = torch.where(allowed, logits, 0.0).sigmoid()
    return masked_mean(_binary_entropy(p), allowed) / _binary_entropy(masked_mean(p, allowed).detach())


def entropy_loss(entropy: Tensor, weight: float, floor: float) -> Tensor:
    """Penalty below the floor, minus the weighted bonus, for entropies of any shape as shares of their largest value.

    Example:
        >>> entropy_loss(torch.tensor([0.5, 1.0]), weight=0.5, floor=0.75).tolist()
        [0.25, -0.5]
    """
    return ENTROPY_FLOOR_WEIGHT * torch.relu(floor - entropy) - weight * entropy


def _binary_entropy(p: Tensor) -> Tensor:
    p = p.clamp(EPS, 1.0 - EPS)
    return -(p * p.log() + (1.0 - p) * (1.0 - p).log())


def centred_logits(logits: Tensor, mean_probability: Tensor | float) -> Tensor:
    """Shift each image's logits so that ``mean(sigmoid(logits))`` is ``mean_probability``.

    The expected number of hidden cells is then right by construction, so no penalty has to hold it. The shift is found
    by bisection without gradient; one Newton step on top gives it its exact derivative.

    Args:
        logits: ``[B, N]``, ``-inf`` where forbidden.
        mean_probability: wanted mean over allowed cells, in (0, 1); a number or ``[B]``.
    """
    allowed = torch.isfinite(logits)
    safe = torch.where(allowed, logits, 0.0)
    target = _beside(logits, mean_probability).clamp(1e-4, 1 - 1e-4)
    shift = _bisected_shift(safe.detach(), allowed, target)
    p = (safe + shift).sigmoid()
    slope = masked_mean(p * (1 - p), allowed).clamp_min(1e-4).detach()
    correction = (masked_mean(p, allowed) - target) / slope
    return torch.where(allowed, safe + shift - correction.unsqueeze(1), float("-inf"))


@torch.no_grad()
def _bisected_shift(logits: Tensor, allowed: Tensor, target: Tensor, *, steps: int = 30) -> Tensor:
    """Shift ``[B, 1]`` between the two that would be right if all logits were the highest, or the lowest."""
    wanted = torch.logit(target).expand(logits.shape[0]).unsqueeze(1)
    low = wanted - logits.masked_fill(~allowed, float("-inf")).amax(1, keepdim=True)
    high = wanted - logits.masked_fill(~allowed, float("inf")).amin(1, keepdim=True)
    for _ in range(steps):
        middle = (low + high) / 2
        enough = masked_mean((logits + middle).sigmoid(), allowed).unsqueeze(1) > target.reshape(-1, 1)
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return (low + high) / 2


def zscore_reward(error: Tensor, hidden: Tensor) -> Tensor:
    """Standardise each image's error over its hidden cells; 0 elsewhere. ``[B, N]``.

    The mean over the hidden cells is 0 by construction, so never build a set reward from it.
    """
    mean = masked_mean(error, hidden).unsqueeze(1)
    std = masked_mean((error - mean).square(), hidden).sqrt().unsqueeze(1)
    return torch.where(hidden, (error - mean) / (std + EPS), 0.0)


def rank_reward(error: Tensor, hidden: Tensor) -> Tensor:
    """Rank of each hidden cell's error among the hidden ones, scaled to [0, 1]; 0 elsewhere. ``[B, N]``.

    Equal errors, as of crops of plain air, share the mean of their ranks.
    """
    error = error.contiguous()
    ordered = error.masked_fill(~hidden, float("-inf")).sort(1).values
    below, up_to = torch.searchsorted(ordered, error), torch.searchsorted(ordered, error, right=True)
    rank = (below + up_to - 1).to(error.dtype) / 2
    shown = (~hidden).sum(1, keepdim=True)
    return torch.where(hidden, (rank - shown) / (hidden.sum(1, keepdim=True) - 1).clamp_min(1), 0.0)
