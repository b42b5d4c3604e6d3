"""The plots of ``quality``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from eva_peft.results.plots import new_figure

from .statistics import mean_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours that can be distinguished with common kinds of colour blindness.
COLOURS = ("#0072b2", "#d55e00", "#009e73")
Curve = Sequence[Sequence[float]]


def plot_final_losses(
    values: Mapping[str, Mapping[int, float]], ours: str | None, measure: str
) -> Figure:
    """Plot the final loss of every method: mean, two standard errors, and all seeds.

    Args:
        values: label -> seed -> loss.
        ours: label whose interval is shaded.
        measure: name of the axis.
    """
    size = 7, 1 + 0.3 * len(values)
    figure = new_figure(size, "Loss at the end of fine-tuning, one line a method")
    axes = figure.subplots()
    for place, (label, by_seed) in enumerate(values.items()):
        mean, error = mean_error(list(by_seed.values()))
        colour = COLOURS[0] if label == ours else "#444444"
        interval = 2 * (error or 0.0)
        if label == ours:
            axes.axvspan(mean - interval, mean + interval, color=colour, alpha=0.12, linewidth=0)
        axes.plot(list(by_seed.values()), [place] * len(by_seed), "|", color=colour, alpha=0.5)
        axes.errorbar(mean, place, xerr=interval, fmt="o", markersize=4, color=colour, capsize=2)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.set_xlabel(measure)
    axes.grid(alpha=0.3, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_loss_curves(
    runs: Mapping[str, tuple[str, Sequence[Curve]]],
    highlighted: Sequence[str],
    target_loss: float | None,
    measure: str,
) -> Figure:
    """Plot the mean loss vs. steps: some methods in colour, the others grey.

    Args:
        runs: method -> label, and for each seed its (step, loss) pairs by step.
        highlighted: methods in colour.
        target_loss: target loss, up to which steps are counted.
        measure: name of the axis.
    """
    figure = new_figure((7, 4.2), "Held-out loss over the steps of fine-tuning, one line a method")
    axes = figure.subplots()
    colours = dict(zip(highlighted, COLOURS, strict=True))
    for method in [*(m for m in runs if m not in colours), *(m for m in highlighted if m in runs)]:
        label, seeds = runs[method]
        steps = [step for step, _ in seeds[0]]
        means = [sum(curve[i][1] for curve in seeds) / len(seeds) for i in range(len(steps))]
        if method in colours:
            axes.plot(steps, means, color=colours[method], marker="o", markersize=3, label=label)
        else:
            axes.plot(steps, means, color="#bbbbbb", linewidth=0.8)
    if target_loss is not None:
        axes.axhline(target_loss, color="#444444", linewidth=0.8, linestyle=":")
    axes.set_xlabel("optimiser steps (grey: the other methods)")
    axes.set_ylabel(measure)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
