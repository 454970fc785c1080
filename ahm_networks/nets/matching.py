# SPDX-License-Identifier: Apache-2.0
"""Which tensor of a ``state_dict`` belongs to which tensor of a network, whatever the prefixes on both sides."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from ahm_networks.nets.encoders import encoder_network, encoder_root, encoder_stages, image_readers

__all__ = ["Target", "align_prefixes", "pair_keys"]

# MONAI's MaskedAutoEncoderViT ends its `blocks` with the norm that its ViT calls `norm`; the published weights of the
# Swin transformer call `fc1` and `fc2` what MONAI calls `linear1` and `linear2`.
RENAMED = ((r"(^|\.)blocks\.\d+\.(weight|bias)$", r"\1norm.\2"), (r"(^|\.)mlp\.fc([12])\.", r"\1mlp.linear\2."))


@dataclasses.dataclass(frozen=True)
class Target:
    """The tensors of a network that are to be filled.

    Attributes:
        names: all names of each tensor by its first one, which is its key.
        tensors: by key.
        anchors: keys of the encoder's tensors, by which both sides are aligned; of an unknown network, all.
        readers: keys of the tensors that may read the image itself.
        prefixes: of names, under which the encoder may lie, the shortest first.
        grid: patches per axis of the position embeddings, where there are any.
    """

    names: dict[str, list[str]]
    tensors: dict[str, Tensor]
    anchors: list[str]
    readers: set[str]
    prefixes: list[str]
    grid: tuple[int, ...] | None

    @classmethod
    def of(cls, network: nn.Module, part: str) -> Target:
        """Look at the ``encoder`` of a network or at ``all`` of it.

        Raises:
            TypeError: when the encoder is asked for and unknown.
        """
        network = _unwrapped(network)
        names, tensors = _own_tensors(network)
        try:
            stages, root = encoder_stages(network), encoder_root(network)
        except TypeError:
            if part == "encoder":
                raise
            kernels = [key for key, tensor in tensors.items() if tensor.ndim > 3]
            inside = [f"{name}." for name, module in network.named_modules() if name and any(module.children())]
            return cls(names, tensors, list(tensors), set(kernels[:1]), sorted(["", *inside], key=len), None)
        anchors = _keys_of(tensors, [module for stage in stages for module in stage])
        readers = set(_keys_of(tensors, image_readers(network)))
        if part == "encoder":
            tensors = {key: tensors[key] for key in anchors}
        where = next(name for name, module in network.named_modules() if module is root)
        grid = getattr(encoder_network(network), "feat_size", None)
        return cls(names, tensors, anchors, readers, _prefixes(where), grid)


def _unwrapped(network: nn.Module) -> nn.Module:
    inner = getattr(network, "module", getattr(network, "_orig_mod", None))
    return _unwrapped(inner) if isinstance(inner, nn.Module) else network


def _own_tensors(network: nn.Module) -> tuple[dict[str, list[str]], dict[str, Tensor]]:
    state = {key: value for key, value in network.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    first: dict[Tensor, str] = {}
    names: dict[str, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(first.setdefault(tensor, name), []).append(name)
    return names, {key: state[key] for key in names}


def _keys_of(tensors: Mapping[str, Tensor], modules: Iterable[nn.Module]) -> list[str]:
    inside = {tensor for module in modules for tensor in module.state_dict(keep_vars=True).values()}
    return [key for key, tensor in tensors.items() if tensor in inside]


def pair_keys(target: Target, weights: Mapping[str, Tensor]) -> tuple[dict[str, str], set[str]]:
    """Find the source of each of the target's tensors.

    Returns:
        The source's key by the target's, and all keys of the source that stand for one of the target's tensors.
    """
    keys = {_renamed(key): key for key in weights} | {key: key for key in weights}
    sources = {name: weights[key] for name, key in keys.items()}
    anchors = {key: target.tensors[key] for key in target.anchors}
    own_prefix, source_prefix = align_prefixes(anchors, sources, target.prefixes)
    pairs: dict[str, str] = {}
    used = set()
    for key in target.tensors:
        looked_up = [source_prefix + n.removeprefix(own_prefix) for n in target.names[key] if n.startswith(own_prefix)]
        found = [keys[name] for name in looked_up if name in keys]
        used.update(found)
        if found:
            pairs[key] = found[0]
    return pairs, used


def align_prefixes(
    own: Mapping[str, Tensor], source: Mapping[str, Tensor], own_prefixes: Iterable[str]
) -> tuple[str, str]:
    """Find the prefixes to take off both sides so that most names agree.

    Every prefix of the source's key tree is tried with every one of ``own_prefixes``. What counts is the number of
    tensors that agree in name and in shape (up to input channels and number of tokens), then in name alone; among
    equals the first, so name the shortest of ``own_prefixes`` first.

    Returns:
        The network's prefix and the source's, each empty or ending with a dot.
    """
    agreeing: Counter[tuple[str, str]] = Counter({("", ""): 0})
    fitting: Counter[tuple[str, str]] = Counter()
    for prefix in own_prefixes:
        inner = {name.removeprefix(prefix): tensor for name, tensor in own.items() if name.startswith(prefix)}
        for name, tensor in source.items():
            for start in (0, *(dot.end() for dot in re.finditer(r"\.", name))):
                if name[start:] in inner:
                    agreeing[prefix, name[:start]] += 1
                    fitting[prefix, name[:start]] += _alike(tensor, inner[name[start:]])
    return max(agreeing, key=lambda pair: (fitting[pair], agreeing[pair]))


def _prefixes(path: str) -> list[str]:
    return ["", *(f"{path[: dot.start()]}." for dot in re.finditer(r"\.|$", path) if path)]


def _alike(source: Tensor, own: Tensor) -> bool:
    if source.ndim != own.ndim:
        return False
    free = 1 if own.ndim > 2 else None
    return all(a == b for axis, (a, b) in enumerate(zip(source.shape, own.shape, strict=True)) if axis != free)


def _renamed(key: str) -> str:
    for pattern, replacement in RENAMED:
        key = re.sub(pattern, replacement, key)
    return key
