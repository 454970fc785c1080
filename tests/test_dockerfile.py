# SPDX-License-Identifier: Apache-2.0
"""The Dockerfile names files and extras that there are, and lets nothing private in."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def instructions() -> list[tuple[str, str]]:
    """Instructions and what follows them, continued lines joined, comments left out."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


def copied() -> list[str]:
    """Sources of all COPY instructions."""
    words = [rest.split() for name, rest in instructions() if name == "COPY"]
    return [word for line in words for word in line[:-1] if not word.startswith("--")]


def test_what_is_copied_exists_and_is_let_in() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignored and copied()
    for source in copied():
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored


def test_nothing_of_a_bundle_is_let_in_but_what_is_in_version_control() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored.index("bundles/*/*") > ignored.index("!bundles")
    let_in = {line.removeprefix("!bundles/*/") for line in ignored if line.startswith("!bundles/*/")}
    assert let_in == {"LICENSE", "configs", "docs"}


def test_packages_and_extras_are_those_of_the_project() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    (default,) = [rest.partition("=")[2] for name, rest in instructions() if name == "ARG"]
    assert set(default.split(",")) <= set(settings["options.extras_require"])
    packages = settings["options.packages.find"]["include"].split()
    assert {package.rstrip("*") for package in packages} <= set(copied())
    supported = settings["metadata"]["classifiers"]
    (image,) = [rest for name, rest in instructions() if name == "FROM"]
    assert f"Python :: {image.removeprefix('python:').removesuffix('-slim')}" in supported


def test_the_container_does_not_run_as_root_and_carries_no_secrets() -> None:
    names = [name for name, _ in instructions()]
    assert [rest for name, rest in instructions() if name == "USER"] == ["1000"]
    assert names.index("USER") < names.index("CMD")
    assert not re.search(
        r"password|token|secret|api_key", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.IGNORECASE
    )
