# SPDX-License-Identifier: Apache-2.0
"""Three rounds of federated learning by MONAI's own client, over two sites with data of their own."""

from __future__ import annotations

import importlib.util
import json
import runpy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from monai.bundle import ConfigParser
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems, FlStatistics, ModelType
from monai.fl.utils.exchange_object import ExchangeObject
from torch import Tensor

from tests.bundles.ahm_segmentation.segmenting import TINY as TINY_SEGMENTATION
from tests.bundles.ahm_segmentation.segmenting import planted, write_case
from tests.bundles.running import BUNDLES, ROOT, TINY, assert_same_state

SITES = ("site-1", "site-2")
ROUNDS, STEPS = 3, 10
SHARED: dict[str, Any] = {"max_epochs": ROUNDS, "min_epoch_length": STEPS, "val_interval": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "ahm_pretrain": {**TINY, **SHARED, "learning_rate": 0.005, "masker_learning_rate": 0.01, "warm_up": 0.0},
    "ahm_segmentation": {**TINY_SEGMENTATION, **SHARED, "learning_rate": 0.01, "schedule": "cosine"},
}
KEY_METRIC = {"ahm_pretrain": "random_psnr", "ahm_segmentation": "dice"}
BEST = {"ahm_pretrain": "runs/pretrain/models/model.pt", "ahm_segmentation": "models/model.pt"}
Weights = dict[str, Tensor]


class Federation(NamedTuple):
    """What was seen in three rounds: the global model and, by site, its scores, untrained first; the sites' weights."""

    clients: list[MonaiAlgo]
    weights: list[Weights]
    scores: list[list[dict[str, Any]]]
    local: list[list[Weights]]
    progress: list[float]


def site(folder: Path, bundle: str, number: int) -> Path:
    """Provision a site with the bundle, the federation's settings and scans that the other site has not."""
    for scan in range(6 * number, 6 * number + 6):
        write_case(folder / "data", f"scan{scan}", planted(scan + number) * (1 + number))
    source = next(path for path in BUNDLES if path.name == bundle)
    shutil.copytree(source / "configs", folder / bundle / "configs")
    options = {**SETTINGS[bundle], "dataset_dir": str(folder / "data/images")}
    if bundle == "ahm_segmentation":
        options["label_values"] = [1 + number, 2 * (1 + number)]
    (folder / bundle / "configs/federated.json").write_text(json.dumps(options))
    return folder


def client(folder: Path, bundle: str, *, differences: bool) -> MonaiAlgo:
    """Start MONAI's client as `docs/federated.md` says."""
    algorithm = MonaiAlgo(
        bundle,
        local_epochs=1,
        send_weight_diff=differences,
        config_train_filename=["configs/train.json", "configs/federated.json"],
        config_evaluate_filename=["configs/train.json", "configs/evaluate.json", "configs/federated.json"],
        best_model_filepath=BEST[bundle],
    )
    algorithm.initialize({ExtraItems.CLIENT_NAME: folder.name, ExtraItems.APP_ROOT: str(folder)})
    return algorithm


def copied(weights: Mapping[str, Tensor]) -> Weights:
    return {name: value.detach().clone() for name, value in weights.items()}


def evaluated(clients: list[MonaiAlgo], weights: Weights) -> list[dict[str, Any]]:
    return [dict(client.evaluate(ExchangeObject(weights=copied(weights))).metrics) for client in clients]


def trained(client: MonaiAlgo, weights: Weights) -> Weights:
    """Train a round, and return the site's weights; the server adds differences to those that it has sent."""
    client.train(ExchangeObject(weights=copied(weights)))
    sent = client.get_weights()
    assert sent.statistics[FlStatistics.NUM_EXECUTED_ITERATIONS] == STEPS
    return {name: value + weights[name] if client.send_weight_diff else value for name, value in sent.weights.items()}


def federate(folder: Path, bundle: str, *, differences: bool) -> Federation:
    """Federated averaging."""
    folders = [site(folder / name, bundle, number) for number, name in enumerate(SITES)]
    clients = [client(path, bundle, differences=differences) for path in folders]
    weights = [copied(clients[0].trainer.network.state_dict())]
    run = Federation(clients, weights, [evaluated(clients, weights[0])], [], [])
    for _ in range(ROUNDS):
        run.local.append([copied(trained(client, weights[-1])) for client in clients])
        weights.append({name: torch.stack([site[name] for site in run.local[-1]]).mean(0) for name in weights[-1]})
        run.scores.append(evaluated(clients, weights[-1]))
        run.progress.append(getattr(clients[0].trainer, "progress", 0.0))
    return run


@pytest.fixture(scope="module", params=["ahm_pretrain", "ahm_segmentation"])
def federation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Federation]:
    bundle = str(request.param)
    differences = bundle == "ahm_segmentation"  # MONAI's default, and the other way too
    return bundle, federate(tmp_path_factory.mktemp(bundle), bundle, differences=differences)


def test_global_model_gets_better_on_every_site(federation: tuple[str, Federation]) -> None:
    bundle, run = federation
    scores = [[site[KEY_METRIC[bundle]] for site in by_site] for by_site in run.scores]
    print(f"{bundle}: {KEY_METRIC[bundle]} of the global model by round and site: {scores}")
    assert len(scores) == ROUNDS + 1
    assert all(last > first for first, last in zip(scores[0], scores[-1], strict=True))
    assert all(first != second for first, second in scores)  # every site scores on scans of its own


def test_sites_hold_the_same_weights_after_aggregation_and_others_before(federation: tuple[str, Federation]) -> None:
    _, run = federation
    for client in run.clients:
        assert_same_state(client.evaluator.network.state_dict(), run.weights[-1])
    for weights, (first, second) in zip(run.weights[:-1], run.local, strict=True):
        for name in weights:
            assert not torch.equal(first[name], second[name]), name
            assert not torch.equal(first[name], weights[name]), name


def test_a_round_starts_from_the_weights_that_it_was_sent(federation: tuple[str, Federation]) -> None:
    """Nothing of the site's own last round is left in the network, nor are old weights loaded again."""
    _, run = federation
    client = run.clients[0]
    for group in client.trainer.optimizer.param_groups:
        group |= {"lr": 0.0, "weight_decay": 0.0}
    scheduler = client.train_workflow.parser.get_parsed_content("lr_scheduler")
    scheduler.base_lrs = [0.0] * len(scheduler.base_lrs)
    client.train(ExchangeObject(weights=copied(run.weights[-1])))
    assert_same_state(client.trainer.network.state_dict(), run.weights[-1])


def test_rounds_are_parts_of_one_training(federation: tuple[str, Federation]) -> None:
    """Epochs, learning rate and the masker's schedule go on from round to round, checkpoints can be asked for."""
    bundle, run = federation
    client = run.clients[1]
    assert (client.trainer.state.epoch, client.trainer.state.iteration) == (ROUNDS, ROUNDS * STEPS)
    rate = client.trainer.optimizer.param_groups[0]["lr"]
    assert rate < 0.01 * SETTINGS[bundle]["learning_rate"]
    best = client.get_weights({ExtraItems.MODEL_TYPE: ModelType.BEST_MODEL}).weights
    assert best.keys() == run.weights[-1].keys()


@pytest.mark.parametrize("federation", ["ahm_pretrain"], indirect=True)
def test_maskers_stay_on_their_sites_and_their_schedule_spans_all_rounds(federation: tuple[str, Federation]) -> None:
    _, run = federation
    first, second = (dict(client.trainer.masker.named_parameters()) for client in run.clients)
    assert not first.keys() & run.weights[-1].keys()
    assert not any(torch.equal(weight, second[name]) for name, weight in first.items() if name.endswith("weight"))
    ends = [(STEPS * number - 1) / (STEPS * ROUNDS) for number in range(1, ROUNDS + 1)]
    assert run.progress == pytest.approx(ends)


@pytest.mark.parametrize("federation", ["ahm_segmentation"], indirect=True)
def test_evaluation_takes_the_settings_of_the_federation(federation: tuple[str, Federation]) -> None:
    _, run = federation
    assert {"dice_box", "dice_slab"} <= run.scores[0][0].keys()


def job_of(bundle: str, folder: Path, **settings: Any) -> Path:
    """Assemble the NVFlare job of the documentation."""
    source = next(path for path in BUNDLES if path.name == bundle)
    make_job = runpy.run_path(str(ROOT / "docs/nvflare/make_job.py"))["make_job"]
    make_job(source, settings, folder / "job", rounds=5, local_epochs=2, clients=2)
    return folder / "job"


def resolved(path: Path) -> dict[str, Any]:
    """NVFlare's configuration with the values of its variables put in."""
    content = json.loads(path.read_text())
    variables = {f"{{{name}}}": value for name, value in content.items() if isinstance(value, (str, int))}

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: fill(item) for name, item in value.items()}
        if isinstance(value, list):
            return [fill(item) for item in value]
        if isinstance(value, str) and value.startswith("{"):
            return variables[value]
        return value

    filled: dict[str, Any] = fill({name: value for name, value in content.items() if isinstance(value, list)})
    return filled


@pytest.mark.parametrize("bundle", ["ahm_pretrain", "ahm_segmentation"])
def test_nvflares_client_and_server_find_one_network_in_the_job(
    bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server reads `train.json` alone, the client both files; where the scans are, each site's variable tells."""
    site(tmp_path / "site-1", bundle, 0)
    monkeypatch.setenv("AHM_SITES", str(tmp_path))
    options = {"ahm_pretrain": "pretraining.json", "ahm_segmentation": "segmentation.json"}
    documented = json.loads((ROOT / "docs/nvflare" / options[bundle]).read_text())
    place = documented["dataset_dir"].replace("'images'", "'data', 'images'")
    job = job_of(bundle, tmp_path, **{**documented, **SETTINGS[bundle], "dataset_dir": place})

    arguments = resolved(job / "app/config/config_fed_client.json")["components"][0]["args"]
    client = MonaiAlgo(**arguments)
    client.initialize({ExtraItems.CLIENT_NAME: "site-1", ExtraItems.APP_ROOT: str(job / "app")})
    assert client.local_epochs == 2
    assert client.train_workflow.parser.get_parsed_content("max_epochs") == 10  # what schedules span
    server = resolved(job / "app/config/config_fed_server.json")
    persistor = next(part["args"] for part in server["components"] if part["id"] == "persistor")
    parser = ConfigParser()
    parser.read_config(job / "app" / persistor["bundle_root"] / "configs/train.json")
    weights = parser.get_parsed_content("network_def").state_dict()
    score = client.evaluate(ExchangeObject(weights=weights)).metrics
    assert KEY_METRIC[bundle] in score


def test_the_jobs_parts_refer_to_each_other(tmp_path: Path) -> None:
    job = job_of("ahm_segmentation", tmp_path)
    assert json.loads((job / "meta.json").read_text())["min_clients"] == 2
    for name in ("client", "server"):
        content = resolved(job / f"app/config/config_fed_{name}.json")
        ids = {part["id"] for part in content["components"]}
        users = [
            *content["components"],
            *content.get("workflows", []),
            *(e["executor"] for e in content.get("executors", [])),
        ]
        for part in users:
            assert {value for key, value in part["args"].items() if key.endswith("_id")} <= ids
            if importlib.util.find_spec("monai_nvflare") is not None:
                module, _, attribute = part["path"].rpartition(".")
                assert hasattr(importlib.import_module(module), attribute)
