"""A single fine-tuning run: one method, learning rate and seed in a domain."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from torch import nn

from ..meter import Meter
from ..methods import METHODS, Job, after_step
from .descent import DivergedError, descend, loss_of
from .domain import Domain, Task

MAX_FORWARDS = 32  # limit for EVA, in both packages
RHO = 2.0


def fine_tune(
    domain: Domain, method: str, rate: float, seed: int, task: Task, curve: bool = True
) -> dict[str, Any]:
    """Fine-tune a fresh copy of the base; evaluate it on one split of the task and the old task.

    Args:
        domain: its base is not changed.
        method: of ``METHODS``.
        rate: learning rate.
        seed: of initialisation, new head, calibration batches and order of the batches.
        task: the only split that is evaluated.
        curve: evaluate the loss during training, too.

    Returns:
        ``curve`` of (step, loss), final ``loss`` and ``score``, ``old_loss`` and ``old_score``,
        number of trained ``parameters``, ``forwards`` of the initialisation, ``cpu_seconds`` (of
        the host, without GPU time).
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice for users of an individual method
        torch.manual_seed(seed)
        return _fine_tune(domain, method, rate, seed, task, curve)


def _fine_tune(
    domain: Domain, method: str, rate: float, seed: int, task: Task, curve: bool
) -> dict[str, Any]:
    recipe = domain.recipe
    begin = time.process_time()
    model, forwards = start_method(domain, method, seed)
    initialised = time.process_time()
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    losses = [(0, task.loss(model))] if curve else []

    def on_step(step: int) -> None:
        after_step(model, step)
        if curve and step % recipe.every == 0 and step < recipe.steps:
            losses.append((step, task.loss(model)))

    descend(
        model,
        domain.train,
        steps=recipe.steps,
        batch=recipe.batch,
        rate=rate,
        seed=seed,
        on_step=on_step,
    )
    loss, score = task.loss_and_score(model)
    old_loss, old_score = domain.old.loss_and_score(model)
    row = {
        "curve": [*losses, (recipe.steps, loss)],
        "loss": loss,
        "score": score,
        "old_loss": old_loss,
        "old_score": old_score,
        "parameters": parameters,
        "forwards": forwards,
    }
    if not torch.isfinite(torch.tensor([row["loss"], row["old_loss"]])).all():
        raise DivergedError(
            f"the loss is {row['loss']} at the end, on the old task {row['old_loss']}"
        )
    row["cpu_seconds"] = {
        "initialise": round(initialised - begin, 3),
        "all": round(time.process_time() - begin, 3),
    }
    return row


def start_method(domain: Domain, method: str, seed: int) -> tuple[nn.Module, int]:
    """Return a fresh base with a method's adapter, and the number of forward passes it took."""
    job = Job(
        targets=domain.targets,
        batches=domain.calibration(seed),
        loss=loss_of,
        r=domain.recipe.r,
        rho=RHO,
        max_forwards=MAX_FORWARDS,
        steps=domain.recipe.steps,
        seed=seed,
        text=domain.text,
        modules_to_save=domain.head,
    )
    meter = Meter()
    return METHODS[method].start(domain.fresh(seed), job, meter), meter.forwards
