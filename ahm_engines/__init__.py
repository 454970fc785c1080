# SPDX-License-Identifier: Apache-2.0
"""Training, evaluation and inference loops around networks and maskers."""

from ahm_engines.case_inference import CaseInference, IncompleteInferenceError, TolerantDataset
from ahm_engines.command import begin_command
from ahm_engines.contrastive import PairedContrastiveLoss, pair_scores, prepare_views
from ahm_engines.evaluator import MaskedEvaluator
from ahm_engines.events import MaskedEvents, MaskedKeys
from ahm_engines.inference import MaskingInference, MaskingPredictor, load_pretrained, scan_inferer, window_inferer
from ahm_engines.losses import BalancedCrossEntropy, DeepSupervision, MaskedLoss
from ahm_engines.rewards import ErrorReward, ProgressReward
from ahm_engines.trained import fitting_network, load_masker, load_trained, masked_settings, trained_settings
from ahm_engines.trainer import MaskedTrainer

__all__ = [
    "BalancedCrossEntropy",
    "CaseInference",
    "DeepSupervision",
    "ErrorReward",
    "IncompleteInferenceError",
    "MaskedEvaluator",
    "MaskedEvents",
    "MaskedKeys",
    "MaskedLoss",
    "MaskedTrainer",
    "MaskingInference",
    "MaskingPredictor",
    "PairedContrastiveLoss",
    "ProgressReward",
    "TolerantDataset",
    "begin_command",
    "fitting_network",
    "load_masker",
    "load_pretrained",
    "load_trained",
    "masked_settings",
    "pair_scores",
    "prepare_views",
    "scan_inferer",
    "trained_settings",
    "window_inferer",
]
