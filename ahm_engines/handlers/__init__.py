# SPDX-License-Identifier: Apache-2.0
"""Handlers for the engines: they read ``engine.state`` and leave the step alone."""

from ahm_engines.handlers.case_panel import CasePanel
from ahm_engines.handlers.checkpoint import Checkpoints, load_checkpoint, save_checkpoint
from ahm_engines.handlers.diagnostics import MaskOverlap
from ahm_engines.handlers.logging import TensorBoardScalars, TrainingBar
from ahm_engines.handlers.panel import MaskPanel, draw_panel
from ahm_engines.handlers.seeds import EpochSeeds

__all__ = [
    "CasePanel",
    "Checkpoints",
    "EpochSeeds",
    "MaskOverlap",
    "MaskPanel",
    "TensorBoardScalars",
    "TrainingBar",
    "draw_panel",
    "load_checkpoint",
    "save_checkpoint",
]
