# SPDX-License-Identifier: Apache-2.0
"""Whether losses and weights are finite; for losses, nothing waits for the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = ["FiniteCheck", "check_weights"]


def check_weights(modules: Mapping[str, nn.Module]) -> None:
    """See that weights are finite, and that buffers, such as the moments of batch norms, are numbers.

    A step can spoil them although its loss was finite. This waits for the device: call it once an epoch.

    Args:
        modules: by what the error is to call them.

    Raises:
        FloatingPointError: when they are not.
    """
    for name, module in modules.items():
        spoilt = [key for key, weights in module.named_parameters() if not weights.isfinite().all()]
        spoilt += [key for key, moments in module.named_buffers() if moments.isnan().any()]
        if spoilt:
            raise FloatingPointError(
                f"{name}: expected finite weights, {len(spoilt)} are not: {', '.join(spoilt[:3])}; nothing was saved "
                "since. Lower the learning rate, clip gradients, or take bfloat16 instead of float16."
            )


class FiniteCheck:
    """Tell whether the losses of the last iteration were finite while the device works on the next one.

    To read a value from CUDA waits for all that was queued before, the running iteration too. So the answer is copied
    to the host right behind the losses, and that copy alone is waited for.

    Attributes:
        losses: those noted last.

    Example:
        >>> check = FiniteCheck()
        >>> check.note([torch.tensor(1.0), torch.tensor(float("nan"))])
        >>> check.finite()
        False
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self._answer: Tensor | None = None  # in pinned memory
        self._copied: torch.cuda.Event | None = None

    def note(self, losses: Sequence[Tensor]) -> None:
        """Take the losses of an iteration, of one shape and on one device, in place of those before."""
        self.losses = [loss.detach().as_subclass(Tensor) for loss in losses]
        self._copied = None
        if self.losses and self.losses[0].is_cuda:
            if self._answer is None:
                self._answer = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._answer.copy_(self._all_finite(), non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(self.losses[0].device))

    def finite(self) -> bool:
        """Return whether all losses noted last are finite; true where there is none."""
        if not self.losses:
            return True
        if self._copied is None or self._answer is None:
            return bool(self._all_finite())
        self._copied.synchronize()
        return bool(self._answer)

    def _all_finite(self) -> Tensor:
        return torch.isfinite(torch.stack(self.losses)).all()
