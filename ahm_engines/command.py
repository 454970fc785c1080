# SPDX-License-Identifier: Apache-2.0
"""What the bundles' commands do first, so that a slip of the pen is noticed and an error can be read."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from monai.bundle import ConfigWorkflow, run, update_kwargs

from ahm_engines.errors import behind_monai
from ahm_engines.options import did_you_mean
from ahm_engines.reports import running_config

__all__ = ["begin_command", "unused_options"]

_REFERENCE = re.compile(r"[@%](\w+(?:(?:#|::)\w+)*)")
_READ_BY_MONAI = {
    *("imports", "initialize", "run", "finalize", "training", "evaluating", "displayable_configs"),
    *("experiment_name", "run_name", "tracking_uri", "save_execute_config"),
}
# What MONAI takes for itself, on the command line and in a file.
_ARGUMENTS = {"workflow_name", *inspect.signature(ConfigWorkflow).parameters} - {"override"}


def begin_command() -> None:
    """Refuse options that nothing uses, and have an error end with its cause; the bundles' ``initialize`` calls this.

    MONAI takes any name for a new entry, so that ``--dataset_dirr scans`` would train on the default data, and wraps an
    error in others, one for each entry that it came through. The options in an ``--args_file`` are looked at as well.
    Nothing is done where no ``monai.bundle run`` is at work: whoever builds a workflow in Python may add entries, and
    sees the errors.

    Raises:
        ValueError: nothing uses an option; it names the entry that was probably meant.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not run.__code__:
        frame = frame.f_back
    if frame is None:
        return
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _end_with_the_cause
    command, config = frame.f_locals, running_config()
    file, override = command["args_file"], command["override"]
    listed = update_kwargs(file)
    steps = {command[name] or listed.get(name) for name in ("run_id", "init_id", "final_id")}
    given = (listed.keys() | override.keys()) - steps - _ARGUMENTS
    unused = unused_options(given, config)
    for name in unused:
        hint = did_you_mean(name, (config.keys() | _references(config)) - set(unused))
        option = f"--{name}" if name in override else f"{file}: {name}"
        raise ValueError(f"{option}: nothing in these configuration files uses such an option{hint}")


def unused_options(given: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """Return which of the ``given`` entries neither an entry of a configuration refers to nor MONAI knows by name.

    A nested one, such as ``train#trainer#max_epochs``, is used where an entry refers to what it is part of.
    """
    used = [_steps(name) for name in _references(config) | _READ_BY_MONAI]
    return sorted(name for name in given if not any(_lead_the_same_way(_steps(name), each) for each in used))


def _references(config: Mapping[str, Any]) -> set[str]:
    return {name.replace("::", "#") for text in _texts(config) for name in _REFERENCE.findall(text)}


def _steps(name: str) -> list[str]:
    return name.replace("::", "#").split("#")


def _lead_the_same_way(one: Sequence[str], other: Sequence[str]) -> bool:
    return all(step == its for step, its in zip(one, other, strict=False))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _end_with_the_cause(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, traceback)
    cause = behind_monai(error)
    if cause is not error:
        print(f"\n{type(cause).__name__}: {cause}", file=sys.stderr)
