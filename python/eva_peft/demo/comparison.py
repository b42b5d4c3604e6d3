"""Initialise the embedded model with this package and with PEFT; measure each one's error."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft import initialize_lora_eva_weights as peft_initialize
from transformers import PreTrainedModel

import eva_kernels
from eva_peft.assets import load_tiny_llama
from eva_peft.demo import finetune
from eva_peft.demo.batches import Batch, calibration_batches, source_blocks

if TYPE_CHECKING:
    from eva_peft.results.result import EvaResult

# This package with its own stop rule, or with PEFT's number of forwards; PEFT's function.
OURS, OURS_SAME_FORWARDS, PEFT = "eva_kernels", "eva_kernels_same_forwards", "peft"

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """The settings of the demo.

    Attributes:
        r: rank of a layer before EVA moves ranks between layers.
        rho: components computed per layer, relative to `r`.
        tau: similarity at which a component counts as converged.
        batches: calibration batches.
        batch: rows per batch.
        ragged: how many of these rows are cut short and padded.
        length: tokens per row.
        held_out: blocks of the evaluation text.
        repeats: timed runs; PEFT is repeated until its runs took `peft_seconds`, and the run with
            as many forwards as PEFT is not repeated.
        peft_seconds: see `repeats`.
        forward_limit: forwards after which a run of PEFT is aborted.
        memory_forwards: forwards of a run whose memory is measured.
        recipe: of the fine-tuning runs.
    """

    r: int = 16
    rho: float = 2.0
    tau: float = 0.99
    batches: int = 24
    batch: int = 8
    ragged: int = 2
    length: int = 256
    held_out: int = 16
    repeats: int = 3
    peft_seconds: float = 40.0
    forward_limit: int = 120
    memory_forwards: int = 4
    recipe: finetune.Recipe = field(default_factory=finetune.Recipe)

    def lora_config(self, eva: bool = False) -> LoraConfig:
        """Make the configuration that all adapters of the demo share."""
        return LoraConfig(
            r=self.r,
            lora_alpha=self.r,
            target_modules="all-linear",
            init_lora_weights="eva" if eva else True,
            eva_config=EvaConfig(rho=self.rho, tau=self.tau) if eva else None,
        )


QUICK = Setting(
    r=4,
    tau=0.9,
    batches=6,
    batch=4,
    ragged=1,
    repeats=1,
    peft_seconds=0.0,
    forward_limit=40,
    memory_forwards=2,
    held_out=4,
    recipe=finetune.Recipe(steps=6, every=3, learning_rate=1e-3),
)


@dataclass(frozen=True)
class Inputs:
    """The model and its text.

    Attributes:
        model: embedded model, never changed.
        train: blocks of token ids (count, length).
        held_out: blocks from other files (count, length).
    """

    model: PreTrainedModel
    train: torch.Tensor
    held_out: torch.Tensor

    def batches(self, setting: Setting, seed: int = 0) -> list[Batch]:
        """Draw calibration batches from the training text."""
        return calibration_batches(
            self.train,
            self.model.config.pad_token_id,
            setting.batches,
            setting.batch,
            setting.ragged,
            seed,
        )


@dataclass
class Run:
    """The measurements of one way to initialise the adapter.

    Attributes:
        seconds: one value per repeat.
        forwards: forward passes of the model.
        lora_a: layer -> (rank, in_features); None if the run was aborted.
    """

    seconds: list[float]
    forwards: int
    lora_a: dict[str, torch.Tensor] | None


class _ForwardLimitError(RuntimeError):
    """Ends a pass that has no limit of its own."""


def read_inputs(setting: Setting) -> Inputs:
    """Load the embedded model and the source text of the standard library."""
    model, tokenizer = load_tiny_llama()
    train, held_out = source_blocks(tokenizer, setting.length, setting.held_out)
    return Inputs(model, train, held_out)


def compare(
    base: PreTrainedModel, batches: list[Batch], setting: Setting, progress: Progress
) -> tuple[dict[str, Run], list[float], EvaResult]:
    """Initialise with this package and with PEFT, alternately, on the same batches.

    Returns:
        Name -> run; the seconds of one plain forward, one value per repeat; the result that this
        package returns for its own run.
    """
    runs: dict[str, Run] = {}
    plain: list[float] = []

    def add(name: str, run: Run) -> None:
        run.seconds = [*runs[name].seconds, *run.seconds] if name in runs else run.seconds
        runs[name] = run

    plain_forward_seconds(base, batches[:1])  # the first one is slower
    for repeat in range(setting.repeats):
        plain.append(plain_forward_seconds(base, batches[:8]))
        progress(f"EVA by eva-kernels, run {repeat + 1}")
        run, result = run_ours(base, batches, setting)
        add(OURS, run)
        if repeat == 0 or sum(runs[PEFT].seconds) < setting.peft_seconds:
            progress(f"EVA by PEFT, run {repeat + 1}")
            add(PEFT, run_peft(base, batches, setting, setting.forward_limit))
        if repeat == 0:
            progress("EVA by eva-kernels, as many forwards as PEFT")
            add(OURS_SAME_FORWARDS, run_ours(base, batches, setting, runs[PEFT].forwards)[0])
    return runs, plain, result


def run_ours(
    base: PreTrainedModel, batches: list[Batch], setting: Setting, forwards: int | None = None
) -> tuple[Run, EvaResult]:
    """Initialise with this package; `forwards` fixes their number, whatever has converged."""
    config = setting.lora_config(eva=True)
    if forwards is not None:
        config.eva_config.tau = 1.0  # no cosine is above it: only the limit ends the pass
    model = get_peft_model(copy.deepcopy(base), config, low_cpu_mem_usage=True)
    initialize = eva_kernels.initialize  # loads the PEFT layer on first use
    start = time.perf_counter()
    model = initialize(
        model,
        batches,
        progress=False,
        max_steps=forwards or setting.forward_limit,
        on_not_converged="warn" if forwards is None else "ignore",
    )
    seconds = time.perf_counter() - start
    result = model.eva_result
    return Run([seconds], result.forwards, _copy_lora_a(model)), result


def run_peft(base: PreTrainedModel, batches: list[Batch], setting: Setting, limit: int) -> Run:
    """Initialise with PEFT's own function, which ends by its own rule or at a limit of forwards."""
    model = get_peft_model(
        copy.deepcopy(base), setting.lora_config(eva=True), low_cpu_mem_usage=True
    )
    forwards = 0

    def forward(model: torch.nn.Module, batch: Batch) -> None:
        nonlocal forwards
        if forwards == limit:
            raise _ForwardLimitError
        forwards += 1
        model(**batch)

    start = time.perf_counter()
    lora_a = None
    with contextlib.suppress(_ForwardLimitError):
        peft_initialize(model, batches, forward_fn=forward, show_progress_bar=False)
        lora_a = _copy_lora_a(model)
    return Run([time.perf_counter() - start], forwards, lora_a)


@torch.no_grad()
def lost_variances(
    base: PreTrainedModel, batches: list[Batch], runs: dict[str, Run]
) -> dict[str, float | None]:
    """Compare the final `lora_A` rows of every run with exact PCA over the batches it has seen.

    A layer of rank R loses 1 - c / e: c is the variance within the span of its rows, e the variance
    within the exact first R principal directions, from the float64 covariance of its inputs.

    Returns:
        Run -> mean over its layers; None for a run that was aborted.
    """
    counts = {name: min(run.forwards, len(batches)) for name, run in runs.items()}
    lost: dict[str, float | None] = dict.fromkeys(runs)
    sums = _InputSums(base)
    with sums:
        for done, batch in enumerate(batches, 1):
            sums.mask = batch["attention_mask"].bool()
            base(**batch, use_cache=False)
            for name, run in runs.items():
                if counts[name] == done and run.lora_a is not None:
                    lost[name] = statistics.fmean(
                        _lost_variance(sums.covariance(layer), rows)
                        for layer, rows in run.lora_a.items()
                    )
    return lost


class _InputSums(contextlib.ExitStack):
    """Sum the inputs of all linear layers of a model, and their products, in float64."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.mask = torch.empty(0)
        self.sums: dict[str, tuple[int, torch.Tensor, torch.Tensor]] = {}
        self.first_reader: dict[str, str] = {}  # of an input that several layers read
        self._last: tuple[str, torch.Tensor] | None = None
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                handle = module.register_forward_pre_hook(self._hook(name))
                self.callback(handle.remove)

    def covariance(self, layer: str) -> torch.Tensor:
        """Return the centred scatter of a layer's inputs so far, (D, D)."""
        count, total, products = self.sums[self.first_reader[layer]]
        return products - torch.outer(total, total) / count

    def _hook(self, name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if self._last is not None and self._last[1] is inputs[0]:
                self.first_reader[name] = self._last[0]
                return
            self._last = (name, inputs[0])
            self.first_reader[name] = name
            x = inputs[0][self.mask].double()
            width = x.shape[1]
            zero = (0, x.new_zeros(width), x.new_zeros(width, width))
            count, total, products = self.sums.get(name, zero)
            self.sums[name] = (count + len(x), total + x.sum(0), products.addmm_(x.T, x))

        return hook


def _lost_variance(covariance: torch.Tensor, rows: torch.Tensor) -> float:
    basis = torch.linalg.qr(rows.double().T).Q
    captured = (basis * (covariance @ basis)).sum()
    best = torch.linalg.eigvalsh(covariance)[-len(rows) :].sum()
    return float(1 - captured / best)


@torch.no_grad()
def plain_forward_seconds(model: PreTrainedModel, batches: list[Batch]) -> float:
    """Return the seconds of one forward without EVA, mean over batches."""
    start = time.perf_counter()
    for batch in batches:
        model(**batch)
    return (time.perf_counter() - start) / len(batches)


def _copy_lora_a(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: a.detach().clone() for name, a in finetune.lora_a_weights(model).items()}
