"""Draw an `EvaResult` with matplotlib: ranks, explained variance, convergence and cost.

Every `plot_` function takes a finished calibration and returns a new figure, which is not part of
pyplot's state and whose label describes it in words.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import EvaValueError
from ..surroundings.files import atomic_write
from .layer_names import layer_table, module_kinds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase
    from matplotlib.ticker import MaxNLocator

    from .result import EvaResult

SUFFIXES = (".png", ".svg")

# From the Okabe-Ito palette: distinguishable with every common colour blindness.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#999999"
_MAX_CURVES = 8
_RANK_COLOURS = "YlGnBu"
_MISSING_CELL = "#e4e4e4"
_DPI = 130


def plot_ranks(result: EvaResult) -> Figure:
    """Draw the rank of every layer as a heat map: one row per module kind, one column per block.

    Layers whose name has no block index share one column.
    """
    _, rows, columns = _rank_grid(result.ranks)
    size = (min(max(3.5 + 0.36 * len(columns), 6.0), 26.0), min(1.7 + 0.32 * len(rows), 26.0))
    figure = new_figure(size, f"Rank given to each of {len(result.ranks)} layers, as a heat map")
    _draw_ranks(figure, result, size)
    return figure


def plot_explained_variance(result: EvaResult) -> Figure:
    """Draw the cumulative explained variance of every module kind: median and range over blocks.

    Module kinds that read the same input share a curve. A dot marks the mean rank.
    """
    figure = new_figure((8.5, 4.2), "Cumulative explained variance over components by module kind")
    _draw_explained_variance(figure, result)
    return figure


def plot_convergence(result: EvaResult) -> Figure:
    """Draw how many layers had converged after each step, and the |cos| between steps."""
    figure = new_figure((8.5, 4.6), "Converged layers and similarity between steps over the pass")
    _draw_convergence(figure, result)
    return figure


def plot_cost(result: EvaResult) -> Figure:
    """Draw the seconds spent in each phase, and the peak memory."""
    figure = new_figure((8.5, 2.9), "Seconds by phase and peak memory")
    _draw_cost(figure, result)
    return figure


def plot_result(result: EvaResult) -> Figure:
    """Draw ranks, explained variance, convergence and cost in one 2 x 2 figure."""
    _, rows, columns = _rank_grid(result.ranks)
    left = min(max(7.0, 2.2 + 0.26 * len(columns)), 20.0)
    top = min(max(4.2, 1.5 + 0.27 * len(rows)), 24.0)
    right, bottom = 7.0, 4.6
    figure = new_figure(
        (left + right, top + bottom), "Ranks, explained variance, convergence, cost"
    )
    panels: Any = figure.subfigures(2, 2, width_ratios=[left, right], height_ratios=[top, bottom])
    _draw_ranks(panels[0, 0], result, (left, top))
    _draw_explained_variance(panels[0, 1], result)
    _draw_convergence(panels[1, 0], result)
    _draw_cost(panels[1, 1], result)
    return figure


def save_result_plot(result: EvaResult, path: str | os.PathLike[str]) -> None:
    """Write `plot_result` to a file in the format of its suffix; its folder is created.

    Raises:
        EvaValueError: a suffix other than `.png` and `.svg`.
        ImportError: matplotlib is not installed.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise EvaValueError(
            f"cannot write a plot to {os.fspath(path)!r}: its name must end in one of "
            f"{', '.join(SUFFIXES)}"
        )
    figure = plot_result(result)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(Path(path)) as temporary:
        figure.savefig(temporary, format=suffix[1:], dpi=_DPI)


def _rank_grid(ranks: dict[str, int]) -> tuple[np.ndarray[Any, Any], list[str], list[str]]:
    """Lay the ranks out as (kinds, blocks), NaN where a block has no such layer."""
    table = layer_table(ranks)
    rows = {kind: i for i, kind in enumerate(dict.fromkeys(kind for kind, _ in table.values()))}
    blocks = sorted({block for _, block in table.values() if block is not None})
    columns = {block: i for i, block in enumerate(blocks)}
    labels = [str(block) for block in blocks]
    if any(block is None for _, block in table.values()):
        labels.append("none")
    grid = np.full((len(rows), len(labels)), np.nan)
    for name, (kind, block) in table.items():
        column = len(labels) - 1 if block is None else columns[block]
        grid[rows[kind], column] = ranks[name]
    return grid, list(rows), labels


def _draw_ranks(figure: FigureBase, result: EvaResult, size: tuple[float, float]) -> None:
    grid, rows, columns = _rank_grid(result.ranks)
    axes = figure.subplots()
    if not rows:
        _draw_message(axes, "no layers")
        return
    axes.set_facecolor(_MISSING_CELL)
    top = max(float(np.nanmax(grid)), 1.0)
    image = axes.imshow(
        np.ma.masked_invalid(grid), cmap=_RANK_COLOURS, vmin=0, vmax=top, aspect="auto"
    )
    width = 72 * (size[0] - 1.3 - 0.085 * max(map(len, rows))) / len(columns)
    height = 72 * (size[1] - 1.2) / len(rows)
    _write_cell_numbers(axes, grid, top, width, height)
    stride = max(1, round(0.5 + 14 / max(width, 1.0)))
    axes.set_xticks(range(0, len(columns), stride), columns[::stride])
    axes.set_yticks(range(len(rows)), rows, fontsize=min(9.0, max(3.0, 0.8 * height)))
    axes.set_xticks(np.arange(0.5, len(columns) - 1), minor=True)
    axes.set_yticks(np.arange(0.5, len(rows) - 1), minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    axes.set_xlabel("block" if columns != ["none"] else "layers without a block index")
    if columns == ["none"]:
        axes.set_xticks([])
    axes.set_title(f"Rank by layer (total {sum(result.ranks.values())})")
    colour_bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    colour_bar.set_label("rank")
    colour_bar.locator = _integer_locator()


def _write_cell_numbers(
    axes: Axes, grid: np.ndarray[Any, Any], top: float, width: float, height: float
) -> None:
    """Write the ranks into cells of width x height points, if they can be read at that size."""
    size = min(9.0, 0.62 * height, 0.85 * width / (0.64 * len(f"{top:.0f}")))
    if size < 4.5:
        return
    for (row, column), rank in np.ndenumerate(grid):
        if not np.isnan(rank):
            colour = "white" if rank > 0.55 * top else "black"
            axes.text(
                column, row, f"{rank:.0f}", ha="center", va="center", color=colour, fontsize=size
            )


def _collect_curves(result: EvaResult) -> list[tuple[str, np.ndarray[Any, Any], float]]:
    """Gather (label, cumulative variance (layers, K), mean rank) by module kind."""
    kind_of = {name: kind for name, (kind, _) in layer_table(result.ranks).items()}
    if len(set(kind_of.values())) > _MAX_CURVES:  # many experts or stages
        kind_of = module_kinds(result.ranks)
    groups: dict[str, list[str]] = {}
    for name, kind in kind_of.items():
        groups.setdefault(kind, []).append(name)
    merged: dict[bytes, tuple[list[str], np.ndarray[Any, Any], list[int]]] = {}
    for kind, names in groups.items():
        curves = _cumulative(result, names)
        ranks = [result.ranks[name] for name in names]
        kinds, _, all_ranks = merged.setdefault(curves.tobytes(), ([], curves, []))
        kinds.append(kind)
        all_ranks.extend(ranks)
    curve_groups = [(", ".join(k), curves, float(np.mean(r))) for k, curves, r in merged.values()]
    if len(curve_groups) > _MAX_CURVES:
        all_names = list(result.ranks)
        ranks = [result.ranks[name] for name in all_names]
        curve_groups = [("all layers", _cumulative(result, all_names), float(np.mean(ranks)))]
    return curve_groups


def _cumulative(result: EvaResult, names: list[str]) -> np.ndarray[Any, Any]:
    ratios = [np.asarray(result.explained_variance_ratio[name], dtype=float) for name in names]
    width = max((len(ratio) for ratio in ratios), default=0)
    curves = np.zeros((len(names), width))
    for curve, ratio in zip(curves, ratios, strict=True):
        curve[: len(ratio)] = ratio
    return np.cumsum(curves, axis=1)


def _draw_explained_variance(figure: FigureBase, result: EvaResult) -> None:
    curves = [curve for curve in _collect_curves(result) if curve[1].size]
    if not curves:
        _draw_message(figure.subplots(), "no components")
        return
    rows = 1 if len(curves) < 4 else 2
    columns = -(-len(curves) // rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, (label, values, rank) in zip(panels, curves, strict=False):
        median = np.median(values, axis=0)
        steps = np.arange(1, len(median) + 1)
        axes.fill_between(steps, values.min(0), values.max(0), color=_BLUE, alpha=0.2, linewidth=0)
        axes.plot(steps, median, color=_BLUE, marker="." if len(steps) == 1 else None)
        if rank >= 1:
            height = float(np.interp(rank, steps, median))
            axes.plot(rank, height, "o", color=_ORANGE, markeredgecolor="white", markersize=7)
        axes.set_title(textwrap.fill(label, 66 // columns, break_long_words=False), fontsize=9)
        axes.grid(alpha=0.3)
    for i in range(len(curves), len(panels)):
        panels[i].set_axis_off()
        panels[i - columns].tick_params(labelbottom=True)
    panels[0].set_xlim(0)
    panels[0].set_ylim(0, 1.02)
    panels[0].xaxis.set_major_locator(_integer_locator())
    figure.suptitle("Explained variance: median and range over layers")
    figure.supxlabel("components (dot: mean rank given)", fontsize="medium")
    figure.supylabel("cumulative share of variance", fontsize="medium")


def _draw_convergence(figure: FigureBase, result: EvaResult) -> None:
    steps = list(result.history.get("step", []))
    if not steps:
        _draw_message(figure.subplots(), "no steps on record")
        return
    quantiles = _similarity_quantiles(result)
    marker = "." if len(steps) < 40 else None
    panels = figure.subplots(
        2 if quantiles else 1,
        1,
        sharex=True,
        squeeze=False,
        height_ratios=[1, 1.5] if quantiles else [1],
    ).flatten()
    layers = len(result.ranks)
    panels[0].plot(steps, result.history["converged"], color=_BLUE, marker=marker)
    panels[0].set_ylim(-0.04 * max(layers, 1), 1.08 * max(layers, 1))
    panels[0].yaxis.set_major_locator(_integer_locator(4))
    panels[0].set_ylabel("layers converged")
    panels[0].set_title(f"Convergence over steps ({layers} layers)")
    panels[0].grid(alpha=0.3)
    if quantiles:
        _draw_similarity(panels[1], quantiles, _tau(result), marker)
        figure.legend(loc="outside lower center", fontsize=8, ncols=4, frameon=False)
    panels[-1].set_xlabel("step")
    panels[-1].set_xlim(steps[0] - 0.5, steps[-1] + 0.5)
    panels[-1].xaxis.set_major_locator(_integer_locator())


def _similarity_quantiles(result: EvaResult) -> dict[int, np.ndarray[Any, Any]]:
    """Return the quantiles 0, 0.1, 0.5, 0.9 over layers for each step that has similarities."""
    quantiles = {}
    history = result.history
    for step, values in zip(history["step"], history["similarity"], strict=True):
        similarities = np.asarray([v for v in values or () if v is not None], dtype=float)
        similarities = similarities[np.isfinite(similarities)]
        if similarities.size:
            quantiles[step] = np.quantile(similarities, (0, 0.1, 0.5, 0.9))
    return quantiles


def _draw_similarity(
    axes: Axes, quantiles: dict[int, np.ndarray[Any, Any]], tau: float | None, marker: str | None
) -> None:
    """Draw 1 - |cos| downwards on a log scale, so that 0.9, 0.99 and 0.999 are evenly spaced."""
    x = list(quantiles)
    slowest, low, median, high = np.clip(1 - np.stack(list(quantiles.values()), axis=1), 1e-7, 1.0)
    axes.fill_between(
        x, low, high, color=_BLUE, alpha=0.2, linewidth=0, label="10 to 90 % of layers"
    )
    axes.plot(x, median, color=_BLUE, marker=marker, label="median layer")
    axes.plot(x, slowest, color=_ORANGE, linestyle="--", marker=marker, label="slowest layer")
    bottom = min(float(high.min()), 0.01)
    if tau is not None and 0 < tau < 1:
        axes.axhline(1 - tau, color="black", linewidth=1, linestyle=":", label=f"tau = {tau:g}")
        bottom = min(bottom, 1 - tau)
    axes.set_yscale("log")
    axes.set_ylim(1.2, 0.6 * bottom)
    ticks = [10.0**-n for n in range(8) if 10.0**-n >= 0.6 * bottom]
    axes.set_yticks(ticks, [f"{1 - tick:.7g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylabel("smallest |cos| to\nthe step before")
    axes.grid(alpha=0.3)


def _tau(result: EvaResult) -> float | None:
    """Return the threshold from the config in the metadata, None if there is none."""
    eva = (result.metadata.get("lora_config") or {}).get("eva_config") or {}
    return float(eva["tau"]) if "tau" in eva else None


def phase_seconds(result: EvaResult) -> dict[str, float]:
    """Return the seconds of each phase in order, and as `other` the rest of the total."""
    phases = {name: float(s) for name, s in result.seconds.items() if name != "total"}
    other = result.seconds["total"] - sum(phases.values())
    if other > 0:
        phases["other"] = other
    return phases


def format_bytes(count: float) -> str:
    """Format a number of bytes with a binary unit, for instance as "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _draw_cost(figure: FigureBase, result: EvaResult) -> None:
    axes = figure.subplots()
    phases = phase_seconds(result)
    total = sum(phases.values())
    colours = [_GREY if name in ("forward", "other") else _BLUE for name in phases]
    bars = axes.barh(list(phases), list(phases.values()), color=colours, height=0.62)
    shares = [f"{100 * s / (total or 1.0):.1f} %" for s in phases.values()]
    labels = [f"{s:.3g} s ({share})" for s, share in zip(phases.values(), shares, strict=True)]
    axes.bar_label(bars, labels, padding=4, fontsize=9)
    axes.set_xlim(0, 1.28 * max(*phases.values(), 1e-9))
    axes.set_ylim(len(phases) - 0.4, -0.6)
    axes.set_xlabel("seconds")
    axes.set_title(
        f"Time by phase: {total:.3g} s in all, {result.forwards} forwards\n"
        f"peak memory beyond the model {format_bytes(result.peak_memory_bytes)}"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _draw_message(axes: Axes, text: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)


def _integer_locator(intervals: int = 6) -> MaxNLocator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(intervals, integer=True)


def new_figure(size: tuple[float, float], alt: str) -> Figure:
    """Create a figure with its own canvas, size in inches; the label is its alternative text."""
    figure = require_matplotlib()(figsize=size, layout="constrained", facecolor="white")
    figure.set_label(alt)
    return figure


def require_matplotlib() -> Callable[..., Figure]:
    """Return matplotlib's `Figure`, imported on first use.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install eva-kernels[report]") from error
    return Figure
