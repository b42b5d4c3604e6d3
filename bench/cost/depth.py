"""The cost of a whole model, extrapolated linearly from two depths with a few of its layers.

For models that do not fit, or methods that would take hours. The time is a constant, for embeddings
and head, plus a time per layer times the number of layers. The memory peak is the maximum over
several phases, each of them linear in that way: its linear extrapolation is a lower bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..common import RESULTS
from ..rows import Rows
from ..sections import Section
from .configs import CONFIGS
from .run import measure_row, row_keys

METHODS = ("eva", "eva-peft", "lora-ga", "lora-ga-paper", "corda-ipm")
QUANTITIES = ("init_s", "init_peak", "init_reserved")
HEADERS = (
    "method", "batch", "depth", "initialise", "memory", "reserved", "a layer", "from", "forwards",
    "line off between",
)  # fmt: skip


def run(
    name: str,
    depths: Sequence[int] = (2, 6),
    methods: Sequence[str] = METHODS,
    batch: int = 4,
    out: Path = RESULTS,
    quiet: bool = False,
    repeats: int | None = None,
    on_rows: Callable[[list[dict[str, Any]]], None] | None = None,
) -> Path:
    """Measure each method at each depth, and extrapolate to the depth of the model.

    Args:
        name: of a configuration.
        depths: numbers of layers, at least two.
        methods: names in ``bench.methods``.
        batch: batch size; 1 for methods that process one sample at a time.
        out: folder of the results; the file is ``depth-NAME.json``.
        quiet: show no progress bar.
        repeats: of every row; those of the configuration if ``None``.
        on_rows: called after each row with all rows measured so far.

    Raises:
        ValueError: fewer than two depths.
        RuntimeError: the configuration needs a GPU, and there is none.
    """
    depths = sorted(set(depths))
    if len(depths) < 2:
        raise ValueError("extrapolation needs at least two different depths")
    config = CONFIGS[name]
    config.device()
    full_depth = config.make_config().num_hidden_layers
    settings = {
        "config": name,
        "depth": full_depth,
        "samples": config.samples,
        "length": config.length,
        "passes": config.passes,
        "r": config.r,
        "dtype": str(config.dtype).removeprefix("torch."),
    }

    overrides = {} if repeats is None else {"repeats": repeats}

    def measure(key: Any) -> dict[str, Any]:
        return measure_row({**key, **overrides, "config": name, "real": False})

    keys_by_size = row_keys(replace(config, batches=(batch,)), methods)
    keys = [{**key, "depth": n} for key in keys_by_size for n in depths]
    rows = Rows(f"depth-{name}", {**settings, **overrides}, out, quiet)
    if on_rows is not None:
        for count in range(1, len(keys) + 1):
            on_rows(rows.make(keys[:count], measure))
    measured = rows.make(keys, measure)
    return rows.finish({"measured": measured, "whole": extrapolate(measured, full_depth)})


def extrapolate(measured: Sequence[Mapping[str, Any]], full_depth: int) -> list[dict[str, Any]]:
    """Return the cost of each method at ``full_depth``, by the line through its extreme depths.

    ``FIGURE_off`` is the relative error of that line at each depth in between. A method that failed
    at some depth has its ``error`` instead.
    """
    extrapolated = []
    for name in dict.fromkeys(row["method"] for row in measured):
        rows = sorted((r for r in measured if r["method"] == name), key=lambda row: row["depth"])
        row: dict[str, Any] = {"method": name, "batch": rows[0]["batch"], "depth": full_depth}
        errors = [r["error"] for r in rows if "error" in r]
        if errors:
            extrapolated.append({**row, "error": errors[0]})
            continue
        row["from"] = [r["depth"] for r in rows]
        row["forwards"] = [r["forwards"] for r in rows]
        first, *between, last = rows
        for quantity in QUANTITIES:
            low, high = first[quantity]["median"], last[quantity]["median"]
            per_layer = (high - low) / (last["depth"] - first["depth"])
            row[quantity] = low + per_layer * (full_depth - first["depth"])
            row[f"{quantity}_of_a_layer"] = per_layer
            predicted = [
                (low + per_layer * (r["depth"] - first["depth"]), r[quantity]) for r in between
            ]
            row[f"{quantity}_off"] = [
                prediction / measured_value["median"] - 1
                for prediction, measured_value in predicted
            ]
        extrapolated.append(row)
    return extrapolated


def sections(record: Mapping[str, Any]) -> list[Section]:
    """Return the extrapolated costs as a table."""
    settings, rows = record["settings"], record["rows"]["whole"]
    repeats = settings.get("repeats")
    text = (
        f"Configuration `{settings['config']}`, {settings['depth']} layers, **extrapolated** by "
        f"the line through the smallest and the largest depth measured; {settings['samples']} "
        f"samples of {settings['length']} tokens, r = {settings['r']}, {settings['dtype']}. "
        f"{f'Every depth was measured {repeats}x. ' if repeats else ''}"
        "Seconds, and GiB above the weights (peaks: a lower bound). *Line off between*: what the "
        "line would say of the seconds at the depths between, over what was measured there, less "
        "one."
    )
    title = f"Cost by depth: {settings['config']}"
    return [Section(title, text, HEADERS, [_table_row(row) for row in rows])]


def _table_row(row: Mapping[str, Any]) -> list[str]:
    cells = [row["method"], str(row["batch"]), str(row["depth"])]
    if "error" in row:
        return [*cells, row["error"], *[""] * (len(HEADERS) - 4)]
    gib = [f"{row[name] / 2**30:.3f}" for name in ("init_peak", "init_reserved")]
    layer = f"{row['init_s_of_a_layer']:.3f} s, {row['init_peak_of_a_layer'] / 2**20:.1f} MiB"
    depths, forwards = (", ".join(map(str, row[key])) for key in ("from", "forwards"))
    errors_between = ", ".join(f"{share:+.0%}" for share in row["init_s_off"]) or "-"
    return [*cells, f"{row['init_s']:.2f}", *gib, layer, depths, forwards, errors_between]
