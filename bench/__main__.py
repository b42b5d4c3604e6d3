"""``python -m bench``: run all benchmarks, or a single one."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import RESULTS, default_device
from .processes import exit_on_signal

app = typer.Typer(add_completion=False, help=__doc__)


Out = Annotated[Path, typer.Option(help="Folder for the result files.")]
Full = Annotated[bool, typer.Option("--full", help="Use all seeds and sizes, not a few.")]


@app.callback(invoke_without_command=True)
def main(context: typer.Context, out: Out = Path("bench-report"), full: Full = False) -> None:
    """Run cost, scale, accuracy and quality, then write tables, plots and an HTML page."""
    if context.invoked_subcommand is None:
        cost(out=out)
        scale(out, full)
        accuracy(out, full)
        quality(out, full)
        report(out)


@app.command()
def cost(
    config: Annotated[
        str, typer.Option(help="Model configuration; on a CPU only tiny is feasible.")
    ] = "tiny",
    method: Annotated[
        list[str] | None, typer.Option(help="Method; repeat for several. Default: all.")
    ] = None,
    out: Out = RESULTS,
) -> None:
    """Measure the cost of every initialisation: time by phase, memory, data, change of the base."""
    from .cost.configs import CONFIGS
    from .cost.run import run
    from .methods import METHODS

    _check_names([config], CONFIGS)
    _check_names(method or (), METHODS)
    try:
        run(config, out, method)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from error


@app.command()
def depth(
    config: Annotated[str, typer.Option(help="Model configuration.")] = "tiny",
    layers: Annotated[
        list[int] | None,
        typer.Option(help="Number of layers to measure, at least twice. Default: 2 and 6."),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Method; repeat for several. Default: some.")
    ] = None,
    out: Out = RESULTS,
) -> None:
    """Extrapolate the cost on a model too large to run, from a few of its layers."""
    import json

    from .cost import depth as benchmark
    from .cost.configs import CONFIGS
    from .methods import METHODS
    from .sections import markdown

    _check_names([config], CONFIGS)
    _check_names(method or (), METHODS)
    try:
        path = benchmark.run(config, layers or (2, 6), method or benchmark.METHODS, out=out)
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from error
    record = json.loads(path.read_text("utf-8"))
    print(markdown(benchmark.sections(record)[0], record))


@app.command()
def scale(out: Out = RESULTS, full: Full = False) -> None:
    """Measure the cost of a step by width, tokens, layers and rank; memory of 7B to 70B models."""
    from .scale.run import run

    run("full" if full else "quick", out)


@app.command()
def accuracy(out: Out = RESULTS, full: Full = False) -> None:
    """Measure lost variance and rank error against exact PCA, and the time of each method."""
    from .accuracy.run import run

    run("full" if full else "quick", out)


@app.command()
def quality(
    out: Out = RESULTS,
    full: Full = False,
    domain: Annotated[
        list[str] | None,
        typer.Option(help="Domain; repeat for several. Default: all but pretrained (for a GPU)."),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Method; repeat for several. Default: all.")
    ] = None,
    data: Annotated[
        str, typer.Option(help="embedded, or hub for the data sets of the paper.")
    ] = "embedded",
) -> None:
    """Fine-tune from every initialisation in several domains, and compare the results."""
    from .methods import METHODS
    from .quality.domains import RECIPES
    from .quality.run import DATA, run

    _check_names(domain or (), RECIPES)
    _check_names(method or (), METHODS)
    _check_names([data], DATA)
    run("full" if full else "quick", out, domain, method, data=data)


@app.command()
def report(
    out: Out = RESULTS,
    readme: Annotated[
        bool, typer.Option("--readme", help="Also update the tables of the README.")
    ] = False,
) -> None:
    """Write the HTML page, plots and tables of a results folder from its JSON files."""
    from . import report as benchmark

    print(f"wrote {benchmark.run(out)}")
    if readme:
        tables(write=True)


def _check_names(given: Iterable[str], known: Iterable[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise typer.BadParameter(f"unknown: {', '.join(unknown)}; choose from {', '.join(known)}")


@app.command()
def step(steps: int = 46, out: Out = RESULTS) -> None:
    """Time one SVD step on real activations, compared with PEFT's IncrementalPCA."""
    from . import svd_step

    svd_step.run(steps, out)


@app.command()
def initialize(repeats: int = 5, out: Out = RESULTS) -> None:
    """Time the whole initialisation, compared with PEFT's and with plain forward passes."""
    from . import initialize as benchmark

    benchmark.run(repeats, out)


@app.command()
def memory(repeats: int = 3, child: str = "", out: Out = RESULTS) -> None:
    """Measure peak memory of plain passes, this package and PEFT, each in a fresh process."""
    from . import memory as benchmark

    if child:
        benchmark.child(child)
    else:
        benchmark.run(repeats, out)


@app.command()
def tables(write: bool = False) -> None:
    """Print the README's tables from the result files, or write them into the README."""
    from . import tables as benchmark

    if write:
        benchmark.write_readme()
    else:
        print(benchmark.render())


@app.command()
def kernels(seconds: float = 300.0, out: Path | None = None) -> None:
    """Time every kernel against its PyTorch twin and PEFT's step, after checking its result."""
    from .kernels._timing import Ceilings, measure_ceilings
    from .kernels.run import run

    device = default_device()
    small = device.type == "cpu"
    measured = measure_ceilings(device, small)
    ceilings = Ceilings(measured["bytes_per_second"], measured["flops_per_second"])
    rows = run(device, small=small, ceilings=None if small else ceilings, seconds=seconds)
    _output({"ceilings": measured, "rows": rows}, out)


@app.command()
def tune(seconds: float = 200.0, out: Path | None = None) -> None:
    """Time the sketch with other launch parameters, one changed at a time.

    A rehearsal without a GPU needs TRITON_INTERPRET=1 in the environment.
    """
    from .kernels import tune

    device = default_device()
    rows = tune.run(device, small=device.type == "cpu", seconds=seconds, save=_make_saver(out))
    print(tune.table(rows))


@app.command()
def kernel_report(
    arch: Annotated[
        list[str] | None, typer.Option(help="Architecture; repeat for several. Default: all.")
    ] = None,
    write: Annotated[bool, typer.Option(help="Save the result in bench/results.")] = False,
) -> None:
    """Compile the Triton kernels for every architecture in the launch tables; needs no GPU."""
    from . import kernel_report as report

    if report.run(tuple(arch or report.ARCHS), write):
        raise typer.Exit(1)


@app.command()
def simulate(
    model: Annotated[
        list[str] | None, typer.Option(help="Model; repeat for several. Default: all.")
    ] = None,
    write: Annotated[bool, typer.Option(help="Save the result in bench/results.")] = False,
) -> None:
    """Simulate the peak memory of initialising 7B to 70B models; needs no GPU."""
    from . import simulated_memory
    from .models import MODELS

    _check_names(model or (), MODELS)
    simulated_memory.run(model or list(MODELS), write)


@app.command()
def families(
    family: Annotated[
        list[str] | None, typer.Option(help="Family; repeat for several. Default: all.")
    ] = None,
    write: Annotated[bool, typer.Option(help="Save the result in bench/results.")] = False,
) -> None:
    """Try to initialise tiny models of all families, with this package and with PEFT's EVA."""
    from .families import FAMILIES
    from .families.run import outcome_text, run

    _check_names(family or (), FAMILIES)
    for row in run(family, write):
        print(f"{row['family']}: {outcome_text(row['ours'])}; PEFT: {outcome_text(row['peft'])}")


@app.command()
def end_to_end(
    config: str = "tiny",
    seconds: float = 600.0,
    out: Path | None = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Profile of our steps, for a trace viewer; compressed if named .gz."),
    ] = None,
) -> None:
    """Time plain forward passes, this package and PEFT's EVA on the shape of a model."""
    from . import end_to_end as benchmark

    _check_names([config], benchmark.SETTINGS)
    device = default_device()
    result = benchmark.run(config, device, seconds=seconds, save=_make_saver(out), trace=trace)
    _output(result, out)


@app.command()
def gpu_check(
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Rehearse on the CPU.")] = False,
    skip: Annotated[list[str] | None, typer.Option(help="Stage to skip; repeatable.")] = None,
    also: Annotated[
        list[str] | None, typer.Option(help="Additional stage, run on request only; repeatable.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep stages that passed in an earlier run.")
    ] = False,
    seconds: Annotated[
        float | None, typer.Option(help="Time limit of the whole check.", show_default="540")
    ] = None,
) -> None:
    """Build, test, sanitise and measure on a GPU within nine minutes; fails unless all passed."""
    from .gpu_check.plan import TOTAL_SECONDS
    from .gpu_check.runner import Check

    total = TOTAL_SECONDS if seconds is None else seconds
    # shut down cleanly, ending the running stage, too
    signal.signal(signal.SIGTERM, exit_on_signal)
    try:
        check = Check(
            out, dry_run=dry_run, skip=skip or (), also=also or (), resume=resume, total=total
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    raise typer.Exit(0 if check.run() else 1)


def _make_saver(out: Path | None) -> Callable[[Any], None]:
    """Return what keeps all that was found so far in a file; on the screen, only the end is."""
    return (lambda result: _output(result, out)) if out else (lambda result: None)


def _output(result: Any, out: Path | None) -> None:
    """Write a result with the day, the commit and the machine; print it where there is no file."""
    import json

    from .common import header
    from .files import write_json

    rows = result if isinstance(result, dict) else {"rows": result}
    if out is None:
        print(json.dumps(result, indent=1))
    else:
        write_json(out, {**header(), **rows})


if __name__ == "__main__":
    app()
