# SPDX-License-Identifier: Apache-2.0
"""What MONAI's tools and the model zoo expect of a bundle."""

from __future__ import annotations

import configparser
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import verify_net_in_out

from tests.bundles.running import (
    BUNDLES,
    CLASSIFICATION,
    PRETRAIN,
    SEGMENTATION,
    SHELF,
    TINY_NET,
    TINY_UNET,
    read_bundle,
)

METADATA_FIELDS = (  # those of schema 20240725, and what the zoo adds
    "schema version monai_version pytorch_version numpy_version required_packages_version task description authors "
    "copyright network_data_format changelog name data_source data_type image_classes label_classes pred_classes "
    "eval_metrics intended_use references supported_apps"
)
README_SECTIONS = (
    "Overview",
    "Data",
    "Training configuration",
    "Input",
    "Output",
    "Performance",
    "Bundle commands",
    "References",
    "License",
)


FILES = (
    "LICENSE",
    "configs/metadata.json",
    "configs/train.json",
    "configs/inference.json",
    "configs/evaluate.json",
    "configs/multi_gpu_train.json",
    "configs/multi_gpu_evaluate.json",
    "configs/inference_trt.json",
    "configs/logging.conf",
    "docs/README.md",
    "docs/data_license.txt",
)
TINY = {
    PRETRAIN: TINY_NET,
    SEGMENTATION: TINY_NET,
    CLASSIFICATION: {"architecture_args": {"backbone_args": TINY_UNET}},
}
every_bundle = pytest.mark.parametrize("bundle", BUNDLES, ids=lambda bundle: bundle.name)


def read(bundle: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((bundle / "configs" / name).read_text())
    return content


@every_bundle
@pytest.mark.parametrize("name", FILES)
def test_file_is_there_and_not_empty(bundle: Path, name: str) -> None:
    assert (bundle / name).read_text().strip()


@every_bundle
def test_readme_has_the_sections_of_the_zoo(bundle: Path) -> None:
    lines = (bundle / "docs/README.md").read_text().lower().splitlines()
    headings = [line.lstrip("# ").strip() for line in lines if line.startswith("#")]
    missing = [section for section in README_SECTIONS if section.lower() not in headings]
    assert not missing


@every_bundle
def test_configs_stand_alone(bundle: Path) -> None:
    for path in (bundle / "configs").glob("*.json"):
        text = path.read_text()
        assert json.loads(text), path.name
        assert ".json::" not in text, path.name  # would be looked for in the working directory


@every_bundle
def test_logging_conf_parses(bundle: Path) -> None:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(bundle / "configs" / "logging.conf")
    assert "handlers" in parser["logger_root"]


@every_bundle
def test_metadata_is_complete_and_fits_the_package(bundle: Path) -> None:
    metadata = read(bundle, "metadata.json")
    assert not [field for field in METADATA_FIELDS.split() if field not in metadata]
    assert metadata["version"] in metadata["changelog"]
    assert metadata["version"] == version("monai-ahm")
    assert metadata["monai_version"] == version("monai")


@every_bundle
def test_metadata_names_packages_that_are_installed(bundle: Path) -> None:
    for package in read(bundle, "metadata.json")["required_packages_version"]:
        assert version(package)


@every_bundle
def test_train_config_is_one_readable_file(bundle: Path) -> None:
    assert len((bundle / "configs" / "train.json").read_text().splitlines()) < 130
    config = read(bundle, "train.json")
    assert config["training"] == "%run"
    assert isinstance(config["run"], list)
    assert isinstance(config["train"]["handlers"], list)


def test_train_and_inference_have_the_same_shelves() -> None:
    train, inference = read(PRETRAIN, "train.json"), read(PRETRAIN, "inference.json")
    assert tuple(train["maskers"]) == tuple(inference["maskers"]) == SHELF
    for name, entry in inference["maskers"].items():
        assert entry.items() <= train["maskers"][name].items(), name  # training adds what only matters there
    for key in ("architectures", "network_def", "q_patch_size"):
        assert train[key] == inference[key]


@every_bundle
def test_inference_without_a_checkpoint_has_the_defaults_of_training(bundle: Path, tmp_path: Path) -> None:
    """And what the metadata say: whoever reads the bundle before anything is trained sees one and the same network."""
    train = read_bundle("train.json", bundle=bundle, output_dir=str(tmp_path)).parser
    inference = read_bundle(
        "inference.json", "infer", bundle=bundle, load_pretrain=False, output_dir=str(tmp_path)
    ).parser
    settings = train.get_parsed_content("settings")
    for key in settings.keys() & inference.get().keys():
        assert inference.get_parsed_content(key) == settings[key], key
    if bundle == PRETRAIN:
        return
    outputs = read(bundle, "metadata.json")["network_data_format"]["outputs"]["pred"]["channel_def"]
    assert [name for name in outputs.values() if name != "background"] == settings["classes"]


@every_bundle
@pytest.mark.parametrize(("name", "kind"), [("train.json", "train"), ("inference.json", "infer")])
def test_workflow_has_every_property_that_monai_asks_for(bundle: Path, name: str, kind: str, tmp_path: Path) -> None:
    option: dict[str, Any] = {"load_pretrain": False} if kind == "infer" else {}
    option["output_dir"] = str(tmp_path)
    assert read_bundle(name, kind, bundle=bundle, **option).check_properties() == []


@every_bundle
@pytest.mark.parametrize("name", ["train.json", "inference.json"])
def test_network_takes_and_gives_what_the_metadata_says(bundle: Path, name: str) -> None:
    option: dict[str, Any] = {"load_pretrain": False} if name == "inference.json" else {}
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(bundle / "configs" / "metadata.json"),
        config_file=str(bundle / "configs" / name),
        **TINY[bundle],
        **option,
    )
