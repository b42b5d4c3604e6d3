"""Short fine-tuning runs that differ only in the initial values of `lora_A`.

The demo compares three starts with the same total rank, text, order of batches and learning rate:
EVA, PEFT's default random start, and random rows with orthonormal directions. The last one is the
control: its rows have the length of EVA's, so what EVA gains over it comes from the directions.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from eva_peft.results.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Start = Callable[[torch.nn.Module, int], PeftModel]


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters that all runs share.

    Attributes:
        steps: optimiser steps.
        every: steps between two evaluations.
        batch: blocks per step.
        learning_rate: highest rate of AdamW, reached after a tenth of the steps and falling to
            zero. The default lies between the best of 0.002, 0.004 and 0.008 for EVA (0.002) and
            the best for both random starts (0.004).
    """

    steps: int = 40
    every: int = 10
    batch: int = 4
    learning_rate: float = 3e-3


@dataclass(frozen=True)
class Curve:
    """The held-out losses of one start over several seeds.

    Attributes:
        steps: steps at which the loss was taken, 0 first.
        runs: one list of losses per seed, nats per token.
        parameters: number of trained values.
        rank: sum of the ranks over the layers.
    """

    steps: list[int]
    runs: list[list[float]]
    parameters: int
    rank: int

    def mean(self) -> list[float]:
        """Return the mean over seeds, one value per step."""
        return [statistics.fmean(losses) for losses in zip(*self.runs, strict=True)]

    def standard_error(self) -> list[float]:
        """Return the standard error of the mean, 0 for a single seed."""
        if len(self.runs) < 2:
            return [0.0] * len(self.steps)
        root = len(self.runs) ** 0.5
        return [statistics.stdev(losses) / root for losses in zip(*self.runs, strict=True)]


def random_start(config: LoraConfig) -> Start:
    """Make PEFT's default start: Kaiming-uniform `lora_A`, zero `lora_B`."""

    def start(base: torch.nn.Module, seed: int) -> PeftModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return get_peft_model(base, copy.deepcopy(config))

    return start


def orthonormal_start(config: LoraConfig) -> Start:
    """Make the control: the rows of `lora_A` are random, orthogonal and of length one."""
    wrap = random_start(config)

    def start(base: torch.nn.Module, seed: int) -> PeftModel:
        model = wrap(base, seed)
        generator = torch.Generator().manual_seed(seed)
        for weight in lora_a_weights(model).values():
            torch.nn.init.orthogonal_(weight, generator=generator)
        return model

    return start


def lora_a_weights(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """Map the names of layers in the base model to their `lora_A` weights (rank, in_features)."""
    suffix = ".lora_A.default.weight"
    prefix = "base_model.model."
    return {
        name.removesuffix(suffix).removeprefix(prefix): parameter
        for name, parameter in model.named_parameters()
        if name.endswith(suffix)
    }


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, blocks: torch.Tensor) -> float:
    """Return the mean loss in nats per token over blocks of token ids (count, length)."""
    model.eval()
    total = 0.0
    for part in blocks.split(8):
        total += float(model(input_ids=part, labels=part, use_cache=False).loss) * len(part)
    model.train()
    return total / len(blocks)


def finetune(
    model: PeftModel, train: torch.Tensor, held_out: torch.Tensor, recipe: Recipe, seed: int
) -> tuple[list[int], list[float]]:
    """Train the adapter of a model in place.

    Args:
        model: adapted model; only its adapter is trained.
        train: blocks of token ids (count, length).
        held_out: blocks of token ids (count, length) for the evaluation.
        recipe: hyper-parameters of the runs.
        seed: of the order of the batches.

    Returns:
        The evaluated steps and the held-out losses in nats per token.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat(
        [
            torch.randperm(len(train), generator=generator)
            for _ in range(1 + recipe.steps * recipe.batch // len(train))
        ]
    )
    warmup = max(1, recipe.steps // 10)
    steps, losses = [0], [held_out_loss(model, held_out)]
    for step in range(1, recipe.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(
                step / warmup, (recipe.steps - step + 1) / (recipe.steps - warmup + 1)
            )
        block = train[order[(step - 1) * recipe.batch : step * recipe.batch]]
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=block, labels=block, use_cache=False).loss.backward()
        optimizer.step()
        if step % recipe.every == 0 or step == recipe.steps:
            steps.append(step)
            losses.append(held_out_loss(model, held_out))
    return steps, losses


def compare_starts(
    base: torch.nn.Module,
    starts: dict[str, Start],
    train: torch.Tensor,
    held_out: torch.Tensor,
    recipe: Recipe,
    seeds: int,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Curve]:
    """Fine-tune a copy of the base model from every start, once per seed, starts interleaved.

    Args:
        base: model to adapt; it is copied for every run and stays as it is.
        starts: name -> function that wraps a model with an adapter, given a seed.
        train: blocks of token ids (count, length).
        held_out: blocks of token ids (count, length).
        recipe: hyper-parameters of the runs.
        seeds: runs of every start, with seeds 0, 1, ...
        progress: called with a line of text before every run.

    Returns:
        Name -> losses over steps and seeds.
    """
    curves: dict[str, Curve] = {}
    for seed in range(seeds):
        for name, start in starts.items():
            if progress is not None:
                progress(f"fine-tuning, {name}, seed {seed + 1} of {seeds}")
            model = start(copy.deepcopy(base), seed)
            steps, losses = finetune(model, train, held_out, recipe, seed)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            rank = sum(len(a) for a in lora_a_weights(model).values())
            earlier_runs = curves[name].runs if name in curves else []
            curves[name] = Curve(steps, [*earlier_runs, losses], trained, rank)
    return curves


def describe(curves: dict[str, Curve]) -> dict[str, Any]:
    """Return the curves as JSON-able numbers."""
    return {
        name: {
            "steps": curve.steps,
            "runs": curve.runs,
            "mean": curve.mean(),
            "standard_error": curve.standard_error(),
            "parameters": curve.parameters,
            "rank": curve.rank,
        }
        for name, curve in curves.items()
    }


def format_table(
    described: dict[str, Any], learning_rate: float
) -> tuple[str, list[str], list[list[str]], str]:
    """Format described curves as a table: heading, column names, rows of text, note."""
    first = next(iter(described.values()))
    steps, seeds = first["steps"], len(first["runs"])
    shown = (0, len(steps) // 2, -1)
    rows = []
    for name, curve in described.items():
        losses = [f"{curve['mean'][i]:.3f}" for i in shown]
        error = f"{curve['standard_error'][-1]:.3f}" if seeds > 1 else "-"
        rows.append([name, str(curve["rank"]), f"{curve['parameters']:,}", *losses, error])
    headers = ["start", "ranks", "parameters", *(f"step {steps[i]}" for i in shown), "s.e."]
    note = (
        "Held-out loss in nats per token; same total rank, steps, batches and learning rate "
        f"({learning_rate:g}); mean over {seeds} {'seed' if seeds == 1 else 'seeds'}. s.e.: "
        "standard error at the last step."
    )
    return "Fine-tuning", headers, rows, note


def plot_curves(curves: dict[str, Curve]) -> Figure:
    """Draw the held-out loss over the steps, with the standard error as a band."""
    figure = new_figure((7, 4.2), "Held-out loss over the steps of fine-tuning, one line a start")
    axes = figure.subplots()
    # Colours that are distinguishable with the common kinds of colour blindness.
    colours = ("#0072b2", "#d55e00", "#009e73")
    for (name, curve), colour in zip(curves.items(), colours, strict=False):
        mean, error = curve.mean(), curve.standard_error()
        low = [m - e for m, e in zip(mean, error, strict=True)]
        high = [m + e for m, e in zip(mean, error, strict=True)]
        axes.fill_between(curve.steps, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(curve.steps, mean, color=colour, marker="o", markersize=3, label=name)
    axes.set_xlabel("optimiser steps")
    axes.set_ylabel("held-out loss, nats per token")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
