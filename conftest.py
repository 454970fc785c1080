# SPDX-License-Identifier: Apache-2.0
"""Every test begins with the same random state, and tests that run beside each other share the cores."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it when it is imported


def pytest_runtest_setup() -> None:
    """Seed what tests draw from, before their fixtures of any scope: a test fails always or never.

    That is torch, numpy and random, MONAI's chains (``Compose`` takes the seed of ``set_determinism``), and the state
    that all MONAI transforms without a seed of their own have in common.
    """
    from monai.transforms import Randomizable
    from monai.utils import set_determinism

    set_determinism(0)
    Randomizable.R.seed(0)
