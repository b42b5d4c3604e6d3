"""The training loop, used to pre-train the base models and for every fine-tuning."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..methods import Batch
from .domain import take_samples


class DivergedError(RuntimeError):
    """The loss is not finite, or has not fallen."""


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss that training minimises; AdaLoRA adds its regularisation to it."""
    loss: Tensor = model(**batch).loss
    return loss


def descend(
    model: nn.Module,
    train: Batch,
    *,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    on_step: Callable[[int], None] | None = None,
) -> None:
    """Train all parameters that require gradients with AdamW, no weight decay; stay in train mode.

    Args:
        model: ``model(**batch).loss`` is a scalar.
        train: tensors (samples, ...).
        steps, batch: optimiser steps, and samples in each.
        rate: peak learning rate, reached after a tenth of the steps; then falls linearly to zero.
        seed: of the order of the samples, which is shuffled anew in each epoch.
        on_step: called after each step with the number of steps taken.

    Raises:
        DivergedError: the loss is infinite or NaN.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    order = _sample_order(len(next(iter(train.values()))), steps * batch, seed)
    warmup = max(1, steps // 10)
    model.train()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(step / warmup, (steps - step + 1) / (steps - warmup + 1))
        loss = loss_of(model, take_samples(train, order[(step - 1) * batch : step * batch]))
        if not torch.isfinite(loss):
            raise DivergedError(f"the training loss is {float(loss)} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if on_step is not None:
            on_step(step)


def _sample_order(count: int, num_samples: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    epochs = range(1 + num_samples // count)
    return torch.cat([torch.randperm(count, generator=generator) for _ in epochs])
