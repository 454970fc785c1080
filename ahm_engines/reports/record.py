# SPDX-License-Identifier: Apache-2.0
"""What a run was: configuration as resolved, versions, seed, data. No patient data."""

from __future__ import annotations

import inspect
import logging
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from monai.bundle import ConfigParser

from ahm_engines.files import writable_folder, write_json

__all__ = ["describe_run", "provenance", "running_config", "write_record"]

logger = logging.getLogger(__name__)

FOLDERS = (
    *("bundle_root", "output_dir", "ckpt_dir", "cache_dir", "evaluate_dir", "evaluate_report"),
    *("dataset_dir", "datalist", "labels_dir", "labels_csv", "masks_dir", "pretrained", "checkpoint"),
    *("tracking_uri", "save_execute_config"),  # the first may hold a password
)
PACKAGES = ("monai-ahm", "monai", "torch", "numpy", "nibabel", "pydicom", "itk-io", "pytorch-ignite")


def describe_run(
    *, seed: int, data: Mapping[str, Any], config: Mapping[str, Any] | None = None, **facts: Any
) -> dict[str, Any]:
    """Collect the facts about a run as plain values, fit for JSON and for a checkpoint.

    Args:
        seed: of the run.
        data: description of the data: counts, modality, spacing, intensity range; no patient data.
        config: configuration; by default that of the bundle that calls.
        **facts: more of the caller's.
    """
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "data": _plain(data),
        "versions": _versions(),
        "git_commit": _git_commit(),
        "config": _plain(running_config() if config is None else config),
        **_plain(facts),
    }


def provenance(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as it goes into checkpoints, which are passed on: without the user's folders, files and cases."""
    config = {key: value for key, value in record["config"].items() if key not in FOLDERS}
    return {**record, "config": _without_places(config)}


def write_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write the record as JSON, on the first process only.

    Raises:
        OSError: when the folder cannot be written to.
    """
    if idist.get_rank() == 0:
        writable_folder(Path(path).parent)
        write_json(path, record)


def running_config() -> dict[str, Any]:
    """Configuration of the bundle that calls: its files merged, overrides applied, references not resolved.

    MONAI hands it to none of the expressions that it evaluates, so it is taken from the parser further up the stack.

    Returns:
        The configuration; empty outside of a bundle.
    """
    frame = inspect.currentframe()
    while frame is not None:
        parser = frame.f_locals.get("self")
        if isinstance(parser, ConfigParser):
            return {key: value for key, value in parser.get().items() if key != parser.meta_key}
        frame = frame.f_back
    logger.warning("Not called by a bundle: the record of this run has no configuration.")
    return {}


def _without_places(value: Any) -> Any:
    """Leave out lists of cases and absolute paths, however deep."""
    if isinstance(value, Mapping):
        return {
            key: _without_places(item)
            for key, item in value.items()
            if not (key == "data" and isinstance(item, list)) and not _is_place(item)
        }
    if isinstance(value, list):
        return [_without_places(item) for item in value if not _is_place(item)]
    return value


def _is_place(value: Any) -> bool:
    return isinstance(value, str) and Path(value).is_absolute()


def _plain(value: Any) -> Any:
    """Turn whatever it is into dictionaries, lists, numbers and text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def _git_commit() -> str | None:
    """Commit of the checkout that this code runs from, if it is one; an environment may lie in somebody's own."""
    return _git("rev-parse", "HEAD") if _git("ls-files", "--error-unmatch", Path(__file__).name) else None


def _git(*words: str) -> str | None:
    """What git says about this folder; ``None`` where it fails."""
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
