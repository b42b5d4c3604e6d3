"""One fine-tuning: a method, a learning rate and a seed, in a domain."""

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

MOST_FORWARDS = 32  # of EVA, both packages
RHO = 2.0


def fine_tune(
    domain: Domain, method: str, rate: float, seed: int, task: Task, curve: bool = True
) -> dict[str, Any]:
    """Adapt a fresh copy of the base, and measure it on one split of the task and on the old task.

    Args:
        domain: its base stays as it is.
        method: of ``METHODS``.
        rate: learning rate.
        seed: of initialisation, new head, calibration batches and order of the batches.
        task: the split that is looked at; no other is.
        curve: take the loss also on the way.

    Returns:
        ``curve`` (step, loss), ``loss`` and ``score`` at the end, ``old_loss`` and ``old_score``,
        trained ``parameters``, ``forwards`` of the initialisation, ``cpu_seconds`` (of
        the host: what a GPU takes is not in them).
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice to users of single methods
        torch.manual_seed(seed)
        return _fine_tune(domain, method, rate, seed, task, curve)


def _fine_tune(
    domain: Domain, method: str, rate: float, seed: int, task: Task, curve: bool
) -> dict[str, Any]:
    recipe = domain.recipe
    begin = time.process_time()
    model, forwards = start(domain, method, seed)
    initialised = time.process_time()
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    losses = [(0, task.loss(model))] if curve else []

    def after(step: int) -> None:
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
        after=after,
    )
    loss, score = task.both(model)
    old_loss, old_score = domain.old.both(model)
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


def start(domain: Domain, method: str, seed: int) -> tuple[nn.Module, int]:
    """Return a fresh base with the adapter of a method, and how many forward passes that took."""
    job = Job(
        targets=domain.targets,
        batches=domain.calibration(seed),
        loss=loss_of,
        r=domain.recipe.r,
        rho=RHO,
        most_forwards=MOST_FORWARDS,
        steps=domain.recipe.steps,
        seed=seed,
        text=domain.text,
        modules_to_save=domain.head,
    )
    meter = Meter()
    return METHODS[method].start(domain.fresh(seed), job, meter), meter.forwards
