# SPDX-License-Identifier: Apache-2.0
"""What the bundles' commands do first, so that a slip of the pen is noticed and an error can be read."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow, run, update_kwargs
from monai.utils import str2bool

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
    """Refuse options that cannot be meant, and end errors with their cause; the bundles' ``initialize`` calls this.

    MONAI takes any name for a new entry, so that ``--dataset_dirr scans`` would train on the default data, any text for
    a value, passes over ``None``, and wraps an error in others, one for each entry that it came through. The options in
    an ``--args_file`` are looked at as well. Nothing is done where no ``monai.bundle run`` is at work: whoever builds a
    workflow in Python may add entries, and sees the errors.

    Raises:
        ValueError: nothing uses an option; it names the entry that was probably meant. Or its value is text where the
            files have a number, a list or the like, or ``None``.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not run.__code__:
        frame = frame.f_back
    if frame is None:
        return
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _end_with_the_cause
    _check_options(frame.f_locals, running_config())


def _check_options(command: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    file, override = command["args_file"], command["override"]
    listed = update_kwargs(file)
    steps = {command[name] or listed.get(name) for name in ("run_id", "init_id", "final_id")}
    given = {name: value for name, value in (listed | override).items() if name not in steps | _ARGUMENTS}
    called = {name: f"--{name}" if name in override else f"{file}: {name}" for name in given}
    unused = unused_options(given, config)
    for name in unused:
        hint = did_you_mean(name, (config.keys() | _references(config)) - set(unused))
        raise ValueError(f"{called[name]}: nothing in these configuration files uses such an option{hint}")
    defaults = ConfigParser.load_config_files(command["config_file"] or listed["config_file"])
    for name in sorted(given.keys() & defaults.keys()):
        if name in override and override[name] is None and defaults[name] is not None:
            raise ValueError(f"--{name}: MONAI passes over None, so that it would stay as it is; write '$None'.")
        if told := wrong_kind(given[name], defaults[name]):
            raise ValueError(f"{called[name]}: {told}")


def unused_options(given: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """Return which of the ``given`` entries neither an entry of a configuration refers to nor MONAI knows by name.

    A nested one, such as ``train#trainer#max_epochs``, is used where an entry refers to what it is part of.
    """
    used = [_steps(name) for name in _references(config) | _READ_BY_MONAI]
    return sorted(name for name in given if not any(_lead_the_same_way(_steps(name), each) for each in used))


def wrong_kind(value: Any, default: Any) -> str:
    """Return what is wrong with a value in place of that in the files; empty where it may be right.

    Expressions and references may give anything, and so may a value where the files have text or nothing.

    Example:
        >>> wrong_kind("abc", 0.001)
        "expected a number, got 'abc'."
    """
    if not isinstance(value, str) or value.startswith(("$", "@", "%")) or isinstance(default, str | None):
        return ""
    if isinstance(default, bool):
        known = str2bool(value, True, False) == str2bool(value, False, False)  # whichever it is by default
        return "" if known else f"expected true or false, got {value!r}."
    kind = "a number" if isinstance(default, int | float) else "a list" if isinstance(default, list) else "a dictionary"
    return f"expected {kind}, got {value!r}."


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
