"""One page, the plots and the README tables, generated from the result files only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from eva_peft.results.report import figure_to_html, render_html, table_to_html

from . import tables
from .common import RESULTS
from .sections import Section, markdown, provenance

# Result files by pattern, in the order of the page, and the module that shows them.
PARTS = {
    "cost-*": "bench.cost.show",
    "depth-*": "bench.cost.depth",
    "scale": "bench.scale.show",
    "accuracy": "bench.accuracy.show",
    "quality": "bench.quality.show",
}
# Shown as the tables of the README have them.
OTHERS = {
    "initialize": ("The whole pass on MiniLM, against PEFT's", tables.whole_pass),
    "svd_step": ("One step, against PEFT's", tables.svd_step),
    "simulated_memory": ("Simulated memory of large models", tables.simulated_memory),
    "families": ("Model families", tables.families),
}
TITLE = "Benchmarks of eva_kernels"


def load(folder: Path) -> Iterator[tuple[Section, Mapping[str, Any] | None]]:
    """Yield the sections of all result files in a folder, with the record they are made from."""
    for pattern, module in PARTS.items():
        for path in sorted(folder.glob(f"{pattern}.json")):
            record = json.loads(path.read_text("utf-8"))
            for section in import_module(module).sections(record):
                yield section, record
    for name, (title, show) in OTHERS.items():
        if (folder / f"{name}.json").exists():
            yield Section(title, show(folder)), None


def html_page(folder: Path) -> str:
    """Return the page of a folder of results as HTML that needs no other file."""
    convert = MarkdownIt("commonmark").enable("table").render
    sections = []
    for section, record in load(folder):
        body = [convert(section.text)]
        body += [figure_to_html(draw()) for draw in section.figures.values()]
        if section.rows:
            body.append(table_to_html(section.headers, section.rows))
        if section.notes:
            body.append(convert(section.notes))
        if record is not None:
            body.append(f"<p>{escape(provenance(record))}</p>")
        sections.append((section.title, "\n".join(body)))
    return render_html(TITLE, sections)


def markdown_page(folder: Path) -> str:
    """Return all tables of a folder of results as Markdown, with the plots beside it."""
    parts = [f"# {TITLE}", "Made by `python -m bench report` from the JSON files beside it."]
    for section, record in load(folder):
        parts.append(f"## {section.title}")
        parts.append(section.text if record is None else markdown(section, record))
        parts += [f"![{stem}](plots/{stem}.png)" for stem in section.figures]
    return "\n\n".join(parts) + "\n"


def run(folder: Path = RESULTS) -> Path:
    """Write ``report.html``, ``README.md`` and ``plots/`` into a folder of results.

    Returns:
        The page.

    Raises:
        FileNotFoundError: the folder holds no results.
    """
    found = list(load(folder))
    if not found:
        raise FileNotFoundError(f"no result files in {folder}; run a part of the benchmark first")
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    for section, _ in found:
        for stem, draw in section.figures.items():
            figure = draw()
            figure.savefig(plots / f"{stem}.png", dpi=130)
            figure.savefig(plots / f"{stem}.svg")
    (folder / "README.md").write_text(markdown_page(folder), "utf-8")
    path = folder / "report.html"
    path.write_text(html_page(folder), "utf-8")
    return path
