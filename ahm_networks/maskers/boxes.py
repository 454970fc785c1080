# SPDX-License-Identifier: Apache-2.0
"""AMP's adaptive masking policy: boxes of chosen place and size, one after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ahm_networks.maskers.base import Decision, Masker, Step
from ahm_networks.maskers.borrowed import BorrowedNetwork
from ahm_networks.maskers.box_actions import box_actions, box_sizes
from ahm_networks.maskers.box_actor_critic import ActorCriticLearner
from ahm_networks.maskers.box_environment import BoxEnvironment, Moves
from ahm_networks.maskers.box_feedback import BoxReward, ErrorSoFar
from ahm_networks.maskers.box_learner import BoxDecision, BoxLearner, Episode
from ahm_networks.maskers.box_q_learner import QLearner
from ahm_networks.nets.box_scorer import BoxScorer, BoxState
from ahm_networks.nets.policy import feature_network
from ahm_networks.rl.q_learning import best_action
from ahm_networks.rl.schedules import LinearSchedule, check_ends, check_share

__all__ = ["BoxMasker"]

LEARNERS = ("dqn", "actor_critic")


class BoxMasker(Masker):
    r"""Hide up to ``n_steps`` boxes, each of a place and size chosen by an agent (AMP, ICME 2023).

    A box is made of whole cells. It can be chosen if it lies in the grid, hides a new cell that may be hidden, and
    hides no more than are left of ``mask_ratio``, which is a limit here. An episode ends after ``n_steps`` boxes, when
    no box can be chosen any more, or with the stop action.

    One reconstruction under the whole mask rewards all steps: rebuilding after every box would cost ``n_steps`` as
    much. Box :math:`b_t` earns what its *newly* hidden cells have above an average hidden cell,

    .. math:: r_t = \frac{1}{n_{max}} \sum_{i \in b_t} \frac{e_i - \lambda \mu}{\sigma}

    with the reward :math:`e_i` of a cell, its running mean :math:`\mu` and deviation :math:`\sigma` over hidden cells,
    the cells :math:`n_{max}` of the largest box and the area penalty :math:`\lambda`. With sums and no penalty the
    largest box would always win, with means the smallest spot of texture.

    The paper gives no settings; state, reward and defaults are ours. In ``eval()`` mode each step hides the best box.
    The whole masker runs in float32.

    Args:
        spatial_dims: 2 or 3.
        patch_size: voxels per cell.
        mask_ratio: largest share of the allowed cells to hide.
        in_channels: image channels.
        n_steps: boxes per image.
        sizes: box sizes in cells, each one number or one per axis.
        learner: ``dqn``, or ``actor_critic`` on the same network.
        double: whether to take double Q-learning targets; like gamma and target network, for several steps only.
        dueling: whether to split the Q-values into a value and advantages; an actor-critic needs it.
        gamma: discount.
        epsilon: chance to explore at the start and at the end of its schedule; ``dqn`` only, as the next three.
        explore: shares of the training at which epsilon begins and ends to change; two equal ones make a jump.
        target_decay: of the target network, an exponential mean of the weights; 0 for none.
        td_loss: ``huber`` or ``mse``.
        area_penalty: :math:`\lambda`.
        cell_weight: of a second task on the same features, to predict the error of every single hidden cell, also of
            those that a curriculum hides at random: a box's reward alone teaches slowly. 0 for none.
        stop: whether the agent may end an episode, after its first box.
        replay: episodes to keep and learn from again, one old for each new one; 0 for none. Takes 2 bytes a voxel and
            ``n_steps`` bytes an action and a cell of the device's memory, is not in ``state_dict`` but fills again
            after a resume, and needs images of one size. ``dqn`` only.
        network: rebuilds the image after each box but the last, to show the agent the error so far: ``n_steps - 1``
            forward passes more. Its weights do not become the masker's.
        entropy_weight: of the entropy bonus at the start and at the end of the training; ``actor_critic`` only.
        entropy_floor: share of the largest entropy below which a penalty acts, 0 for none; ``actor_critic`` only.
        features: ``strided`` or ``vgg16``.
        features_weights: file with VGG16's weights.
        **kwargs: ``foreground_threshold`` and ``seed`` of :class:`Masker`.

    Raises:
        ValueError: for options out of range or that exclude each other; on call, for a grid that no box fits into.

    Example:
        >>> masker = BoxMasker(2, patch_size=4, mask_ratio=0.5, n_steps=3, sizes=(1, 2))
        >>> decision = masker(torch.rand(2, 1, 32, 32))
        >>> decision.episode.actions.shape, decision.box_cells.shape
        (torch.Size([2, 3]), torch.Size([2, 3, 64]))
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
        n_steps: int = 4,
        sizes: Sequence[int | Sequence[int]] = (1, 2, 4),
        learner: str = "dqn",
        double: bool = True,
        dueling: bool = True,
        gamma: float = 0.9,
        epsilon: tuple[float, float] = (1.0, 0.05),
        explore: tuple[float, float] = (0.0, 0.8),
        target_decay: float = 0.995,
        td_loss: str = "huber",
        area_penalty: float = 1.0,
        cell_weight: float = 1.0,
        stop: bool = False,
        replay: int = 0,
        network: nn.Module | BorrowedNetwork | None = None,
        entropy_weight: tuple[float, float] = (0.003, 0.0),
        entropy_floor: float = 0.8,
        features: str = "strided",
        features_weights: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(spatial_dims, patch_size, mask_ratio, **kwargs)
        _check_learner(learner, dueling, replay)
        _check_steps(n_steps, stop, network)
        exploring = (*check_ends("epsilon", epsilon, 0, 1), *check_ends("explore", explore, 0, 1))
        entropy_weight = check_ends("entropy_weight", entropy_weight, 0, math.inf)
        check_share("entropy_floor", entropy_floor)
        self.in_channels = in_channels
        self.n_steps = n_steps
        self.sizes = box_sizes(sizes, spatial_dims)
        self.cell_weight = cell_weight
        self.stop = stop
        self.error_so_far = None if network is None else ErrorSoFar(network, self.patch_size)
        self.scorer = BoxScorer(
            spatial_dims,
            feature_network(features, spatial_dims, in_channels, self.patch_size, features_weights),
            self.patch_size,
            self.sizes,
            steps=n_steps,
            with_error=network is not None,
            with_value=dueling,
            with_cells=cell_weight > 0,
            stop=stop,
        )
        self.learner: BoxLearner
        if learner == "actor_critic":
            self.learner = ActorCriticLearner(gamma=gamma, entropy_weight=entropy_weight, entropy_floor=entropy_floor)
        else:
            self.learner = QLearner(
                self.scorer,
                epsilon=LinearSchedule(*exploring),
                gamma=gamma,
                double=double,
                target_decay=target_decay if n_steps > 1 else 0.0,
                td_loss=td_loss,
                replay=replay,
            )
        self.reward = BoxReward(area_penalty, max(torch.Size(size).numel() for size in self.sizes))

    def set_progress(self, progress: float) -> None:
        """Move the chance to explore, or the entropy weight, along its schedule."""
        self.learner.progress = progress

    def forward(self, image: Tensor, *, mask_ratio: float | None = None, foreground: Tensor | None = None) -> Decision:
        """See :meth:`Masker.forward`."""
        scope = self.scope(image, mask_ratio, foreground)
        boxes = box_actions(self.sizes, scope.grid, image.device)
        everywhere = image.new_ones(len(image), torch.Size(scope.grid).numel(), dtype=torch.bool)
        free = everywhere if scope.allowed is None else scope.allowed.flatten(1)
        looked = self.scorer.look(image)
        moves = self._play(image, looked, BoxEnvironment(boxes, free, scope.count, steps=self.n_steps, stop=self.stop))
        state = BoxState(moves.hidden, moves.numbers, moves.error)
        scores, value = self.scorer(looked, state)  # again, but all steps at once: one gradient instead of one per step
        cells = moves.new.any(1).view(-1, 1, *scope.grid)
        return BoxDecision(
            mask=self.expand(cells, image),
            cells=cells,
            allowed=scope.allowed,
            policy_map=boxes.policy_map(scores[:, 0].detach(), moves.valid[:, 0], free).view(-1, 1, *scope.grid),
            episode=Episode(image, state, moves.valid, moves.actions, moves.live),
            box_cells=moves.new,
            scores=self.learner.read(scores, value, moves.valid),
            value=value,
            predicted=self.scorer.single_cells(looked),
            ratio=scope.ratio,
        )

    def loss(self, steps: Sequence[Step]) -> Tensor:
        """Mean loss of the learner over all episodes; in training, the target network moves on."""
        losses = []
        for decision, reward in steps:
            own = _own(decision)
            error = self.reward_of_cells(own, reward)
            hidden = own.cells.flatten(1)
            rewards = self.reward(error, hidden, own.box_cells)
            draws = self.uniform(len(reward), device=reward.device)
            losses.append(self.learner.loss(self.scorer, own, rewards, draws))
            if own.predicted is not None:
                losses[-1] = losses[-1] + self.cell_weight * self.reward.cell_loss(own.predicted, error, hidden)
        if self.training:
            self.learner.follow(self.scorer)
        return torch.stack(losses).mean()

    def diagnostics(self, decision: Decision) -> dict[str, Tensor]:
        """The learner's, and how many new cells a box hides, mean over the boxes of the batch."""
        own = _own(decision)
        size = own.box_cells.sum() / own.box_cells.any(2).sum().clamp_min(1)
        return self.learner.diagnostics(own) | {"box_cells_mean": size}

    @torch.no_grad()
    def _play(self, image: Tensor, looked: Tensor, environment: BoxEnvironment) -> Moves:
        """Let the agent act; it has looked at the image once."""
        shape = (self.n_steps, len(image), environment.actions + 1)
        draws = self.uniform(*shape, device=image.device) if self.training else None
        moves = []
        for step in range(self.n_steps):
            state = environment.observe(self._error(image, environment))
            scores, valid = self.scorer(looked, state)[0].squeeze(1), environment.valid
            action = best_action(scores, valid) if draws is None else self.learner.act(scores, valid, draws[step])
            moves.append(Moves(*state, *(part.unsqueeze(1) for part in (valid, action, *environment.step(action)))))
        return Moves.joined(moves)

    def _error(self, image: Tensor, environment: BoxEnvironment) -> Tensor | None:
        if self.error_so_far is None:
            return None
        hidden = environment.hidden
        if not environment.taken:
            return torch.zeros_like(hidden, dtype=torch.float32)
        return self.error_so_far(image, hidden.view(-1, 1, *environment.boxes.grid))


def _own(decision: Decision) -> BoxDecision:
    if not isinstance(decision, BoxDecision):
        raise TypeError(f"decision: expected one of a BoxMasker, got {type(decision).__name__}.")
    return decision


def _check_learner(learner: str, dueling: bool, replay: int) -> None:
    if learner not in LEARNERS:
        raise ValueError(f"learner: expected one of {', '.join(LEARNERS)}, got {learner!r}.")
    if learner == "actor_critic" and not dueling:
        raise ValueError("dueling: learner='actor_critic' needs its value as a baseline; leave dueling=True.")
    if learner == "actor_critic" and replay:
        raise ValueError("replay: learner='actor_critic' learns from its own last masks only; take replay=0 or 'dqn'.")


def _check_steps(n_steps: int, stop: bool, network: object) -> None:
    if n_steps < 1:
        raise ValueError(f"n_steps: expected at least 1 box, got {n_steps}.")
    if n_steps == 1 and (stop or network is not None):
        raise ValueError("stop, network: matter after the first box only, so they need n_steps of at least 2.")
