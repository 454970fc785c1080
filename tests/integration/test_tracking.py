# SPDX-License-Identifier: Apache-2.0
"""`--tracking mlflow` with training, evaluation and inference of every bundle: what arrives, and what must not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigWorkflow
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ahm_engines.handlers import local_tracking_uri, tracking
from tests.bundles.ahm_classification import classifying
from tests.bundles.ahm_segmentation import segmenting
from tests.bundles.running import BUNDLES, CLASSIFICATION, PRETRAIN, SEGMENTATION, TINY, run_bundle, write_cases

SECRET = "Doe_Jane_1970"
LONGER = {"max_epochs": 2, "min_epoch_length": 12, "val_interval": 1}
WRITE: dict[Path, Callable[[Path], Path]] = {
    PRETRAIN: write_cases,
    SEGMENTATION: segmenting.write_labelled,
    CLASSIFICATION: classifying.write_volumes,
}
SETTINGS: dict[Path, dict[str, Any]] = {
    PRETRAIN: {**TINY, **LONGER},
    SEGMENTATION: {**segmenting.TINY, **LONGER, "classes": ["box", "slab (T2)"]},
    CLASSIFICATION: {**classifying.TINY, **LONGER},
}
# groups of the metrics of an evaluation, and one of them
EVALUATED = {
    PRETRAIN: ("validation", "random_psnr"),
    SEGMENTATION: ("test", "dice_slab _T2_"),
    CLASSIFICATION: ("test", "macro_f1"),
}
SENT_CASES = (b"scan0", b"rows_0")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the database of all runs, which stands for a server elsewhere."""
    pytest.importorskip("mlflow", reason="MLflow is not installed: pip install 'monai-ahm[mlflow]'")
    return tmp_path_factory.mktemp("server")


def run(server: Path, bundle: Path, files: list[str], kind: str, **options: Any) -> ConfigWorkflow:
    address = f"sqlite:///{server}/mlruns.db"
    return run_bundle(files, kind, bundle=bundle, tracking="mlflow", tracking_uri=address, **options)


def runs_of(server: Path, experiment: str) -> dict[str, Any]:
    """Runs by the first word of their names, and a client to ask for more."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{server}/mlruns.db")
    known = client.search_runs(client.get_experiment_by_name(experiment).experiment_id)
    return {"client": client, **{run.info.run_name.split("_")[0].split(" ")[0]: run for run in known}}


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda bundle: bundle.name)
def test_training_evaluation_and_inference_are_tracked(bundle: Path, server: Path, tmp_path: Path) -> None:
    data, output = WRITE[bundle](tmp_path / SECRET / "data"), tmp_path / SECRET / "run"
    options = {**SETTINGS[bundle], "dataset_dir": str(data), "ckpt_dir": str(output)}
    options["output_dir"] = f"$'{output}'"  # an expression: of those MONAI would send the whole configuration
    workflow = run(server, bundle, ["train.json"], "train", **options)
    assert [handler["_target_"] for handler in workflow.parser.get("train#handlers")][-1] == "MLFlowHandler"
    run(server, bundle, ["train.json", "evaluate.json"], "train", **options)
    given = {"dataset_dir": str(data), "output_dir": str(output / "out"), "checkpoint": str(output / "model.pt")}
    run(server, bundle, ["inference.json"], "infer", **given)

    runs = runs_of(server, bundle.name)
    client, training, evaluation = (runs.pop(name) for name in ("client", "training", "evaluation"))
    inferences = runs_of(server, f"{bundle.name}_inference")
    assert not runs and {one.info.status for one in (training, evaluation, inferences["run"])} == {"FINISHED"}

    curves = EventAccumulator(str(output / "tensorboard")).Reload()
    written = {
        tracking.FORBIDDEN.sub("_", name) for name in curves.Tags()["scalars"] if not name.startswith("masking/")
    }
    rates = {name for name in training.data.metrics if name.startswith("lr_group")}
    assert rates and training.data.metrics.keys() - rates == written
    losses = client.get_metric_history(training.info.run_id, "train/loss")
    assert [point.step for point in losses] == [10, 20]
    assert [point.value for point in losses] == pytest.approx([event.value for event in curves.Scalars("train/loss")])
    group, metric = EVALUATED[bundle]
    assert f"{group}/{metric}" in evaluation.data.metrics
    assert {name.split("/")[0] for name in evaluation.data.metrics} == {group}
    for one in (training, evaluation):
        assert one.data.params["seed"] == "0" and one.data.params["task"] in ("pretraining", bundle.name[4:])
        assert [file.path for file in client.list_artifacts(one.info.run_id)] == ["run_record.json"]
    sent = [path for path in server.rglob("*") if path.is_file()]
    leaks = [path.name for path in sent for word in (SECRET.encode(), *SENT_CASES) if word in path.read_bytes()]
    assert not leaks


def test_without_mlflow_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    message = segmenting.message_of(
        segmenting.train, segmenting.write_labelled(tmp_path / "data"), tmp_path / "run", tracking="mlflow"
    )
    assert "pip install 'monai-ahm[mlflow]'" in message


def test_runs_are_kept_in_the_output_folder_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: object())
    monkeypatch.chdir(tmp_path)
    assert local_tracking_uri("runs") == f"sqlite:///{tmp_path}/runs/mlruns.db"
