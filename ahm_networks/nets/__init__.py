# SPDX-License-Identifier: Apache-2.0
"""Networks that rebuild images, and networks that score cells."""

from ahm_networks.nets.reconstruction import ReconstructionUNet

__all__ = ["ReconstructionUNet"]
