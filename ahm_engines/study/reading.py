# SPDX-License-Identifier: Apache-2.0
"""Put a study together: shipped presets, ablations and arms, a file of the user's, single changes."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from ahm_engines.study.settings import Arm, Study, expect_choice, expect_known, scratch_like
from ahm_transforms.io.json_file import read_json

__all__ = ["preset_names", "read_study"]

logger = logging.getLogger(__name__)

SIZES = ("small", "full")
PRESETS = files("ahm_engines.study") / "presets"
BASE, ARMS = "base", "arms"
OF_ARM = "arms."  # begins a change of one arm
ON_PRESETS = "presets"  # entry of an ablation: what differs on one preset
WHOLE = ("arms", "seeds", "backbone_args", "architecture_args", "decoder_args")  # replaced, not merged


def preset_names() -> dict[str, list[str]]:
    """Names of the data sets and of the ablations that come with the package."""
    found = sorted(Path(entry.name).stem for entry in PRESETS.iterdir() if entry.name.endswith(".json"))
    ablations = [name.removeprefix("ablation_") for name in found if name.startswith("ablation_")]
    data = [name for name in found if not name.startswith("ablation_") and name not in (BASE, ARMS)]
    return {"preset": data, "ablation": ablations}


def read_study(
    preset: str | None = None,
    *,
    size: str = "small",
    ablation: str | None = None,
    config: str | Path | None = None,
    data_dir: str | Path | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Study:
    """Put a study together: base, preset, its size, ablation, file, changes; what comes later wins.

    Args:
        preset: a data set's name, see `preset_names`.
        size: ``small`` or ``full``.
        ablation: name of a question, which brings its own arms.
        config: JSON file with the same entries as a preset.
        data_dir: folder that relative paths of ``data`` start from.
        changes: single entries, such as ``{"finetune.max_epochs": 20}``; one of an arm, such as
            ``{"arms.a3c.pretrain.mask_ratio": 0.5}``, leaves the other arms in.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown name or entry, or settings that make no study.
    """
    expect_choice("size", size, SIZES)
    layers = [_load(BASE)]
    if preset:
        layers.append(_shipped(preset, "preset"))
    if ablation:
        asked = _shipped(ablation, "ablation")
        here = asked.pop(ON_PRESETS, {}).get(preset, {})
        layers += [asked, here]
    if config:
        layers.append(_read(Path(config)))
    try:
        layers = [_sized(layer, size) for layer in layers]
        layers += [
            _nested(key.split("."), value) for key, value in (changes or {}).items() if not key.startswith(OF_ARM)
        ]
        content: dict[str, Any] = {}
        for layer in layers:
            content = _merged(content, layer)
        content.setdefault("name", "-".join(word for word in (preset or "study", ablation, size) if word))
        of_arms = {key.removeprefix(OF_ARM): value for key, value in (changes or {}).items() if key.startswith(OF_ARM)}
        content["arms"] = _arms([layer["arms"] for layer in layers if "arms" in layer], of_arms)
        return _study(content, Path(data_dir) if data_dir else None)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"study: an entry is of another kind than in the presets ({error}).") from error


def _study(content: dict[str, Any], data_dir: Path | None) -> Study:
    fields = set(Study.__dataclass_fields__)
    expect_known("study", content, fields)
    data = {key: _placed(key, value, data_dir) for key, value in content.get("data", {}).items()}
    seeds = {_fraction(fraction): _seeds(value) for fraction, value in content.get("seeds", {}).items()}
    ordered = {fraction: seeds[fraction] for fraction in sorted(seeds)}
    return Study(**content | {"data": data, "seeds": ordered})


def _arms(layers: Sequence[Sequence[str] | Mapping[str, Any]], changes: Mapping[str, Any]) -> dict[str, Arm]:
    """The arms that the last layer names or defines, with changes such as ``{"a3c.pretrain.mask_ratio": 0.5}``.

    A name is one of the shelf or of any layer. A definition builds on the arm of its own name or of ``like``: on the
    shelf, in a layer before, or further up.
    """
    known = _load(ARMS)
    entries: Mapping[str, Any] = {}
    for layer in layers:
        if isinstance(layer, str):
            raise ValueError(f"arms: expected a list of names or definitions by name, got {layer!r}.")
        entries = layer if isinstance(layer, Mapping) else {name: {} for name in layer}
        known = _with_definitions(known, entries)
    for key, value in changes.items():
        changed = _nested(key.split("."), value)
        expect_known("arms", changed, entries)
        entries = _merged(entries, changed)
        known = _with_definitions(known, changed)
    arms = {name: Arm(**{"title": name.replace("_", " "), **known[name]}) for name in entries}
    return {name: replace(arm, compare_with=_references(name, arms, entries[name])) for name, arm in arms.items()}


def _references(name: str, arms: Mapping[str, Arm], entry: Mapping[str, Any]) -> list[str]:
    """What an arm is compared with: what its entry says, or else those of the shelf that the study has.

    Without any, those from scratch with the same network; a warning says where there is none either, and no other arm
    is compared with this one.
    """
    arm = arms[name]
    if isinstance(arm.compare_with, str):
        raise ValueError(f"arms.{name}.compare_with: expected a list of arms, got {arm.compare_with!r}.")
    if "compare_with" in entry:
        return list(arm.compare_with or [])
    found = [other for other in arm.compare_with or [] if other in arms and other != name]
    if found or arm.pretrain is None:
        return found
    found = scratch_like(arm, arms)
    named = any(name in (other.compare_with or []) for other in arms.values())
    if not found and not named and len(arms) > 1:
        logger.warning(
            "arm %r is compared with no other arm: none of the study's trains the same network from scratch. Add one, "
            "or name arms in its compare_with.",
            name,
        )
    return found


def _with_definitions(known: Mapping[str, Any], entries: Mapping[str, Any]) -> dict[str, Any]:
    arms = dict(known)
    for name, entry in entries.items():
        like = entry.get("like", name)
        alone = "like" not in entry and ("pretrain" in entry or "finetune" in entry)
        if like not in arms and not alone:
            raise ValueError(f"arms: expected names of {', '.join(sorted(arms))}, got {like!r}.")
        changes = {key: value for key, value in entry.items() if key != "like"}
        base = dict(arms.get(like, {}))
        if "title" not in changes and (like != name or "equal_time" in changes):
            base.pop("title", None)  # it would be that of another arm
        arms[name] = _merged(base, changes)
        expect_known(f"arms.{name}", arms[name], set(Arm.__dataclass_fields__))
    return arms


def _shipped(name: str, kind: str) -> dict[str, Any]:
    expect_choice(kind, name, preset_names()[kind])
    return _load(name if kind == "preset" else f"ablation_{name}")


def _load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((PRESETS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path, "config")
    if not isinstance(content, dict):
        raise ValueError(f"config {path}: expected a JSON object, got {type(content).__name__}.")
    return content


def _sized(layer: dict[str, Any], size: str) -> dict[str, Any]:
    plain = {key: value for key, value in layer.items() if key != "sizes"}
    return _merged(plain, layer.get("sizes", {}).get(size, {}))


def _merged(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(low[key], value) if key not in WHOLE and _dicts(low.get(key), value) else value
        for key, value in high.items()
    }
    return {**low, **both}


def _dicts(*values: Any) -> bool:
    return all(isinstance(value, Mapping) for value in values)


def _nested(path: list[str], value: Any) -> dict[str, Any]:
    return {path[0]: value if len(path) == 1 else _nested(path[1:], value)}


def _placed(key: str, value: Any, data_dir: Path | None) -> Any:
    if key not in ("dataset_dir", "datalist", "labels_dir", "labels_csv") or value is None:
        return value
    return str((data_dir / value if data_dir else Path(value)).absolute())


def _seeds(value: Any) -> list[int]:
    """A number of seeds, or their list."""
    seeds = range(value) if isinstance(value, int) else value
    if isinstance(seeds, str) or not all(isinstance(seed, int) for seed in seeds):
        raise ValueError(f"seeds: expected a number of seeds or a list of whole numbers, got {value!r}.")
    return sorted(set(seeds))


def _fraction(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"seeds: expected label fractions in (0, 1], got {text!r}.") from None
