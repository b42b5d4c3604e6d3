"""The README's tables, generated from the result files only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .common import RESULTS
from .cost.show import short_section
from .quality import show as quality
from .sections import Section, markdown, markdown_table, provenance

README = Path(__file__).parent.parent / "README.md"


def load(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """Read one result file."""
    record: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return record


def whole_pass(folder: Path = RESULTS) -> str:
    """Render the table of the whole initialisation."""
    record = load("initialize", folder)
    memory = load("memory", folder)
    ranks = load("ranks", folder)
    settings = record["settings"]
    headers = ["", *(f"padded to {row['padded_to']}" for row in record["rows"])]

    def line(label: str, key: str, unit: str) -> list[str]:
        return [label, *(f"{row[key]['median']:.2f}{unit}" for row in record["rows"])]

    rows = [
        line("plain forward passes", "plain_s", " s"),
        line("PEFT's EVA", "peft_s", " s"),
        line("**this package**", "ours_s", " s"),
        line("PEFT over this package", "peft_over_ours", "x"),
        line("this package over the plain passes", "ours_over_plain", "x"),
    ]
    accuracy = ranks["rows"]
    others = [
        [
            "peak memory above the plain passes",
            f"{memory['rows']['peft_over_plain'] / 2**20:.0f} MiB",
            f"{memory['rows']['ours_over_plain'] / 2**20:.0f} MiB",
        ],
        [
            "lost variance of `lora_A` against exact PCA, mean",
            f"{accuracy['peft_lost_mean']:.1e}",
            f"{accuracy['ours_lost_mean']:.1e}",
        ],
        [
            f"ranks off the exact allocation (sum over {len(accuracy['layers'])} layers, budget "
            f"{accuracy['ours_total']})",
            str(accuracy["peft_rank_error"]),
            str(accuracy["ours_rank_error"]),
        ],
    ]
    text = (
        f"MiniLM (36 layers, {settings['forwards']} batches of {settings['batch']} texts of "
        f"the Python documentation, r = {settings['r']}, rho = {settings['rho']:g}); medians "
        f"of {settings['repeats']} interleaved runs in one process:"
    )
    notes = markdown_table(["", "PEFT's EVA", "this package"], others)
    return markdown(Section("The whole pass", text, headers, rows, notes=notes), record)


def svd_step(folder: Path = RESULTS) -> str:
    """Render the table of one SVD step."""
    record = load("svd_step", folder)
    rows = [
        [
            row["layer"],
            str(row["features"]),
            f"{row['peft_ms']['median']:.1f} ms",
            f"{row['ours_ms']['median']:.1f} ms",
            f"{row['speedup']['median']:.1f}x",
            f"{row['peft_lost']:.1e}",
            f"{row['ours_lost']:.1e}",
        ]
        for row in record["rows"]
    ]
    settings = record["settings"]
    headers = ["layer input", "D", "PEFT", "this package", "ratio", "PEFT lost", "ours lost"]
    text = (
        f"One SVD step on its real activations ({record['rows'][0]['tokens']} tokens, K = "
        f"{settings['components']}) against PEFT's `IncrementalPCA(lowrank=True)`, and the "
        f"share of variance lost against exact PCA after {settings['steps']} steps:"
    )
    return markdown(Section("One SVD step", text, headers, rows), record)


def simulated_memory(folder: Path = RESULTS) -> str:
    """Render the table of simulated peak memory."""
    from .simulated_memory import HEADERS, rows_for_table

    record = load("simulated_memory", folder)
    text = (
        "Peak GPU memory in GiB above the parameters, of the real code on tensors without "
        "contents (4 x 512 tokens, bfloat16, seven projections a layer, r = 16, rho = 2; "
        "simulated, see `bench/simulated_memory.py` for what that leaves out):"
    )
    return markdown(Section("Simulated memory", text, HEADERS, rows_for_table(record)), record)


def families(folder: Path = RESULTS) -> str:
    """Render the table of model families."""
    from .families.run import outcome_text

    record = load("families", folder)
    rows = [
        [row["family"], outcome_text(row["ours"]), outcome_text(row["peft"])]
        for row in record["rows"]
    ]
    table = markdown_table(["family", "this package", "PEFT's EVA"], rows)
    return f"{table}\n\n{provenance(record)}"


def headline(folder: Path = RESULTS) -> str:
    """Render what the tables say in a line each."""
    ratios = [row["peft_over_ours"]["median"] for row in load("initialize", folder)["rows"]]
    memory, ranks = load("memory", folder)["rows"], load("ranks", folder)["rows"]
    outcomes = load("families", folder)["rows"]
    ours, peft = (sum(row[side]["error"] is None for row in outcomes) for side in ("ours", "peft"))
    return "\n".join(
        [
            f"- **Time**: PEFT's EVA takes {min(ratios):.1f} to {max(ratios):.1f} times as long, "
            "on a pre-trained MiniLM and two CPU cores.",
            f"- **Memory** above the plain forward passes: {memory['ours_over_plain'] / 2**20:.0f} "
            f"MiB (PEFT's {memory['peft_over_plain'] / 2**20:.0f}).",
            f"- **Accuracy**: `lora_A` loses {ranks['ours_lost_mean']:.1e} of the variance that "
            f"the exact components hold (PEFT's {ranks['peft_lost_mean']:.1e}).",
            f"- **Models**: {ours} of {len(outcomes)} families work by default options (PEFT's "
            f"{peft}).",
        ]
    )


def measured() -> str:
    """Render the block of measurements."""
    cost_record, quality_record = load("cost-tiny"), load("quality")
    blocks = [
        whole_pass(),
        svd_step(),
        markdown(short_section(cost_record), cost_record),
        markdown(quality.sections(quality_record)[0], quality_record),
        simulated_memory(),
    ]
    return "\n\n".join(blocks)


# The README's blocks: what stands between the marks of each.
BLOCKS: dict[str, Callable[[], str]] = {
    "headline": headline,
    "families": families,
    "bench": measured,
}


def render() -> str:
    """Render all blocks, one after the other."""
    return "\n\n".join(block() for block in BLOCKS.values())


def with_tables(text: str) -> str:
    """Return the README with every block as the result files have it."""
    for name, block in BLOCKS.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        head, found, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"README.md has no block {name!r} between {begin} and {end}")
        text = f"{head}{begin}\n{block()}\n{end}{tail}"
    return text


def write_readme() -> None:
    """Put the tables into the README."""
    README.write_text(with_tables(README.read_text()))
