"""The command line `eva-kernels`: demo, init, info and report.

Only light modules are imported here, so that help and usage errors come at once; every command
imports what it needs.
"""

from __future__ import annotations

import json
import signal
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .errors import EvaError, EvaValueError, EvaWarning
from .staging import staged_folder

if TYPE_CHECKING:
    from peft import LoraConfig

app = typer.Typer(
    name="eva-kernels",
    help="EVA initialisation of LoRA adapters from the activations of your own data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

REPORT_SUFFIXES = (".html", ".png", ".svg")
_PACKAGES = ("triton", "transformers", "peft", "accelerate", "datasets", "matplotlib")
_NATIVE_MODULES = ("eva_kernels._C", "eva_kernels._cuda")


class Method(str, Enum):
    """How the components are found."""

    AUTO = "auto"
    SKETCH = "sketch"
    GRAM = "gram"


class DType(str, Enum):
    """The data type of the model's weights during the pass; `auto` is that of the checkpoint."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Task(str, Enum):
    """What the model is loaded for."""

    CAUSAL_LM = "causal-lm"
    SEQ2SEQ_LM = "seq2seq-lm"
    MASKED_LM = "masked-lm"
    SEQUENCE_CLASSIFICATION = "sequence-classification"
    TOKEN_CLASSIFICATION = "token-classification"
    QUESTION_ANSWERING = "question-answering"
    FEATURE_EXTRACTION = "feature-extraction"


# Task -> (class of transformers, PEFT's task type)
_TASKS = {
    Task.CAUSAL_LM: ("AutoModelForCausalLM", "CAUSAL_LM"),
    Task.SEQ2SEQ_LM: ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    Task.MASKED_LM: ("AutoModelForMaskedLM", None),
    Task.SEQUENCE_CLASSIFICATION: ("AutoModelForSequenceClassification", "SEQ_CLS"),
    Task.TOKEN_CLASSIFICATION: ("AutoModelForTokenClassification", "TOKEN_CLS"),
    Task.QUESTION_ANSWERING: ("AutoModelForQuestionAnswering", "QUESTION_ANS"),
    Task.FEATURE_EXTRACTION: ("AutoModel", "FEATURE_EXTRACTION"),
}


class Terminated(KeyboardInterrupt):
    """Asked to end, as by a scheduler that takes the machine away."""


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGTERM, _terminate)
    app(prog_name="eva-kernels")


def _terminate(number: int, frame: object) -> None:
    raise Terminated


def _print_version(wanted: bool) -> None:
    if wanted:
        from eva_kernels import __version__

        _say(Console(), f"eva-kernels {__version__}")
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
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps.")] = False,
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
    r: Annotated[int | None, typer.Option(min=1, help="Mean rank.", show_default="16")] = None,
    rho: Annotated[
        float | None, typer.Option(min=1, help="Largest rank over mean rank.", show_default="2")
    ] = None,
    alpha: Annotated[int | None, typer.Option(min=1, help="LoRA alpha.", show_default="16")] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(help="Module names with commas between.", show_default="all-linear"),
    ] = None,
    tau: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="|cos| of a converged component.", show_default="0.99"),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="JSON file with fields of LoraConfig; options given here go before it."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts a batch.")] = 8,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a text at most.")] = 512,
    max_steps: Annotated[int, typer.Option(min=1, help="Forward passes at most.")] = 1000,
    method: Annotated[Method, typer.Option(help="How components are found.")] = Method.AUTO,
    seed: Annotated[int, typer.Option(help="Of the order of texts and the first basis.")] = 0,
    task: Annotated[
        Task | None, typer.Option(help="What to load the model for.", show_default="causal-lm")
    ] = None,
    dtype: Annotated[DType, typer.Option(help="Weights during the pass.")] = DType.AUTO,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda:1.", show_default="a GPU, if any")
    ] = None,
    device_map: Annotated[
        str | None, typer.Option(help="Such as auto: spread the model over devices.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="File for the state of the pass, to resume from.")
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
        lora = {"r": r, "lora_alpha": alpha, "target_modules": _targets(target_modules)}
        _check_device(device)
        fields = _config_fields(config, lora, {"rho": rho, "tau": tau})
        task = task or _task_of(fields)
        lora_config = _lora_config(fields, task)
        tokenizer = import_module("transformers").AutoTokenizer.from_pretrained(model)

        from .data import DecoderInputs, load_texts, make_loader, padding_token

        texts = load_texts(
            data, text_column=text_column, split=split, limit=limit, tokenizer=tokenizer
        )
        batches: Any = make_loader(texts, tokenizer, batch_size, max_length, seed)
        base = _load_model(model, task, dtype.value, device, device_map, seed)
        if getattr(base.config, "pad_token_id", None) is None:  # classifiers look for it
            base.config.pad_token_id = padding_token(tokenizer)
        options: dict[str, Any] = {"max_steps": max_steps, "method": method.value, "seed": seed}
        if checkpoint is not None:
            options["checkpoint"] = checkpoint

        from .initialize import initialize
        from .report import write_html

        if task is Task.SEQ2SEQ_LM:
            batches = DecoderInputs(batches, base)
        tuned = initialize(base, batches, lora_config, **options)
        tuned.save_pretrained(folder)
        tuned.eva_result.save(folder / "eva.safetensors")
        write_html(tuned.eva_result, folder / "report.html")
    _say(Console(), tuned.eva_result.summary())
    _say(Console(), f"wrote {out}: PeftModel.from_pretrained(base_model, {str(out)!r}) loads it")


@app.command()
def info(ctx: typer.Context) -> None:
    """Show versions, devices, and which backend each operation uses and why."""
    with _exit_codes(ctx):
        import platform

        from eva_kernels import __version__
        from eva_kernels.ops import backend_report

        rows = [("python", platform.python_version()), ("eva_kernels", __version__)]
        rows += [("torch", import_module("torch").__version__)]  # its build, too
        rows += [(name, _version(name)) for name in _PACKAGES]
        console = Console()
        console.print(_table("Versions", ("package", "version"), rows))
        console.print(_table("Devices", ("device", "what", "memory"), _devices()))
        console.print(_table("Backends", ("operation", "backend", "why"), backend_report()))
        natives = [(name, _native_module(name)) for name in _NATIVE_MODULES]
        console.print(_table("Compiled extension", ("module", "state"), natives))


@app.command()
def report(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(help="A saved result, such as eva.safetensors.")],
    out: Annotated[
        Path | None,
        typer.Option(help="What to write: .html, .png or .svg.", show_default="FILE as .html"),
    ] = None,
) -> None:
    """Write the report or the plots of a saved result."""
    target = file.with_suffix(".html") if out is None else out
    if target.suffix.lower() not in REPORT_SUFFIXES:
        raise typer.BadParameter(f"--out must end in one of {', '.join(REPORT_SUFFIXES)}")
    with _exit_codes(ctx):
        if not file.is_file():
            raise EvaValueError(f"there is no file {file}")

        from .plots import save_result_plot
        from .report import write_html
        from .result import EvaResult

        write = write_html if target.suffix.lower() == ".html" else save_result_plot
        write(EvaResult.load(file), target)
        _say(Console(), f"wrote {target}")


@contextmanager
def _exit_codes(ctx: typer.Context, checkpoint: Path | None = None) -> Iterator[None]:
    """End a failed command with a line on stderr and its exit code.

    That is 1; when interrupted 130, when terminated 143.
    """
    console = Console(stderr=True)
    debug = ctx.find_root().params["debug"]
    try:
        with warnings.catch_warnings():
            # What other packages are to change in their code is of no use to who runs this.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.showwarning = _plain_warnings(console, warnings.showwarning)
            yield
    except (typer.Exit, typer.BadParameter):
        raise
    except KeyboardInterrupt as error:
        if checkpoint is None:
            fate = "nothing was kept"
        elif checkpoint.is_file():
            fate = f"the checkpoint {checkpoint} was kept; the same command goes on from it"
        else:
            fate = f"no checkpoint had been written to {checkpoint} yet"
        ended = isinstance(error, Terminated)
        _say(console, f"{'terminated' if ended else 'interrupted'}: {fate}")
        raise typer.Exit(128 + (signal.SIGTERM if ended else signal.SIGINT)) from None
    except Exception as error:
        if debug:
            traceback.print_exception(error)
        _say(console, f"error: {_one_line(error)}")
        raise typer.Exit(1) from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, (EvaError, OSError, ImportError)) and text:
        return text
    return f"{type(error).__name__}: {text} (eva-kernels --debug shows where)"


def _plain_warnings(console: Console, fallback: Any) -> Any:
    def show(message: Any, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        if issubclass(category, EvaWarning):
            _say(console, f"warning: {message}")
        else:
            fallback(message, category, *args, **kwargs)

    return show


def _say(console: Console, text: str) -> None:
    """Print one line as it is: no markup, no colours by guess, no wrapping."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _targets(names: str | None) -> str | list[str] | None:
    if names is None or names == "all-linear":
        return names
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise EvaValueError(f"--target-modules {names!r} names no module")
    return wanted


def _check_device(name: str | None) -> None:
    """Refuse a device that is not there, before anything is loaded."""
    if name is None:
        return
    import torch

    try:
        torch.empty(0, device=name)
    except (AssertionError, ImportError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        raise EvaValueError(f"--device {name} cannot be used: {why}") from error


def _config_fields(
    path: Path | None, lora: Mapping[str, Any], eva: Mapping[str, Any]
) -> dict[str, Any]:
    """Merge the config file with the options that were given; options go before the file."""
    fields: dict[str, Any] = {}
    if path is not None:
        if not path.is_file():
            raise EvaValueError(f"--config: there is no file {path}")
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise EvaValueError(f"--config {path} is not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise EvaValueError(f"--config {path} must hold a JSON object")
    kind = fields.pop("peft_type", "LORA")
    if kind != "LORA":
        raise EvaValueError(f"--config {path} describes {kind}; EVA initialises LORA only")
    weights = fields.pop("init_lora_weights", True)
    if weights not in (True, "eva"):
        raise EvaValueError(f"--config {path} asks for init_lora_weights={weights!r}, not 'eva'")
    own = fields.get("eva_config") or {}
    if not isinstance(own, dict):
        raise EvaValueError(f"--config {path}: eva_config must be a JSON object")
    fields["eva_config"] = {
        **own,
        **{name: value for name, value in eva.items() if value is not None},
    }
    fields |= {name: value for name, value in lora.items() if value is not None}
    if fields.get("target_modules") is None:
        fields["target_modules"] = "all-linear"
    return {"r": 16, "lora_alpha": 16, **fields}


def _task_of(fields: Mapping[str, Any]) -> Task:
    wanted = fields.get("task_type")
    return next((t for t, (_, kind) in _TASKS.items() if kind and kind == wanted), Task.CAUSAL_LM)


def _lora_config(fields: dict[str, Any], task: Task) -> LoraConfig:
    import dataclasses

    from peft import EvaConfig, LoraConfig

    known = {
        "LoraConfig": [field.name for field in dataclasses.fields(LoraConfig) if field.init],
        "EvaConfig": [field.name for field in dataclasses.fields(EvaConfig)],
    }
    for name, given in (("LoraConfig", fields), ("EvaConfig", fields["eva_config"])):
        unknown = sorted(set(given) - set(known[name]))
        if unknown:
            raise EvaValueError(f"--config: {name} has no field {', '.join(map(repr, unknown))}")
    kind = _TASKS[task][1]
    fixed = {"task_type": kind, "inference_mode": False, "init_lora_weights": "eva"}
    try:
        fixed["eva_config"] = EvaConfig(**fields["eva_config"])
        return LoraConfig(**{**fields, **fixed})
    except (TypeError, ValueError) as error:
        raise EvaValueError(f"the LoRA config is refused: {error}") from error


def _load_model(
    name: str, task: Task, dtype: str, device: str | None, device_map: str | None, seed: int
) -> Any:
    import torch
    import transformers

    # Heads that the checkpoint lacks, and adapters that EVA leaves alone, start at random.
    torch.manual_seed(seed)
    options: dict[str, Any] = {"dtype": dtype}
    if device_map is not None:
        options["device_map"] = device_map
    model = getattr(transformers, _TASKS[task][0]).from_pretrained(name, **options)
    if device_map is None:
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[tuple[str, str, str]]:
    import platform

    import torch

    threads = f"{platform.machine()}, {torch.get_num_threads()} threads"
    rows = [("cpu", threads, "")]
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        what = f"{found.name}, compute capability {found.major}.{found.minor}"
        rows.append((f"cuda:{i}", what, f"{found.total_memory / 2**30:.1f} GiB"))
    if len(rows) == 1:
        built = torch.version.cuda or torch.version.hip
        why = f"torch is built for {built}, but sees no GPU" if built else "this torch is CPU only"
        rows.append(("cuda", f"none: {why}", ""))
    return rows


def _native_module(name: str) -> str:
    try:
        module = import_module(name)
    except ImportError as error:
        return f"not usable: {error}"
    archs = getattr(module, "archs", None)
    return f"works, built for sm {archs}" if archs else "works"


def _table(title: str, headers: tuple[str, ...], rows: Any) -> Table:
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", show_edge=False)
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    return table


if __name__ == "__main__":
    main()
