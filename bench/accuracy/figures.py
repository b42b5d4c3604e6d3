"""Plots of accuracy: vs. the time of a step, and vs. tokens seen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from eva_peft.results.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .show import Group

MAX_PANELS = 6
ROUNDING = 1e-9
SIZE = 7, 4.5  # inches
# Peers in Okabe and Ito's warm colours, sketches in a blue that darkens with their width; each also
# has its own marker.
_STYLES = {
    "peft": ("#D55E00", "s"),
    "peft-2k": ("#E69F00", "D"),
    "scikit": ("#CC79A7", "X"),
    "gram": ("#000000", "*"),
}
_BLUES = ("#9ecae1", "#6baed6", "#3182bd", "#1f5fa8", "#08306b")
_MARKERS = ("o", "v", "P", "^", "h")


def plot_lost_vs_time(groups: Sequence[Group], labels: Mapping[str, str]) -> Figure:
    """Plot lost variance vs. the time of a step: one point per method, one panel per input."""
    figure = new_figure(SIZE, "Lost variance against the time of a step, by method and layer input")
    panels = _panel_rows(groups)
    columns = min(3, len(panels))
    num_rows = math.ceil(len(panels) / columns)
    axes = figure.subplots(num_rows, columns, sharey=True, squeeze=False).flatten()
    floor = _exact_level(
        method["points"][-1]["lost"] for row in panels for method in row["methods"].values()
    )
    styles = _styles(labels)
    for ax, row in zip(axes, panels, strict=False):
        sketch_points = []
        for name, method in row["methods"].items():
            ms, lost = method["ms"]["median"], max(method["points"][-1]["lost"], floor)
            colour, marker = styles[name]
            ax.plot(ms, lost, marker, color=colour, markersize=6, label=labels[name], zorder=3)
            if name.startswith("sketch"):
                sketch_points.append((ms, lost))
        if sketch_points:
            ax.plot(*zip(*sketch_points, strict=True), color=_BLUES[2], linewidth=0.8, zorder=2)
        ax.set_title(f"{row['input']} (D = {row['features']})", fontsize=8)
        _set_log_log(ax)
        _set_plain_ticks(ax, [method["ms"]["median"] for method in row["methods"].values()])
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    for ax in axes[::columns]:
        ax.set_ylabel("lost variance", fontsize=8)
    for ax in axes[max(0, len(panels) - columns) : len(panels)]:
        ax.set_xlabel("milliseconds a step", fontsize=8)
    _mark_exact_level(axes[: len(panels)], floor, panels)
    _add_legend(figure, axes[0])
    return figure


def plot_lost_vs_tokens(groups: Sequence[Group], labels: Mapping[str, str]) -> Figure:
    """Plot lost variance vs. tokens seen: one line per method, one panel per group of inputs."""
    figure = new_figure(SIZE, "Lost variance over the tokens seen, by method")
    axes = figure.subplots(1, len(groups), sharey=True, squeeze=False).flatten()
    rows = [row for group in groups for row in group.rows]
    floor = _exact_level(
        p["lost"] for row in rows for m in row["methods"].values() for p in m["points"]
    )
    styles = _styles(labels)
    for ax, group in zip(axes, groups, strict=True):
        tokens = [point["tokens"] for point in group.rows[0]["exact"]]
        for name in group.ms:
            series = zip(*(row["methods"][name]["points"] for row in group.rows), strict=True)
            lost = [max(median(p["lost"] for p in points), floor) for points in series]
            colour, marker = styles[name]
            ax.plot(tokens, lost, color=colour, marker=marker, markersize=4, label=labels[name])
        ax.set_title(group.title, fontsize=8)
        ax.set_xlabel("tokens seen", fontsize=8)
        _set_log_log(ax)
        ax.set_xticks(tokens[::2], [_format_thousands(count) for count in tokens[::2]])
    axes[0].set_ylabel("lost variance (median over inputs)", fontsize=8)
    _mark_exact_level(axes, floor, rows)
    _add_legend(figure, axes[0])
    return figure


def plot_rank_errors(ranks: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> Figure:
    """Plot the rank error to the exact allocation as a heat map: methods vs. tokens seen."""
    figure = new_figure(SIZE, "Ranks off the exact allocation, by method and tokens seen")
    ax = figure.subplots()
    names = list(dict.fromkeys(entry["method"] for entry in ranks))
    tokens = list(dict.fromkeys(entry["tokens"] for entry in ranks))
    error_at = {(entry["method"], entry["tokens"]): entry["rank_error"] for entry in ranks}
    grid = [[error_at.get((name, count), 0) for count in tokens] for name in names]
    max_error = max(*(max(line) for line in grid), 1)
    ax.imshow(grid, cmap="YlGnBu", vmin=0, vmax=max_error, aspect="auto")
    for i, line in enumerate(grid):
        for j, value in enumerate(line):
            colour = "white" if value > 0.6 * max_error else "black"
            ax.text(j, i, str(value), ha="center", va="center", color=colour, fontsize=9)
    ax.set_xticks(range(len(tokens)), [_format_thousands(count) for count in tokens], fontsize=9)
    ax.set_yticks(range(len(names)), [labels[name] for name in names], fontsize=9)
    ax.set_xlabel("tokens seen", fontsize=9)
    ax.set_title("Ranks off the exact allocation, sum over the real layer inputs", fontsize=9)
    return figure


def _panel_rows(groups: Sequence[Group]) -> list[Mapping[str, Any]]:
    """Choose inputs to show: the first of every group, and more of the first group."""
    others = [group.rows[0] for group in groups[1:]][: MAX_PANELS - 1]
    return [*groups[0].rows[: MAX_PANELS - len(others)], *others]


def _styles(labels: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    sketches = [name for name in labels if name not in _STYLES]
    blues = {
        name: (_BLUES[i % len(_BLUES)], _MARKERS[i % len(_MARKERS)])
        for i, name in enumerate(sketches)
    }
    return {**_STYLES, **blues}


def _exact_level(values: Iterable[float]) -> float:
    """Return the decade below the least value above rounding, where exact answers are drawn."""
    seen = [value for value in values if value > ROUNDING]
    return 10.0 ** (math.floor(math.log10(min(seen, default=1e-6))) - 1)


def _mark_exact_level(
    axes: Iterable[Axes], floor: float, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Label the level at which exact answers are drawn, if there are any."""
    points = [p for row in rows for m in row["methods"].values() for p in m["points"]]
    if all(point["lost"] > ROUNDING for point in points):
        return
    for ax in axes:
        ax.axhline(floor, color="#999999", linewidth=0.8, linestyle=":", zorder=1)
        exponents = range(round(math.log10(floor)) + 1, 1, 2)
        ticks, labels = [10.0**e for e in exponents], [f"$10^{{{e}}}$" for e in exponents]
        ax.set_yticks([floor, *ticks], ["exact", *labels])
        ax.set_ylim(floor / 2.5, None)


def _set_log_log(ax: Axes) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.grid(alpha=0.3)
    ax.tick_params(labelsize=7)
    ax.tick_params(which="minor", labelbottom=False, labelleft=False)


def _set_plain_ticks(ax: Axes, values: Sequence[float]) -> None:
    """Set ticks at 1, 3, 10, ... within the values, as plain numbers."""
    ax.set_xlim(min(values) / 1.7, max(values) * 1.7)
    decades = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in (1, 3)]
    ticks = [tick for tick in ticks if min(values) / 1.7 <= tick <= max(values) * 1.7]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def _format_thousands(count: float) -> str:
    return f"{count / 1000:.3g}k" if count >= 1000 else f"{count:g}"


def _add_legend(figure: Figure, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=7.5, ncols=5, frameon=False)
