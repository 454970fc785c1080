# SPDX-License-Identifier: Apache-2.0
"""Time and exactness of patch masks: `RandPatchMaskd` against MONAI's RandCoarseDropoutd, 8^3 patches on 96^3.

Run with ``python -m benchmarks.masking``. Both are asked to hide 0.75 of one volume, in one thread as in a DataLoader
worker. RandCoarseDropoutd draws its holes independently; they overlap, so it hides less than it is asked for. The last
comparison gives it as many holes as it needs to hide 0.75 on average. It writes into its input, hence works on a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform, RandCoarseDropoutd

from ahm_transforms import RandPatchMaskd
from benchmarks._paired import Paired, paired, peak_memory_mb, report

SIZE, PATCH, RATIO = 96, 8, 0.75
HOLES = round(RATIO * (SIZE // PATCH) ** 3)


def hidden_share(transform: MapTransform, image: torch.Tensor, draws: int = 10) -> float:
    """Return the mean share of voxels that ``transform`` sets to another value."""
    changed = [transform({"image": image.clone()})["image"] != image for _ in range(draws)]
    return float(torch.stack(changed).float().mean())


def holes_needed(image: torch.Tensor) -> int:
    """Search the number of holes with which RandCoarseDropout hides `RATIO` of the image on average."""
    low, high = HOLES, 8 * HOLES
    while high - low > 16:
        middle = (low + high) // 2
        low, high = (middle, high) if hidden_share(dropout(middle), image) < RATIO else (low, middle)
    return high


def dropout(holes: int, fill_value: float | None = None) -> RandCoarseDropoutd:
    """MONAI's transform; it fills with noise unless told otherwise."""
    return RandCoarseDropoutd("image", holes=holes, spatial_size=PATCH, fill_value=fill_value, prob=1.0)


def main() -> None:
    """Compare, print the table and the line of JSON."""
    torch.set_num_threads(1)
    image = _volume(SIZE)
    ours = RandPatchMaskd("image", patch_size=PATCH, mask_ratio=RATIO)
    rivals = {
        f"asked {RATIO}, its defaults": dropout(HOLES),
        f"asked {RATIO}, fill 0": dropout(HOLES, fill_value=0),
        f"reached {RATIO}, its defaults": dropout(holes_needed(image)),
    }
    rows: dict[str, Paired] = {}
    extra: dict[str, dict[str, object]] = {"ours": _describe(ours, image)}
    for name, rival in rivals.items():
        rows[name] = paired(_call(rival, image), _call(ours, image), rounds=30)
        extra[name] = {**_describe(rival, image), "times_faster": round(1 / rows[name].ratio_median, 1)}
    for name, entry in extra.items():
        print(f"{name:32s}" + "  ".join(f"{key} {value}" for key, value in entry.items()))
    report(rows, labels=("RandCoarseDropoutd", "RandPatchMaskd"), extra={"asked": RATIO, "details": extra})


def _call(transform: MapTransform, image: torch.Tensor) -> Callable[[], object]:
    if isinstance(transform, RandCoarseDropoutd):
        return lambda: transform({"image": image.clone()})
    return lambda: transform({"image": image})


def _describe(transform: MapTransform, image: torch.Tensor) -> dict[str, object]:
    # A process of its own: memory that earlier work has left in the heap would hide what this call takes.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        peak = pool.submit(_peak_mib, transform).result()
    return {
        "hidden": round(hidden_share(transform, image), 4),
        "peak_mib": None if peak is None else round(peak, 1),
    }


def _peak_mib(transform: MapTransform) -> float | None:
    transform({"image": _volume(2 * PATCH)})  # loads what the first call loads
    return peak_memory_mb(_call(transform, _volume(SIZE)))


def _volume(size: int) -> torch.Tensor:
    image: torch.Tensor = MetaTensor(torch.rand(1, size, size, size) + 1.0)
    return image


if __name__ == "__main__":
    main()
