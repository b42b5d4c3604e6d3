"""Write an `EvaResult` as one self-contained HTML page, from parts that other reports reuse."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import EvaValueError
from ..surroundings.files import atomic_write
from . import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .result import EvaResult

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1c1e; --soft: #5b6169; --paper: #fff; --panel: #f4f5f7;
  --line: #d9dce0; --warn: #8a4b00; --warn-paper: #fff3df; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #a2a9b1; --paper: #16181b;
  --panel: #202327; --line: #3a3f45; --warn: #ffc978; --warn-paper: #3a2a10; --accent: #6cb8e6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .7rem; padding-top: .7rem;
  border-top: 1px solid var(--line); }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; font-size: .9rem; }
a { color: var(--accent); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .7rem; }
.tile { background: var(--panel); border-radius: .5rem; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.35rem; font-weight: 600; }
.tile span { color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .8rem .28rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td.n, th.n { text-align: right; white-space: nowrap; }
td { overflow-wrap: break-word; white-space: pre-wrap; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: .4rem; }
.warn { background: var(--warn-paper); color: var(--warn); border-radius: .5rem;
  padding: .6rem .9rem; }
@media print { html { font-size: 10.5px; } body { max-width: none; padding: 0; font-size: 1rem; }
  nav { display: none; } th { white-space: normal; }
  :root { --ink: #000; --soft: #444; --paper: #fff; --panel: #f4f5f7; --line: #bbb;
  --warn: #5c3200; --warn-paper: #fff; --accent: #000; }
  img, tr, .tile { break-inside: avoid; }
  h2 { break-after: avoid; } .scroll { overflow: visible; } }
"""


def render_html(title: str, sections: list[tuple[str, str]]) -> str:
    """Build one page that needs no other file and no network.

    Args:
        title: plain text; escaped here.
        sections: (heading, body) pairs; headings are plain text, bodies are HTML and taken as is.
    """
    links = "".join(
        f'<a href="#s{i}">{escape(heading)}</a>' for i, (heading, _) in enumerate(sections)
    )
    body = "\n".join(
        f'<section id="s{i}"><h2>{escape(heading)}</h2>\n{content}\n</section>'
        for i, (heading, content) in enumerate(sections)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<nav>{links}</nav>\n{body}\n</body>\n</html>\n"
    )


def figure_to_html(fig: Figure) -> str:
    """Return a figure, whose label is the alternative text, as an `img` element with its data."""
    import matplotlib

    buffer = io.BytesIO()
    # Fixed identifiers and no date: the same figure gives the same page.
    with matplotlib.rc_context({"svg.hashsalt": "eva-kernels"}):
        fig.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    text = fig.get_label() or "Figure"
    return f'<img alt="{escape(str(text))}" src="data:image/svg+xml;base64,{data}">'


def table_to_html(headers: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Build a table; every cell is escaped, numbers are shortened and right-aligned.

    Args:
        headers: one for each column.
        rows: cells of any type; None shows as a dash, True and False as yes and no.

    Returns:
        A `table` element in a box that scrolls sideways on a narrow page.

    Raises:
        EvaValueError: a row of another length than the headers.
    """
    body = [list(row) for row in rows]
    wrong_rows = [row for row in body if len(row) != len(headers)]
    if wrong_rows:
        raise EvaValueError(f"{len(headers)} headers, but a row of {len(wrong_rows[0])} cells")
    numeric = [
        all(_is_number(row[i]) or row[i] is None for row in body) and bool(body)
        for i in range(len(headers))
    ]
    cell_classes = [' class="n"' if right else "" for right in numeric]
    head = "".join(
        f"<th{cell_class}>{escape(str(header))}</th>"
        for cell_class, header in zip(cell_classes, headers, strict=True)
    )
    lines = [
        "<tr>"
        + "".join(
            f"<td{cell_class}>{escape(_cell_text(value))}</td>"
            for cell_class, value in zip(cell_classes, row, strict=True)
        )
        + "</tr>"
        for row in body
    ]
    return (
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody>\n</table></div>"
    )


def result_sections(result: EvaResult) -> list[tuple[str, str]]:
    """Describe a calibration in sections for `render_html`.

    Returns:
        (heading, HTML) pairs: summary, four figures, per-layer table, metadata. If matplotlib is
        missing, a sentence that says so replaces each figure.
    """
    return [
        ("Summary", _summary_html(result)),
        ("Ranks", _figure_html(plots.plot_ranks, result)),
        ("Explained variance", _figure_html(plots.plot_explained_variance, result)),
        ("Convergence", _figure_html(plots.plot_convergence, result)),
        ("Time and memory", _figure_html(plots.plot_cost, result) + _cost_table(result)),
        ("Layers", _layer_table(result)),
        ("Metadata", _metadata_table(result)),
    ]


def write_html(result: EvaResult, path: str | os.PathLike[str]) -> None:
    """Write the report of a calibration as one HTML file, whose folder is created."""
    title = f"EVA initialisation of {result.metadata.get('model') or 'a model'}"
    page = render_html(title, result_sections(result))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(Path(path)) as temporary:
        temporary.write_text(page, encoding="utf-8")


def explained_by_rank(result: EvaResult, name: str) -> float:
    """Return the share of a layer's variance that the components within its rank explain."""
    ratios = np.asarray(result.explained_variance_ratio[name], dtype=float)
    return float(ratios[: result.ranks[name]].sum())


def _summary_html(result: EvaResult) -> str:
    ranks = list(result.ranks.values())
    converged = sum(bool(value) for value in result.converged.values())
    lost_variances = [value for value in result.lost_variance.values() if np.isfinite(value)]
    explained = [explained_by_rank(result, name) for name in result.ranks]
    tiles = [
        (f"{len(ranks)}", "layers"),
        (
            f"{sum(ranks)}",
            f"total rank ({min(ranks, default=0)} to {max(ranks, default=0)} per layer)",
        ),
        (f"{converged} / {len(ranks)}", "layers converged"),
        (f"{result.steps:,}", f"steps, {result.forwards:,} forwards"),
        (f"{result.tokens:,}", "tokens"),
        (f"{result.seconds.get('total', 0.0):.3g} s", "total time"),
        (plots.format_bytes(result.peak_memory_bytes), "peak memory beyond the model"),
        (f"{100 * np.mean(explained or [0.0]):.1f} %", "variance explained, mean over layers"),
        (f"{max(lost_variances, default=0.0):.2g}", "lost variance on the last step, worst layer"),
    ]
    boxes = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
        for value, label in tiles
    )
    notes = []
    if converged < len(ranks):
        notes.append(
            f"{len(ranks) - converged} of {len(ranks)} layers had not converged when the pass "
            "ended; their components are the best estimate so far."
        )
    if result.skipped_tokens:
        notes.append(f"{result.skipped_tokens:,} tokens with NaN or infinite values were left out.")
    if result.uncalled:
        names = ", ".join(result.uncalled)
        notes.append(
            f"EVA computed no components for these layers, which start as plain LoRA: {names}."
        )
    warnings_html = "".join(f'<p class="warn">{escape(note)}</p>' for note in notes)
    return f'{warnings_html}<div class="tiles">{boxes}</div>'


def _figure_html(plot: Callable[[EvaResult], Figure], result: EvaResult) -> str:
    try:
        return figure_to_html(plot(result))
    except ImportError as error:
        return f'<p class="warn">No figure: {escape(str(error))}</p>'


def _cost_table(result: EvaResult) -> str:
    phases = plots.phase_seconds(result)
    total = sum(phases.values())
    rows = [
        (name, round(seconds, 4), round(100 * seconds / (total or 1.0), 1))
        for name, seconds in phases.items()
    ]
    return table_to_html(["phase", "seconds", "share (%)"], rows)


def _layer_table(result: EvaResult) -> str:
    shared = {name: i for i, group in enumerate(result.shared_inputs, 1) for name in group}
    headers = ["layer", "rank", "variance explained (%)", "lost variance", "numerical rank"]
    headers += ["width", "method", "converged", "shared input"]
    rows = [
        (
            name,
            rank,
            round(100 * explained_by_rank(result, name), 2),
            result.lost_variance.get(name),
            result.numerical_rank.get(name),
            result.in_features.get(name),
            result.method.get(name),
            result.converged.get(name),
            shared.get(name),
        )
        for name, rank in result.ranks.items()
    ]
    note = f"<p>{result.tokens:,} tokens were used in the pass. "
    note += "Layers with the same number under &ldquo;shared input&rdquo; read one tensor.</p>"
    return note + table_to_html(headers, rows)


def _metadata_table(result: EvaResult) -> str:
    rows = [
        (key, value if isinstance(value, str) else json.dumps(value, indent=1, default=str))
        for key, value in result.metadata.items()
    ]
    return table_to_html(["key", "value"], rows)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _cell_text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (float, np.floating)):
        return f"{value:.4g}"
    return str(value)
