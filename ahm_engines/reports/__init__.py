# SPDX-License-Identifier: Apache-2.0
"""Reports about runs."""

from ahm_engines.reports.patients import patient_hashes, warn_of_trained_patients
from ahm_engines.reports.record import describe_run, provenance, running_config, write_record

__all__ = [
    "describe_run",
    "patient_hashes",
    "provenance",
    "running_config",
    "warn_of_trained_patients",
    "write_record",
]
