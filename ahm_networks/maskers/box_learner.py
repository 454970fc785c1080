# SPDX-License-Identifier: Apache-2.0
"""Episodes of boxes, the decision that holds them, and the contract of what learns from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from ahm_networks.maskers.base import Decision
from ahm_networks.nets.box_scorer import BoxScorer, BoxState

__all__ = ["BoxDecision", "BoxLearner", "Episode"]


class Episode(NamedTuple):
    """What was seen and done for a batch of images, in ``T`` steps.

    Attributes:
        image: ``[B, C, *S]``.
        state: before each step.
        valid: ``[B, T, A]`` bool, actions that the state admitted; none of them once the episode is over.
        actions: ``[B, T]`` action numbers.
        live: ``[B, T]`` bool, steps that were taken.
    """

    image: Tensor
    state: BoxState
    valid: Tensor
    actions: Tensor
    live: Tensor

    def packed(self) -> dict[str, Tensor]:
        """One tensor under each name, images and errors in half precision: what is worth keeping."""
        packed = {"image": self.image.half(), "valid": self.valid, "actions": self.actions, "live": self.live}
        packed |= {"hidden": self.state.hidden, "numbers": self.state.numbers}
        return packed if self.state.error is None else packed | {"error": self.state.error.half()}

    @classmethod
    def unpacked(cls, packed: Mapping[str, Tensor]) -> Episode:
        """The inverse of :meth:`packed`."""
        error = packed["error"].float() if "error" in packed else None
        state = BoxState(packed["hidden"], packed["numbers"], error)
        return cls(packed["image"], state, packed["valid"], packed["actions"], packed["live"])


@dataclass(frozen=True, kw_only=True)
class BoxDecision(Decision):
    """What the masker needs to learn from the outcome.

    Attributes:
        episode: what was seen and done.
        box_cells: ``[B, T, N]`` bool, cells that each step hid; no cell counts twice.
        scores: ``[B, T, A]`` Q-values or logits with their gradient, ``-inf`` where not valid.
        value: ``[B, T]`` value of each state with its gradient; ``None`` without a dueling network.
        predicted: ``[B, N]`` predicted standardised error of each cell with its gradient, or ``None``.
        ratio: share of the cells that the masker was asked for; 0 while masks are random.
    """

    episode: Episode
    box_cells: Tensor
    scores: Tensor
    value: Tensor | None
    predicted: Tensor | None
    ratio: float


class BoxLearner(nn.Module, ABC):
    """Reads the scores of the network, acts on them, and turns rewards into a loss."""

    progress = 0.0

    @abstractmethod
    def read(self, scores: Tensor, value: Tensor | None, valid: Tensor) -> Tensor:
        """Turn the network's scores ``[..., A]`` and value ``[...]`` into Q-values or logits, ``-inf`` if not valid."""

    @abstractmethod
    def act(self, scores: Tensor, valid: Tensor, draws: Tensor) -> Tensor:
        """Choose actions ``[B]`` in training from scores ``[B, A]`` and uniform draws ``[B, A + 1]``."""

    @abstractmethod
    def loss(self, scorer: BoxScorer, decision: BoxDecision, rewards: Tensor, draws: Tensor) -> Tensor:
        """Loss of a batch of episodes.

        Args:
            scorer: the network that decided.
            decision: its episodes.
            rewards: ``[B, T]``, of each step.
            draws: ``[B]`` uniform numbers, for learners that choose what to learn from.
        """

    @abstractmethod
    def diagnostics(self, decision: BoxDecision) -> dict[str, Tensor]:
        """See :meth:`Masker.diagnostics`."""

    def follow(self, scorer: BoxScorer) -> None:
        """Let what trails the network's weights catch up."""
