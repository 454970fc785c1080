# SPDX-License-Identifier: Apache-2.0
"""What MONAI's tools and the model zoo expect of a bundle."""

from __future__ import annotations

import configparser
import json
from importlib.metadata import version
from typing import Any

import pytest
from monai.bundle import ConfigWorkflow, verify_net_in_out

from tests.bundles.running import BUNDLE, CONFIGS, SHELF, TINY_NET

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


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((CONFIGS / name).read_text())
    return content


@pytest.mark.parametrize(
    "name",
    [
        "LICENSE",
        "configs/metadata.json",
        "configs/train.json",
        "configs/inference.json",
        "configs/evaluate.json",
        "configs/multi_gpu_train.json",
        "configs/logging.conf",
        "docs/README.md",
        "docs/data_license.txt",
    ],
)
def test_file_is_there_and_not_empty(name: str) -> None:
    assert (BUNDLE / name).read_text().strip()


def test_readme_has_the_sections_of_the_zoo() -> None:
    lines = (BUNDLE / "docs/README.md").read_text().lower().splitlines()
    headings = [line.lstrip("# ").strip() for line in lines if line.startswith("#")]
    missing = [section for section in README_SECTIONS if section.lower() not in headings]
    assert not missing


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.json")))
def test_config_stands_alone(name: str) -> None:
    text = (CONFIGS / name).read_text()
    assert json.loads(text)
    assert ".json::" not in text  # would be looked for in the working directory


def test_logging_conf_parses() -> None:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(CONFIGS / "logging.conf")
    assert "handlers" in parser["logger_root"]


def test_metadata_is_complete_and_fits_the_package() -> None:
    metadata = read("metadata.json")
    assert not [field for field in METADATA_FIELDS.split() if field not in metadata]
    assert metadata["version"] in metadata["changelog"]
    assert metadata["version"] == version("monai-ahm")
    assert metadata["monai_version"] == version("monai")


def test_metadata_names_packages_that_are_installed() -> None:
    for package in read("metadata.json")["required_packages_version"]:
        assert version(package)


def test_train_config_is_one_readable_file() -> None:
    assert len((CONFIGS / "train.json").read_text().splitlines()) < 130
    config = read("train.json")
    assert config["training"] == "%run"
    assert isinstance(config["run"], list)
    assert isinstance(config["train"]["handlers"], list)


def test_train_and_inference_have_the_same_shelf() -> None:
    train, inference = read("train.json"), read("inference.json")
    assert tuple(train["maskers"]) == SHELF
    for key in ("maskers", "masker", "network_def"):
        assert train[key] == inference[key]


@pytest.mark.parametrize(
    "key", ["crop_size", "patch_size", "mask_ratio", "foreground_threshold", "window_hu", "modality"]
)
def test_train_and_inference_agree_on_defaults(key: str) -> None:
    assert read("train.json")[key] == read("inference.json")[key]


@pytest.mark.parametrize(("name", "kind"), [("train.json", "train"), ("inference.json", "infer")])
def test_workflow_has_every_property_that_monai_asks_for(name: str, kind: str) -> None:
    workflow = ConfigWorkflow(
        config_file=str(CONFIGS / name),
        meta_file=str(CONFIGS / "metadata.json"),
        logging_file=False,
        workflow_type=kind,
        load_pretrain=False,  # an option of the inference config; the other does not look at it
    )
    workflow.initialize()
    assert workflow.check_properties() == []


@pytest.mark.parametrize("name", ["train.json", "inference.json"])
def test_network_takes_and_gives_what_the_metadata_says(name: str) -> None:
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(CONFIGS / "metadata.json"),
        config_file=str(CONFIGS / name),
        **TINY_NET,
    )
