# SPDX-License-Identifier: Apache-2.0
"""Cases that are looked for when they are needed, as another program may bring its own: MONAI Label does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from ahm_transforms.io._types import Case
from ahm_transforms.io.cases import Cases

__all__ = ["CaseFinder"]

# What says where to look and what to choose has no say in lists that are divided already.
_NO_SAY = {
    **dict.fromkeys(("dataset_dir", "labels_dir", "masks_dir", "labels_csv", "class_pattern", "patient_pattern")),
    **{"split_classes": None, "label_fraction": 1.0, "skip_bad": False},
}


class CaseFinder:
    """Find cases, once and not before they are asked for; or check those that others put in their place.

    Args:
        load: `load_cases`, `load_segmentation_cases` or `load_classification_cases`.
        options: all of its arguments.

    Example:
        >>> finder = CaseFinder(lambda **options: Cases([{"image": "a.nii", "case_id": "a"}], []))
        >>> finder.used(finder.cases.training, finder.cases.validation) is finder.cases
        True
    """

    def __init__(self, load: Callable[..., Cases], **options: Any) -> None:
        self.load = load
        self.options = options

    @cached_property
    def cases(self) -> Cases:
        """The cases that the options ask for."""
        return self.load(**self.options)

    def held_out(self, training: Sequence[Case]) -> list[Case]:
        """Return the test cases beside a training set that was found; beside others there are none."""
        return self.cases.test if training and _were_found(training) else []

    def used(self, training: Sequence[Case], validation: Sequence[Case]) -> Cases:
        """Return the cases that two data sets hold: those found, or else these, checked as if they had been found.

        Cases that were found have a ``case_id``. Others hold ``image`` and ``label`` alone, and nothing is looked for.

        Raises:
            BadCasesError: some of the others cannot be used; it lists them all.
            ValueError: there is none to train on, or a class occurs in none.
        """
        if not training:
            raise ValueError("there is no case to train on: where a server's datastore is used, label an image first.")
        if _were_found([*training, *validation]):
            return self.cases
        options = {key: _NO_SAY.get(key, value) for key, value in self.options.items()}
        options |= {"datalist": {"training": list(training), "validation": list(validation)}}
        return self.load(**options | {"val_fraction": 0.0, "test_fraction": 0.0})


def _were_found(cases: Sequence[Case]) -> bool:
    return all("case_id" in case for case in cases)
