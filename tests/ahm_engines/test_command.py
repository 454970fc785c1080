# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigParser, run

from ahm_engines.command import begin_command, unused_options
from ahm_engines.errors import behind_monai
from tests.bundles.running import BUNDLES, PRETRAIN, ROOT, command, finish, read_bundle, start

NOTHING: dict[str, Any] = {"nothing": ["$None"], "logging_file": False}  # logging is set up for all tests otherwise


def config_of(bundle: Path, *files: str) -> dict[str, Any]:
    parser = ConfigParser()
    parser.read_config([str(bundle / "configs" / name) for name in files])
    return dict(parser.get())


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("mask_ration", "; did you mean mask_ratio?"),
        ("dataset_dirr", "; did you mean dataset_dir?"),
        ("xyz", "."),
        ("train#max_epochs", "; did you mean max_epochs?"),
        ("validate::datasett", "; did you mean validate#dataset?"),
    ],
)
def test_an_option_that_nothing_uses_stops_the_command(option: str, meant: str) -> None:
    with pytest.raises(RuntimeError) as error:
        run("nothing", config_file=str(PRETRAIN / "configs/train.json"), **NOTHING, **{option: 1})
    assert str(behind_monai(error.value)) == (
        f"--{option}: nothing in these configuration files uses such an option{meant}"
    )


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_an_option_in_a_file_that_nothing_uses_stops_the_command(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"args.{suffix}"  # YAML takes JSON
    file.write_text(json.dumps({"max_epochs": 3, "max_epoch": 4}))
    with pytest.raises(RuntimeError) as error:
        run("nothing", config_file=str(PRETRAIN / "configs/train.json"), args_file=str(file), **NOTHING)
    assert str(behind_monai(error.value)) == (
        f"{file}: max_epoch: nothing in these configuration files uses such an option; did you mean max_epochs?"
    )


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("learning_rate", "abc", "expected a number, got 'abc'."),
        ("max_epochs", "3x", "expected a number, got '3x'."),
        ("resume", "maybe", "expected true or false, got 'maybe'."),
        ("policy_share", "0,5-0,7", "expected a list, got '0,5-0,7'."),
        ("backbone_args", "{'channels': [4, 8]", "expected a dictionary, got \"{'channels': [4, 8]\"."),
        ("val_interval", None, "MONAI passes over None, so that it would stay as it is; write '$None'."),
    ],
)
def test_a_value_that_cannot_be_meant_stops_the_command(option: str, value: str | None, told: str) -> None:
    with pytest.raises(RuntimeError) as error:
        run("nothing", config_file=str(PRETRAIN / "configs/train.json"), **NOTHING, **{option: value})
    assert str(behind_monai(error.value)) == f"--{option}: {told}"


def test_a_value_in_a_file_that_cannot_be_meant_stops_the_command(tmp_path: Path) -> None:
    file = tmp_path / "args.json"
    file.write_text(json.dumps({"config_file": str(PRETRAIN / "configs/train.json"), "max_epochs": "3 epochs"}))
    with pytest.raises(RuntimeError) as error:
        run("nothing", args_file=str(file), **NOTHING)
    assert str(behind_monai(error.value)) == f"{file}: max_epochs: expected a number, got '3 epochs'."


def test_expressions_and_what_may_be_text_are_taken() -> None:
    values = {"val_interval": "$None", "max_epochs": "@val_interval", "resume": "YES", "skip_bad": 1, "amp": "no"}
    values |= {"dataset_dir": "scans", "modality": "ct", "labels_dir": None, "policy_share": "$[0, 1]"}
    run("nothing", config_file=str(PRETRAIN / "configs/train.json"), **NOTHING, **values)


def test_a_file_may_hold_all_that_a_command_takes(tmp_path: Path) -> None:
    file = tmp_path / "args.json"
    own = {"config_file": str(PRETRAIN / "configs/train.json"), "workflow_type": "train", "tracking": None}
    file.write_text(json.dumps({"run_id": "nothing", **NOTHING, **own, "train#trainer#max_epochs": 3}))
    run(args_file=str(file), max_epochs=2, workflow_type="train")


def test_options_that_are_used_and_entries_of_ones_own_are_not_refused() -> None:
    own = {"my_ratio": 0.3, "mask_ratio": "@my_ratio", "train#trainer#max_epochs": 3, "tracking_uri": "x"}
    own |= {"train::dataset::cache_rate": 0.5, "train#handlers#-1#_disabled_": True, "validate": {}}
    run("nothing", config_file=str(PRETRAIN / "configs/train.json"), **NOTHING, **own)


def test_workflows_in_python_may_have_any_entry() -> None:
    begin_command()
    read_bundle("train.json", my_own=3).finalize()


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda bundle: bundle.name)
@pytest.mark.parametrize("name", ["train.json", "inference.json"])
def test_every_entry_of_the_files_is_used(bundle: Path, name: str) -> None:
    config = config_of(bundle, name)
    assert "train" not in config or "masker" in config or "pretrained" in config  # the files were read
    assert unused_options(config.keys() - {"_meta_"}, config) == []


def test_an_option_of_another_configuration_is_unused() -> None:
    training, inference = (config_of(BUNDLES[1], name) for name in ("train.json", "inference.json"))
    assert unused_options(["checkpoint", "pretrained"], training) == ["checkpoint"]
    assert unused_options(["checkpoint", "pretrained"], inference) == ["pretrained"]
    contrastive = config_of(PRETRAIN, "train.json", "contrastive.json")
    assert unused_options(["masker_learning_rate", "learning_rate"], contrastive) == ["masker_learning_rate"]


def test_the_last_line_of_an_error_is_what_went_wrong() -> None:
    process = start(command({"dataset_dir": "/nowhere"}))
    with pytest.raises(AssertionError) as error:
        finish(process)
    text = str(error.value).rstrip()
    assert "Traceback" in text and "Failed to evaluate" in text
    assert text.splitlines()[-1] == "FileNotFoundError: dataset_dir /nowhere is not a folder."


def test_only_what_monai_wraps_is_unwrapped() -> None:
    inner = ValueError("inner")
    outer = RuntimeError("outer")
    outer.__cause__ = inner
    wrapper = RuntimeError("Failed to evaluate it")
    wrapper.__cause__ = outer
    assert behind_monai(wrapper) is outer and behind_monai(inner) is inner


def documented_commands() -> list[tuple[str, list[str]]]:
    """Words after ``monai.bundle run`` of every command in a block of the documentation, with its file."""
    found = []
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("bundles/*/docs/*.md"))]
    for page in [*pages, ROOT / "examples/README.md"]:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if "monai.bundle run" in line and not line.lstrip().startswith("#"):
                    words = shlex.split(re.sub(r"\s#.*", "", line))
                    found.append((page.name, words[words.index("monai.bundle") + 2 :]))
    return found


def options_of(words: Sequence[str]) -> dict[str, str]:
    names = [index for index, word in enumerate(words) if word.startswith("--")]
    return {words[index][2:]: words[index + 1] for index in names}


def test_commands_in_the_documentation_have_options_that_are_used() -> None:
    checked = 0
    for page, words in documented_commands():
        options = options_of(words)
        files = options.pop("config_file")
        names = json.loads(files.replace("'", '"')) if files.startswith("[") else [files]
        if not all((ROOT / name).is_file() for name in names):  # relative to another folder
            continue
        checked += 1
        parser = ConfigParser()
        parser.read_config([str(ROOT / name) for name in names])
        parser.update({name: value for name, value in options.items() if name not in ("tracking", "meta_file")})
        given = [name for name in options if name not in ("tracking", "meta_file", "run_id", "logging_file")]
        assert unused_options(given, parser.get()) == [], (page, words)
    assert checked > 50
