# SPDX-License-Identifier: Apache-2.0
"""Start from pretrained weights, and keep the encoder as it is for a while."""

from __future__ import annotations

import logging
from pathlib import Path

from ignite.engine import Engine, Events
from torch import nn

from ahm_engines.trained import trained_settings
from ahm_networks.nets import Transfer, freeze_encoder, read_weights, transfer_weights, unfreeze_encoder

__all__ = ["FrozenEncoder", "PretrainedWeights"]

logger = logging.getLogger(__name__)


class PretrainedWeights:
    """Load pretrained weights into a network when training first starts, and log which fitted.

    A trainer that runs again, as in the next round of federated learning, keeps what it has. List it behind the handler
    of checkpoints: a training that is resumed then goes on with its own weights, and does not need the file any more.

    Args:
        path: a pretraining checkpoint or a plain ``state_dict``; ``None`` trains from scratch.
        network: to load into; may be distributed.
        part: ``encoder`` or ``all``, as in :func:`ahm_networks.nets.transfer_weights`.
        image_channels: as there; ``None`` takes what a pretraining of ours wrote into its checkpoint.

    Attributes:
        transfer: what was loaded; ``None`` before the start, from scratch and where training is resumed.

    Raises:
        FileNotFoundError: on starting, when there is no such file.
        ValueError: on starting, when nothing in the file fits the network.
    """

    def __init__(
        self, path: str | Path | None, network: nn.Module, *, part: str = "encoder", image_channels: int | None = None
    ) -> None:
        self.path = path
        self.network = network
        self.part = part
        self.image_channels = image_channels
        self.transfer: Transfer | None = None

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine | None = None) -> None:
        """Load, once, unless the training is under way."""
        if self.transfer is not None or (engine is not None and engine.state.epoch > 0):
            return
        if self.path is None:
            logger.info("No pretrained weights: training from scratch.")
            return
        weights = read_weights(self.path)
        channels = self.image_channels or trained_settings(self.path).get("in_channels")
        try:
            self.transfer = transfer_weights(self.network, weights, part=self.part, image_channels=channels)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        logger.info("Weights of %s:\n%s", self.path, self.transfer.table())


class FrozenEncoder:
    """Train the decoder or head alone, for the first epochs or for good.

    The epoch decides, so that a resumed training freezes what an unbroken one would have. A distributed network must
    be built with ``find_unused_parameters=True``.

    Args:
        network: whose encoder to freeze; may be distributed.
        epochs: how many epochs the encoder is frozen; -1 for good, ``None`` or 0 not at all.

    Raises:
        ValueError: for other negative numbers.
    """

    def __init__(self, network: nn.Module, epochs: int | None) -> None:
        if epochs is not None and epochs < -1:
            raise ValueError(f"epochs: expected -1 (for good), 0 or more, got {epochs}.")
        self.network = network
        self.epochs = epochs or 0
        self.frozen = False

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        if self.epochs:
            engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Freeze or unfreeze where the epoch that starts differs from the last."""
        freeze = self.epochs == -1 or engine.state.epoch <= self.epochs
        if freeze == self.frozen:
            return
        (freeze_encoder if freeze else unfreeze_encoder)(self.network)
        self.frozen = freeze
        logger.info("Epoch %d: encoder %s.", engine.state.epoch, "frozen" if freeze else "trained from now on")
