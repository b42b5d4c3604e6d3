"""The record as text: which stages passed, which did not and why, and the measurements."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH = 140
WARNING = (
    "DRY RUN on the CPU: a rehearsal with small shapes. No number below says anything about a GPU."
)
CALLS = ("launches", "kernels", "host_waits", "copies_to_host", "sync_warnings")


def render(record: Mapping[str, Any]) -> str:
    """Return the whole record as text."""
    dry = bool(record["dry_run"])
    parts: list[Any] = [f"gpu-check: {record['status'].upper()}{' (dry run)' if dry else ''}"]
    if dry:
        parts.append(WARNING)
    parts.append(f"{record['date']}, commit {record['commit']}, sources {record['sources']}")
    for group in ("machine", "versions"):
        present = {key: value for key, value in record[group].items() if value not in (None, "")}
        if present:
            parts.append(", ".join(f"{key} {value}" for key, value in present.items()))
    parts.append(_stages(record["stages"]))
    results = {name: stage.get("results", {}) for name, stage in record["stages"].items()}
    parts += _tests(results.get("tests", {}))
    parts += _ceilings(results.get("ceilings", {}), dry)
    parts += _kernels(results.get("kernels", {}), dry)
    for name, stage_results in results.items():
        if name.startswith("end_to_end"):
            parts += _end_to_end(stage_results, dry)
    parts += _tune(results.get("tune", {}), dry)
    parts += _quality(results.get("quality", {}), dry)
    parts += _depth(results.get("corda", {}), dry)
    return _text(parts)


def _text(parts: Sequence[Any]) -> str:
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, highlight=False)
    for part in parts:
        console.print(part, markup=False, soft_wrap=isinstance(part, str))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    return "\n".join(line.rstrip() for line in lines)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _stages(stages: Mapping[str, Any]) -> Table:
    table = Table(title="stages", title_justify="left", box=None, pad_edge=False)
    for column in ("stage", "status", "seconds", "reason"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    for name, stage in stages.items():
        status = stage["status"] + (" (kept)" if stage.get("kept") else "")
        table.add_row(name, status, f"{stage['seconds']:.1f}", stage["reason"])
    return table


def _tests(results: Mapping[str, Any]) -> list[Any]:
    notes = []
    if results.get("one_process"):
        notes.append(f"  in one process: {results['one_process']}")
    if results.get("missing_packages"):
        notes.append(f"  not installed: {', '.join(results['missing_packages'])}")
    if "passed" not in results:  # pytest was killed
        return ["tests: no report", *notes] if notes else []
    counts = ", ".join(f"{results[key]} {key}" for key in ("passed", "failed", "skipped"))
    lines = [f"tests: {counts}; marked gpu: {results['gpu_passed']} passed"]
    lines += [f"  failed: {name}" for name in results["failures"]]
    lines += [f"  skipped {count}x: {reason}" for reason, count in results["skip_reasons"].items()]
    return [*lines, *notes]


def _ceilings(results: Mapping[str, Any], dry: bool) -> list[Any]:
    if "bytes_per_second" not in results:
        return []
    copy, product = results["bytes_per_second"] / 1e9, results["flops_per_second"] / 1e12
    note = " (dry run, of the CPU)" if dry else ""
    return [f"ceilings{note}: copy {copy:.4g} GB/s, bfloat16 product {product:.4g} TFLOP/s"]


def _kernels(results: Mapping[str, Any], dry: bool) -> list[Any]:
    rows = results.get("rows", [])
    if not rows:
        return []
    unit = "dry ms" if dry else "ms"
    columns = ["kernel", "path", unit, "p20-p80", "host", "floor", "share", "GB/s", "TFLOP/s"]
    lines, notes = [], []
    for row in rows:
        label = str(row.get("label", row["op"]))
        if row["status"] != "timed":
            notes.append(f"  {label}: {row['status']} {row.get('reason', '')}")
        elif "wall_ms" in row:
            lines.append([label, "wall clock", *_spread(row["wall_ms"]), *[""] * 5])
            notes.append(f"  {label}: {_calls(row['calls'])}")
        else:
            lines.append(_kernel_line(label, row, dry))
            notes.append(f"  {label}: {_ratios(row)}")
    return [_table("kernels", [*columns], lines), *notes]


def _kernel_line(label: str, row: Mapping[str, Any], dry: bool) -> list[str]:
    times = row["times"][row["fast"]]
    line = [label, row["fast"], *_spread(times["ms"]), f"{times['host_ms']['median']:.3g}"]
    share = row.get("share_of_ceiling")
    if dry or share is None:
        return [*line, "", "", "", ""]
    share_text = f"{100 * share:.0f} % {row['limited_by']}"
    rate = f"{row['tflop_s']:.4g}" if row["tflop_s"] else ""
    return [*line, f"{row['floor_ms']:.3g}", share_text, f"{row['gb_s']:.4g}", rate]


def _ratios(row: Mapping[str, Any]) -> str:
    worst = max(row["errors"].values())
    ratios = ", ".join(f"{name} takes {ratio:.3g}x" for name, ratio in row["over_fast"].items())
    return f"{ratios}; error {worst:.1e}"


def _spread(values: Mapping[str, float]) -> list[str]:
    return [f"{values['median']:.3g}", f"{values['p20']:.3g}-{values['p80']:.3g}"]


def _calls(calls: Mapping[str, Any]) -> str:
    known = [f"{calls[key]:g} {key.replace('_', ' ')}" for key in CALLS if calls[key] is not None]
    return ", ".join(known) or "calls are not counted on the CPU"


def _end_to_end(results: Mapping[str, Any], dry: bool) -> list[Any]:
    rows = results.get("rows", [])
    if not rows:
        return []
    unit = "dry ms a step" if dry else "ms a step"
    lines, notes = [], []
    for row in rows:
        name = f"{row['method']}, {row['batch']} x {results['length']}"
        if row["status"] != "measured":
            notes.append(f"  {name}: {row['status']} {row.get('reason', '')}")
            continue
        step = {key: 1e3 * value for key, value in row["step_s"].items()}
        peak = row["peak_above_weights"]
        gib = "" if peak is None else f"{peak / 2**30:.3f}"
        lines.append([name, *_spread(step), gib])
        if "calls_per_step" in row:
            notes.append(f"  {name}, a step: {_calls(row['calls_per_step'])}")
        if "same_bits_twice" in row:
            notes.append(f"  {name}: same bits twice: {'yes' if row['same_bits_twice'] else 'NO'}")
        if "hash_pass_s" in row:
            notes.append(
                f"  {name}: hash pass {row['hash_pass_s']:.3g} s for {row['hash_pass_tokens']} "
                f"tokens, so {row['hash_pass_extrapolated_s']:.3g} s for the batch (extrapolated)"
            )
    for entry in results.get("ratios", []):
        known = {k: v for k, v in entry.items() if k != "batch"}
        text = ", ".join(f"{k.replace('_', ' ')} {v:.3g}x" for k, v in known.items())
        notes.append(f"  batch {entry['batch']}: {text}{' (dry run)' if dry else ''}")
    columns = ["method", unit, "p20-p80", "peak above weights, GiB"]
    return [_table(f"end to end, {results['config']}", columns, lines), *notes]


def _tune(results: Mapping[str, Any], dry: bool) -> list[Any]:
    timed = [row for row in results.get("rows", []) if row["status"] == "timed"]
    if not timed:
        return []
    lines = []
    for row in timed:
        shape = " ".join(f"{key}={value}" for key, value in row["shape"].items())
        line = [f"{shape}: {row['change']}", f"{1e3 * row['ms']['median']:.1f}"]
        lines.append([*line, f"{row['over_as_is']:.3f}"])
    columns = ["launch parameters of the sketch", "dry us" if dry else "us", "over the table's"]
    return [_table("tune", columns, lines)]


def _quality(results: Mapping[str, Any], dry: bool) -> list[Any]:
    rows = results.get("rows", [])
    if not rows:
        return []
    base = results["base"]
    lines = [["the base", "", "", *_pair(base, "loss"), *_pair(base, "score")]]
    for row in rows:
        rate = "" if row["rate"] is None else f"{row['rate']:g}"
        seeds = str(row["seeds"])
        lines.append([row["method"], rate, seeds, *_pair(row, "loss"), *_pair(row, "score")])
    columns = ["initialisation", "rate", "seeds", "loss", "+-", "score", "+-"]
    size = f"{base['parameters'] / 1e6:.3g} million parameters"
    return [_table(f"quality, {size}{' (dry run)' if dry else ''}", columns, lines)]


def _pair(row: Mapping[str, Any], name: str) -> list[str]:
    return [f"{row[key]:.4f}" if key in row else "" for key in (name, f"{name}_error")]


def _depth(results: Mapping[str, Any], dry: bool) -> list[Any]:
    notes = []
    for row in [*results.get("measured", []), *results.get("whole", [])]:
        if "error" in row:
            continue
        if "from" in row:
            provenance = f"extrapolated from {' and '.join(map(str, row['from']))}"
            seconds, peak = row["init_s"], row["init_peak"]
        else:
            times = "once" if row["repeats"] == 1 else f"{row['repeats']} times"
            provenance = f"measured {times}"
            seconds, peak = row["init_s"]["median"], row["init_peak"]["median"]
        memory = "" if dry else f", {peak / 2**30:.3g} GiB above the weights"
        depth = f"{row['depth']} layer{'' if row['depth'] == 1 else 's'}"
        note = f"{row['method']}, {depth} ({provenance}): {seconds:.4g} s{memory}"
        notes.append(f"{note}{' (dry run)' if dry else ''}")
    return notes
