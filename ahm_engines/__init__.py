# SPDX-License-Identifier: Apache-2.0
"""Training and evaluation loops around networks and maskers."""
