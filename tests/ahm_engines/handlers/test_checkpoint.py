# SPDX-License-Identifier: Apache-2.0
import errno
import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer
from monai.handlers import LrScheduleHandler, ValidationHandler
from monai.optimizers import WarmupCosineSchedule
from monai.transforms import Compose, RandFlipd, RandGaussianNoised
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, MultiStepLR, StepLR

from ahm_engines import MaskedEvaluator, MaskedTrainer, files
from ahm_engines.handlers import Checkpoints, EpochSeeds, load_checkpoint, save_checkpoint
from ahm_networks import ActorCriticMasker, CurriculumMasker, ReconstructionUNet

SMALL = {"channels": (4, 8), "strides": (2,), "num_res_units": 0}


def run(folder, epochs, *, resume=False, seed=0, workers=0, stop_after=None, masker_seed=0, validate=False):
    """Train on random crops in random order with random noise; everything that can differ, would."""
    torch.manual_seed(seed)
    network = ReconstructionUNet(2, backbone_args={**SMALL, "dropout": 0.2})
    masker = CurriculumMasker(ActorCriticMasker(2, 8, 0.5, seed=masker_seed), policy_share=(0.5, 0.5), warm_up=0.0)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    masker_optimizer = torch.optim.Adam(masker.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(1)
    items = [{"image": torch.rand(1, 16, 16, generator=generator)} for _ in range(6)]
    transform = Compose([RandFlipd("image", prob=0.5, spatial_axis=0), RandGaussianNoised("image", prob=1.0)])
    loader = DataLoader(Dataset(items, transform), batch_size=2, shuffle=True, num_workers=workers)
    evaluator = MaskedEvaluator("cpu", DataLoader(Dataset(items), batch_size=2), network, masker)
    objects = {"model": network, "masker": masker, "optimizer": optimizer, "masker_optimizer": masker_optimizer}
    trainer = MaskedTrainer(
        "cpu",
        epochs,
        loader,
        network,
        optimizer,
        masker,
        masker_optimizer=masker_optimizer,
        epoch_length=4,  # not the loader's length: an epoch's end must not leave half an iterator behind
        train_handlers=[
            EpochSeeds(seed, masker),
            *([ValidationHandler(1, evaluator)] if validate else []),
            Checkpoints(folder, objects, evaluator=evaluator, resume=resume, provenance={"method": "test"}),
        ],
    )
    if stop_after is not None:

        def stop():
            raise KeyboardInterrupt

        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop_after), stop)
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
    else:
        trainer.run()
    return network, masker


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            assert torch.equal(x, y), name


@pytest.mark.parametrize("workers", [0, 2])
def test_two_runs_with_one_seed_are_identical_and_another_seed_differs(tmp_path, workers):
    first, second = (run(tmp_path / name, 2, workers=workers) for name in "ab")
    assert_same(first, second)
    other = run(tmp_path / "c", 2, seed=1, workers=workers)
    assert not torch.equal(next(first[0].parameters()), next(other[0].parameters()))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_stopped_in_mid_epoch_and_resumed_ends_like_an_unbroken_one(tmp_path, workers):
    unbroken = run(tmp_path / "whole", 4, workers=workers)
    run(tmp_path / "broken", 4, stop_after=10, workers=workers)
    assert load_checkpoint(tmp_path / "broken" / "last.pt")["trainer"]["epoch"] == 2
    resumed = run(tmp_path / "broken", 4, resume=True, workers=workers, masker_seed=9)
    assert_same(unbroken, resumed)


LENGTH = 4  # of an epoch
SCHEDULES = {  # all that the bundles can build, by how many epochs there are
    "step": lambda optimizer, _: StepLR(optimizer, 3, 0.9),
    "cosine": lambda optimizer, epochs: CosineAnnealingLR(optimizer, epochs),
    "multistep": lambda optimizer, epochs: MultiStepLR(optimizer, [epochs * 3 // 4, epochs * 7 // 8], 0.33),
    "constant": lambda optimizer, _: ConstantLR(optimizer, 1.0),
    "warmup": lambda optimizer, epochs: WarmupCosineSchedule(
        optimizer, warmup_steps=epochs * LENGTH // 10, t_total=epochs * LENGTH, warmup_multiplier=0.01
    ),
}


def rates(folder, schedule, epochs, *, stop_after=None, resume=False, patients=()):
    """Train, and return both learning rates in every iteration."""
    network = torch.nn.Linear(1, 1)
    groups = [{"params": [network.weight], "lr": 0.1}, {"params": [network.bias], "lr": 0.01}]
    optimizer = torch.optim.Adam(groups)
    lr_scheduler = SCHEDULES[schedule](optimizer, epochs)
    objects = {"model": network, "optimizer": optimizer, "lr_scheduler": lr_scheduler}
    batches = [{"image": torch.ones(1, 1), "label": torch.ones(1, 1)}] * LENGTH
    handlers = [
        LrScheduleHandler(lr_scheduler, print_lr=False, epoch_level=schedule != "warmup"),
        Checkpoints(folder, objects, resume=resume, patients=patients),
    ]
    options = {"train_handlers": handlers, "decollate": False}
    trainer = SupervisedTrainer("cpu", epochs, batches, network, optimizer, torch.nn.MSELoss(), **options)
    seen = []
    trainer.add_event_handler(
        Events.ITERATION_STARTED, lambda: seen.append([group["lr"] for group in optimizer.param_groups])
    )
    if stop_after is not None:
        trainer.add_event_handler(Events.EPOCH_COMPLETED(once=stop_after), trainer.terminate)
    trainer.run()
    return seen


@pytest.mark.parametrize("before", [2, 9, 5], ids=["longer", "shorter", "as long"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_goes_on_as_in_a_run_that_had_the_new_number_of_epochs(tmp_path, caplog, schedule, before):
    unbroken = rates(tmp_path / "unbroken", schedule, 5)
    rates(tmp_path / "resumed", schedule, before, stop_after=2)
    caplog.clear()
    assert rates(tmp_path / "resumed", schedule, 5, resume=True) == unbroken[2 * LENGTH :]
    ends = [load_checkpoint(tmp_path / name / "last.pt") for name in ("unbroken", "resumed")]
    for part in ("lr_scheduler", "trainer"):
        assert str(ends[0][part]) == str(ends[1][part])
    assert ends[1]["trainer"]["max_epochs"] == 5
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    text = f"max_epochs was {before}, is 5: the learning rate follows the schedule of 5 epochs from here."
    assert said == ([] if before == 5 else [text])


def test_a_checkpoint_that_does_not_say_how_many_epochs_there_were_keeps_its_schedule(tmp_path, caplog):
    rates(tmp_path, "cosine", 2)
    content = load_checkpoint(tmp_path / "last.pt")
    del content["trainer"]["max_epochs"]
    torch.save(content, tmp_path / "last.pt")
    rates(tmp_path, "cosine", 3, resume=True)
    assert load_checkpoint(tmp_path / "last.pt")["lr_scheduler"]["T_max"] == 2
    assert "max_epochs" not in caplog.text


def test_other_patients_are_not_trained_on(tmp_path):
    rates(tmp_path, "step", 1, patients=["a", "b", "feedface"])
    before = (tmp_path / "last.pt").read_bytes()
    text = r"last\.pt: trained on 3 patients, now there are 4 to train on, 2 of them the same; .* another output_dir"
    with pytest.raises(ValueError, match=text):
        rates(tmp_path, "step", 2, resume=True, patients=["a", "d", "e", "feedface"])
    assert (tmp_path / "last.pt").read_bytes() == before and b"feedface" not in before  # who has it need not know
    assert json.loads((tmp_path / "patients.json").read_text()) == {"trained_on": ["a", "b", "feedface"]}


@pytest.mark.parametrize("before", [["a"], []])
def test_the_same_patients_are_trained_on_and_unknown_ones_too(tmp_path, before):
    rates(tmp_path, "step", 1, patients=before)
    assert len(rates(tmp_path, "step", 2, resume=True, patients=["a"])) == LENGTH


def test_the_best_of_another_key_metric_is_not_compared(tmp_path, caplog):
    run(tmp_path, 1, validate=True)
    content = load_checkpoint(tmp_path / "last.pt")
    torch.save(content | {"best": {"metric": 1e9, "epoch": 1, "name": "ssim"}}, tmp_path / "last.pt")
    run(tmp_path, 2, validate=True, resume=True)
    best = load_checkpoint(tmp_path / "last.pt")["best"]
    assert (best["name"], best["epoch"]) == ("random_psnr", 2) and best["metric"] < 1e9
    assert load_checkpoint(tmp_path / "model.pt")["trainer"]["epoch"] == 2
    assert "key metric was ssim, is random_psnr" in caplog.text


def test_a_checkpoint_of_something_else_is_not_resumed(tmp_path):
    """Such as weights that somebody has put there under that name."""
    rates(tmp_path, "step", 1)
    content = load_checkpoint(tmp_path / "last.pt")
    torch.save({name: content[name] for name in ("model", "optimizer", "lr_scheduler")}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"last\.pt: expected entries \['trainer', 'best'\], the checkpoint has"):
        rates(tmp_path, "step", 2, resume=True)


def test_resuming_without_a_checkpoint_starts_anew(tmp_path):
    assert_same(run(tmp_path / "a", 1), run(tmp_path / "b", 1, resume=True))


def test_checkpoints_hold_provenance_and_load_with_weights_only(tmp_path):
    run(tmp_path, 1, validate=True)
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    assert content["provenance"] == {"method": "test"}
    assert set(content) == {"model", "masker", "optimizer", "masker_optimizer", "trainer", "best", "provenance"}


def test_scale_of_float16_gradients_is_kept(tmp_path):
    def train(scale, **options):
        network, masker = ReconstructionUNet(2, backbone_args=SMALL), ActorCriticMasker(2, 8, 0.5)
        optimizer, batches = torch.optim.SGD(network.parameters(), 0.1), [{"image": torch.rand(1, 1, 16, 16)}]
        half = {"amp": True, "amp_kwargs": {"dtype": torch.float16}}
        handlers = [Checkpoints(tmp_path, {"model": network}, **options)]
        trainer = MaskedTrainer("cpu", 1, batches, network, optimizer, masker, train_handlers=handlers, **half)
        trainer.precision.scaler.load_state_dict(trainer.precision.scaler.state_dict() | {"scale": scale})
        trainer.run()
        return trainer.precision.scaler

    train(256.0)
    assert load_checkpoint(tmp_path / "last.pt")["scaler"]["scale"] == 256.0
    assert train(8.0, resume=True).get_scale() == 256.0


def test_the_old_checkpoint_survives_a_failed_write(tmp_path, monkeypatch):
    network = torch.nn.Linear(2, 2)
    path = save_checkpoint(tmp_path / "last.pt", {"model": network})
    before = path.read_bytes()

    def half(content, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, {"model": network})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize(
    ("cause", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"last\.pt: cannot be written \(No space left"),
        (KeyboardInterrupt(), ""),
    ],
)
def test_what_ended_a_write_is_told_and_the_old_checkpoint_stays(tmp_path, monkeypatch, cause, text):
    """torch.save tells of its own file, which was then left in mid-record."""
    path = save_checkpoint(tmp_path / "last.pt", {"model": torch.nn.Linear(2, 2)})
    before, save = path.read_bytes(), torch.save

    class Full:
        def __init__(self, file):
            self.file, self.left = file, 1000

        def write(self, data):
            self.left -= len(data)
            if self.left < 0:
                raise cause
            return self.file.write(data)

        def flush(self):
            pass

    monkeypatch.setattr(torch, "save", lambda content, file: save(content, Full(file)))
    with pytest.raises(type(cause), match=text):
        save_checkpoint(path, {"model": torch.nn.Linear(50, 50)})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["last.pt"]


def test_a_new_training_keeps_the_checkpoints_of_the_one_before(tmp_path, caplog):
    def saved(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    rates(tmp_path, "step", 3, patients=["a"])
    first = saved(tmp_path)
    rates(tmp_path, "step", 4, patients=["a"], resume=True)
    assert not (tmp_path / "previous").exists() and "previous" not in caplog.text
    resumed = saved(tmp_path)
    rates(tmp_path, "step", 2)
    assert saved(tmp_path / "previous") == resumed != first
    assert "holds another training, which this one does not resume" in caplog.text and "previous" in caplog.text
    assert set(saved(tmp_path)) == {"last.pt"}  # and nothing of the patients of the other
    second = saved(tmp_path)
    rates(tmp_path, "step", 1)
    assert saved(tmp_path / "previous") == second


def test_a_training_that_fails_before_it_saves_leaves_what_is_there(tmp_path):
    rates(tmp_path, "step", 1)
    before = (tmp_path / "last.pt").read_bytes()
    run(tmp_path, 1, stop_after=1)
    assert (tmp_path / "last.pt").read_bytes() == before and not (tmp_path / "previous").exists()


OTHER = """
import sys, time
from ahm_engines.files import lock_folder
lock_folder(sys.argv[1])
print("locked", flush=True)
time.sleep(600)
"""


def test_two_processes_do_not_train_into_one_folder_and_a_killed_one_keeps_nobody_out(tmp_path):
    rates(tmp_path, "step", 1)
    assert set(os.listdir(tmp_path)) == {"last.pt"}
    before = (tmp_path / "last.pt").read_bytes()
    with subprocess.Popen([sys.executable, "-c", OTHER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        for resume in (True, False):
            with pytest.raises(BlockingIOError, match=r"another process is at work in this folder, .* output_dir"):
                rates(tmp_path, "step", 2, resume=resume)
        other.kill()
    assert (tmp_path / "last.pt").read_bytes() == before
    assert len(rates(tmp_path, "step", 2, resume=True)) == LENGTH


def test_a_training_that_failed_does_not_keep_the_next_one_of_its_process_out(tmp_path):
    run(tmp_path, 1, stop_after=1)
    assert os.listdir(tmp_path) == [".lock"]
    run(tmp_path, 1)
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "model.pt"]


def test_without_locks_on_the_file_system_training_goes_on(tmp_path, monkeypatch):
    def none(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", none)
    assert len(rates(tmp_path, "step", 1)) == LENGTH


def test_whoever_resumes_with_other_settings_is_told(tmp_path, caplog):
    def train(**settings):
        network = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        batches = [{"image": torch.ones(1, 1), "label": torch.ones(1, 1)}]
        handler = Checkpoints(tmp_path, {"model": network}, resume=True, provenance={"settings": settings})
        options = {"train_handlers": [handler], "decollate": False}
        SupervisedTrainer("cpu", 1, batches, network, optimizer, torch.nn.MSELoss(), **options).run()

    train(patch_size=4, masker="a3c")
    train(patch_size=4, masker="a3c")
    assert "settings" not in caplog.text
    train(patch_size=8, masker="a3c")
    assert "last.pt: resumed with other settings: patch_size was 4, is 8." in caplog.text


def test_a_checkpoint_of_another_architecture_is_refused_and_nothing_is_loaded(tmp_path):
    path = save_checkpoint(tmp_path / "model.pt", {"model": torch.nn.Linear(2, 3)})
    other = torch.nn.Linear(2, 4)
    before = other.weight.clone()
    with pytest.raises(ValueError, match=r"model\.pt: 'model' was saved from another architecture") as error:
        load_checkpoint(path, {"model": other})
    assert "weight (3, 2) instead of (4, 2)" in str(error.value)
    assert torch.equal(other.weight, before)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 half of one"])
def test_damaged_files_are_named(tmp_path, content):
    path = tmp_path / "last.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"last\.pt: not a readable checkpoint"):
        load_checkpoint(path)


def test_a_file_that_holds_something_else_is_named(tmp_path):
    torch.save(torch.ones(2), tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"last\.pt: expected a checkpoint, a dictionary, got Tensor"):
        load_checkpoint(tmp_path / "last.pt")


def test_a_compiled_network_is_saved_and_loaded_by_its_own_names(tmp_path):
    network, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    path = save_checkpoint(tmp_path / "model.pt", {"model": torch.compile(network)})
    assert list(load_checkpoint(path)["model"]) == ["weight", "bias"]
    load_checkpoint(path, {"model": torch.compile(other)})
    assert torch.equal(other.weight, network.weight)


def test_missing_files_and_entries_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.pt")
    path = save_checkpoint(tmp_path / "model.pt", {"model": torch.nn.Linear(1, 1)})
    with pytest.raises(ValueError, match=r"expected entries \['masker'\], the checkpoint has \['model'\]"):
        load_checkpoint(path, {"masker": torch.nn.Linear(1, 1)})


def test_an_output_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot write to this output folder"):
        Checkpoints(tmp_path / "file" / "models", {})


def test_persistent_workers_are_refused():
    loader = torch.utils.data.DataLoader([1], num_workers=1, persistent_workers=True)
    network = ReconstructionUNet(2, backbone_args=SMALL)
    with pytest.raises(ValueError, match="persistent_workers"):
        MaskedTrainer(
            "cpu",
            1,
            loader,
            network,
            torch.optim.Adam(network.parameters()),
            ActorCriticMasker(2, 8, 0.5),
            train_handlers=[EpochSeeds(0)],
        )
