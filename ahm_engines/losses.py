# SPDX-License-Identifier: Apache-2.0
"""Reconstruction error of hidden voxels, and losses of networks that predict classes or at several depths."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from monai.losses import DeepSupervisionLoss
from torch import Tensor, nn
from torch.nn import functional as F

from ahm_networks.processes import share_of_batch
from ahm_transforms.masking.functional import cells_to_image, image_to_cells

__all__ = ["BalancedCrossEntropy", "DeepSupervision", "MaskedLoss", "hidden_mean"]


def hidden_mean(error: Tensor, mask: Tensor) -> Tensor:
    """Mean error over the hidden voxels of a batch, a scalar; 0 when nothing is hidden.

    Args:
        error: ``[B, 1, *S]``.
        mask: ``[B, 1, *S]`` bool, ``True`` = hidden.
    """
    return torch.where(mask, error, 0.0).sum() / mask.sum().clamp_min(1)


class MaskedLoss(nn.Module):
    """L1 or squared error per voxel; its mean over hidden voxels trains the network.

    Args:
        norm: ``l1`` (SimMIM, MIM-Med3D) or ``l2`` (MAE, AHM).
        patch_size: predict targets normalised per patch, as MAE's ``norm_pix``; ``None`` predicts intensities. The
            variance of a patch is floored at a hundredth of its image's, or flat air would be amplified noise.

    Raises:
        ValueError: for another norm.

    Example:
        >>> image, mask = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.bool)
        >>> mask[..., :2] = True
        >>> loss = MaskedLoss("l1")
        >>> float(loss(torch.full_like(image, 0.5), image, mask))
        0.5
    """

    def __init__(self, norm: str = "l1", *, patch_size: int | Sequence[int] | None = None) -> None:
        super().__init__()
        if norm not in ("l1", "l2"):
            raise ValueError(f"norm: expected 'l1' or 'l2', got {norm!r}.")
        self.norm = norm
        self.patch_size = patch_size

    def forward(self, pred: Tensor, image: Tensor, mask: Tensor) -> Tensor:
        """Mean error over hidden voxels, a scalar."""
        return hidden_mean(self.error(pred, image), mask)

    def error(self, pred: Tensor, image: Tensor) -> Tensor:
        """Error of every voxel, mean over the channels: ``[B, 1, *S]`` float32.

        Raises:
            ValueError: when prediction and image differ in shape.
        """
        if pred.shape != image.shape:
            raise ValueError(
                f"pred: expected the image's shape {tuple(image.shape)}, got {tuple(pred.shape)}; a network that "
                "predicts at several depths needs its deep supervision off."
            )
        difference = pred.float() - self._target(image.float())
        error = difference.abs() if self.norm == "l1" else difference.square()
        return error if error.shape[1] == 1 else error.mean(1, keepdim=True)

    def to_intensity(self, pred: Tensor, image: Tensor) -> Tensor:
        """Undo the target normalisation of a prediction, with the patch statistics of ``image``."""
        if self.patch_size is None:
            return pred
        mean, std = self._patch_statistics(image)
        return pred * std + mean

    def _target(self, image: Tensor) -> Tensor:
        if self.patch_size is None:
            return image
        mean, std = self._patch_statistics(image)
        return (image - mean) / std

    def _patch_statistics(self, image: Tensor) -> tuple[Tensor, Tensor]:
        if self.patch_size is None:
            raise ValueError("patch_size: expected one, got None.")
        image = image.float()  # squares overflow in half precision
        axes = tuple(range(2, image.ndim))
        mean = image_to_cells(image, self.patch_size)
        variance = (image_to_cells(image.square(), self.patch_size) - mean.square()).clamp_min(0.0)
        floor = 0.01 * image.var(axes, keepdim=True, unbiased=False) + 1e-8
        std = torch.maximum(variance, floor).sqrt()
        size = image.shape[2:]
        return cells_to_image(mean, self.patch_size, size), cells_to_image(std, self.patch_size, size)


class BalancedCrossEntropy(nn.Module):
    """Cross-entropy with a weight for each class, the mean over the batches of all processes together.

    PyTorch divides by the weights of the cases at hand, so that the average of several processes would not be the loss
    of the whole batch. A single process, or one that wants no gradient, has PyTorch's loss.

    Args:
        weight: of each class; ``None`` gives all the same.

    Example:
        >>> loss = BalancedCrossEntropy([1.0, 3.0])
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 9.0]])
        >>> round(float(loss(logits, torch.tensor([0, 1]))), 4)  # log(2) of a case that weighs 1 of 4
        0.1734
    """

    weight: Tensor | None

    def __init__(self, weight: Sequence[float] | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", None if weight is None else torch.tensor(weight))

    def forward(self, pred: Tensor, label: Tensor) -> Tensor:
        """Return the loss, a scalar.

        Args:
            pred: logits ``[B, K]``.
            label: ``[B]`` indices of classes.
        """
        loss = F.cross_entropy(pred, label, self.weight)
        if self.weight is None or not torch.is_grad_enabled():
            return loss
        return loss * share_of_batch(self.weight[label])


class DeepSupervision(DeepSupervisionLoss):
    """Weighted mean of a segmentation loss over the predictions of a deeply supervised network.

    The weights are 1, 1/2, 1/4, ... from the finest to the coarsest prediction, divided by their sum, so that the loss
    has the size of a plain one (MONAI sums without dividing). Predictions come stacked ``[B, heads, C, *S]``, as from
    MONAI's ``DynUNet`` in training, or as a list, whose coarser ones meet a label of their own size, nearest voxels.
    A plain prediction ``[B, C, *S]`` has its plain loss.

    Args:
        loss: ``loss(pred, label)`` with ``label`` ``[B, 1, *S]``, such as MONAI's ``DiceCELoss``.

    Example:
        >>> loss = DeepSupervision(nn.MSELoss())
        >>> heads = torch.stack([torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)], dim=1)
        >>> round(float(loss(heads, torch.zeros(1, 1, 4, 4))), 4)  # 2/3 of the first and 1/3 of the second
        0.3333
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(loss)

    def get_weights(self, levels: int = 1) -> list[float]:
        """Weights of that many predictions, with sum 1."""
        weights = [0.5**level for level in range(levels)]
        return [weight / sum(weights) for weight in weights]

    def get_loss(self, pred: Tensor, label: Tensor) -> Tensor:
        """Loss of one prediction, with the label of its size and of any type."""
        if pred.shape[2:] != label.shape[2:]:
            label = F.interpolate(label.float(), pred.shape[2:], mode="nearest-exact").to(label.dtype)
        return self.loss(pred, label)

    def forward(self, pred: Tensor | Sequence[Tensor], label: Tensor) -> Tensor:
        """Return the loss, a scalar."""
        if isinstance(pred, Tensor) and pred.ndim == label.ndim + 1:
            pred = pred.unbind(1)
        loss: Tensor = super().forward(pred, label)
        return loss
