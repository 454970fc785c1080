# SPDX-License-Identifier: Apache-2.0
"""Handlers for the engines: they read ``engine.state`` and leave the step alone."""

from ahm_engines.handlers.case_panel import CasePanel
from ahm_engines.handlers.checkpoint import Checkpoints, load_checkpoint, save_checkpoint
from ahm_engines.handlers.classification_scores import ClassificationScores
from ahm_engines.handlers.contrastive_scores import ContrastiveScores
from ahm_engines.handlers.costs import RunCosts
from ahm_engines.handlers.diagnostics import MaskOverlap
from ahm_engines.handlers.logging import TensorBoardScalars, TrainingBar
from ahm_engines.handlers.panel import MaskPanel, draw_panel
from ahm_engines.handlers.pictures import PredictionPictures
from ahm_engines.handlers.predictions import ClassificationResults
from ahm_engines.handlers.processes import validation_sampler
from ahm_engines.handlers.quick_look import QuickLookd, draw_quick_look
from ahm_engines.handlers.record import RunRecord
from ahm_engines.handlers.seeds import EpochSeeds
from ahm_engines.handlers.segmentation_scores import SegmentationScores
from ahm_engines.handlers.stopping import EarlyStop, FiniteLoss, GradientClip
from ahm_engines.handlers.tracking import local_tracking_uri, tracked
from ahm_engines.handlers.transfer import FrozenEncoder, PretrainedWeights

__all__ = [
    "CasePanel",
    "Checkpoints",
    "ClassificationResults",
    "ClassificationScores",
    "ContrastiveScores",
    "EarlyStop",
    "EpochSeeds",
    "FiniteLoss",
    "FrozenEncoder",
    "GradientClip",
    "MaskOverlap",
    "MaskPanel",
    "PredictionPictures",
    "PretrainedWeights",
    "QuickLookd",
    "RunCosts",
    "RunRecord",
    "SegmentationScores",
    "TensorBoardScalars",
    "TrainingBar",
    "draw_panel",
    "draw_quick_look",
    "load_checkpoint",
    "local_tracking_uri",
    "save_checkpoint",
    "tracked",
    "validation_sampler",
]
