# SPDX-License-Identifier: Apache-2.0
"""Hide what a slowly following copy of the network rebuilds worst: hard masks without anything to learn."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ahm_networks.maskers.base import Decision, Masker
from ahm_networks.maskers.borrowed import BorrowedNetwork
from ahm_networks.rl.functional import rank_reward
from ahm_networks.rl.schedules import LinearSchedule, check_ends
from ahm_transforms.masking.functional import choose_cells, image_to_cells

__all__ = ["TeacherErrorMasker"]

RAMP = 0.25  # share of the training over which the decay rises
GOLDEN = 0.6180339887498949  # its multiples, without their whole parts, fill [0, 1) evenly

ErrorMap = Callable[[Tensor, Tensor], Tensor]


class TeacherErrorMasker(Masker):
    """Let an averaged teacher rebuild the image and hide the cells of its largest errors (AnatoMask, 2024; HPM, 2023).

    In training every call first moves the teacher towards the network. The teacher then rebuilds the image under
    random masks, without gradient, and its error ranks the cells. In ``eval()`` mode the teacher stays as it is, its
    masks are always the same two halves of the cells, and every cell is judged.

    The teacher's decay rises linearly over the first quarter of the training. After ``n`` updates it is at most
    ``(1 + n) / (10 + n)``: else a short training would never get rid of the first, random weights.

    There is nothing to learn by gradient: :meth:`loss` returns ``None`` and no weight wants one. The teacher is part of
    ``state_dict``, the network is not. Processes that train the same network hold the same teacher, but for the
    statistics of its batch norms: those follow each process's own images unless the norms are synchronised.

    Args:
        spatial_dims: 2 or 3.
        patch_size: voxels per cell.
        mask_ratio: share of the allowed cells to hide.
        network: the one that is trained, ``network(image, mask) -> image``, without a wrapper for several processes.
        in_channels: image channels; ``None`` leaves it to the network to refuse what does not fit.
        decay: share of its own weights that the teacher keeps at an update, at the start and after the ramp.
        passes: 2 hides one random half of the allowed cells and then the other, so that every cell is judged;
            1 hides ``mask_ratio`` of them once, as AnatoMask does, and only those can be found to be hard: the others
            are chosen at random, and only when more cells are asked for than were judged.
        error: ``error(pred, image)``, a voxel map ``[B, 1, *S]``; ``None`` takes the absolute difference, mean over the
            channels. Give what the network is trained on, such as ``MaskedLoss.error``.
        amp_dtype: precision of the teacher's passes by autocast; ``None`` is float32.
        **kwargs: ``foreground_threshold`` and ``seed`` of :class:`Masker`.

    Raises:
        ValueError: for decays other than two numbers in [0, 1], or another number of passes.

    Example:
        >>> from ahm_networks import ReconstructionUNet
        >>> masker = TeacherErrorMasker(2, patch_size=8, mask_ratio=0.5, network=ReconstructionUNet(2))
        >>> int(masker(torch.rand(2, 1, 32, 32)).cells.sum())
        16
    """

    updates: Tensor

    def __init__(
        self,
        spatial_dims: int,
        patch_size: int | Sequence[int],
        mask_ratio: float = 0.6,
        *,
        network: nn.Module,
        in_channels: int | None = None,
        decay: tuple[float, float] = (0.999, 0.9999),
        passes: int = 2,
        error: ErrorMap | None = None,
        amp_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(spatial_dims, patch_size, mask_ratio, **kwargs)
        if passes not in (1, 2):
            raise ValueError(f"passes: expected 1 or 2, got {passes!r}.")
        self.in_channels = in_channels
        self.decay = LinearSchedule(*check_ends("decay", decay, 0, 1), end=RAMP)
        self.passes = passes
        self.error = error or _absolute_difference
        self.amp_dtype = amp_dtype
        self.student = BorrowedNetwork(network)
        self.teacher = copy.deepcopy(network).requires_grad_(False).eval()
        self.register_buffer("updates", torch.zeros(()))
        self.set_progress(0.0)

    def train(self, mode: bool = True) -> TeacherErrorMasker:
        """Switch the masker; the teacher stays in ``eval()`` mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def set_progress(self, progress: float) -> None:
        """Move the decay along its schedule."""
        self.scheduled_decay = self.decay(progress)

    def forward(self, image: Tensor, *, mask_ratio: float | None = None, foreground: Tensor | None = None) -> Decision:
        """See :meth:`Masker.forward`; at ratio 0 the teacher moves, but rebuilds nothing."""
        scope = self.scope(image, mask_ratio, foreground)
        if self.training:
            self.move_teacher()
        scores = self._scores(image, scope.grid)
        judged, error = self._judge(image, self._parts(scores, scope.allowed) if scope.ratio > 0 else [], scores)
        rank = rank_reward(error.flatten(1), judged.flatten(1)).view_as(scores)
        cells = choose_cells(torch.where(judged, rank, scores - 1.0), scope.count, allowed=scope.allowed)
        return Decision(mask=self.expand(cells, image), cells=cells, allowed=scope.allowed, policy_map=rank)

    def diagnostics(self, decision: Decision) -> dict[str, Tensor]:
        """Share of its own weights that the teacher keeps at the next update."""
        return {"teacher_decay": 1.0 - self._share()}

    @torch.no_grad()
    def move_teacher(self) -> None:
        """Average the network into the teacher, running statistics too; whole numbers are copied."""
        share = self._share()
        pairs = list(zip(_state(self.teacher), _state(self.student.network), strict=True))
        averaged = [(old, new) for old, new in pairs if old.is_floating_point()]
        old, new = [old for old, _ in averaged], [new for _, new in averaged]
        torch._foreach_lerp_(old, new, [share.to(tensor.dtype) for tensor in old])
        for old_number, new_number in pairs:
            if not old_number.is_floating_point():
                old_number.copy_(new_number)
        self.updates += 1

    def _share(self) -> Tensor:
        """Weight of the network in an update: one minus the decay."""
        return (9.0 / (10.0 + self.updates)).clamp_min(1.0 - self.scheduled_decay)

    def _scores(self, image: Tensor, grid: Sequence[int]) -> Tensor:
        """Numbers that split the cells, ``[B, 1, *G]``: random in training, else the same for every image."""
        if self.training:
            return self.uniform(image.shape[0], 1, *grid, device=image.device)
        number = torch.arange(torch.Size(grid).numel(), dtype=torch.float64, device=image.device)
        return (number * GOLDEN % 1.0).float().view(1, 1, *grid).expand(image.shape[0], -1, *grid)

    def _parts(self, scores: Tensor, allowed: Tensor | None) -> list[Tensor]:
        """Cells to hide in each pass; without a foreground as many in every image, as an MAE demands."""
        once = self.training and self.passes == 1
        count = self.count(self.mask_ratio if once else 0.5, scores.shape[2:], allowed)
        first = choose_cells(scores, count, allowed=allowed)
        if once:
            return [first]
        return [first, ~first if allowed is None else allowed & ~first]

    @torch.no_grad()
    def _judge(self, image: Tensor, parts: Sequence[Tensor], scores: Tensor) -> tuple[Tensor, Tensor]:
        """Which cells the teacher rebuilt, and the mean error of each, ``[B, 1, *G]``."""
        judged, error = torch.zeros_like(scores, dtype=torch.bool), torch.zeros_like(scores)
        for part in parts:
            with torch.autocast(image.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
                pred = self.teacher(image, self.expand(part, image))
            found = image_to_cells(self.error(pred.float(), image), self.patch_size)
            judged, error = judged | part, torch.where(part, found, error)
        return judged, error


def _state(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()


def _absolute_difference(pred: Tensor, image: Tensor) -> Tensor:
    return (pred - image.float()).abs().mean(1, keepdim=True)
