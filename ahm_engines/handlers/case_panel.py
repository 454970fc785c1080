# SPDX-License-Identifier: Apache-2.0
"""A picture of each case that inference went through."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from monai.transforms import Transform

from ahm_engines.files import writable_folder, write_atomically
from ahm_engines.handlers.panel import draw_panel

__all__ = ["CasePanel"]


class CasePanel(Transform):
    """Write ``<case_id>/<case_id>_panel.png`` for one decollated output of :class:`MaskingInference`.

    Args:
        output_dir: folder of the results.
        y_up: as in :func:`draw_panel`.
        separate_folder: whether each case has a folder of its own there.

    Raises:
        OSError: when the folder cannot be written to.
    """

    def __init__(self, output_dir: str | Path, *, y_up: bool | None = None, separate_folder: bool = True) -> None:
        self.folder = writable_folder(output_dir)
        self.y_up = y_up
        self.separate_folder = separate_folder

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Draw, and return ``data`` as it is."""
        case = str(data["case_id"])
        image, policy, mask, rebuilt = (
            data[key].as_tensor()[None] for key in ("image", "policy", "mask", "reconstruction")
        )
        figure = draw_panel(image, policy, mask > 0.5, rebuilt, rows=1, y_up=self.y_up, title=case)
        folder = writable_folder(self.folder / case if self.separate_folder else self.folder)
        write_atomically(folder / f"{case}_panel.png", lambda file: figure.savefig(file, format="png"))
        return dict(data)
