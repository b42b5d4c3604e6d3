"""All LoRA initialisers compared, as functions with a common signature."""

from __future__ import annotations

from typing import Any

from . import covariances, eva, gradients, weights
from ._job import Batch, Job, Method, forward, lora_layers, rank_of

__all__ = ["METHODS", "Batch", "Job", "Method", "after_step", "forward", "lora_layers", "rank_of"]

METHODS: dict[str, Method] = {
    **weights.METHODS,
    **gradients.METHODS,
    **covariances.METHODS,
    **eva.METHODS,
}


def after_step(model: object, step: int) -> None:
    """Let a method act after optimizer step ``step`` (1, 2, ...), as AdaLoRA has to."""
    base: Any = getattr(model, "base_model", None)
    if hasattr(base, "update_and_allocate"):
        base.update_and_allocate(step)
