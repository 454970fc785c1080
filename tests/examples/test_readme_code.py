# SPDX-License-Identifier: Apache-2.0
"""The Python code in README.md runs as it stands there, and does what the text around it says."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ahm_networks import ActorCriticMasker, CurriculumMasker, ReconstructionUNet
from tests.bundles.running import ROOT
from tests.fixtures_data import write_nifti

README = (ROOT / "README.md").read_text()
Names = dict[str, Any]


def blocks(markdown: str) -> list[str]:
    """Return the fenced blocks of Python."""
    return re.findall(r"^```python\n(.*?)^```$", markdown, flags=re.DOTALL | re.MULTILINE)


def run(code: str) -> Names:
    names: Names = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)
    return names


def three_quarters_are_hidden(names: Names, printed: str) -> None:
    volume = write_nifti(Path("scan.nii.gz"), (32, 48, 64))
    data = names["transform"]({"image": "scan.nii.gz"})
    np.testing.assert_array_equal(data["target"][0], volume)
    assert data["mask"].dtype == torch.bool
    assert float(data["mask"].float().mean()) == 0.75
    assert torch.equal(data["image"], data["target"].masked_fill(data["mask"], 0))


def the_encoder_is_filled(names: Names, printed: str) -> None:
    assert "100.0% of its numbers filled" in printed
    pretrained = torch.load("model.pt", weights_only=True)["model"]["backbone.model.0.conv.unit0.conv.weight"]
    assert torch.equal(names["network"].state_dict()["model.0.conv.unit0.conv.weight"], pretrained)


def both_are_taught(names: Names, printed: str) -> None:
    mask = names["decision"].mask
    assert mask.shape == (2, 1, 64, 64, 64) and mask.dtype == torch.bool
    assert float(mask.float().mean()) == pytest.approx(0.6, abs=0.01)
    for learner in (names["network"], names["masker"]):
        assert any(weight.grad is not None and weight.grad.any() for weight in learner.parameters())


def every_other_image_is_masked_each_time_anew(names: Names, printed: str) -> None:
    hide = names["hide"].set_random_state(seed=0)
    masks = [hide({"image": torch.ones(1, 32, 32, 32)})["mask"] for _ in range(20)]
    hidden = [mask for mask in masks if mask.any()]
    assert 5 < len(hidden) < 15 and all(mask.float().mean() == pytest.approx(0.6, abs=0.01) for mask in hidden)
    assert not torch.equal(hidden[0], hidden[1])


CHECKS: dict[str, Callable[[Names, str], None]] = {
    "RandPatchMaskd": three_quarters_are_hidden,
    "load_masker": every_other_image_is_masked_each_time_anew,
    "transfer_weights": the_encoder_is_filled,
    "masker.loss": both_are_taught,
}


def test_every_block_has_a_check() -> None:
    assert [[word for word in CHECKS if word in code] for code in blocks(README)] == [[word] for word in CHECKS]


@pytest.mark.parametrize("word", CHECKS)
def test_a_block_does_what_the_readme_says(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    parts = {"model": ReconstructionUNet(3), "masker": CurriculumMasker(ActorCriticMasker(3, 8))}  # the bundle's own
    weights = {name: part.state_dict() for name, part in parts.items()}
    torch.save({**weights, "provenance": {"settings": {"task": "pretraining", "masker": "a3c"}}}, "model.pt")
    names = run(next(code for code in blocks(README) if word in code))
    CHECKS[word](names, capsys.readouterr().out)


def test_what_commands_in_the_readme_import_is_there() -> None:
    commands = re.findall(r'python -c "(.+?)"', README)
    assert commands
    for command in commands:
        imports = [line for line in ast.parse(command).body if isinstance(line, ast.ImportFrom)]
        run("\n".join(map(ast.unparse, imports)))


def test_blocks_are_found_whole_and_errors_in_them_are_seen() -> None:
    text = "```bash\nls\n```\n```python\na = 1\n\nb = a\n```\ntext\n```python\nc\n```\n"
    assert blocks(text) == ["a = 1\n\nb = a\n", "c\n"]
    with pytest.raises(NameError):
        run(blocks(text)[1])
