# SPDX-License-Identifier: Apache-2.0
"""Reports about runs."""

from ahm_engines.reports.record import bundle_config, describe_run, provenance, write_record

__all__ = ["bundle_config", "describe_run", "provenance", "write_record"]
