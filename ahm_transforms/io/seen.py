# SPDX-License-Identifier: Apache-2.0
"""What a check has seen of a case: kept in a folder for the next time, and warned of."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ahm_transforms.io._types import NAMES_SHOWN, Case, Geometry
from ahm_transforms.io.remembered import Remembered

__all__ = ["FEW_VALUES", "Seen", "recall", "remember", "warn"]

LOGGER = logging.getLogger(__name__)

FEW_VALUES = 64  # scans of 8 bits have more than 100 different values, label maps have their classes


class Seen(NamedTuple):
    """A case with the reason why it cannot be used, if there is one, and what its image holds.

    ``odd`` names values that are no good, ``digest`` stands for the values, ``classes`` are those of its label.
    """

    case: Case
    bad: str = ""
    odd: str = ""
    like_labels: bool = False
    digest: str = ""
    geometry: Geometry = Geometry((), ())
    classes: frozenset[str] = frozenset()


def recall(cases: Sequence[Case], memory: Remembered | None) -> list[Seen]:
    """Return what was seen of the cases of one image; nothing unless all of them are remembered."""
    found = [] if memory is None else [(case, each) for case in cases if (each := memory.read(case)) is not None]
    seen = [Seen(case, **each | _frozen(**each)) for case, each in found]
    return seen if len(seen) == len(cases) else []


def _frozen(geometry: Any, classes: Sequence[str], **_: Any) -> dict[str, Any]:
    return {"geometry": Geometry(*map(tuple, geometry)), "classes": frozenset(classes)}


def remember(seen: Sequence[Seen], memory: Remembered | None) -> None:
    """Keep what was seen of cases without fault."""
    for each in seen:
        if memory is not None and not each.bad:
            found = {name: value for name, value in each._asdict().items() if name not in ("case", "bad")}
            memory.write(each.case, found | {"classes": sorted(each.classes)})


def warn(seen: Sequence[Seen], called: Mapping[str, str]) -> None:
    """Name images with values that are no good, those that look like label maps, and copies of other patients'.

    Args:
        seen: of all cases.
        called: names by case id.
    """
    if odd := {called[each.case["case_id"]]: each.odd for each in seen if each.odd}:
        names = ", ".join(f"{name} ({what})" for name, what in odd.items())
        LOGGER.warning("%d image(s) hold NaN, infinite or constant values: %s", len(odd), names)
    if like_labels := list(dict.fromkeys(called[each.case["case_id"]] for each in seen if each.like_labels)):
        LOGGER.warning(
            "%d image(s) hold no more than %d different whole numbers and look like label maps: %s",
            *(len(like_labels), FEW_VALUES, _some(like_labels, ", ")),
        )
    if copies := _copies(seen, called):
        LOGGER.warning(
            "%d image(s) look like copies of another patient's: %s. Training and test may each have one: leave one "
            "out, or give both one patient (patient_id in a datalist, --patient_pattern).",
            *(len(copies), _some(copies, "; ")),
        )


def _copies(seen: Sequence[Seen], called: Mapping[str, str]) -> list[str]:
    """Name every further image of the same values, with the first, where their patients are not the same."""
    alike: dict[str, dict[str, str]] = defaultdict(dict)
    for each in seen:
        if not each.odd and not each.bad:  # images of one value are alike and no copies
            alike[each.digest].setdefault(str(each.case["patient_id"]), called[each.case["case_id"]])
    groups = [list(names.values()) for names in alike.values()]
    return [f"{other} of {first}" for first, *others in groups for other in others]


def _some(names: Sequence[str], between: str) -> str:
    return between.join(names[:NAMES_SHOWN]) + (f"{between}..." if len(names) > NAMES_SHOWN else "")
