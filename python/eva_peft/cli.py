"""The command line `eva-kernels`: demo, init, info, report and pad.

Only light modules are imported here, so that help and usage errors come at once; every command
imports what it needs.
"""

from __future__ import annotations

import signal
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from importlib import import_module, metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .command.model_setup import (
    DType,
    Task,
    check_device,
    config_fields,
    load_model,
    load_tokenizer,
    lora_config,
    needs_decoder_inputs,
    parse_target_modules,
    task_of,
    warn_of_unknown_targets,
)
from .errors import EvaError, EvaValueError, EvaWarning
from .surroundings.staging import naming_folder_in_errors, staged_folder

app = typer.Typer(
    name="eva-kernels",
    help="EVA initialisation of LoRA adapters from the activations of your own data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RESULT_FILE = "eva.safetensors"  # next to an adapter
REPORT_SUFFIXES = (".html", ".png", ".svg")
_PACKAGES = ("triton", "transformers", "peft", "accelerate", "datasets", "matplotlib")
_NATIVE_MODULES = ("eva_kernels._C", "eva_kernels._cuda")


class Method(str, Enum):
    """How the components are found."""

    AUTO = "auto"
    SKETCH = "sketch"
    GRAM = "gram"


class Terminated(KeyboardInterrupt):
    """SIGTERM, as sent by a scheduler that reclaims the machine."""


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGTERM, _terminate)
    app(prog_name="eva-kernels")


def _terminate(number: int, frame: object) -> None:
    raise Terminated


def _print_version(requested: bool) -> None:
    if requested:
        from eva_kernels import __version__

        _print_line(Console(), f"eva-kernels {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of a failure.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for the report and the plots.")] = Path(
        "demo-report"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps, and one seed.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Fine-tuning runs of each method.")] = 3,
) -> None:
    """Run EVA on the embedded model and text, compare with PEFT's EVA, fine-tune, report."""
    with _exit_codes(ctx):
        from .demo import run_demo

        run_demo(out, quick=quick, seeds=seeds, console=Console())


@app.command()
def init(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Model: hub id or folder.")],
    data: Annotated[
        str,
        typer.Option(
            help="Texts to calibrate on: a .jsonl, .parquet or .txt file (a text a line), or a "
            "hub dataset as NAME or NAME:CONFIG."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the adapter and the report.")],
    r: Annotated[
        int | None, typer.Option(min=1, help="Mean rank of the layers.", show_default="16")
    ] = None,
    rho: Annotated[
        float | None,
        typer.Option(min=1, help="Largest rank of a layer, as a multiple of r.", show_default="2"),
    ] = None,
    alpha: Annotated[int | None, typer.Option(min=1, help="LoRA alpha.", show_default="16")] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(help="Module names with commas between.", show_default="all-linear"),
    ] = None,
    tau: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Components have converged when |cos| to the step before is at least this.",
            show_default="0.99",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="JSON file with fields of LoraConfig; options given here override it."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per batch.")] = 8,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens per text, at most.")] = 512,
    max_steps: Annotated[int, typer.Option(min=1, help="Forward passes at most.")] = 1000,
    method: Annotated[
        Method,
        typer.Option(help="sketch is fast, gram is exact, auto is exact where memory allows."),
    ] = Method.AUTO,
    seed: Annotated[
        int,
        typer.Option(
            min=-(2**63),
            max=2**63 - 1,
            help="Seed of the order of the texts and of the first components.",
        ),
    ] = 0,
    task: Annotated[
        Task | None, typer.Option(help="Task to load the model for.", show_default="causal-lm")
    ] = None,
    dtype: Annotated[
        DType, typer.Option(help="Data type of the model's weights during the pass.")
    ] = DType.AUTO,
    device: Annotated[
        str | None,
        typer.Option(help="Device, such as cpu or cuda:1.", show_default="a GPU, if any"),
    ] = None,
    device_map: Annotated[
        str | None, typer.Option(help="Spread the model over devices, such as with auto.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="File that stores the progress, so that a stopped run can be resumed."),
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(help="Column with the texts or chats.", show_default="guessed")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a hub dataset.")] = "train",
    limit: Annotated[int, typer.Option(min=1, help="Texts to read at most.")] = 10_000,
    force: Annotated[
        bool, typer.Option("--force", help="Replace files in a folder that is not empty.")
    ] = False,
) -> None:
    """Calibrate on your data and write an adapter folder for PeftModel.from_pretrained."""
    if device is not None and device_map is not None:
        raise typer.BadParameter("give --device or --device-map, not both")
    with _exit_codes(ctx, checkpoint), staged_folder(out, force, checkpoint) as folder:
        lora = {"r": r, "lora_alpha": alpha, "target_modules": parse_target_modules(target_modules)}
        check_device(device)
        fields = config_fields(config, lora, {"rho": rho, "tau": tau})
        task = task or task_of(fields)
        peft_config = lora_config(fields, task)
        tokenizer = load_tokenizer(model)

        from .command.data import DecoderInputs, load_texts, make_loader, padding_token

        texts = load_texts(
            data, text_column=text_column, split=split, limit=limit, tokenizer=tokenizer
        )
        base = load_model(model, task, dtype.value, device, device_map, seed)
        batches: Any = make_loader(texts, tokenizer, batch_size, max_length, seed, base)
        warn_of_unknown_targets(peft_config.target_modules, base)
        if getattr(base.config, "pad_token_id", None) is None:  # classifiers look for it
            base.config.pad_token_id = padding_token(tokenizer, base)
        options: dict[str, Any] = {"max_steps": max_steps, "method": method.value, "seed": seed}
        if checkpoint is not None:
            options["checkpoint"] = checkpoint

        from .initialize import initialize
        from .results.report import write_html

        if needs_decoder_inputs(base, task):
            batches = DecoderInputs(batches, base)
        tuned = initialize(base, batches, peft_config, **options)
        with naming_folder_in_errors(out):
            tuned.save_pretrained(folder)
            tuned.eva_result.save(folder / RESULT_FILE)
            write_html(tuned.eva_result, folder / "report.html")
    _print_line(Console(), tuned.eva_result.summary())
    # without is_trainable PEFT loads frozen adapters, and these are there to be trained
    call = f"PeftModel.from_pretrained(base_model, {str(out)!r}, is_trainable=True)"
    _print_line(Console(), f"wrote {out}: {call} loads it, ready to train")


@app.command()
def info(ctx: typer.Context) -> None:
    """Show versions, devices, and which backend each operation uses and why."""
    with _exit_codes(ctx):
        import platform

        from eva_kernels import __version__
        from eva_kernels.ops import backend_report

        rows = [("python", platform.python_version()), ("eva_kernels", __version__)]
        rows += [("torch", import_module("torch").__version__)]  # its build, too
        rows += [(name, _package_version(name)) for name in _PACKAGES]
        console = Console()
        console.print(_make_table("Versions", ("package", "version"), rows))
        console.print(_make_table("Devices", ("device", "what", "memory"), _device_rows()))
        console.print(_make_table("Backends", ("operation", "backend", "why"), backend_report()))
        natives = [(name, _native_module_state(name)) for name in _NATIVE_MODULES]
        console.print(_make_table("Compiled extension", ("module", "state"), natives))


@app.command()
def report(
    ctx: typer.Context,
    file: Annotated[
        Path, typer.Argument(help=f"A saved result, or a folder with {RESULT_FILE} in it.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="What to write: .html, .png or .svg.", show_default="FILE as .html"),
    ] = None,
) -> None:
    """Write the report or the plots of a saved result."""
    if file.is_dir():
        file /= RESULT_FILE
    target = file.with_suffix(".html") if out is None else out
    if target.suffix.lower() not in REPORT_SUFFIXES:
        raise typer.BadParameter(f"--out must end in one of {', '.join(REPORT_SUFFIXES)}")
    with _exit_codes(ctx):
        if not file.is_file():
            raise EvaValueError(
                f"there is no file {file}; pass a result that eva-kernels init or EvaResult.save "
                "wrote"
            )

        from .results.plots import save_result_plot
        from .results.report import write_html
        from .results.result import EvaResult

        write = write_html if target.suffix.lower() == ".html" else save_result_plot
        write(EvaResult.load(file), target)
        _print_line(Console(), f"wrote {target}")


@app.command()
def pad(
    ctx: typer.Context,
    adapter: Annotated[Path, typer.Argument(help="Folder of a saved LoRA adapter.")],
    out: Annotated[Path, typer.Option(help="Folder for the adapter with one rank.")],
    r: Annotated[
        int | None, typer.Option(min=1, help="The rank.", show_default="the largest of a layer")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace files in a folder that is not empty.")
    ] = False,
) -> None:
    """Give all layers of a saved adapter one rank, for runtimes that read no rank_pattern."""
    with _exit_codes(ctx):
        if out.resolve() == adapter.resolve():
            raise EvaValueError(
                f"--out {out} is the folder of the adapter itself; name another folder"
            )

        from .lora.pad import pad_ranks

        with staged_folder(out, force, None) as folder:
            rank = pad_ranks(adapter, folder, r)
    _print_line(Console(), f"wrote {out}: rank {rank} in all layers, the same outputs")


@contextmanager
def _exit_codes(ctx: typer.Context, checkpoint: Path | None = None) -> Iterator[None]:
    """End a failed command with a line on stderr and an exit code.

    The code is 1; 130 if interrupted, 143 if terminated.
    """
    console = Console(stderr=True)
    debug = ctx.find_root().params["debug"]
    try:
        with warnings.catch_warnings():
            # FutureWarnings concern the authors of other packages, not users of this command.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.showwarning = _warning_printer(console, warnings.showwarning)
            yield
    except (typer.Exit, typer.BadParameter):
        raise
    except KeyboardInterrupt as error:
        if checkpoint is None:
            checkpoint_text = "nothing was saved"
        elif checkpoint.is_file():
            checkpoint_text = (
                f"the checkpoint {checkpoint} was kept; run the same command again to resume"
            )
        else:
            checkpoint_text = f"no checkpoint had been written to {checkpoint} yet"
        terminated = isinstance(error, Terminated)
        _print_line(console, f"{'terminated' if terminated else 'interrupted'}: {checkpoint_text}")
        raise typer.Exit(128 + (signal.SIGTERM if terminated else signal.SIGINT)) from None
    except Exception as error:
        if debug:
            traceback.print_exception(error)
        _print_line(console, f"error: {_error_line(error)}")
        raise typer.Exit(1) from error


def _error_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, (EvaError, OSError, ImportError)) and text:
        return text
    return f"{type(error).__name__}: {text} (eva-kernels --debug, before the command, shows where)"


def _warning_printer(console: Console, fallback: Any) -> Any:
    def show(message: Any, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        if issubclass(category, EvaWarning):
            _print_line(console, f"warning: {message}")
        else:
            fallback(message, category, *args, **kwargs)

    return show


def _print_line(console: Console, text: str) -> None:
    """Print one line unchanged: no markup, no automatic colours, no wrapping."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _package_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _device_rows() -> list[tuple[str, str, str]]:
    import platform

    import torch

    from eva_kernels.streaming._host import state_device

    from .surroundings.devices import accelerator

    threads = f"{platform.machine()}, {torch.get_num_threads()} threads"
    rows = [("cpu", threads, "")]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        description = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
        rows.append((f"cuda:{i}", description, f"{properties.total_memory / 2**30:.1f} GiB"))
    accelerator_device = accelerator()
    if accelerator_device is not None and accelerator_device.type != "cuda":
        sums_on_cpu = state_device(accelerator_device) != accelerator_device
        description = (
            "sums and folds on the CPU: it lacks float64" if sums_on_cpu else "plain PyTorch"
        )
        description = f"no kernels for it: {description}"
        rows += [
            (f"{accelerator_device.type}:{i}", description, "")
            for i in range(torch.accelerator.device_count())
        ]
    if len(rows) == 1:
        gpu_platform = torch.version.cuda or torch.version.hip
        reason = (
            f"torch is built for {gpu_platform}, but sees no GPU"
            if gpu_platform
            else "this torch is CPU only"
        )
        rows.append(("cuda", f"none: {reason}", ""))
    return rows


def _native_module_state(name: str) -> str:
    try:
        module = import_module(name)
    except ImportError as error:
        return f"not usable: {error}"
    archs = getattr(module, "archs", None)
    return f"works, built for sm {archs}" if archs else "works"


def _make_table(title: str, headers: tuple[str, ...], rows: Any) -> Table:
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", show_edge=False)
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    return table


if __name__ == "__main__":
    main()
