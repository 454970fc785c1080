# SPDX-License-Identifier: Apache-2.0
"""How several processes divide the cases that they validate on."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from monai.data import DistributedSampler

from ahm_networks.processes import number_of_processes

__all__ = ["validation_sampler"]


def validation_sampler(dataset: Any) -> DistributedSampler:
    """Deal out the cases in turn, each to one process, so that none is scored twice.

    Raises:
        ValueError: when there are fewer cases than processes: some would have nothing to do, and the others wait.
    """
    if isinstance(dataset, Sized) and len(dataset) < number_of_processes():
        raise ValueError(
            f"cases to validate on: expected at least one for each of {number_of_processes()} processes, got "
            f"{len(dataset)}; start fewer processes, or give it more cases, as by val_fraction or test_fraction."
        )
    return DistributedSampler(dataset, even_divisible=False, shuffle=False)
