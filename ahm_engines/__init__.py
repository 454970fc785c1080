# SPDX-License-Identifier: Apache-2.0
"""Training, evaluation and inference loops around networks and maskers."""

from ahm_engines.evaluator import MaskedEvaluator
from ahm_engines.events import MaskedEvents, MaskedKeys
from ahm_engines.inference import MaskingInference, MaskingPredictor, load_pretrained, window_inferer
from ahm_engines.losses import MaskedLoss
from ahm_engines.rewards import ErrorReward
from ahm_engines.trainer import MaskedTrainer

__all__ = [
    "ErrorReward",
    "MaskedEvaluator",
    "MaskedEvents",
    "MaskedKeys",
    "MaskedLoss",
    "MaskedTrainer",
    "MaskingInference",
    "MaskingPredictor",
    "load_pretrained",
    "window_inferer",
]
