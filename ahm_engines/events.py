# SPDX-License-Identifier: Apache-2.0
"""Events of masked training, and the names of what it puts into ``engine.state.output``."""

from __future__ import annotations

from ignite.engine import EventEnum
from monai.utils.enums import StrEnum

__all__ = ["MaskedEvents", "MaskedKeys"]


class MaskedEvents(EventEnum):
    """Fired in this order within one training iteration, around MONAI's own ``IterationEvents``."""

    MASK_CHOSEN = "mask_chosen"
    REWARDED = "rewarded"
    MASKER_UPDATED = "masker_updated"


class MaskedKeys(StrEnum):
    """Keys of the output of :class:`MaskedTrainer` and :class:`MaskedEvaluator`."""

    IMAGE = "image"
    PRED = "pred"
    MASK = "mask"
    DECISION = "decision"
    ERROR = "error"
    LOSS = "loss"
    MASKER_LOSS = "masker_loss"
    STATS = "stats"
    RANDOM_MASK = "random_mask"
    RANDOM_PRED = "random_pred"
