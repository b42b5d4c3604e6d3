"""The table of costs, its plot, and a summary in words."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eva_peft.results.plots import new_figure

from ..methods import METHODS
from ..sections import Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
HEADERS = [
    "method",
    "batch",
    "load",
    "collect",
    "solve",
    "apply",
    "initialise",
    "p20 to p80",
    "of an epoch",
    "first step",
    "memory",
    "reserved",
    "first step's",
    "forwards",
    "tokens",
    "base changed",
    "reload",
]
SHORT = ("method", "batch", "initialise", "of an epoch", "memory", "base changed", "reload")
OURS = "this package"
RIVALS = ("eva-peft", "lora-ga", "lora-ga-paper", "corda-ipm", "corda-kpm")


def sections(record: Mapping[str, Any]) -> list[Section]:
    """Return the section of one configuration."""
    settings, rows = record["settings"], record["rows"]
    epoch = epoch_seconds(settings, rows)
    size = settings["model"]
    text = (
        f"Configuration `{settings['config']}`: {size['num_hidden_layers']} layers of width "
        f"{size['hidden_size']}, vocabulary {size['vocab_size']}, {settings['dtype']}, weights "
        f"{settings['weights']}; {settings['samples']} samples of {settings['length']} tokens for "
        f"every method that reads data, r = {settings['r']}. EVA goes over them "
        f"{settings['passes']} times at most. Seconds are medians over repetitions in a process of "
        "its own for each row; memory is the peak above the weights, of the initialisation and of "
        "the first step of training.\n\n" + comparison_text(rows)
    )
    notes = (
        f"An epoch is {settings['epoch']} samples in batches of {settings['train_batch']}, at "
        "the seconds of a training step with LoRA. *initialise*: collect, solve and apply. *first "
        "step*: forward, backward and optimizer. *memory*, *first step's*: tensors in use on a GPU "
        "(*reserved*: what the allocator held), the resident set on a CPU. *base changed*: "
        "relative Frobenius norm. *reload*: whether the saved adapter gives the same logits on a "
        "fresh base. Where PEFT decomposes and applies in one call, both are under *solve*. CorDA "
        "takes one sample at a time."
    )
    # on a CPU, memory reserved by the allocator cannot be told from memory in use
    headers = [h for h in HEADERS if h != "reserved" or record["machine"]["gpu"]]
    body = [_table_row(row, epoch, headers) for row in rows]
    figures = {f"cost-{settings['config']}": functools.partial(plot, rows)}
    return [Section(f"Cost: {settings['config']}", text, headers, body, figures, notes)]


def short_section(record: Mapping[str, Any], batch: int = 8) -> Section:
    """Return a few columns of the rows with one batch size, for the README."""
    section = sections(record)[0]
    shown_rows = [
        row for row in record["rows"] if row["batch"] in (1, batch) or not _reads_data(row)
    ]
    epoch = epoch_seconds(record["settings"], record["rows"])
    rows = [_table_row(row, epoch, SHORT) for row in shown_rows]
    return Section(section.title, section.text, SHORT, rows)


def epoch_seconds(settings: Row, rows: Sequence[Row]) -> float | None:
    """Return the seconds of a training epoch with LoRA; ``None`` if that row failed."""
    step = next((r["train_step_s"] for r in rows if r["method"] == "lora" and _succeeded(r)), None)
    return None if step is None else step * settings["epoch"] / settings["train_batch"]


def _succeeded(row: Row) -> bool:
    return "error" not in row


def _table_row(row: Row, epoch: float | None, headers: Sequence[str]) -> list[str]:
    cells = _cells(row, epoch)
    if not _succeeded(row):  # the reason goes into the first column of numbers
        cells[headers[2]] = row["error"].replace("|", "\\|")
    return [cells.get(header, "") for header in headers]


def _cells(row: Row, epoch: float | None) -> dict[str, str]:
    cells = {
        "method": METHODS[row["method"]].label,
        "batch": str(row["batch"]) if _reads_data(row) else "-",
    }
    if not _succeeded(row):
        return cells
    init = row["init_s"]
    phases = {name: _seconds(spread["median"]) for name, spread in row["seconds"].items()}
    return {
        **cells,
        **phases,
        "initialise": _seconds(init["median"]),
        "p20 to p80": f"{init['p20']:.2f} to {init['p80']:.2f}",
        "of an epoch": "" if epoch is None else f"{100 * init['median'] / epoch:.2g} %",
        "memory": format_bytes(row["init_peak"]["median"]),
        "reserved": format_bytes(row["init_reserved"]["median"]),
        "first step's": format_bytes(row["first_step_peak"]["median"]),
        "forwards": str(row["forwards"]),
        "tokens": str(row["tokens"]),
        "base changed": "no" if row["weights_changed"] == 0 else f"{row['weights_changed']:.1e}",
        "reload": reload_text(row),
    }


def _reads_data(row: Row) -> bool:
    return METHODS[row["method"]].reads_data


def _seconds(value: float) -> str:
    return f"{value:.2f} s"


def format_bytes(value: float) -> str:
    """Format bytes in MiB or GiB."""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def reload_text(row: Row) -> str:
    """Say whether saving and loading restored the adapter."""
    if "reload_error" in row:
        return row["reload_error"].split(":")[0]
    difference = row["reload_difference"]
    return "exact" if difference == 0 else f"off by {difference:.1e}"


def comparison_text(rows: Sequence[Row]) -> str:
    """Say how this package compares with other data-driven methods, for each batch size."""
    row_of = {(r["method"], r["batch"]): r for r in rows if _succeeded(r)}
    sizes = sorted({batch for method, batch in row_of if method == "eva"}, reverse=True)
    lines = []
    for rival in RIVALS:
        label = METHODS[rival].label
        rows_by_size = [
            (size, row_of["eva", size], _row_for(row_of, rival, size)) for size in sizes
        ]
        pairs = [(size, ours, theirs) for size, ours, theirs in rows_by_size if theirs is not None]
        if not pairs:
            lines.append(f"- {label}: no numbers to compare with.")
            continue
        times = [_ratio(theirs, ours, "init_s") for _, ours, theirs in pairs]
        peaks = [_ratio(ours, theirs, "init_peak") for _, ours, theirs in pairs]
        batches = "/".join(str(size) for size, *_ in pairs)
        lines.append(
            f"- {label} takes {_join_numbers(times)} times as long as this package (batch "
            f"{batches}; below 1 it is faster), and this package {_join_numbers(peaks)} of its "
            "memory."
        )
    return "\n".join(lines)


def _row_for(row_of: Mapping[tuple[str, int], Row], method: str, size: int) -> Row | None:
    return row_of.get((method, 1 if METHODS[method].one_sample else size))


def _ratio(numerator: Row, denominator: Row, quantity: str) -> float:
    divisor = denominator[quantity]["median"]
    return max(numerator[quantity]["median"], 0.0) / divisor if divisor > 0 else float("inf")


def _join_numbers(values: Sequence[float]) -> str:
    return " / ".join(f"{value:.2f}" for value in values)


def plot(rows: Sequence[Row]) -> Figure:
    """Plot seconds and memory in two panels: a line per method, a marker per batch size."""
    measured = [row for row in rows if _succeeded(row)]
    methods = list(dict.fromkeys(row["method"] for row in measured))
    figure = new_figure((8, 5.4), "Seconds and memory of every initialisation, one line a method")
    panels = figure.subplots(1, 2, sharey=True)
    sizes = sorted({row["batch"] for row in measured if _reads_data(row)}, reverse=True)
    marker_of_size = dict(zip(sizes, "osD^v", strict=False))
    for axes, quantity, unit, label in (
        (panels[0], "init_s", 1.0, "seconds to initialise"),
        (panels[1], "init_peak", 2.0**20, "peak memory above the weights, MiB"),
    ):
        for row in measured:
            value = max(row[quantity]["median"] / unit, 1e-3)
            marker = marker_of_size[row["batch"]] if _reads_data(row) else "_"
            ours = METHODS[row["method"]].source == OURS
            colour = "#0072b2" if ours else "#555555"
            axes.plot(value, methods.index(row["method"]), marker, color=colour, markersize=6)
        axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(methods)), [METHODS[name].label for name in methods])
    panels[0].invert_yaxis()
    for size in sizes:
        panels[0].plot([], [], marker_of_size[size], color="#555555", label=f"batch {size}")
    panels[0].legend(frameon=False, loc="lower left")
    return figure
