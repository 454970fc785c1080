# SPDX-License-Identifier: Apache-2.0
"""Judge a network and its masker on held-out images."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Events
from ignite.metrics import Metric
from monai.engines import IterationEvents, SupervisedEvaluator
from monai.inferers import Inferer
from torch import Tensor, nn

from ahm_engines.events import MaskedEvents, MaskedKeys
from ahm_engines.losses import MaskedLoss
from ahm_engines.metrics import hidden_psnr, hidden_ssim, rank_correlation
from ahm_engines.step import Precision, check_fit, prepare_image
from ahm_networks.maskers import Decision, Masker, UniformMasker
from ahm_networks.rl.functional import masked_mean
from ahm_transforms.masking.functional import hidden_fraction, image_to_cells

__all__ = ["MaskedEvaluator"]

logger = logging.getLogger(__name__)


class MaskedEvaluator(SupervisedEvaluator):
    """Rebuild every image twice: under the masker's own mask, and under a uniform one of the same cells allowed.

    The uniform masks are the same in every epoch, and for every masker of the same patch size, ratio and foreground
    threshold, so their scores compare networks; the key metric is ``random_psnr``. The masker's own mask tells what
    the masker has learned. Metrics, means over the images in which something is hidden, NaN where there are none:

    - ``psnr``, ``ssim``: hidden voxels under the masker's mask, in dB and in [-1, 1].
    - ``random_psnr``, ``random_ssim``: the same under uniform masks.
    - ``hardness``: error under the masker's mask over error under the uniform one; above 1 it finds hard places.
    - ``rank_correlation``: of the policy map and the true errors, over the cells that the uniform mask hides.
    - ``foreground_share``: share of the hidden voxels above ``foreground_threshold``.
    - the masker's own diagnostics.

    Args:
        device: where to evaluate.
        val_data_loader: batches with ``image`` ``[B, C, *S]``.
        network: ``network(image, mask) -> image``.
        masker: runs in ``eval()`` mode; its random state is put back afterwards.
        loss_function: gives the error, and undoes target normalisation.
        data_range: of the intensities, for PSNR and SSIM.
        foreground_threshold: intensity above which a voxel is foreground.
        seed: of the masks.
        epoch_length, non_blocking, prepare_batch, inferer, postprocessing, additional_metrics, val_handlers, amp,
            amp_kwargs: as in MONAI's ``SupervisedEvaluator``.

    Raises:
        ValueError: when the masker's cells do not consist of whole tokens of the network; on running, when images do
            not fit network or masker, or are smaller than the window of SSIM.

    Example:
        >>> from ahm_networks import ReconstructionUNet
        >>> loader = [{"image": torch.rand(2, 1, 32, 32)}]
        >>> evaluator = MaskedEvaluator("cpu", loader, ReconstructionUNet(2), UniformMasker(2, patch_size=8))
        >>> evaluator.run()
        >>> sorted(evaluator.state.metrics)[:3]
        ['foreground_share', 'hardness', 'psnr']
    """

    def __init__(
        self,
        device: torch.device | str,
        val_data_loader: Iterable[Any],
        network: nn.Module,
        masker: Masker,
        *,
        loss_function: MaskedLoss | None = None,
        data_range: float = 1.0,
        foreground_threshold: float = 0.05,
        seed: int = 0,
        epoch_length: int | None = None,
        non_blocking: bool = True,
        prepare_batch: Callable[[Any, torch.device, bool], Tensor] = prepare_image,
        inferer: Inferer | None = None,
        postprocessing: Callable[..., Any] | None = None,
        additional_metrics: dict[str, Metric] | None = None,
        val_handlers: Sequence[Any] | None = None,
        amp: bool = False,
        amp_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        device = torch.device(device)
        super().__init__(
            device=device,
            val_data_loader=val_data_loader,
            network=network,
            epoch_length=epoch_length,
            non_blocking=non_blocking,
            prepare_batch=prepare_batch,
            inferer=inferer,
            postprocessing=postprocessing,
            key_val_metric={STATS: StatsAverage()},
            additional_metrics=additional_metrics,
            metric_cmp_fn=lambda now, best: now > best or math.isnan(best),
            event_names=[MaskedEvents],
            amp=amp,
            decollate=False,
        )
        check_fit(network, masker)
        self.state.key_metric_name = "random_psnr"
        self.precision = Precision(device, amp, amp_kwargs)
        self.masker = masker
        self.reference = UniformMasker(
            masker.spatial_dims,
            masker.patch_size,
            masker.mask_ratio,
            foreground_threshold=masker.foreground_threshold,
        )
        self.loss_function = loss_function or MaskedLoss()
        self.data_range = data_range
        self.foreground_threshold = foreground_threshold
        self.seed = seed
        self._random_states: list[Tensor] = []
        self.add_event_handler(Events.EPOCH_STARTED, self._fix_random_state)
        self.add_event_handler(Events.EPOCH_COMPLETED, self._restore_random_state)
        self.add_event_handler(Events.EPOCH_COMPLETED, self._warn_of_empty_foreground)
        self._register_handlers(val_handlers or [])

    def _fix_random_state(self) -> None:
        self._random_states = [generator.get_state() for generator in self.masker.generators()]
        self.masker.set_random_state(self.seed)
        self.reference.set_random_state(self.seed)

    def _restore_random_state(self) -> None:
        for generator, state in zip(self.masker.generators(), self._random_states, strict=True):
            generator.set_state(state)
        self.state.metrics.pop(STATS, None)  # its entries stand beside it

    def _warn_of_empty_foreground(self) -> None:
        """A threshold above all intensities restricts no mask, which looks like one that works."""
        threshold = self.masker.foreground_threshold
        if threshold == self.foreground_threshold and self.state.metrics["foreground_share"] == 0:
            logger.warning(
                "foreground_threshold: no image has a cell above %g, so masks may be anywhere; intensities are those "
                "after the preprocessing, which recipes scale to [0, 1].",
                threshold,
            )

    @torch.no_grad()
    def _iteration(self, engine: Any, batchdata: Any) -> dict[str, Any]:
        self.network.eval()
        self.masker.eval()
        image = self.prepare_batch(batchdata, self.state.device, self.non_blocking)
        decision = self.masker(image)
        self.state.output = output = {
            MaskedKeys.IMAGE: image,
            MaskedKeys.DECISION: decision,
            MaskedKeys.MASK: decision.mask,
        }
        self.fire_event(MaskedEvents.MASK_CHOSEN)
        uniform = self.reference(image, mask_ratio=self.masker.mask_ratio)
        output[MaskedKeys.PRED] = self._rebuild(image, decision.mask)
        output[MaskedKeys.RANDOM_MASK] = uniform.mask
        output[MaskedKeys.RANDOM_PRED] = self._rebuild(image, uniform.mask)
        self.fire_event(IterationEvents.FORWARD_COMPLETED)
        output[MaskedKeys.ERROR] = (output[MaskedKeys.PRED] - image).abs().mean(1, keepdim=True)
        output[MaskedKeys.STATS] = self._stats(output, uniform)
        self.fire_event(IterationEvents.MODEL_COMPLETED)
        return output

    def _rebuild(self, image: Tensor, mask: Tensor) -> Tensor:
        with self.precision.autocast():
            pred = self.inferer(image, self.network, mask)
        return self.loss_function.to_intensity(pred.float(), image)

    def _stats(self, output: Mapping[str, Any], uniform: Decision) -> dict[str, Tensor]:
        image, decision = output[MaskedKeys.IMAGE], output[MaskedKeys.DECISION]
        stats = {}
        chosen_some, random_some = (mask.flatten(1).any(1) for mask in (decision.mask, uniform.mask))
        for name, pred, mask, some in (
            ("", output[MaskedKeys.PRED], decision.mask, chosen_some),
            ("random_", output[MaskedKeys.RANDOM_PRED], uniform.mask, random_some),
        ):
            stats[f"{name}psnr"] = hidden_psnr(pred, image, mask, data_range=self.data_range)[some]
            stats[f"{name}ssim"] = hidden_ssim(pred, image, mask, data_range=self.data_range)[some]
        random_error = (output[MaskedKeys.RANDOM_PRED] - image).abs().mean(1, keepdim=True)
        chosen = masked_mean(output[MaskedKeys.ERROR].flatten(1), decision.mask.flatten(1))
        hardness = chosen / masked_mean(random_error.flatten(1), uniform.mask.flatten(1)).clamp_min(1e-8)
        stats["hardness"] = hardness[chosen_some & random_some]
        foreground = image.amax(1, keepdim=True) > self.foreground_threshold
        stats["foreground_share"] = hidden_fraction(foreground, within=decision.mask)[chosen_some]
        if decision.policy_map is not None:
            error = image_to_cells(random_error, self.masker.patch_size).flatten(1)
            stats["rank_correlation"] = rank_correlation(
                decision.policy_map.flatten(1), error, uniform.cells.flatten(1)
            )
        return stats | {name: value.reshape(1) for name, value in self.masker.diagnostics(decision).items()}


STATS = str(MaskedKeys.STATS)


class StatsAverage(Metric):
    """Mean over all images, and over all processes, of every entry of the output's statistics."""

    def __init__(self) -> None:
        # pairs, as ignite takes a mapping for predictions and labels
        super().__init__(output_transform=lambda output: list(output[STATS].items()), skip_unrolling=True)

    def reset(self) -> None:
        """Forget everything."""
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def update(self, output: Iterable[tuple[str, Tensor]]) -> None:
        """Add the numbers of one batch; nothing waits for the device."""
        for name, values in output:
            self._sums[name] = self._sums.get(name, torch.zeros((), device=values.device)) + values.sum()
            self._counts[name] = self._counts.get(name, 0) + values.numel()

    def compute(self) -> dict[str, float]:
        """Average."""
        means = {}
        for name, total in self._sums.items():
            count = float(idist.all_reduce(float(self._counts[name])))
            means[name] = float(idist.all_reduce(total)) / count if count else math.nan
        return means
