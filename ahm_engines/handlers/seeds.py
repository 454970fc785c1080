# SPDX-License-Identifier: Apache-2.0
"""Make every epoch a function of the seed and its number alone, so that a resumed run repeats an unbroken one."""

from __future__ import annotations

from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.data.utils import set_rnd

__all__ = ["EpochSeeds"]

EPOCH_STEP, RANK_STEP = 1_000_003, 10_007


class EpochSeeds:
    """Seed torch, the data set's random transforms and the masker at the start of every epoch.

    Loader workers take their seeds from torch's, so keep ``persistent_workers`` off. The order of the samples follows
    the loader's own generator if it has one, which is seeded too.

    Args:
        seed: of the run.
        masker: what has ``set_random_state(seed)``, or ``None``.

    Raises:
        ValueError: when the loader keeps its workers alive.
    """

    def __init__(self, seed: int, masker: Any = None) -> None:
        self.seed = seed
        self.masker = masker

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        loader = engine.data_loader
        if getattr(loader, "persistent_workers", False):
            raise ValueError("persistent_workers: expected False, or epochs would not depend on the seed alone.")
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Seed for the epoch that starts."""
        seed = self.seed + EPOCH_STEP * engine.state.epoch + RANK_STEP * idist.get_rank()
        torch.manual_seed(seed)
        loader = engine.state.dataloader
        set_rnd(loader.dataset, seed)
        if loader.generator is not None:
            loader.generator.manual_seed(seed)
        if self.masker is not None:
            self.masker.set_random_state(seed)
        engine.set_data(loader)  # a new iterator, so that nothing of the last epoch's order is left
