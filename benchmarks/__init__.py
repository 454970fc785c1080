# SPDX-License-Identifier: Apache-2.0
"""What is measured against peers, one command each: ``python -m benchmarks.<name>``."""
