# SPDX-License-Identifier: Apache-2.0
"""The transforms of `ahm_transforms.masking.array` for dictionaries of images."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import get_track_meta
from monai.transforms import MapTransform, Randomizable
from monai.utils import convert_to_dst_type, convert_to_tensor, ensure_tuple
from torch import Tensor

from ahm_transforms.masking.array import AdaptiveHardMask, Fill, Foreground, MaskTransform, RandBoxMask, RandPatchMask

__all__ = [
    "AdaptiveHardMaskD",
    "AdaptiveHardMaskDict",
    "AdaptiveHardMaskd",
    "MaskTransformd",
    "RandBoxMaskD",
    "RandBoxMaskDict",
    "RandBoxMaskd",
    "RandPatchMaskD",
    "RandPatchMaskDict",
    "RandPatchMaskd",
]


class MaskTransformd(Randomizable, MapTransform):
    """Hide the same voxels in several entries of a dictionary, and write the mask beside them.

    The mask is drawn for the first key that is there. It is a MetaTensor with that image's metadata, so that spatial
    transforms and writers can follow; a dictionary without any of the keys comes back as it is. Like MONAI's other
    random transforms it keeps what it has drawn: workers may be processes, not threads that share one transform.

    Args:
        keys: entries to mask, each ``[C, *S]``, all of one spatial shape.
        transform: what masks one image.
        mask_key: entry for the mask ``[1, *S]`` bool, ``True`` = hidden.
        original_key: entry for the image as it was, one per key; None keeps none.
        allow_missing_keys: skip missing keys instead of raising.

    Raises:
        KeyError: when a key is missing.
        ValueError: when a new entry would overwrite an image or another entry, or would be called ``<key>_...``,
            which MONAI's Spacingd takes for metadata.
    """

    backend = MaskTransform.backend

    def __init__(
        self,
        keys: KeysCollection,
        transform: MaskTransform,
        *,
        mask_key: str = "mask",
        original_key: KeysCollection | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        self.transform = transform
        self.mask_key = mask_key
        self.original_keys = (None,) * len(self.keys) if original_key is None else ensure_tuple(original_key)
        if len(self.original_keys) != len(self.keys):
            raise ValueError(f"original_key: expected one name for each of {self.keys}, got {original_key!r}.")
        self._check_new_keys(mask_key, *self.original_keys)

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> MaskTransformd:
        """Seed the draw of the masks."""
        super().set_random_state(seed, state)
        self.transform.set_random_state(seed, state)
        return self

    def randomize(self, data: NdarrayOrTensor) -> None:
        """Draw the mask for an image ``[C, *S]``."""
        self.transform.randomize(data)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a new dictionary with masked images, the mask and what else was asked for."""
        d = dict(data)
        present = list(self.key_iterator(d, self.original_keys))
        if not present:
            return d
        self.randomize(d[present[0][0]])
        for key, original_key in present:
            image = convert_to_tensor(d[key], track_meta=get_track_meta())
            if original_key is not None:
                d[original_key] = image
            d[key] = self._mask_entry(key, image)
        d.update(self.new_entries(like=d[present[0][0]]))
        return d

    def new_entries(self, like: Tensor) -> dict[Hashable, Any]:
        """Return what is written beside the images; ``like`` is the first masked image."""
        return {self.mask_key: convert_to_dst_type(self.transform.mask, dst=like, dtype=torch.bool)[0]}

    def _mask_entry(self, key: Hashable, image: Tensor) -> Tensor:
        try:
            return self.transform(image, randomize=False)
        except ValueError as error:
            raise ValueError(f"keys: entry {key!r} cannot be masked. {error}") from error

    def _check_new_keys(self, *new_keys: Hashable) -> None:
        written = [*self.keys, *(name for name in new_keys if name is not None)]
        for name in written[len(self.keys) :]:
            if written.count(name) > 1:
                raise ValueError(
                    f"mask_key, original_key, policy_key: expected a new name for each entry, got {name!r}, which "
                    "would overwrite another one."
                )
            if any(str(name).startswith(f"{key}_") for key in self.keys):
                raise ValueError(
                    f"mask_key, original_key, policy_key: expected names that do not continue a key, got {name!r} "
                    f"for keys {self.keys}; MONAI's Spacingd takes such entries for metadata."
                )


class RandPatchMaskd(MaskTransformd):
    """Dictionary form of `RandPatchMask`: an exact share of the cells of a patch grid.

    Arguments and errors are those of `RandPatchMask` and `MaskTransformd`.

    Example:
        >>> hide = RandPatchMaskd("image", 4, 0.75, original_key="target").set_random_state(seed=0)
        >>> out = hide({"image": torch.ones(1, 16, 16)})
        >>> sorted(out), out["image"].mean().item(), out["target"].mean().item()
        (['image', 'mask', 'target'], 0.25, 1.0)
    """

    def __init__(
        self,
        keys: KeysCollection,
        patch_size: int | Sequence[int],
        mask_ratio: float,
        *,
        prob: float = 1.0,
        fill: Fill = 0.0,
        foreground: Foreground | None = None,
        ratio_of: Literal["foreground", "grid"] = "foreground",
        mask_key: str = "mask",
        original_key: KeysCollection | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        transform = RandPatchMask(
            patch_size, mask_ratio, prob=prob, fill=fill, foreground=foreground, ratio_of=ratio_of
        )
        super().__init__(
            keys, transform, mask_key=mask_key, original_key=original_key, allow_missing_keys=allow_missing_keys
        )


class RandBoxMaskd(MaskTransformd):
    """Dictionary form of `RandBoxMask`: boxes at random places.

    Arguments and errors are those of `RandBoxMask` and `MaskTransformd`.

    Example:
        >>> hide = RandBoxMaskd("image", num_boxes=1, box_size=4).set_random_state(seed=0)
        >>> int(hide({"image": torch.ones(1, 16, 16)})["mask"].sum())
        16
    """

    def __init__(
        self,
        keys: KeysCollection,
        num_boxes: int,
        box_size: int | Sequence[int],
        *,
        max_num_boxes: int | None = None,
        max_box_size: int | Sequence[int] | None = None,
        prob: float = 1.0,
        fill: Fill = 0.0,
        mask_key: str = "mask",
        original_key: KeysCollection | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        transform = RandBoxMask(
            num_boxes, box_size, max_num_boxes=max_num_boxes, max_box_size=max_box_size, prob=prob, fill=fill
        )
        super().__init__(
            keys, transform, mask_key=mask_key, original_key=original_key, allow_missing_keys=allow_missing_keys
        )


class AdaptiveHardMaskd(MaskTransformd):
    """Dictionary form of `AdaptiveHardMask`: what a masker chooses for the first key's image.

    Arguments and errors are those of `AdaptiveHardMask` and `MaskTransformd`; ``policy_key`` names the entry for the
    policy map ``[1, *G]``, a plain tensor since it does not lie on the image's voxels. None writes none; an image that
    is not masked has none, so ``policy_key`` needs ``prob=1``.

    Example:
        >>> hide = AdaptiveHardMaskd("image", lambda image: image > 2)
        >>> hide({"image": torch.tensor([[[1.0, 5.0], [2.0, 3.0]]])})["mask"].tolist()
        [[[False, True], [False, True]]]
    """

    transform: AdaptiveHardMask

    def __init__(
        self,
        keys: KeysCollection,
        masker: Callable[[Tensor], Any] | str | Path,
        *,
        draw: bool = False,
        prob: float = 1.0,
        device: str | torch.device | None = None,
        fill: Fill = 0.0,
        mask_key: str = "mask",
        original_key: KeysCollection | None = None,
        policy_key: str | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(
            keys,
            AdaptiveHardMask(masker, draw=draw, prob=prob, device=device, fill=fill),
            mask_key=mask_key,
            original_key=original_key,
            allow_missing_keys=allow_missing_keys,
        )
        self.policy_key = policy_key
        if policy_key is not None:
            self._check_new_keys(policy_key, mask_key, *self.original_keys)
            if prob < 1:
                raise ValueError(
                    f"policy_key: expected prob=1 with {policy_key!r}, got {prob}; other images have none."
                )

    def new_entries(self, like: Tensor) -> dict[Hashable, Any]:
        """Return mask and policy map.

        Raises:
            ValueError: when a policy map is asked for and the masker gave none.
        """
        entries = super().new_entries(like)
        if self.policy_key is None:
            return entries
        if self.transform.policy_map is None:
            raise ValueError(
                f"policy_key: expected the masker to answer with a policy map for {self.policy_key!r}, got none; "
                "leave policy_key out or let the masker return (mask, policy_map)."
            )
        return {**entries, self.policy_key: self.transform.policy_map}


RandPatchMaskD = RandPatchMaskDict = RandPatchMaskd
RandBoxMaskD = RandBoxMaskDict = RandBoxMaskd
AdaptiveHardMaskD = AdaptiveHardMaskDict = AdaptiveHardMaskd
