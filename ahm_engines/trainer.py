# SPDX-License-Identifier: Apache-2.0
"""Train a reconstruction network and its masker together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from ignite.engine import EventEnum, Events
from ignite.metrics import Metric
from monai.engines import IterationEvents, SupervisedTrainer, Workflow
from monai.inferers import Inferer
from torch import Tensor, nn

from ahm_engines.events import MaskedEvents, MaskedKeys
from ahm_engines.finite import FiniteCheck, check_weights
from ahm_engines.losses import MaskedLoss, hidden_mean
from ahm_engines.rewards import ErrorReward
from ahm_engines.step import Precision, average_gradients, broadcast_weights, check_fit, prepare_image, weights_of
from ahm_networks.maskers import Decision, Masker
from ahm_networks.processes import mean_over_processes, share_of_batch
from ahm_networks.rl.schedules import check_ends

__all__ = ["MaskedTrainer"]

Stages = Sequence[tuple[float, float]]
Reward = Callable[[Tensor, Tensor, Tensor, Callable[[], Tensor] | None], Tensor]
ALWAYS: Stages = ((0.0, 1.0),)
LOSS_KEYS = (MaskedKeys.LOSS, MaskedKeys.MASKER_LOSS)
REWARD_KEYS = (MaskedKeys.IMAGE, MaskedKeys.ERROR, MaskedKeys.PRED, MaskedKeys.MASK)


class MaskedTrainer(SupervisedTrainer):
    """MONAI trainer for masked reconstruction with a masker that may learn; the image is its own label.

    One iteration:

    1. ``image = prepare_batch(batch)``
    2. ``decision = masker(image)`` - ``MASK_CHOSEN``
    3. ``pred = inferer(image, network, decision.mask)`` - ``FORWARD_COMPLETED``
    4. ``loss`` = error over hidden voxels, backward, step - ``LOSS_COMPLETED``, ``BACKWARD_COMPLETED``
    5. ``reward`` from the detached error - ``REWARDED``
    6. ``masker.loss([(decision, reward)])``, backward, step - ``MASKER_UPDATED``; 5 and 6 only while the masker learns
    7. output: ``MaskedKeys`` - ``MODEL_COMPLETED``

    Several processes, with ``network`` in a ``DistributedDataParallel``, take the step that one process would take with
    all their images: the error is that of all hidden voxels, however many each process has. Until 7, the losses are a
    process's own, weighted with its share; then they are those of all processes.

    While the network does not learn, it is in evaluation mode. While it does, the passes for rewards alone (``again``,
    the masks of ``num_samples`` after the first) count in the statistics of its batch norms, too: in another mode,
    their errors could not be compared with that of the step.

    Args:
        device: where to train.
        max_epochs: passes over the loader.
        train_data_loader: batches with ``image`` ``[B, C, *S]``.
        network: ``network(image, mask) -> image``.
        optimizer: of the network.
        masker: decides what to hide; the trainer never asks which one it holds.
        masker_optimizer: of the masker; ``None`` leaves its weights alone.
        loss_function: error and loss of the network.
        reward: ``reward(error, pred, mask, again)``, a voxel map; ``again()`` rebuilds the same image under the same
            mask after the network's step and gives the new error, ``again`` is ``None`` where there was no step.
        network_stages: intervals of the training, in [0, 1], in which the network learns.
        masker_stages: the same for the masker. Both together make up AHM's staged training.
        schedule_epochs: epochs that stages and the masker's schedules span; ``None`` = ``max_epochs``, which federated
            learning sets to the end of the round.
        gradient_clip: largest gradient norm of the network, ``None`` for no limit.
        masker_gradient_clip: the same for the masker.
        channels_last: whether images and weights are laid out channels last.
        compile: whether to run the network through ``torch.compile``; checkpoints keep the plain names.
        compile_kwargs: for ``torch.compile``.
        amp: mixed precision for the network; maskers always run in float32.
        amp_kwargs: for ``torch.autocast``, such as ``{"dtype": torch.bfloat16}``.
        epoch_length, non_blocking, prepare_batch, inferer, postprocessing, key_train_metric, additional_metrics,
            train_handlers, event_names, event_to_attr, decollate: as in MONAI's ``SupervisedTrainer``.

    Raises:
        ValueError: when the masker's cells do not consist of whole tokens of the network, or a stage is no interval.
        FloatingPointError: when a loss was not finite, one iteration later or at the end of the epoch, or weights are
            not at the end of an epoch; before any handler saves what came of it.

    Example:
        >>> from ahm_networks import ActorCriticMasker, ReconstructionUNet
        >>> network, masker = ReconstructionUNet(2), ActorCriticMasker(2, patch_size=8, mask_ratio=0.6)
        >>> trainer = MaskedTrainer(
        ...     "cpu",
        ...     1,
        ...     [{"image": torch.rand(2, 1, 32, 32)}],
        ...     network,
        ...     torch.optim.AdamW(network.parameters(), 5e-4),
        ...     masker,
        ...     masker_optimizer=torch.optim.Adam(masker.parameters(), 5e-4),
        ... )
        >>> trainer.run()
        >>> trainer.state.output["mask"].shape
        torch.Size([2, 1, 32, 32])
    """

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: Iterable[Any],
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        masker: Masker,
        *,
        masker_optimizer: torch.optim.Optimizer | None = None,
        loss_function: MaskedLoss | None = None,
        reward: Reward | None = None,
        network_stages: Stages = ALWAYS,
        masker_stages: Stages = ALWAYS,
        schedule_epochs: int | None = None,
        gradient_clip: float | None = None,
        masker_gradient_clip: float | None = 1.0,
        channels_last: bool = False,
        compile: bool = False,
        compile_kwargs: Mapping[str, Any] | None = None,
        amp: bool = False,
        amp_kwargs: Mapping[str, Any] | None = None,
        epoch_length: int | None = None,
        non_blocking: bool = True,
        prepare_batch: Callable[[Any, torch.device, bool], Tensor] = prepare_image,
        inferer: Inferer | None = None,
        postprocessing: Callable[..., Any] | None = None,
        key_train_metric: dict[str, Metric] | None = None,
        additional_metrics: dict[str, Metric] | None = None,
        train_handlers: Sequence[Any] | None = None,
        event_names: list[str | EventEnum | type[EventEnum]] | None = None,
        event_to_attr: dict[Any, str] | None = None,
        decollate: bool = False,
    ) -> None:
        device = torch.device(device)
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            train_data_loader=train_data_loader,
            network=network,
            optimizer=optimizer,
            loss_function=loss_function or MaskedLoss(),
            epoch_length=epoch_length,
            non_blocking=non_blocking,
            prepare_batch=prepare_batch,
            inferer=inferer,
            postprocessing=postprocessing,
            key_train_metric=key_train_metric,
            additional_metrics=additional_metrics,
            amp=amp,
            event_names=[MaskedEvents, *(event_names or [])],
            event_to_attr=event_to_attr,
            decollate=decollate,
        )
        self.precision = Precision(device, amp, amp_kwargs)
        self.scaler = self.precision.scaler
        self.memory_format = _memory_format(channels_last, network, masker.spatial_dims)
        self.forward_network = torch.compile(network, **(compile_kwargs or {})) if compile else network
        self.masker = masker
        self.masker_optimizer = masker_optimizer
        self.reward = reward or ErrorReward()
        self.network_stages = _checked_stages("network_stages", network_stages)
        self.masker_stages = _checked_stages("masker_stages", masker_stages)
        self.schedule_epochs = schedule_epochs
        self.gradient_clip = gradient_clip
        self.masker_gradient_clip = masker_gradient_clip
        self._loss_check = FiniteCheck()
        check_fit(network, masker)
        broadcast_weights(masker)
        self.add_event_handler(Events.EPOCH_COMPLETED, self._raise_if_not_finite)  # ahead of whatever saves
        self.add_event_handler(Events.EPOCH_COMPLETED, check_weights, {"network": network, "masker": masker})
        self._register_handlers(train_handlers or [])

    @property
    def progress(self) -> float:
        """Share of the training that is over, in [0, 1)."""
        total = (self.schedule_epochs or self.state.max_epochs) * (self.state.epoch_length or 1)
        return min(max(self.state.iteration - 1, 0) / max(total, 1), 1.0)

    def run(self) -> None:
        """Train until ``max_epochs``."""
        Workflow.run(self)  # not Trainer.run: it would make a gradient scaler of its own

    def _iteration(self, engine: Any, batchdata: Any) -> dict[str, Any]:
        progress = self.progress
        learns = _within(progress, self.network_stages)
        self.network.train(learns)
        self.masker.train()
        self.masker.set_progress(progress)
        image = self.prepare_batch(batchdata, self.state.device, self.non_blocking)
        if self.memory_format is not None:
            image = image.to(memory_format=self.memory_format)
        output = self._reconstruct(image, learns)
        if learns:
            self.precision.update(output[MaskedKeys.LOSS], self.optimizer, self.gradient_clip)
            output |= {key: output[key].detach() for key in (MaskedKeys.PRED, MaskedKeys.ERROR, MaskedKeys.LOSS)}
            self.fire_event(IterationEvents.BACKWARD_COMPLETED)
        output[MaskedKeys.MASKER_LOSS] = self._update_masker(output, progress, learns)
        self._raise_if_not_finite()
        known = [key for key in LOSS_KEYS if output[key] is not None]
        output |= {key: mean_over_processes(output[key]) for key in known}
        self._loss_check.note([output[key] for key in known])  # the same in all processes: all stop, or none
        self.fire_event(IterationEvents.MODEL_COMPLETED)
        return output

    def _reconstruct(self, image: Tensor, learns: bool) -> dict[str, Any]:
        """Steps 2 to 4 without the update; without gradient unless the network learns."""
        decision = self.masker(image)
        output = self.state.output = {MaskedKeys.IMAGE: image, MaskedKeys.DECISION: decision}
        output[MaskedKeys.MASK] = decision.mask
        self.fire_event(MaskedEvents.MASK_CHOSEN)
        with torch.set_grad_enabled(learns):
            output[MaskedKeys.PRED] = self._rebuild(image, decision.mask)
            self.fire_event(IterationEvents.FORWARD_COMPLETED)
            output[MaskedKeys.ERROR] = self.loss_function.error(output[MaskedKeys.PRED], image)
            own = hidden_mean(output[MaskedKeys.ERROR], decision.mask)
            output[MaskedKeys.LOSS] = own * share_of_batch(decision.mask)
        self.fire_event(IterationEvents.LOSS_COMPLETED)
        return output

    def _update_masker(self, output: dict[str, Any], progress: float, learned: bool) -> Tensor | None:
        """Steps 5 and 6."""
        if self.masker_optimizer is None or not _within(progress, self.masker_stages):
            return None
        image, error, pred, mask = (output[key] for key in REWARD_KEYS)
        again = partial(self._error_again, image, mask) if learned else None
        steps = [(output[MaskedKeys.DECISION], self._rewarded(error, pred, mask, again))]
        self.fire_event(MaskedEvents.REWARDED)
        steps += [self._further_sample(image) for _ in range(self.masker.num_samples - 1)]
        loss = self.masker.loss(steps)
        if loss is None:
            return None
        self.masker_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        weights = weights_of(self.masker_optimizer)
        average_gradients(weights)
        if self.masker_gradient_clip is not None:
            torch.nn.utils.clip_grad_norm_(weights, self.masker_gradient_clip)
        self.masker_optimizer.step()
        self.fire_event(MaskedEvents.MASKER_UPDATED)
        return loss.detach()

    def _rebuild(self, image: Tensor, mask: Tensor) -> Tensor:
        with self.precision.autocast():
            return self.inferer(image, self.forward_network, mask)

    @torch.no_grad()
    def _error_again(self, image: Tensor, mask: Tensor) -> Tensor:
        return self.loss_function.error(self._rebuild(image, mask), image)

    def _rewarded(self, error: Tensor, pred: Tensor, mask: Tensor, again: Callable[[], Tensor] | None = None) -> Tensor:
        """The one detach between the two learners."""
        return self.reward(error.detach(), pred.detach(), mask, again)

    def _raise_if_not_finite(self) -> None:
        """Look at the last iteration's losses: by now they are there, so that nothing has to wait for them."""
        if not self._loss_check.finite():
            raise FloatingPointError(
                f"loss: expected finite numbers, got {[float(loss) for loss in self._loss_check.losses]} by epoch "
                f"{self.state.epoch}, iteration {self.state.iteration}; nothing was saved since. Lower the learning "
                "rate, set gradient_clip, or take bfloat16 instead of float16."
            )

    def _further_sample(self, image: Tensor) -> tuple[Decision, Tensor]:
        """Another mask for the same image: the masker's gradient is kept, the network's is not needed."""
        decision = self.masker(image)
        with torch.no_grad():
            pred = self._rebuild(image, decision.mask)
            error = self.loss_function.error(pred, image)
        return decision, self._rewarded(error, pred, decision.mask)


def _checked_stages(name: str, stages: Stages) -> Stages:
    for stage in stages:
        first, last = check_ends(name, stage, 0, 1)
        if first > last:
            raise ValueError(f"{name}: expected intervals that end no earlier than they begin, got {stage!r}.")
    return stages


def _within(progress: float, stages: Stages) -> bool:
    return any(first <= progress < last or progress == last == 1.0 for first, last in stages)


def _memory_format(channels_last: bool, network: nn.Module, spatial_dims: int) -> torch.memory_format | None:
    if not channels_last:
        return None
    memory_format = torch.channels_last_3d if spatial_dims == 3 else torch.channels_last
    network.to(memory_format=memory_format)  # type: ignore[call-overload]  # torch's stubs know 2D layouts only
    return memory_format
