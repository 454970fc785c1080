# SPDX-License-Identifier: Apache-2.0
"""Does pretraining help, and does the clever mask beat a random one: one study answers it for one data set."""

from ahm_engines.study.reading import preset_names, read_study
from ahm_engines.study.runner import Progress, run_study
from ahm_engines.study.settings import Arm, Study

__all__ = ["Arm", "Progress", "Study", "preset_names", "read_study", "run_study"]
