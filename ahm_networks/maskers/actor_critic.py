# SPDX-License-Identifier: Apache-2.0
"""AHM's adaptive hard masking network, with estimators that are sound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ahm_networks.maskers.base import Decision, Masker, Step
from ahm_networks.maskers.drawing import draw_in_order
from ahm_networks.maskers.policies import ActorCriticDecision, BernoulliPolicy, Policy, SetPolicy
from ahm_networks.nets.policy import CellScorer, feature_network
from ahm_networks.rl import functional as rl
from ahm_networks.rl.running import RunningMoments
from ahm_networks.rl.schedules import LinearSchedule, check_ends, check_share
from ahm_transforms.masking.functional import cell_count

__all__ = ["ActorCriticMasker"]

OPTIONS = {
    "mode": ("set", "bernoulli"),
    "credit": ("set", "patch"),
    "baseline": ("value", "leave_one_out", "running_mean"),
    "reward_scale": ("running", "log", "zscore", "rank"),
}


class ActorCriticMasker(Masker):
    r"""Adaptive hard masking (Xu et al., IEEE TMI 44(1), 2025): a policy map chooses, a value map is its baseline.

    ``mode="set"`` draws cells without replacement and weighs the exact log-probability of the draw with the advantage
    of the set: the mean reward of the drawn cells minus a baseline that does not depend on the draw.
    ``mode="bernoulli"`` lets every cell decide for itself; there the value covers both actions of a cell and the
    advantage is per cell. The paper's released code takes per-patch loss minus per-patch value over drawn patches;
    that value depends on the action, so the policy would stop learning as soon as the critic is right.

    In ``eval()`` mode the most probable cells are hidden. The whole masker runs in float32.

    Args:
        spatial_dims: 2 or 3.
        patch_size: voxels per cell.
        mask_ratio: share of the allowed cells to hide (its expectation in Bernoulli mode).
        in_channels: image channels.
        mode: ``set`` or ``bernoulli``.
        credit: ``set``, or ``patch`` for every draw's own centred reward: less variance, some bias. Set mode only.
        baseline: ``value`` (expected value under the policy), ``leave_one_out`` (other masks of the same image, needs
            ``num_samples >= 2``) or ``running_mean``. For set credit.
        reward_scale: ``running`` (divide by the running deviation over the data), ``log`` (of the ratio to the running
            mean; rewards below zero, as of learning progress, count as zero), or per image ``zscore`` or ``rank``;
            these two make a set's mean constant, so they need patch credit or Bernoulli agents. ``None`` takes
            ``running`` for sets and ``zscore`` for Bernoulli agents.
        temperature: of the policy; larger is closer to uniform.
        value_weight: weight of the value loss.
        entropy_weight: of the entropy bonus at the start and at the end of the training.
        entropy_floor: share of the largest entropy below which a penalty acts; 0 switches it off.
        num_samples: masks that the training draws per image and step: so many decisions go to :meth:`loss` together.
        features: ``strided`` or ``vgg16``.
        features_weights: file with VGG16's weights.
        **kwargs: ``foreground_threshold`` and ``seed`` of :class:`Masker`.

    Raises:
        ValueError: for unknown names, or options that exclude each other.

    Example:
        >>> masker = ActorCriticMasker(2, patch_size=8, mask_ratio=0.5)
        >>> decision = masker(torch.rand(2, 1, 32, 32))
        >>> masker.loss([(decision, torch.rand(2, 1, 32, 32))]).requires_grad
        True
    """

    def __init__(
        self,
        spatial_dims: int,
        patch_size: int | Sequence[int],
        mask_ratio: float = 0.6,
        *,
        in_channels: int = 1,
        mode: str = "set",
        credit: str = "set",
        baseline: str = "value",
        reward_scale: str | None = None,
        temperature: float = 1.0,
        value_weight: float = 0.5,
        entropy_weight: tuple[float, float] = (0.003, 0.0),
        entropy_floor: float = 0.8,
        num_samples: int = 1,
        features: str = "strided",
        features_weights: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(spatial_dims, patch_size, mask_ratio, **kwargs)
        _check_names(mode=mode, credit=credit, baseline=baseline)
        policy: Policy = BernoulliPolicy() if mode == "bernoulli" else SetPolicy(credit, baseline)
        self.reward_scale = reward_scale or policy.default_reward_scale
        _check_names(reward_scale=self.reward_scale)
        _check_fit(mode, credit, baseline, self.reward_scale, num_samples)
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature!r}.")
        self.in_channels = in_channels
        self.policy = policy
        self.temperature = temperature
        self.value_weight = value_weight
        self.entropy_weight = LinearSchedule(*check_ends("entropy_weight", entropy_weight, 0, math.inf))
        self.entropy_floor = check_share("entropy_floor", entropy_floor)
        self.num_samples = num_samples
        self.progress = 0.0
        net = feature_network(features, spatial_dims, in_channels, self.patch_size, features_weights)
        self.scorer = CellScorer(spatial_dims, net, ["policy", "value"], self.patch_size)
        self.reward_moments = RunningMoments()

    def set_progress(self, progress: float) -> None:
        """Move the entropy weight along its schedule."""
        self.progress = progress

    def forward(self, image: Tensor, *, mask_ratio: float | None = None, foreground: Tensor | None = None) -> Decision:
        """See :meth:`Masker.forward`."""
        scope = self.scope(image, mask_ratio, foreground)
        maps = {name: scores.flatten(1) for name, scores in self.scorer(image).items()}
        logits = self.policy.prepare(scope.confine(maps["policy"] / self.temperature), scope.ratio)
        fixed = logits.detach()
        if self.training:
            draw = self.policy.act(fixed, self.uniform(*fixed.shape, device=image.device), scope.ratio, scope.count)
        else:
            most = int(cell_count(scope.ratio, fixed.shape[1]))
            draw = draw_in_order(fixed, torch.zeros_like(fixed), scope.count, most)
        cells = draw.cells.view(-1, 1, *scope.grid)
        return ActorCriticDecision(
            mask=self.expand(cells, image),
            cells=cells,
            allowed=scope.allowed,
            policy_map=self.policy.chance(fixed, scope.count).view(-1, 1, *scope.grid),
            logits=logits,
            value=maps["value"],
            draw=draw,
            ratio=scope.ratio,
        )

    def loss(self, steps: Sequence[Step]) -> Tensor:
        """Policy loss + value loss - entropy bonus + penalty below the entropy floor."""
        decisions = [_own(decision) for decision, _ in steps]
        errors = [self.reward_of_cells(decision, reward) for decision, reward in steps]
        for decision, error in zip(decisions, errors, strict=True):
            counted = error.clamp_min(0.0) if self.reward_scale == "log" else error
            self.reward_moments.update(counted, decision.cells.flatten(1))
        rewards = [self._scaled(error, d.cells.flatten(1)) for d, error in zip(decisions, errors, strict=True)]
        pairs = list(zip(decisions, rewards, strict=True))
        value = torch.stack([self._value_loss(decision, reward) for decision, reward in pairs]).mean()
        entropy = torch.stack([self._entropy_loss(decision.logits) for decision in decisions]).mean()
        return self.policy.loss(decisions, rewards) + self.value_weight * value + entropy

    def diagnostics(self, decision: Decision) -> dict[str, Tensor]:
        """Policy entropy as a share of its largest value, and the running spread of the advantage."""
        return {
            "policy_entropy": self.policy.entropy(_own(decision).logits.detach()).mean(),
            "advantage_std": self.policy.advantage_moments.std,
        }

    def _scaled(self, error: Tensor, hidden: Tensor) -> Tensor:
        if self.reward_scale == "zscore":
            return rl.zscore_reward(error, hidden)
        if self.reward_scale == "rank":
            return rl.rank_reward(error, hidden)
        if self.reward_scale == "log":
            scaled = (error.clamp_min(0.0) / self.reward_moments.mean.clamp_min(1e-12) + 1e-3).log()
        else:
            scaled = error / self.reward_moments.std
        return torch.where(hidden, scaled, 0.0)

    def _value_loss(self, decision: ActorCriticDecision, reward: Tensor) -> Tensor:
        target, known = self.policy.value_target(decision, reward)
        return rl.masked_mean(F.smooth_l1_loss(decision.value, target, reduction="none"), known).mean()

    def _entropy_loss(self, logits: Tensor) -> Tensor:
        weight = self.entropy_weight(self.progress)
        return rl.entropy_loss(self.policy.entropy(logits), weight, self.entropy_floor).mean()


def _own(decision: Decision) -> ActorCriticDecision:
    if not isinstance(decision, ActorCriticDecision):
        raise TypeError(f"decision: expected one of an ActorCriticMasker, got {type(decision).__name__}.")
    return decision


def _check_names(**chosen: str) -> None:
    for option, name in chosen.items():
        if name not in OPTIONS[option]:
            raise ValueError(f"{option}: expected one of {', '.join(OPTIONS[option])}, got {name!r}.")


def _check_fit(mode: str, credit: str, baseline: str, reward_scale: str, num_samples: int) -> None:
    if num_samples < 1:
        raise ValueError(f"num_samples: expected at least 1, got {num_samples}.")
    if baseline == "leave_one_out" and num_samples < 2:
        raise ValueError(f"baseline: leave_one_out needs num_samples of at least 2, got {num_samples}.")
    if mode == "bernoulli" and (credit, baseline) != ("set", "value"):
        raise ValueError("credit and baseline: only mode='set' has them; Bernoulli agents learn cell by cell.")
    if credit == "patch" and baseline != "value":
        raise ValueError(f"baseline: {baseline} goes with credit='set'; patch credit is centred by the set's mean.")
    if mode == "set" and credit == "set" and reward_scale in ("zscore", "rank"):
        raise ValueError(
            f"reward_scale: {reward_scale} gives every set the same mean reward; take 'running' or 'log', "
            "or credit='patch'."
        )
