# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are complete or not there, and say where they come from."""

from __future__ import annotations

import logging
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ahm_engines.files import lock_folder, unlock_folder, writable_folder, write_atomically
from ahm_engines.finite import check_weights
from ahm_engines.reports.patients import PATIENTS, trained_patients, write_trained_patients
from ahm_networks.processes import number_of_processes

__all__ = [
    "Checkpoints",
    "check_fit",
    "load_checkpoint",
    "look_at_checkpoint",
    "restore_objects",
    "save_checkpoint",
]

BEST, LAST = "model.pt", "last.pt"
PREVIOUS = "previous"  # folder beside them
logger = logging.getLogger(__name__)


def save_checkpoint(path: str | Path, objects: Mapping[str, Any], **facts: Any) -> Path:
    """Write the ``state_dict`` of every object, and plain facts beside them, in one atomic step.

    Raises:
        OSError: when it cannot be written; a file that was there before stays as it is.
    """
    content = {name: _plain(item).state_dict() for name, item in objects.items()} | facts
    try:
        return write_atomically(path, lambda file: torch.save(content, file))
    except RuntimeError as error:  # of torch, on its way out of a file that took no more, or out of an interruption
        cause = error.__context__
        if isinstance(cause, OSError):
            raise OSError(f"{path}: cannot be written ({cause.strerror}).") from cause
        raise error if cause is None or isinstance(cause, Exception) else cause from None


def load_checkpoint(path: str | Path, objects: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read a checkpoint with ``weights_only=True`` and hand every object its state.

    Args:
        path: a file of :func:`save_checkpoint`.
        objects: what to restore, by the names under which it was saved.

    Returns:
        All that the file holds.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is damaged, lacks an entry, or belongs to another architecture; nothing of it is
            then loaded into a network whose weights do not fit.
    """
    content = _read(Path(path), mmap=False)
    restore_objects(path, content, objects or {})
    return content


def look_at_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return all that a checkpoint holds for a look at settings and shapes: the weights stay on the disk.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is damaged.
    """
    return _read(Path(path), mmap=zipfile.is_zipfile(path))  # as all are that torch has written for years


def _read(path: Path, *, mmap: bool) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint.")
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (RuntimeError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a readable checkpoint of weights: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a checkpoint, a dictionary, got {type(content).__name__}.")
    return content


def restore_objects(path: str | Path, content: Mapping[str, Any], objects: Mapping[str, Any]) -> None:
    """Hand every object its state out of what :func:`load_checkpoint` read from ``path``.

    Raises:
        ValueError: as :func:`load_checkpoint`.
    """
    check_fit(path, content, objects)
    for name, item in objects.items():
        _restore(Path(path), name, _plain(item), content[name])


def check_fit(path: str | Path, content: Mapping[str, Any], objects: Mapping[str, Any]) -> None:
    """Compare the names and shapes of weights with what :func:`load_checkpoint` read from ``path``; change nothing.

    Raises:
        ValueError: when an entry is missing, or belongs to another architecture.
    """
    _check_entries(path, content, objects)
    for name, item in objects.items():
        _check_weights(path, name, _plain(item), content[name])


class Checkpoints:
    """Save the last state after every epoch and the best one after every validation; go on from the last one.

    ``last.pt`` and ``model.pt`` (the best) hold the same entries: the state of every object, the trainer's place in
    the training, the scale of its gradients in float16, the best metric so far, and the provenance. The first process
    writes; all of them read, and none leaves the training before both files are written.

    A training that goes on with the same ``max_epochs`` ends as one that never stopped. With another one, schedules of
    the learning rate keep the length that they were built with, and go on from the step they had reached. A training
    that begins anew in a folder with checkpoints moves those into ``previous``, with a warning, before it saves its
    first; those that are there already go. While it runs, other processes cannot train into the folder.

    Args:
        save_dir: folder for both files.
        objects: by name, whatever has a ``state_dict`` and is needed to go on; ``None`` is passed over. Name the
            network ``model``.
        evaluator: its key metric decides what is best; ``None`` keeps the last state only.
        provenance: plain facts about method, data and software, stored in both files.
        patients: hashes of those trained on, see `patient_hashes`; they are noted in a file beside the others.
        resume: go on from ``last.pt`` where there is one.
        every: epochs between two saves of the last state; the final epoch is always saved.

    Raises:
        OSError: when ``save_dir`` cannot be written to; on starting, when another process trains into it.
        FloatingPointError: on saving, when weights are not finite; the files from before stay as they are.
        ValueError: on resuming, when the checkpoint does not fit, or other patients were trained on.
        RuntimeError: on resuming, when not all processes find the same state.
    """

    def __init__(
        self,
        save_dir: str | Path,
        objects: Mapping[str, Any],
        *,
        evaluator: Engine | None = None,
        provenance: Mapping[str, Any] | None = None,
        patients: Sequence[str] = (),
        resume: bool = False,
        every: int = 1,
    ) -> None:
        self.folder = writable_folder(save_dir)
        self.objects = {name: item for name, item in objects.items() if item is not None}
        self.evaluator = evaluator
        self.provenance = dict(provenance or {})
        self.patients = patients
        self.resume = resume
        self.every = every
        self.trainer: Engine | None = None
        self.max_epochs: int | None = None
        self.owns_files = False  # what lies in the folder is of this training
        self.lock: int | None = None

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer, behind the handler that runs the validation."""
        self.trainer = engine
        self.max_epochs = engine.state.max_epochs  # before a round of federated learning sets its own
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.STARTED, self._keep_others_out)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._save_last)
        engine.add_event_handler(Events.COMPLETED, self._end)
        if self.evaluator is not None:
            self.evaluator.add_event_handler(Events.COMPLETED, self._save_best)

    def _start(self, engine: Engine) -> None:
        last = self.folder / LAST
        if not self.resume:
            return
        if last.is_file():
            self._go_on(engine, last)
        else:
            logger.info("No %s to resume from: starting anew.", last)
        _check_agreement(last, engine.state.epoch)

    def _keep_others_out(self) -> None:
        if idist.get_rank() == 0 and self.lock is None:
            self.lock = lock_folder(self.folder)

    def _end(self) -> None:
        idist.barrier()
        if self.lock is not None:
            unlock_folder(self.folder, self.lock)
            self.lock = None

    def _go_on(self, engine: Engine, last: Path) -> None:
        content = load_checkpoint(last)
        check_fit(last, content, self.objects)
        _check_entries(last, content, ("trainer", "best"))
        _check_patients(last, set(self.patients))
        _warn_of_other_settings(last, content.get("provenance", {}), self.provenance)
        self.owns_files = True
        state = content["trainer"]
        if state["epoch_length"] != engine.state.epoch_length:
            raise ValueError(
                f"{last}: saved with {state['epoch_length']} iterations per epoch, now there are "
                f"{engine.state.epoch_length}; resume with the same data, batch size and split."
            )
        before, now = state.get("max_epochs"), self.max_epochs
        schedules = {} if None in (before, now) or before == now else _schedules(self.objects)
        for name, schedule in schedules.items():
            _advance(schedule, content[name]["last_epoch"])
        restore_objects(last, content, {name: item for name, item in self.objects.items() if name not in schedules})
        for schedule in schedules.values():
            _set_rates(schedule)
        if schedules:
            logger.warning(
                "max_epochs was %d, is %d: the learning rate follows the schedule of %d epochs from here.",
                *(before, now, now),
            )
        engine.state.epoch, engine.state.iteration = state["epoch"], state["iteration"]
        scaler = getattr(engine, "scaler", None)
        if scaler is not None and content.get("scaler"):
            scaler.load_state_dict(content["scaler"])
        if self.evaluator is not None:
            _take_best(self.evaluator, content["best"])
        logger.info("Resumed from %s after epoch %d.", last, state["epoch"])

    def _save_last(self, engine: Engine) -> None:
        final = engine.state.epoch == engine.state.max_epochs
        if final or engine.state.epoch % self.every == 0:
            self._save(LAST)
        if final and self.evaluator is not None and self.evaluator.state.best_metric_epoch == -1:
            self._save(BEST)  # nothing was validated: the last state is the best one known

    def _save_best(self, evaluator: Engine) -> None:
        trainer = self.trainer
        if trainer is not None and evaluator.state.best_metric_epoch == evaluator.state.epoch:
            self._save(BEST)

    def _save(self, name: str) -> None:
        if idist.get_rank() != 0 or self.trainer is None:
            return
        check_weights({key: item for key, item in self.objects.items() if isinstance(item, nn.Module)})
        if not self.owns_files:
            _set_aside(self.folder)
            self.owns_files = True
        state = self.trainer.state
        place = {"epoch": state.epoch, "iteration": state.iteration, "epoch_length": state.epoch_length}
        place["max_epochs"] = self.max_epochs
        scale = self._scaler_state()
        facts = {"best": self._best(), "provenance": self.provenance} | ({"scaler": scale} if scale else {})
        save_checkpoint(self.folder / name, self.objects, trainer=place, **facts)
        write_trained_patients(self.folder / name, self.patients)

    def _scaler_state(self) -> dict[str, Any]:
        """Empty where gradients are not scaled."""
        scaler = getattr(self.trainer, "scaler", None)
        return {} if scaler is None else scaler.state_dict()

    def _best(self) -> dict[str, Any]:
        if self.evaluator is None:
            return {"metric": None, "epoch": -1, "name": None}
        state = self.evaluator.state
        return {"metric": state.best_metric, "epoch": state.best_metric_epoch, "name": state.key_metric_name}


def _set_aside(folder: Path) -> None:
    """Keep the checkpoints of an earlier training, the last one that there was."""
    files = [folder / name for name in (LAST, BEST, PATIENTS) if (folder / name).is_file()]
    if files:
        shutil.rmtree(folder / PREVIOUS, ignore_errors=True)
        (folder / PREVIOUS).mkdir()
        for file in files:
            file.rename(folder / PREVIOUS / file.name)
        logger.warning(
            "%s holds another training, which this one does not resume: its checkpoints are kept in %s, until another "
            "one begins here.",
            *(folder, folder / PREVIOUS),
        )


def _warn_of_other_settings(last: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Whoever goes on may change how images are cut and masked, but should know."""
    old, new = (facts.get("settings") or {} for facts in (before, now))
    changed = [f"{key} was {old[key]}, is {new[key]}" for key in old.keys() & new.keys() if old[key] != new[key]]
    if changed:
        logger.warning("%s: resumed with other settings: %s.", last, "; ".join(sorted(changed)))


def _take_best(evaluator: Engine, best: Mapping[str, Any]) -> None:
    """Values of another key metric cannot be compared: the best epoch is then looked for anew."""
    state = evaluator.state
    if best["epoch"] != -1 and best["name"] != state.key_metric_name:
        logger.warning(
            "The key metric was %s, is %s: the best epoch is looked for anew.", best["name"], state.key_metric_name
        )
        return
    state.best_metric, state.best_metric_epoch = best["metric"], best["epoch"]


def _check_agreement(last: Path, epoch: int) -> None:
    """Processes whose machines do not share the folder would each train on from another state."""
    epochs: list[Any] = [epoch] * number_of_processes()
    if number_of_processes() > 1:
        dist.all_gather_object(epochs, epoch)
    if len(set(epochs)) > 1:
        raise RuntimeError(
            f"{last}: expected one state for all processes to resume from, found those of epochs {epochs}, process by "
            "process; put it on a file system that all machines share."
        )


def _check_patients(last: Path, after: set[str]) -> None:
    """Going on with other patients would validate on some that were trained on."""
    before = trained_patients(last)
    if before and after and before != after:
        raise ValueError(
            f"{last}: trained on {len(before)} patients, now there are {len(after)} to train on, {len(before & after)} "
            "of them the same; resume with the same data and split, or train anew with another output_dir."
        )


def _schedules(objects: Mapping[str, Any]) -> dict[str, LRScheduler]:
    """Return those that may depend on the length of the training; a plateau does not."""
    return {
        name: item
        for name, item in objects.items()
        if isinstance(item, LRScheduler) and not isinstance(item, ReduceLROnPlateau)
    }


def _advance(schedule: LRScheduler, position: int) -> None:
    """Take a schedule that was just built to a step, as a training would have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the optimizer's own steps lie before
        while schedule.last_epoch < position:
            schedule.step()


def _set_rates(schedule: LRScheduler) -> None:
    """Give the optimizer, whose state was restored since, the learning rates of the schedule."""
    for group, rate in zip(schedule.optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate


def _plain(item: Any) -> Any:
    """Return a network without what distributes or compiles it, so that its weights have their own names."""
    if isinstance(item, nn.parallel.DistributedDataParallel):
        return _plain(item.module)
    return _plain(item._orig_mod) if hasattr(item, "_orig_mod") else item


def _check_entries(path: str | Path, content: Mapping[str, Any], names: Iterable[str]) -> None:
    missing = [name for name in names if name not in content]
    if missing:
        raise ValueError(f"{path}: expected entries {missing}, the checkpoint has {sorted(content)}.")


def _check_weights(path: str | Path, name: str, item: Any, state: Mapping[str, Any]) -> None:
    """Compare a module's keys and shapes before anything is changed."""
    if not isinstance(item, nn.Module):
        return
    own = item.state_dict()
    missing, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own.keys() & state.keys()
        if isinstance(own[key], torch.Tensor) and own[key].shape != state[key].shape
    ]
    if missing or surplus or shapes:
        raise ValueError(
            f"{path}: '{name}' was saved from another architecture: {len(missing)} weights missing {missing[:3]}, "
            f"{len(surplus)} unknown {surplus[:3]}, {len(shapes)} of another shape {sorted(shapes)[:3]}. "
            "Build it with the configuration in the checkpoint's provenance."
        )


def _restore(path: Path, name: str, item: Any, state: Mapping[str, Any]) -> None:
    try:
        item.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: '{name}' cannot be restored: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
