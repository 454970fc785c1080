# SPDX-License-Identifier: Apache-2.0
"""Tests that run beside each other (pytest -n) share the cores: one thread for each."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it when it is imported
