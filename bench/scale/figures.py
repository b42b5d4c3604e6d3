"""Plots of cost vs. size, of state size vs. width, and of memory by model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eva_peft.results.plots import new_figure

from .words import Row, end_of_step, milliseconds
from .work import AXES, Point, rows_along

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Line = tuple[str, str, str, Callable[[Row], float | None]]  # colour, marker, dash, value

GIB, MIB = 2**30, 2**20
SIZE = 7, 4.5  # inches
# Okabe and Ito's colours, each with a marker of its own.
_LINES: dict[str, Line] = {
    "this package": ("#0072B2", "o", "-", lambda row: milliseconds(row, "sketch")),
    "of that, fold and compare": ("#56B4E9", "v", "-", end_of_step),
    "floor of the machine": ("#999999", ".", ":", lambda row: row["floor"]["step_ms"]),
    "exact Gram": ("#000000", "*", "-", lambda row: milliseconds(row, "gram")),
    "PEFT's step": ("#D55E00", "s", "-", lambda row: milliseconds(row, "peft")),
    "forward of q, k, v": ("#009E73", "^", "--", lambda row: milliseconds(row, "forward")),
}


def costs(base: Point, rows: Sequence[Row]) -> Figure:
    """Plot the time of a step vs. each size, the other sizes fixed."""
    title = "Milliseconds of a step against width, tokens, layer inputs and components"
    return _plot_by_size(title, "milliseconds a step", base, rows, _LINES)


def ratios(base: Point, rows: Sequence[Row]) -> Figure:
    """Plot the others' time divided by our step's vs. each size; above 1 we are faster."""
    lines = {}
    for name in ("exact Gram", "PEFT's step", "forward of q, k, v"):
        colour, marker, dash, cost = _LINES[name]
        lines[f"{name} over this package"] = (colour, marker, dash, _over_ours(cost))
    title = "Time of the competitors over that of this package, against each size"
    figure = _plot_by_size(title, "times as long", base, rows, lines)
    for ax in figure.axes:
        ax.axhline(1, color="#999999", linewidth=1)
    return figure


def _plot_by_size(
    title: str, quantity: str, base: Point, rows: Sequence[Row], lines: Mapping[str, Line]
) -> Figure:
    """Return a figure with a panel for each size, which shows how the lines depend on it."""
    figure = new_figure(SIZE, title)
    axes = figure.subplots(2, 2, sharey=True).flatten()
    for ax, (axis, label) in zip(axes, AXES.items(), strict=True):
        along = rows_along(axis, base, rows)
        for name, line in lines.items():
            _plot_line(ax, along, axis, name, line)
        _style_axes(ax, label, [row[axis] for row in along])
    for ax in axes[::2]:
        ax.set_ylabel(quantity, fontsize=8)
    _add_legend(figure, axes[0])
    return figure


def states(rows: Sequence[Row]) -> Figure:
    """Plot the bytes kept between steps vs. width."""
    figure = new_figure(SIZE, "Memory kept between steps against the width of the layer inputs")
    ax = figure.subplots()
    for method, name, label in (("sketch", "this package", "sketch"), ("gram", "exact Gram", "")):
        colour, marker, dash, _ = _LINES[name]

        def mib_kept(row: Row, method: str = method) -> float:
            return row["state_bytes"][method] / MIB

        _plot_line(ax, rows, "D", label or name, (colour, marker, dash, mib_kept))
    _style_axes(ax, AXES["D"], [row["D"] for row in rows])
    ax.set_ylabel(f"MiB kept between steps, {rows[0]['L']} layer inputs", fontsize=8)
    ax.legend(fontsize=8, frameon=False)
    return figure


def models(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw simulated memory by model as bars on a logarithmic axis."""
    figure = new_figure(SIZE, "Simulated GPU memory of the initialisation by model")
    ax = figure.subplots()
    bars: dict[str, tuple[str, Callable[[Mapping[str, Any]], float | None]]] = {
        "parameters": ("#cccccc", lambda m: m["parameters"]),
        "exact Gram's state": ("#000000", lambda m: m["gram_state"]),
        "plain forward": ("#009E73", lambda m: m["plain"]),
        "this package, whole pass": ("#0072B2", lambda m: m["ours"]),
        "of that, state and sums": ("#56B4E9", lambda m: m["state"]),
    }
    width = 0.8 / len(bars)
    for i, (name, (colour, pick)) in enumerate(bars.items()):
        places = [j + (i - (len(bars) - 1) / 2) * width for j in range(len(rows))]
        known = [(place, pick(row)) for place, row in zip(places, rows, strict=True)]
        shown = [(place, value / GIB) for place, value in known if value]
        if shown:
            xs, heights = zip(*shown, strict=True)
            ax.bar(xs, heights, width, color=colour, label=name)
    ax.set_yscale("log")
    ax.set_xticks(range(len(rows)), [row["model"] for row in rows], fontsize=8)
    ax.set_ylabel("GiB, simulated", fontsize=8)
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)
    _add_legend(figure, ax)
    return figure


def _over_ours(cost: Callable[[Row], float | None]) -> Callable[[Row], float | None]:
    def ratio(row: Row) -> float | None:
        theirs, ours = cost(row), milliseconds(row, "sketch")
        return theirs / ours if theirs and ours else None

    return ratio


def _plot_line(ax: Axes, rows: Sequence[Row], axis: str, name: str, line: Line) -> None:
    colour, marker, dash, cost = line
    points = [(row[axis], value) for row in rows if (value := cost(row)) is not None]
    xs, ys = zip(*points, strict=True) if points else ((), ())
    style = f"{marker}{dash}"
    ax.plot(xs, ys, style, color=colour, markersize=4.5, linewidth=1.2, label=name)


def _style_axes(ax: Axes, label: str, sizes: Sequence[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(sizes, [_format_size(size) for size in sizes])
    ax.minorticks_off()
    ax.set_xlabel(label, fontsize=8)
    ax.tick_params(labelsize=7)
    ax.grid(alpha=0.3)


def _format_size(size: int) -> str:
    return f"{size // 1024}Ki" if size >= 1024 and size % 1024 == 0 else str(size)


def _add_legend(figure: Figure, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=7.5, ncols=3, frameon=False)
