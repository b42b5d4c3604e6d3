"""Run the main task on the embedded model: no network, no input but this Python installation.

A small model trained on Python's documentation is adapted to another text, Python source code.
Three things are measured and shown as they come out: this package's EVA and PEFT's in the same
process, the peak memory of both in fresh processes, and the loss of short fine-tuning runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

import eva_kernels
from eva_peft.demo import finetune
from eva_peft.demo.batches import Batch
from eva_peft.demo.comparison import (
    OURS,
    OURS_SAME_FORWARDS,
    PEFT,
    QUICK,
    Inputs,
    Run,
    Setting,
    compare,
    lost_variances,
    plain_forward_seconds,
    read_inputs,
    run_ours,
    run_peft,
)
from eva_peft.results import plots, report
from eva_peft.surroundings.memory import peak_resident_bytes

if TYPE_CHECKING:
    from eva_peft.results.result import EvaResult

LABELS = {OURS: "eva-kernels", OURS_SAME_FORWARDS: "eva-kernels*", PEFT: "PEFT"}
TITLE = "EVA on an embedded model: Python source code for a model of Python's documentation"


def run_demo(
    out: str | os.PathLike[str],
    *,
    seeds: int = 3,
    quick: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Initialise, compare with PEFT, fine-tune, and write a report.

    Args:
        out: folder for `demo-report.html`, `demo.json`, `loss.png` and `eva.png`; made if missing.
        seeds: fine-tuning runs of every start; one if `quick`.
        quick: a small version of everything, to see that it works; its numbers mean little.
        console: where tables are printed; default a new console on standard output.

    Returns:
        The measured numbers, as in `demo.json`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plots.require_matplotlib()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    console = console or Console()
    setting = QUICK if quick else Setting()
    seconds: dict[str, float] = {}
    with _transformers_quiet(), console.status("reading the model and the text") as status:
        with _timed(seconds, "reading"):
            inputs = read_inputs(setting)
            batches = inputs.batches(setting)
        with _timed(seconds, "comparison"):
            runs, plain, result = compare(inputs.model, batches, setting, status.update)
            lost = lost_variances(inputs.model, batches, runs)
        with _timed(seconds, "memory"):
            status.update("measuring peak memory in fresh processes")
            memory = measure_memory(quick)
        with _timed(seconds, "fine-tuning"):
            curves = finetune.compare_starts(
                inputs.model,
                make_starts(inputs, setting),
                inputs.train,
                inputs.held_out,
                setting.recipe,
                1 if quick else seeds,
                status.update,
            )
    numbers = {
        "setting": asdict(setting),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
        "text": describe_text(inputs, batches),
        "initialisation": describe_runs(runs, plain, lost, memory),
        "fine_tuning": finetune.describe(curves),
        "seconds": {part: round(value, 1) for part, value in seconds.items()},
    }
    print_tables(console, numbers)
    write_report(folder, numbers, curves, result)
    console.print(f"Report: {folder / 'demo-report.html'}")
    return numbers


def make_starts(inputs: Inputs, setting: Setting) -> dict[str, finetune.Start]:
    """Make the three starts; EVA passes once over calibration batches drawn for the seed."""

    def eva(base: torch.nn.Module, seed: int) -> PeftModel:
        model = get_peft_model(base, setting.lora_config(eva=True), low_cpu_mem_usage=True)
        batches = inputs.batches(setting, seed)
        return eva_kernels.initialize(
            model,
            batches,
            seed=seed,
            progress=False,
            max_steps=len(batches),
            on_not_converged="ignore",
        )

    return {
        "EVA": eva,
        "random (PEFT)": finetune.random_start(setting.lora_config()),
        "random orthonormal": finetune.orthonormal_start(setting.lora_config()),
    }


def measure_memory(quick: bool) -> dict[str, int]:
    """Measure the peak resident set of equally many forwards, each kind in a fresh process.

    Args:
        quick: as in `run_demo`.

    Returns:
        Bytes of "plain" forwards, and of forwards with EVA by either package.
    """
    command = [sys.executable, "-m", "eva_peft.demo", *["--quick"] * quick, "--measure"]
    # The children must find the packages where this process has found them.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    children, peaks = {}, {}
    with contextlib.ExitStack() as stack:
        for kind in ("plain", OURS, PEFT):
            child = subprocess.Popen([*command, kind], env=environment, **pipes)
            children[kind] = stack.enter_context(child)
            stack.callback(child.kill)  # if one has failed, or at Ctrl-C
        for kind, child in children.items():
            output, errors = child.communicate()
            if child.returncode != 0:
                last_output = errors[-2000:]
                raise RuntimeError(
                    f"the peak memory of {kind!r} could not be measured in a separate process: "
                    f"{last_output}"
                )
            peaks[kind] = int(output.split()[-1])
    return peaks


def measure_peak(kind: str, quick: bool) -> int:
    """Run one kind of pass and return the peak resident set of this process, in bytes."""
    setting = QUICK if quick else Setting()
    with _transformers_quiet():
        inputs = read_inputs(setting)
        batches = inputs.batches(setting)
        if kind == OURS:
            run_ours(inputs.model, batches, setting, setting.memory_forwards)
        elif kind == PEFT:
            run_peft(inputs.model, batches, setting, setting.memory_forwards)
        else:
            plain_forward_seconds(inputs.model, batches[: setting.memory_forwards])
    return _peak_resident_bytes()


def _peak_resident_bytes() -> int:
    """Return the peak resident set of this program, without that of the one that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    return peak_resident_bytes()


@contextlib.contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - start


@contextlib.contextmanager
def _transformers_quiet() -> Iterator[None]:
    """Keep the bars and deprecation notes of transformers out of the tables."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


def describe_text(inputs: Inputs, batches: list[Batch]) -> dict[str, int]:
    """Count the tokens of the three parts of the text."""
    return {
        "calibration_tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
        "training_tokens": inputs.train.numel(),
        "held_out_tokens": inputs.held_out.numel(),
        "model_parameters": inputs.model.num_parameters(),
    }


def describe_runs(
    runs: dict[str, Run],
    plain: list[float],
    lost: dict[str, float | None],
    memory: dict[str, int],
) -> dict[str, Any]:
    """Return the comparison as JSON-able numbers."""
    forward = statistics.median(plain)
    table: dict[str, Any] = {"plain_forward_seconds": forward, "plain_peak_bytes": memory["plain"]}
    for name, run in runs.items():
        median = statistics.median(run.seconds)
        table[name] = {
            "seconds": run.seconds,
            "seconds_median": median,
            "forwards": run.forwards,
            "seconds_over_plain": median / (forward * run.forwards),
            "lost_variance": lost[name],
            "peak_bytes_above_plain": memory[name] - memory["plain"] if name in memory else None,
            "ranks": None if run.lora_a is None else {k: len(a) for k, a in run.lora_a.items()},
        }
    return table


def print_tables(console: Console, numbers: dict[str, Any]) -> None:
    """Print the tables."""
    for heading, headers, rows, note in format_tables(numbers):
        table = Table(title=heading, caption=note, caption_justify="left")
        for i, header in enumerate(headers):
            table.add_column(header, justify="right" if i else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)


def format_tables(
    numbers: dict[str, Any],
) -> list[tuple[str, list[str], list[list[str]], str]]:
    """Format the numbers as tables: heading, column names, rows of text, note."""
    measured = numbers["initialisation"]
    setting = numbers["setting"]
    rows = []
    for name in (OURS, OURS_SAME_FORWARDS, PEFT):
        run = measured[name]
        ranks = run["ranks"]
        peak = run["peak_bytes_above_plain"]
        rows.append(
            [
                LABELS[name],
                str(run["forwards"]),
                f"{run['seconds_median']:.2f}",
                f"{run['seconds_over_plain']:.2f}",
                "-" if peak is None else f"{peak / 2**20:.1f}",
                "-" if ranks is None else f"{run['lost_variance']:.1e}",
                "-" if ranks is None else str(sum(ranks.values())),
            ]
        )
    counts = [str(len(measured[name]["seconds"])) for name in (OURS, OURS_SAME_FORWARDS, PEFT)]
    note = (
        f"r={setting['r']}, rho={setting['rho']:g}, tau={setting['tau']:g}. * as many forwards as "
        "PEFT. Seconds: median of interleaved runs, "
        f"{', '.join(counts)} "
        "of them. / plain: over as many forwards without EVA. MiB: peak resident set above that of "
        f"{setting['memory_forwards']} plain forwards, each in a fresh process; below zero where "
        "the head that is skipped takes more than EVA adds. Lost variance of lora_A: against exact "
        "PCA over the batches seen, mean over layers."
    )
    headers = ["EVA by", "forwards", "seconds", "/ plain", "MiB", "lost variance", "ranks"]
    initialisation = ("Initialisation", headers, rows, note)
    return [
        initialisation,
        finetune.format_table(numbers["fine_tuning"], setting["recipe"]["learning_rate"]),
    ]


def write_report(
    folder: Path, numbers: dict[str, Any], curves: dict[str, finetune.Curve], result: EvaResult
) -> None:
    """Write the report, the plots and the numbers."""
    figure = finetune.plot_curves(curves)
    figure.savefig(folder / "loss.png", dpi=150)
    plots.save_result_plot(result, folder / "eva.png")
    (folder / "demo.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    sections = []
    for heading, headers, rows, note in format_tables(numbers):
        sections.append((heading, report.table_to_html(headers, rows) + f"<p>{note}</p>"))
    sections[1] = (sections[1][0], report.figure_to_html(figure) + sections[1][1])
    text_counts = numbers["text"]
    intro = (
        f"<p>A Llama-architecture model with {text_counts['model_parameters']:,} parameters, "
        "trained on the documentation of Python, is adapted to Python source code of the standard "
        f"library: {text_counts['calibration_tokens']:,} tokens for the initialisation, "
        f"{text_counts['training_tokens']:,} for training and {text_counts['held_out_tokens']:,} "
        "from other files for the evaluation. All numbers were measured in this run.</p>"
    )
    seconds = report.table_to_html(["part", "seconds"], numbers["seconds"].items())
    sections = [("What was run", intro + seconds), *sections, *report.result_sections(result)]
    page = report.render_html(TITLE, sections)
    (folder / "demo-report.html").write_text(page, encoding="utf-8")
