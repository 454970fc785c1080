# SPDX-License-Identifier: Apache-2.0
"""How a metric is called and shown: its title, unit and direction."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Quantity", "quantity"]


class Quantity(NamedTuple):
    """Title, unit and digits of a number; ``factor`` turns what the files hold into what is shown."""

    title: str
    unit: str = ""
    factor: float = 1.0
    digits: int = 3
    lower_is_better: bool = False

    @property
    def heading(self) -> str:
        """For a column or an axis: title, unit, and direction where lower is better."""
        words = [self.unit, "lower is better" if self.lower_is_better else ""]
        return self.title + (f" ({', '.join(filter(None, words))})" if any(words) else "")

    def number(self, value: float, *, signed: bool = False) -> str:
        """Write a number as the files hold it in the unit shown.

        Example:
            >>> quantity("dice").number(0.0123, signed=True), quantity("dice").number(-0.0001)
            ('+1.2', '0.0')
        """
        return f"{value * self.factor:{'+' if signed else ''}z.{self.digits}f}"


IN_POINTS = {
    "dice": "Dice",
    "surface_dice": "surface Dice",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "auroc": "AUROC",
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
}
OTHERS = {
    "hd95_mm": Quantity("HD95", "mm", digits=2, lower_is_better=True),
    "hd95_px": Quantity("HD95", "px", digits=2, lower_is_better=True),
    "hd95_missing": Quantity("nothing found", "cases", digits=1, lower_is_better=True),
    "random_psnr": Quantity("PSNR, random masks", "dB", digits=2),
    "random_ssim": Quantity("SSIM, random masks"),
    "hardness": Quantity("hardness"),
    "rank_correlation": Quantity("rank correlation", digits=2),
    "policy_entropy": Quantity("policy entropy"),
    "position_entropy": Quantity("position entropy"),
    "overlap_images": Quantity("mask overlap, images"),
    "overlap_epochs": Quantity("mask overlap, epochs"),
    "overlap_chance": Quantity("mask overlap by chance"),
    "foreground_share": Quantity("share in foreground", "%", 100.0, 1),
    "steps": Quantity("steps", digits=0),
    "seconds": Quantity("wall-clock", "min", 1 / 60, 1),
    "step_seconds": Quantity("one step", "ms", 1000.0, 1),
    "memory_mib": Quantity("memory", "MiB", digits=0),
}
KNOWN = {name: Quantity(title, "points", 100.0, 1) for name, title in IN_POINTS.items()} | OTHERS


def quantity(metric: str) -> Quantity:
    """Find how to show a metric; that of a class, ``dice_left``, is shown as the metric is.

    Example:
        >>> quantity("dice_left").heading, quantity("dice_left").number(0.8125)
        ('Dice, left (points)', '81.2')
    """
    known = [name for name in KNOWN if metric == name or metric.startswith(f"{name}_")]
    if not known:
        return Quantity(metric)
    name = max(known, key=len)
    group = metric[len(name) + 1 :]
    return KNOWN[name]._replace(title=f"{KNOWN[name].title}, {group}") if group else KNOWN[name]
