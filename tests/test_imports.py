# SPDX-License-Identifier: Apache-2.0
"""Imports run one way, nothing needs torchvision, and the public names stay."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("ahm_transforms", "ahm_networks", "ahm_engines")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
ALL_FILES = [*FILES, *sorted((ROOT / "benchmarks").rglob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))]

FORBIDDEN = {  # part of the project -> what it must not import
    "ahm_transforms": ("ahm_networks", "ahm_engines"),
    "ahm_networks": ("ahm_engines",),
    "ahm_networks/rl": ("ahm_networks.nets", "ahm_networks.maskers", "ahm_transforms"),
    "ahm_networks/nets": ("ahm_networks.rl", "ahm_networks.maskers"),
    "": ("torchvision", "bundles", "benchmarks", "tests"),
}
MASK_ARGUMENTS = ("spatial_dims", "patch_size", "mask_ratio")
PUBLIC = {  # name -> arguments that others pass
    "ahm_transforms.RandPatchMask": ("patch_size", "mask_ratio"),
    "ahm_transforms.RandPatchMaskd": ("keys", "patch_size", "mask_ratio"),
    "ahm_transforms.RandBoxMask": (),
    "ahm_transforms.RandBoxMaskd": ("keys",),
    "ahm_transforms.AdaptiveHardMask": ("masker",),
    "ahm_transforms.AdaptiveHardMaskd": ("keys", "masker"),
    "ahm_networks.ReconstructionUNet": ("spatial_dims",),
    "ahm_networks.UniformMasker": MASK_ARGUMENTS,
    "ahm_networks.ActorCriticMasker": MASK_ARGUMENTS,
    "ahm_networks.LossPredictionMasker": MASK_ARGUMENTS,
    "ahm_networks.CurriculumMasker": ("masker",),
    "ahm_engines.MaskedTrainer": ("device", "max_epochs", "train_data_loader", "network", "optimizer", "masker"),
    "ahm_engines.MaskedEvaluator": ("device",),
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(path: Path) -> Iterator[str]:
    """Full names of everything that a file imports, wherever in the file."""
    module = relative(path.with_suffix("")).removesuffix("/__init__").split("/")
    package = module if path.name == "__init__.py" else module[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_the_packages_are_found() -> None:
    assert {relative(path).split("/")[0] for path in FILES} == set(PACKAGES)


@pytest.mark.parametrize("part", FORBIDDEN)
def test_imports_run_one_way(part: str) -> None:
    files = [path for path in FILES if relative(path).startswith(part)]
    wrong = [
        f"{relative(path)} imports {name}"
        for path in files
        for name in imported(path)
        if any(within(name, package) for package in FORBIDDEN[part])
    ]
    assert files
    assert not wrong, wrong


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("import ahm_engines.trainer as t", "ahm_engines.trainer"),
        ("from ahm_networks import nets", "ahm_networks.nets"),
        ("def f():\n    from torchvision.models import vgg16", "torchvision.models.vgg16"),
        ("from . import nets", "ahm_networks.nets"),
        ("from .nets import policy", "ahm_networks.nets.policy"),
    ],
)
def test_every_kind_of_import_is_seen(
    line: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "ahm_networks" / "some.py"
    path.parent.mkdir()
    path.write_text(line)
    assert list(imported(path)) == [expected]


@pytest.mark.parametrize("path", ALL_FILES, ids=relative)
def test_every_file_states_its_licence(path: Path) -> None:
    assert path.read_text(encoding="utf-8").splitlines()[:1] == ["# SPDX-License-Identifier: Apache-2.0"]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_keep_their_arguments(name: str) -> None:
    package, attribute = name.split(".")
    module = importlib.import_module(package)
    assert attribute in module.__all__
    parameters = list(inspect.signature(getattr(module, attribute)).parameters)
    assert tuple(parameters[: len(PUBLIC[name])]) == PUBLIC[name]
    assert inspect.getdoc(getattr(module, attribute))


@pytest.mark.parametrize("package", PACKAGES)
def test_all_names_what_is_there(package: str) -> None:
    module = importlib.import_module(package)
    assert all(hasattr(module, name) for name in module.__all__)
