# SPDX-License-Identifier: Apache-2.0
"""Reports about runs."""

from ahm_engines.reports.record import describe_run, provenance, running_config, write_record

__all__ = ["describe_run", "provenance", "running_config", "write_record"]
