"""Log-log slopes, and the crossing points of two costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

TAIL = 3  # number of largest sizes through which a slope is fitted


def slope(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Return the exponent of the power law fitted to positive points by least squares.

    ``None`` for fewer than two points.
    """
    if len(xs) < 2:
        return None
    u, v = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    variance = sum((a - mean_u) ** 2 for a in u)
    return sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / variance


@dataclass(frozen=True)
class Crossing:
    """The part of a range in which one cost is below another.

    Attributes:
        kind: ``"always"``, ``"never"``, ``"from"`` a value on, ``"until"`` a value, or
            ``"unknown"`` with fewer than two points.
        at: that value, interpolated in log-log.
        low, high: the range.
        single: the costs cross at most once; otherwise ``at`` is the last crossing.
    """

    kind: str
    at: float | None
    low: float
    high: float
    single: bool = True

    def text(self, size: str) -> str:
        """Return the range in words: ``from D of about 700 on``."""
        span = f"{size} = {self.low:g} to {self.high:g}"
        texts = {
            "always": f"everywhere in {span}",
            "never": f"nowhere in {span}",
            "unknown": f"(too few points along {size} to say where)",
        }
        if self.at is None:
            return texts[self.kind]
        several = "" if self.single else f" (the last of several changes in {span})"
        if self.kind == "from":
            return f"from {size} = {_two_digits(self.at)} on{several}"
        return f"up to {size} = {_two_digits(self.at)}{several}"


def _two_digits(value: float) -> str:
    """Format a number with two significant digits and no exponent."""
    return f"{round(value, 1 - math.floor(math.log10(value))):g}"


def crossing(xs: Sequence[float], left: Sequence[float], right: Sequence[float]) -> Crossing:
    """Return where ``left`` is below ``right``.

    Args:
        xs: sizes, ascending.
        left, right: positive costs at each.
    """
    if len(xs) < 2:
        only = xs[0] if xs else 0.0
        return Crossing("unknown", None, only, only)
    low, high = xs[0], xs[-1]
    gaps = [math.log(a / b) for a, b in zip(left, right, strict=True)]
    below = [gap < 0 for gap in gaps]
    changes = [i for i in range(1, len(xs)) if below[i] != below[i - 1]]
    if not changes:
        return Crossing("always" if below[0] else "never", None, low, high)
    i = changes[-1]
    share = gaps[i - 1] / (gaps[i - 1] - gaps[i])
    at = math.exp(math.log(xs[i - 1]) + share * math.log(xs[i] / xs[i - 1]))
    return Crossing("from" if below[-1] else "until", at, low, high, len(changes) == 1)
