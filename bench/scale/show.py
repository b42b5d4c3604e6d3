"""The output of ``scale``: tables, sentences generated from the numbers, and plots."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from ..sections import Section
from . import figures, words
from .fit import TAIL, slope
from .words import Row, end_of_step, milliseconds
from .work import AXES, OUTPUTS, Point, rows_along

GIB, MIB = 2**30, 2**20
COSTS = {
    "accumulate": lambda row: milliseconds(row, "sketch", "accumulate"),
    "fold and compare": end_of_step,
    "step": lambda row: milliseconds(row, "sketch"),
    "exact Gram": lambda row: milliseconds(row, "gram"),
    "PEFT": lambda row: milliseconds(row, "peft"),
    "forward": lambda row: milliseconds(row, "forward"),
}


def sections(record: Mapping[str, Any]) -> list[Section]:
    """Return the sections of the report for a result file."""
    base = Point(**record["settings"]["base"])
    measured = [row for row in record["rows"]["points"] if "error" not in row]
    failed = [row for row in record["rows"]["points"] if "error" in row]
    notes = [f"Not timed, {_point(row)}: {row['error']}." for row in failed]
    if not measured:
        first = Section("Cost of a step", "Nothing was measured.", notes=" ".join(notes))
    else:
        first = _costs(record, base, measured, " ".join(notes))
    all_sections = [first]
    if measured:
        all_sections += [_slopes(base, measured), _crossovers(base, measured)]
    memory = record["rows"]["memory"]
    return [*all_sections, _memory(memory)] if memory and memory["models"] else all_sections


def _point(row: Row) -> str:
    return " ".join(f"{axis} = {row[axis]}" for axis in AXES)


def _costs(record: Mapping[str, Any], base: Point, rows: Sequence[Row], notes: str) -> Section:
    settings, ceilings = record["settings"], record["rows"]["ceilings"]
    text = (
        "Milliseconds of one step: L layer inputs of width D, N tokens each, K = r rho components, "
        f"the sketch twice as wide, {settings['dtype']} on the {settings['device'].upper()}. Each "
        f"size is varied alone around {_point({a: getattr(base, a) for a in AXES})}. *Floor* is "
        "the least that the machine's ceilings allow: "
        f"{ceilings['bytes_per_second'] / 1e9:.3g} GB/s in a copy, "
        f"{ceilings['flops_per_second'] / 1e12:.3g} TFLOP/s in a matrix product, "
        f"{ceilings['wide_flops_per_second'] / 1e12:.3g} in float64. *Forward* is {OUTPUTS} linear "
        "layers from D to D for each input, measured for one and multiplied. Medians of runs in "
        "turn; all answers were compared with float64 before."
    )
    headers = ["varied", *AXES, "accumulate", "fold, compare", "step", "of the floor", "bound by"]
    headers += ["exact Gram", "PEFT's step", "forward", "step / forward"]
    table = []
    for axis in AXES:
        for row in rows_along(axis, base, rows):
            table.append([axis, *(str(row[a]) for a in AXES), *_cells(row)])
    plots = {
        "scale_cost": functools.partial(figures.costs, base, rows),
        "scale_ratios": functools.partial(figures.ratios, base, rows),
    }
    return Section("Cost of a step", text, headers, table, plots, notes)


def _cells(row: Row) -> list[str]:
    step, forward = milliseconds(row, "sketch") or 0.0, milliseconds(row, "forward")
    others = [milliseconds(row, name) for name in ("gram", "peft", "forward")]
    return [
        f"{milliseconds(row, 'sketch', 'accumulate'):.2f}",
        f"{end_of_step(row):.2f}",
        f"{step:.2f}",
        f"{100 * row['floor']['step_ms'] / step:.0f} %",
        row["floor"]["limited_by"],
        *("—" if value is None else f"{value:.1f}" for value in others),
        "—" if forward is None else f"{100 * step / forward:.1f} %",
    ]


def _slopes(base: Point, rows: Sequence[Row]) -> Section:
    table = []
    for axis, label in AXES.items():
        line = rows_along(axis, base, rows)
        table.append([label, *(_slope(axis, line, cost) for cost in COSTS.values())])
    text = (
        "Exponents of the power law through the times (least squares in log-log), over all points "
        f"and, in brackets, over the {TAIL} largest. 1 is proportional."
    )
    return Section("Slopes", text, ["size", *COSTS], table)


def _slope(axis: str, rows: Sequence[Row], cost: Any) -> str:
    points = [(row[axis], cost(row)) for row in rows if cost(row) is not None]
    slope_of_all = slope(*zip(*points, strict=True)) if points else None
    if slope_of_all is None:
        return "—"
    tail = slope(*zip(*points[-TAIL:], strict=True))
    return f"{slope_of_all:.2f} ({tail:.2f})"


def _crossovers(base: Point, rows: Sequence[Row]) -> Section:
    sentences = [f"- {sentence}" for sentence in words.crossovers(base, rows)]
    widths = rows_along("D", base, rows)
    headers = ["D", "sketch", "exact Gram", "ratio"]
    table = []
    for row in widths:
        sketch, gram = (row["state_bytes"][method] for method in ("sketch", "gram"))
        ratio = f"{gram / sketch:.2g}"
        table.append([str(row["D"]), f"{sketch / MIB:.2f}", f"{gram / MIB:.2f}", ratio])
    text = (
        "\n".join(sentences) + f"\n\nMiB kept between steps, {base.L} layer inputs, K = {base.K}:"
    )
    plots = {"scale_state": functools.partial(figures.states, widths)} if len(widths) > 1 else {}
    return Section("Where the order changes", text, headers, table, plots)


def _memory(memory: Mapping[str, Any]) -> Section:
    headers = ["model", "parameters", "plain forward", "this package", "more than plain"]
    headers += ["state and sums", "exact Gram's state"]
    table = []
    for row in memory["models"]:
        gram = row["gram_state"]
        more = row["ours"] - row["plain"]
        values = [row["parameters"], row["plain"], row["ours"], more, row["state"]]
        exact = "—" if gram is None else f"{gram / GIB:.1f}"
        table.append([row["model"], *(f"{value / GIB:.2f}" for value in values), exact])
    text = (
        f"Peak GPU memory in GiB above the parameters, simulated ({memory['batch']} x "
        f"{memory['length']} tokens, `bench/simulated_memory.py`, {memory['date']}, commit "
        f"{memory['commit']}). {_memory_words(memory['models'])}"
    )
    plots = {"scale_models": functools.partial(figures.models, memory["models"])}
    return Section("Memory from 7B to 70B, simulated", text, headers, table, plots)


def _memory_words(models: Sequence[Mapping[str, Any]]) -> str:
    shares = [100 * (m["ours"] - m["plain"]) / m["parameters"] for m in models]
    text = (
        f"What the pass takes beyond a plain forward is {min(shares):.1f} to {max(shares):.1f} % "
        "of the parameters."
    )
    exponent = slope([m["parameters"] for m in models], [m["state"] for m in models])
    if exponent is not None:
        text += f" State and sums grow as the parameters to the power of {exponent:.2f}."
    known = [m["gram_state"] / m["state"] for m in models if m["gram_state"]]
    if known:
        text += f" Exact Gram would keep {min(known):.0f} to {max(known):.0f} times as much."
    return text
