"""The output of a part: a table with text and plots, for the report page and the README."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eva_peft.errors import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Section:
    """One table with what belongs to it.

    Attributes:
        title: heading.
        text: sentences above the table, Markdown; paragraphs apart by an empty line.
        headers, rows: of the table, as text.
        figures: stem of the file -> function that draws it.
        notes: sentences below the table.
    """

    title: str
    text: str
    headers: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    figures: Mapping[str, Callable[[], Figure]] = field(default_factory=dict)
    notes: str = ""


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in [headers, ["---"] * len(headers), *rows]]
    return "\n".join(lines)


def provenance(record: Mapping[str, Any]) -> str:
    """Return date, commit, machine and versions of a result file, in a line."""
    machine = record["machine"]
    device = machine["gpu"] or f"{machine['cpu']}, {counted(machine['threads'], 'thread')}"
    return (
        f"{record['date']}, commit {record['commit']}, {device}, torch {machine['torch']}, "
        f"transformers {machine['transformers']}, peft {machine['peft']}"
    )


def markdown(section: Section, record: Mapping[str, Any]) -> str:
    """Return a section without its plots as Markdown."""
    parts = [section.text, markdown_table(section.headers, section.rows) if section.rows else ""]
    return "\n\n".join(part for part in [*parts, section.notes, f"({provenance(record)})"] if part)
