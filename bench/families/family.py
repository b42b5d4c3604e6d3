"""The definition of a model family, and generators of its batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 96
Batch = dict[str, Any]


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss that the model itself computes."""
    loss: Tensor = model(**batch).loss
    return loss


def mean_square(model: nn.Module, batch: Any) -> Tensor:
    """Return the mean square of the first output, with larger weights for its last features.

    So every layer gets a gradient; after a norm the unweighted mean square would be constant.
    """
    out = model(**batch) if isinstance(batch, dict) else model(batch)
    first = (out if isinstance(out, Tensor) else out[0]).float()
    weights = torch.linspace(1, 2, first.shape[-1], device=first.device)
    return (first.square() * weights).mean()


@dataclass(frozen=True)
class Family:
    """A tiny version of a model that people fine-tune.

    Attributes:
        make_model: returns the model in eval mode, always with the same weights.
        make_batches: ``f(count)`` returns batches as a collator would.
        config: fields of the LoRA config besides ``target_modules="all-linear"`` and r.
        loss: ``f(model, batch)``, minimised by a training step.
        untrained: regular expression of adapted layers that get no gradient, and the reason.
    """

    make_model: Callable[[], nn.Module]
    make_batches: Callable[[int], Sequence[Any]]
    config: dict[str, Any] = field(default_factory=dict)
    loss: Callable[[nn.Module, Any], Tensor] = own_loss
    untrained: tuple[str, str] | None = None


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Return a function that makes a model with the same weights at every call."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            return make().eval()

    return build


def text_batches(
    count: int,
    samples: int = 4,
    length: int = 20,
    *,
    labels: str | None = None,
    classes: int = 3,
    left: bool = False,
    seed: int = 5,
) -> list[Batch]:
    """Return padded token batches; token frequencies are skewed, so that spectra decay.

    Args:
        labels: ``"tokens"`` (-100 for padding), ``"classes"`` (one per sample) or none.
        left: pad on the left.
    """
    generator = torch.Generator().manual_seed(seed)
    frequencies = 1 / torch.arange(3, VOCABULARY - 1).float()
    batches = []
    for _ in range(count):
        ids = 3 + torch.multinomial(frequencies, samples * length, True, generator=generator)
        ids = ids.reshape(samples, length)
        lengths = torch.randint(length // 3, length, (samples, 1), generator=generator)
        positions = torch.arange(length).flip(0) if left else torch.arange(length)
        mask = (positions < lengths).long()
        batch: Batch = {"input_ids": ids * mask, "attention_mask": mask}
        if labels == "tokens":
            batch["labels"] = torch.where(mask.bool(), ids, -100)
        elif labels == "classes":
            batch["labels"] = torch.randint(0, classes, (samples,), generator=generator)
        batches.append(batch)
    return batches


def image_batches(
    count: int, samples: int = 4, size: int = 16, *, classes: int | None = 3, seed: int = 5
) -> list[Batch]:
    """Return images whose neighbouring pixels are similar, optionally with classes."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        noise = torch.randn(samples, 3, size, size, generator=generator)
        batch: Batch = {"pixel_values": noise.cumsum(-1).cumsum(-2) / size}
        if classes:
            batch["labels"] = torch.randint(0, classes, (samples,), generator=generator)
        batches.append(batch)
    return batches
