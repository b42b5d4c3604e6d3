"""``python -m bench``: run the benchmarks, or the one that is named."""

from __future__ import annotations

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


if __name__ == "__main__":
    app()
