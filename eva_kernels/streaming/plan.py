"""Which layer inputs are tracked exactly and which by a sketch, within a memory budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import EvaValueError

__all__ = ["EIGEN_ARRAYS", "METHODS", "StreamPlan", "answer_bytes", "fold_bytes", "plan_streams"]
__all__ += ["sketch_width", "stream_bytes"]

METHODS = ("auto", "sketch", "gram")
# (Q, Q) float64 arrays per layer that a fold of all layers holds at once on an accelerator: core
# and metric, a copy of each where they are concatenated with others, the mixing, and scratch.
FOLD_MATRICES = 8
# (D, D) arrays that the eigen-decomposition of one scatter matrix holds at once, float64.
EIGEN_ARRAYS = 4


@dataclass(frozen=True)
class StreamPlan:
    """How one layer input is to be tracked.

    Attributes:
        features: D.
        components: K, at most D.
        width: sketch width Q.
        method: ``"sketch"`` or ``"gram"``.
    """

    features: int
    components: int
    width: int
    method: str


def sketch_width(features: int, components: int, oversample: float) -> int:
    """Return Q: ``oversample`` times the components, never above D."""
    return min(features, max(components, math.ceil(components * oversample)))


def stream_bytes(plan: StreamPlan, itemsize: int = 4) -> int:
    """Return the bytes that the state and the sums of one layer input take between steps."""
    d, q = plan.features, plan.width
    if plan.method == "gram":
        return itemsize * (d * d + q * d + 2 * d) + 8 * (d + q + 1)
    return itemsize * (2 * q * d + d) + 8 * (d + q + 1)


def fold_bytes(plan: StreamPlan, itemsize: int = 4, on_cpu: bool = False) -> int:
    """Return the bytes that the fold of a layer input takes besides state and sums.

    All layer inputs take them at the same time: they are folded together, and the saved rows are
    kept until the comparison.

    Args:
        plan: of the layer input.
        itemsize: bytes of one number of the state.
        on_cpu: there a new basis takes memory of its own, and few layers are folded at once.
    """
    d, k, q = plan.features, plan.components, plan.width
    if on_cpu:
        return itemsize * q * d
    return itemsize * k * d + 8 * FOLD_MATRICES * q * q


def answer_bytes(plan: StreamPlan) -> int:
    """Return the temporary bytes that the answer of a layer input takes besides its state."""
    return 8 * EIGEN_ARRAYS * plan.features**2 if plan.method == "gram" else 0


def plan_streams(
    features: Sequence[int],
    components: Sequence[int],
    *,
    method: str = "auto",
    oversample: float = 2.0,
    memory_budget: int | None = None,
    itemsize: int = 4,
) -> list[StreamPlan]:
    """Choose the method of every layer input.

    ``"auto"`` tracks inputs exactly, narrowest first, while all states together fit the budget;
    the rest is sketched. Without a budget it does so where the exact sums cost no more arithmetic
    than a sketch, ``D <= 2 Q``.

    Args:
        features: D of each layer input.
        components: K wanted of each; cut to D.
        method: ``"auto"``, ``"sketch"`` or ``"gram"``.
        oversample: Q over K.
        memory_budget: bytes for all states together; no limit if ``None``.
        itemsize: bytes of one number of the state.

    Raises:
        EvaValueError: unknown method, ``oversample`` below 1, or a budget that is too small; the
            message gives the least that would do.
    """
    if method not in METHODS:
        raise EvaValueError(f"method={method!r} is unknown; choose one of {METHODS}")
    if oversample < 1:
        raise EvaValueError(f"oversample={oversample} must be at least 1")
    sketches, grams = [], []
    for d, k in zip(features, components, strict=True):
        k = min(k, d)
        width = sketch_width(d, k, oversample)
        sketches.append(StreamPlan(d, k, width, "sketch"))
        grams.append(StreamPlan(d, k, width, "gram"))
    chosen = list(grams if method == "gram" else sketches)
    total = sum(stream_bytes(p, itemsize) for p in chosen)
    if method == "auto":
        for i in sorted(range(len(chosen)), key=lambda i: features[i]):
            extra = stream_bytes(grams[i], itemsize) - stream_bytes(sketches[i], itemsize)
            if memory_budget is None:
                affordable = features[i] <= 2 * grams[i].width
            else:
                affordable = total + extra <= memory_budget
            if affordable:
                chosen[i], total = grams[i], total + extra
    if memory_budget is not None and total > memory_budget:
        raise EvaValueError(
            f"memory_budget={memory_budget} bytes is too small: method={method!r} needs at least "
            f"{total} bytes for {len(chosen)} layer inputs; raise it, or lower r, rho or oversample"
        )
    return chosen
