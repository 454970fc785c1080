# SPDX-License-Identifier: Apache-2.0
"""How well the views of a data set find their partners."""

from __future__ import annotations

import logging
import math

from ignite.engine import Engine, Events
from monai.metrics import Cumulative

from ahm_engines.contrastive import pair_scores

__all__ = ["ContrastiveScores"]

NAMES = ("retrieval", "alignment", "contrastive_loss")
logger = logging.getLogger(__name__)


class ContrastiveScores:
    """Score all views of a run of the evaluator together, whatever its batches and processes.

    A batch's own loss depends on how many negatives it has; here every view is compared with all the others, so that
    numbers of one data set can be compared. Those of :func:`~ahm_engines.contrastive.pair_scores`:

    - ``retrieval``: share of views whose partner is the most similar of all others; chance is 1 / (2N - 1).
    - ``alignment``: mean cosine of partners; 1 as well when all vectors are alike, so read it beside the others.
    - ``contrastive_loss``: with all N crops as one batch; chance is log(2N - 1).

    As a metric, ``key_val_metric={"contrastive_loss": scores}``, one of them decides which epoch is best. Take the
    loss with ``metric_cmp_fn`` for "lower": retrieval is soon 1 on few crops, and then no later epoch is better. A
    single crop has no scores: they are NaN, a key metric ``None``, which MONAI does not compare.

    Args:
        temperature: of the loss.

    Raises:
        ValueError: on attaching, when no number has the name of the key metric.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        self.temperature = temperature
        self._views = Cumulative()

    def attach(self, engine: Engine, name: str | None = None) -> None:
        """Attach to an evaluator whose ``pred`` is ``[2B, D]`` and not decollated, as the metric ``name`` or not."""
        if name is not None and name not in NAMES:
            raise ValueError(f"key metric: expected one of {list(NAMES)}, got {name!r}.")
        engine.add_event_handler(Events.EPOCH_STARTED, self._views.reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish, name)

    def _collect(self, engine: Engine) -> None:
        first, second = engine.state.output["pred"].detach().chunk(2)
        self._views.extend(first, second)

    def _finish(self, engine: Engine, name: str | None) -> None:
        first, second = self._views.get_buffer()  # of all processes
        known = len(first) > 1
        scores = pair_scores(first, second, self.temperature) if known else dict.fromkeys(NAMES, math.nan)
        engine.state.metrics |= scores
        if not known:
            logger.warning("One crop to validate on: it has no negatives, so that no epoch is the best one.")
            if name is not None:
                engine.state.metrics[name] = None
