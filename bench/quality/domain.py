"""A domain: a pre-trained base, the task it is fine-tuned for, and the task it was trained on."""

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
        what: one sentence that describes base, task and old task.
        loss, score: names of the two measures, with units; a higher score is better.
        old: description of the old task's loss and score.
        steps: optimiser steps of a fine-tuning.
        every: steps between two evaluations on the test split.
        batch: samples per step.
        r: rank of every layer; methods that redistribute ranks keep their sum.
        calibration: number of batches of ``batch`` samples for data-driven methods.
        rates: peak learning rates of the sweep, ascending.
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
    """A task on which models are evaluated; both functions leave the model unchanged.

    Attributes:
        loss: ``f(model)``, lower is better.
        loss_and_score: ``f(model)`` returns the loss and the score; a higher score is better.
    """

    loss: Callable[[nn.Module], float]
    loss_and_score: Callable[[nn.Module], tuple[float, float]]


@dataclass(frozen=True)
class Domain:
    """A base and its tasks; built from a seed, the same in every process.

    Attributes:
        base: in eval mode; never changed, ``fresh`` copies it. Training minimises
            ``base(**batch).loss``.
        targets: names of the layers to adapt.
        train: training split of the target task, tensors (samples, ...).
        validation, test: held-out splits of the target task.
        old: the task for which the base was pre-trained.
        text: batches are text, with an ``attention_mask``.
        head: names of layers that are new for the task and fully trained.
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
        """Return a copy of the base; the seed determines the weights of a new head."""
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
        return [take_samples(self.train, rows) for rows in order.split(recipe.batch)]


def take_samples(batch: Batch, rows: Tensor | slice) -> Batch:
    """Return the given samples, without the padding common to all of them."""
    samples = {key: value[rows] for key, value in batch.items()}
    mask = samples.get("attention_mask")
    if mask is None:
        return samples
    length = int(mask.sum(1).max())
    return {k: v[:, :length] if v.shape[1:2] == mask.shape[1:2] else v for k, v in samples.items()}


def split_batches(batch: Batch, size: int) -> list[Batch]:
    """Cut a split into batches."""
    count = len(next(iter(batch.values())))
    return [take_samples(batch, slice(i, i + size)) for i in range(0, count, size)]


Measure = Callable[[Any, Batch], Tensor]
ANSWERS = ("labels", "classes")  # keys of the targets that a model is trained to predict


@torch.no_grad()
def evaluate(model: nn.Module, batch: Batch, size: int, *measures: Measure) -> list[float]:
    """Return for each measure the mean over samples of ``measure(output, batch)``, in eval mode.

    The model gets no labels, so that terms that a method adds to the loss do not count.
    """
    training = model.training
    model.eval()
    values: list[list[Tensor]] = [[] for _ in measures]
    for part in split_batches(batch, size):
        output = model(**{key: value for key, value in part.items() if key not in ANSWERS})
        for found, measure in zip(values, measures, strict=True):
            found.append(measure(output, part))
    model.train(training)
    return [float(torch.cat(found).double().mean()) for found in values]


def samples_task(batch: Batch, size: int, loss: Measure, score: Measure) -> Task:
    """Return the task to do well on the samples of a split, evaluated ``size`` at a time."""

    def loss_and_score(model: nn.Module) -> tuple[float, float]:
        first, second = evaluate(model, batch, size, loss, score)
        return first, second

    return Task(lambda model: evaluate(model, batch, size, loss)[0], loss_and_score)


def classification_task(batch: Batch, answer: str = "labels", size: int = 64) -> Task:
    """Return the task to predict the key ``answer``: cross entropy in nats, and accuracy."""

    def loss(output: Any, part: Batch) -> Tensor:
        return nn.functional.cross_entropy(output.logits, part[answer], reduction="none")

    def correct(output: Any, part: Batch) -> Tensor:
        return (output.logits.argmax(-1) == part[answer]).float()

    return samples_task(batch, size, loss, correct)


def linear_layers(model: nn.Module, without: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the full names of the linear layers, except those with a prefix in ``without``."""
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(tuple(without))
    )
