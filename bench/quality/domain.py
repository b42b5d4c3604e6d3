"""A domain: a pre-trained base, the task it is adapted to, and the task it was trained on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import Batch


@dataclass(frozen=True)
class Recipe:
    """The settings that all methods share in a domain, known before anything is built.

    Attributes:
        title: heading.
        what: one sentence: base, task, old task.
        loss, score: names of the two measures, with units; a higher score is better.
        old: what the old task's loss and score are.
        steps: optimiser steps of a fine-tuning.
        every: steps between two evaluations on the test split.
        batch: samples a step.
        r: rank of every layer; methods that move ranks keep their sum.
        calibration: batches, of ``batch`` samples each, for methods that look at data.
        rates: highest learning rates of the sweep, rising.
    """

    title: str
    what: str
    loss: str
    score: str
    old: str
    steps: int
    every: int
    batch: int
    r: int
    calibration: int
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


@dataclass(frozen=True)
class Task:
    """Something a model is measured on; both functions leave it as it was.

    Attributes:
        loss: ``f(model)``, lower is better.
        both: ``f(model)`` returns the loss and the score; a higher score is better.
    """

    loss: Callable[[nn.Module], float]
    both: Callable[[nn.Module], tuple[float, float]]


@dataclass(frozen=True)
class Domain:
    """A base and its tasks; built from a seed, the same in every process.

    Attributes:
        base: in eval mode; never changed, ``fresh`` copies it. ``base(**batch).loss`` is what
            training goes down on.
        targets: names of the layers to adapt.
        train: training split of the target task, (samples, ...) each.
        validation, test: held-out splits of the target task.
        old: what the base was pre-trained for.
        text: batches are text, with an ``attention_mask``.
        head: names of layers that are new to the task and trained whole.
    """

    recipe: Recipe
    base: nn.Module
    targets: tuple[str, ...]
    train: Batch
    validation: Task
    test: Task
    old: Task
    text: bool = False
    head: tuple[str, ...] = ()

    def fresh(self, seed: int) -> nn.Module:
        """Return a copy of the base; the weights of a new head are drawn by the seed."""
        model = copy.deepcopy(self.base)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name in self.head:
                layer: Any = model.get_submodule(name)
                layer.reset_parameters()
        return model

    def calibration(self, seed: int) -> list[Batch]:
        """Draw batches from the training split, the same for all methods."""
        recipe = self.recipe
        generator = torch.Generator().manual_seed(10_000 + seed)
        count = len(next(iter(self.train.values())))
        order = torch.randperm(count, generator=generator)[: recipe.calibration * recipe.batch]
        return [take(self.train, rows) for rows in order.split(recipe.batch)]


def take(batch: Batch, rows: Tensor | slice) -> Batch:
    """Return some samples; the padding that all of them share is cut."""
    taken = {key: value[rows] for key, value in batch.items()}
    mask = taken.get("attention_mask")
    if mask is None:
        return taken
    length = int(mask.sum(1).max())
    return {k: v[:, :length] if v.shape[1:2] == mask.shape[1:2] else v for k, v in taken.items()}


def chunks(batch: Batch, size: int) -> list[Batch]:
    """Cut a split into batches."""
    count = len(next(iter(batch.values())))
    return [take(batch, slice(i, i + size)) for i in range(0, count, size)]


Measure = Callable[[Any, Batch], Tensor]
ANSWERS = ("labels", "classes")  # keys of what a model is trained to tell


@torch.no_grad()
def evaluate(model: nn.Module, batch: Batch, size: int, *measures: Measure) -> list[float]:
    """Return the mean over samples of ``measure(output, batch)``, a value for each, in eval mode.

    The model is given no answers, so that no method's own addition to the loss is counted.
    """
    training = model.training
    model.eval()
    values: list[list[Tensor]] = [[] for _ in measures]
    for part in chunks(batch, size):
        output = model(**{key: value for key, value in part.items() if key not in ANSWERS})
        for found, measure in zip(values, measures, strict=True):
            found.append(measure(output, part))
    model.train(training)
    return [float(torch.cat(found).double().mean()) for found in values]


def examples(batch: Batch, size: int, loss: Measure, score: Measure) -> Task:
    """Return the task to do well on the samples of a split, read ``size`` at a time."""

    def both(model: nn.Module) -> tuple[float, float]:
        first, second = evaluate(model, batch, size, loss, score)
        return first, second

    return Task(lambda model: evaluate(model, batch, size, loss)[0], both)


def classification(batch: Batch, answer: str = "labels", size: int = 64) -> Task:
    """Return the task to tell the answer from the rest: cross entropy in nats, and accuracy."""

    def loss(output: Any, part: Batch) -> Tensor:
        return nn.functional.cross_entropy(output.logits, part[answer], reduction="none")

    def right(output: Any, part: Batch) -> Tensor:
        return (output.logits.argmax(-1) == part[answer]).float()

    return examples(batch, size, loss, right)


def linear_layers(model: nn.Module, without: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the full names of the linear layers, those left out whose name begins so."""
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(tuple(without))
    )
