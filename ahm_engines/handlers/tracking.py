# SPDX-License-Identifier: Apache-2.0
"""What ``--tracking mlflow`` adds to a bundle, under the names that TensorBoard has and without the user's folders."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine
from monai.handlers import MLFlowHandler
from monai.utils import path_to_sqlite_uri

from ahm_engines.handlers.logging import epoch_scalars, losses
from ahm_engines.reports.record import provenance

__all__ = ["local_tracking_uri", "tracked"]

FORBIDDEN = re.compile(r"[^\w\-. :/]")  # in MLflow's names


def local_tracking_uri(output_dir: str | Path) -> str:
    """Address of MLflow's database ``mlruns.db`` in a folder, where ``--tracking_uri`` names no other.

    Raises:
        ModuleNotFoundError: when MLflow is not installed.
    """
    if find_spec("mlflow") is None:
        raise ModuleNotFoundError("--tracking mlflow needs MLflow: pip install 'monai-ahm[mlflow]'.", name="mlflow")
    return str(path_to_sqlite_uri(str(Path(output_dir) / "mlruns.db")))


def tracked(
    handlers: Sequence[Any],
    group: str,
    record: Mapping[str, Any] | None = None,
    *,
    every: int = 10,
    close: bool = False,
) -> list[Any]:
    """Set up the MLflow handlers that MONAI has put among an engine's, if any; the first process keeps them.

    Losses are ``train/loss`` and ``train/masker_loss``, metrics ``<group>/<metric>``. MONAI would read the loss of
    decollated output only, give the metrics of all engines the same names, stop at a metric without value, and send the
    configuration with the user's folders; the record is sent without them.

    Args:
        handlers: of a trainer or an evaluator.
        group: first part of the names of its metrics.
        record: of :func:`ahm_engines.reports.describe_run`; its ``settings`` become parameters of the run.
        every: iterations between two points, as reading a loss waits for the device.
        close: whether the run ends with the engine's; that of a trainer and of inference does anyway.

    Returns:
        The same handlers; without those of MLflow in all processes but the first.
    """
    if idist.get_rank() > 0:
        return [handler for handler in handlers if not isinstance(handler, MLFlowHandler)]
    for handler in handlers:
        if isinstance(handler, MLFlowHandler):
            _set_up(handler, group, every, close)
            if record is not None:
                handler.experiment_param = {"seed": record["seed"], **record["settings"]}
                handler.dataset_logger = partial(_log_record, handler, record)
    return list(handlers)


def _set_up(handler: MLFlowHandler, group: str, every: int, close: bool) -> None:
    handler.artifacts = ()
    handler.output_transform = _train_losses
    handler.iteration_log = handler.iteration_log and (lambda engine, iteration: iteration % every == 0)
    handler.epoch_logger = partial(_log_epoch, handler, group)
    handler.close_on_complete = handler.close_on_complete or close


def _train_losses(output: Any) -> dict[str, float]:
    return {f"train/{name}": value for name, value in losses(output).items()}


def _log_epoch(handler: MLFlowHandler, group: str, engine: Engine) -> None:
    for name, value in epoch_scalars(engine, group).items():
        handler.client.log_metric(handler.cur_run.info.run_id, FORBIDDEN.sub("_", name), value, step=engine.state.epoch)


def _log_record(handler: MLFlowHandler, record: Mapping[str, Any], _: Any) -> None:
    handler.client.log_dict(handler.cur_run.info.run_id, provenance(record), "run_record.json")
