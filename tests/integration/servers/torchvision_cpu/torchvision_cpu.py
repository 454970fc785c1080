# SPDX-License-Identifier: Apache-2.0
"""Let the torchvision wheel, which is built for CUDA, be imported beside a torch without CUDA.

Its compiled part cannot be loaded there, and its Python part describes two operators of that part, which then do not
exist. They are declared here, right before its first import, without an implementation: MONAI Label calls neither.
``torchvision_cpu.pth``, copied into site-packages together with this file, runs it when Python starts.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any

DECLARED: list[Any] = []  # an operator lives as long as its library


class DeclareOperators(MetaPathFinder):
    """Find nothing, but declare the operators when torchvision is looked for."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        if torch.version.cuda is None:
            library = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            DECLARED.append(library)


sys.meta_path.insert(0, DeclareOperators())
