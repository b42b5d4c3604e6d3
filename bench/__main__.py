"""``python -m bench``: run the benchmarks, or the one that is named."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, help=__doc__)


@app.callback(invoke_without_command=True)
def main(context: typer.Context) -> None:
    """Run everything, then print the tables."""
    if context.invoked_subcommand is None:
        step()
        initialize()
        memory()
        tables()


@app.command()
def step(steps: int = 46) -> None:
    """One SVD step on real activations, against PEFT's IncrementalPCA."""
    from . import svd_step

    svd_step.run(steps)


@app.command()
def initialize(repeats: int = 5) -> None:
    """The whole initialisation, against PEFT's and the plain forward passes."""
    from . import initialize as benchmark

    benchmark.run(repeats)


@app.command()
def memory(repeats: int = 3, child: str = "") -> None:
    """Peak memory, each in a fresh process."""
    from . import memory as benchmark

    if child:
        benchmark.child(child)
    else:
        benchmark.run(repeats)


@app.command()
def tables(write: bool = False) -> None:
    """Print the README's tables from the result files, or put them into the README."""
    from . import tables as benchmark

    if write:
        benchmark.write_readme()
    else:
        print(benchmark.render())


@app.command()
def kernels(seconds: float = 300.0, out: Path | None = None) -> None:
    """Every kernel against its plain twin and PEFT's step, after its answer was found right."""
    import json

    import torch

    from .kernels._timing import Ceilings, measure_ceilings
    from .kernels.run import run

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = device.type == "cpu"
    measured = measure_ceilings(device, small)
    ceilings = Ceilings(measured["bytes_per_second"], measured["flops_per_second"])
    rows = run(device, small=small, ceilings=None if small else ceilings, seconds=seconds)
    _put(json.dumps({"ceilings": measured, "rows": rows}, indent=1), out)


@app.command()
def kernel_report(
    arch: Annotated[list[str] | None, typer.Option(help="An architecture; all if none.")] = None,
    write: Annotated[bool, typer.Option(help="Keep the result in bench/results.")] = False,
) -> None:
    """Compile the Triton kernels for every chip of the launch tables; needs no GPU."""
    from . import kernel_report as report

    if report.run(tuple(arch or report.ARCHS), write):
        raise typer.Exit(1)


@app.command()
def simulate(
    model: Annotated[list[str] | None, typer.Option(help="A model; all if none.")] = None,
    write: Annotated[bool, typer.Option(help="Keep the result in bench/results.")] = False,
) -> None:
    """Peak memory of the initialisation of 7B to 70B models, simulated; needs no GPU."""
    from . import simulated_memory

    unknown = set(model or ()) - set(simulated_memory.MODELS)
    if unknown:
        raise typer.BadParameter(
            f"{', '.join(sorted(unknown))}: known are {', '.join(simulated_memory.MODELS)}"
        )
    simulated_memory.run(model or list(simulated_memory.MODELS), write)


@app.command()
def families(
    family: Annotated[list[str] | None, typer.Option(help="A family; all if none.")] = None,
    write: Annotated[bool, typer.Option(help="Keep the result in bench/results.")] = False,
) -> None:
    """Initialise tiny models of all families, with this package and with PEFT's defaults."""
    from .families import FAMILIES
    from .families.run import run, words

    unknown = set(family or ()) - set(FAMILIES)
    if unknown:
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: known are {', '.join(FAMILIES)}")
    for row in run(family, write):
        print(f"{row['family']}: {words(row['ours'])}; PEFT: {words(row['peft'])}")


@app.command()
def end_to_end(config: str = "tiny", seconds: float = 600.0, out: Path | None = None) -> None:
    """Plain forward, ours and PEFT's EVA on the shape of a model: "tiny" or "llama-2-7b"."""
    import json

    import torch

    from . import end_to_end as benchmark

    if config not in benchmark.SETTINGS:
        raise typer.BadParameter(f"{config!r} is none of {', '.join(benchmark.SETTINGS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _put(json.dumps(benchmark.run(config, device, seconds=seconds), indent=1), out)


@app.command()
def gpu_check(
    out: Annotated[Path, typer.Option(help="Folder of the results.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Rehearse on the CPU.")] = False,
    skip: Annotated[list[str] | None, typer.Option(help="A stage to leave out.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what passed before.")] = False,
) -> None:
    """Build, test, sanitise and measure on a GPU within nine minutes; red unless all is green."""
    from .gpu_check.runner import Check

    # a polite end: the stage that runs is ended, too
    signal.signal(signal.SIGTERM, _leave)
    try:
        check = Check(out, dry_run=dry_run, skip=skip or (), resume=resume)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    raise typer.Exit(0 if check.run() else 1)


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _put(text: str, out: Path | None) -> None:
    if out is None:
        print(text)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
