# SPDX-License-Identifier: Apache-2.0
"""What went wrong, without what was wrapped around it."""

from __future__ import annotations

__all__ = ["behind_monai"]

_WRAPPERS = ("Failed to evaluate", "Failed to instantiate", "applying transform")


def behind_monai(error: BaseException) -> BaseException:
    """Return the error that MONAI's parsers and transforms passed on, each in an error of its own."""
    while error.__cause__ is not None and str(error).startswith(_WRAPPERS):
        error = error.__cause__
    return error
