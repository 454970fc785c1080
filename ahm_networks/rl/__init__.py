# SPDX-License-Identifier: Apache-2.0
"""Reinforcement learning: pure formulas and schedules."""

from ahm_networks.rl import functional

__all__ = ["functional"]
