# SPDX-License-Identifier: Apache-2.0
"""What a run was: configuration as resolved, versions, seed, data. No patient data."""

from __future__ import annotations

import logging
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from fire.parser import DefaultParseValue
from monai.bundle import ConfigParser

from ahm_engines.files import writable_folder, write_json

__all__ = ["bundle_config", "describe_run", "provenance", "write_record"]

logger = logging.getLogger(__name__)

FOLDERS = (
    *("bundle_root", "output_dir", "ckpt_dir", "evaluate_dir", "dataset_dir", "datalist"),
    *("labels_dir", "labels_csv", "masks_dir", "pretrained", "checkpoint"),
)
PACKAGES = ("monai-ahm", "monai", "torch", "numpy", "nibabel", "pydicom", "itk-io", "pytorch-ignite")


def describe_run(
    *, seed: int, data: Mapping[str, Any], config: Mapping[str, Any] | None = None, **facts: Any
) -> dict[str, Any]:
    """Collect the facts about a run as plain values, fit for JSON and for a checkpoint.

    Args:
        seed: of the run.
        data: description of the data: counts, modality, spacing, intensity range; no patient data.
        config: configuration; by default that of the running bundle command.
        **facts: more of the caller's.
    """
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "data": _plain(data),
        "versions": _versions(),
        "git_commit": _git_commit(),
        "config": _plain(bundle_config(sys.argv) if config is None else config),
        **_plain(facts),
    }


def provenance(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as it goes into checkpoints, which are passed on: without the names of the user's folders."""
    config = {key: value for key, value in record["config"].items() if key not in FOLDERS}
    return {**record, "config": config}


def write_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write the record as JSON, on the first process only.

    Raises:
        OSError: when the folder cannot be written to.
    """
    if idist.get_rank() == 0:
        writable_folder(Path(path).parent)
        write_json(path, record)


def bundle_config(command: Sequence[str]) -> dict[str, Any]:
    """Configuration of a ``monai.bundle run`` command line: its files merged, its overrides applied.

    Args:
        command: the words of the command, as in ``sys.argv``.

    Returns:
        The configuration before references are resolved; empty for any other command.
    """
    options = _options(command)
    files = options.pop("config_file", None)
    if files is None:
        logger.warning("Not started by a bundle command: the record of this run has no configuration.")
        return {}
    parser = ConfigParser()
    parser.read_config(f=files)
    parser.update({key: value for key, value in options.items() if key not in NOT_CONFIG})
    parser.resolve_macro_and_relative_ids()
    return {key: value for key, value in parser.get().items() if key != parser.meta_key}


NOT_CONFIG = ("meta_file", "logging_file", "run_id", "init_id", "final_id", "args_file", "tracking")


def _options(command: Sequence[str]) -> dict[str, Any]:
    """Read ``--key value`` and ``--key=value`` as the bundle command does."""
    options: dict[str, Any] = {}
    words = iter(command)
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            options[key.replace("-", "_") if key == "config-file" else key] = DefaultParseValue(
                value if equals else next(words, "")
            )
    return options


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
    """Commit of the checkout that this code runs from, if it is one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
