"""The whole pass on a language model's shape: plain forward, ours, and PEFT's EVA.

Random weights and realistic text: time, memory, launches and waits are measured, none of which
depends on the values of the weights.
"""

from __future__ import annotations

import functools
import gc
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import EvaConfig, LoraConfig, get_eva_state_dict
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PretrainedConfig

import eva_kernels
from eva_peft.assets import source_texts, token_stream

from .common import spread, synchronized_now
from .kernels._timing import count_device_calls
from .models import MODELS, TARGETS
from .peft_eva import end_pass

Batch = dict[str, torch.Tensor]
Save = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        model: returns the config of transformers.
        batches: samples in a batch, one row of results each.
        length: tokens of a sample.
        steps: forward passes of a timed run; ``peft_steps`` of PEFT's.
        hash_tokens: of the batch that PEFT spends on hashing; its time grows with the tokens and
            would be minutes for a real batch.
        r, rho: of the adapters.
        dtype: of the weights.
        methods: names in ``METHODS``, in order of value.
    """

    model: Callable[[], PretrainedConfig]
    batches: tuple[int, ...]
    length: int
    steps: int
    peft_steps: int
    hash_tokens: int
    r: int
    rho: float
    dtype: torch.dtype
    methods: tuple[str, ...] = ("plain", "ours", "peft")


def _tiny() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=512,
        hidden_size=48,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )


_LARGE = Setting(
    model=MODELS["Llama-2-7B"],
    batches=(4, 8, 16),
    length=512,
    steps=6,
    peft_steps=3,
    hash_tokens=64,
    r=16,
    rho=2.0,
    dtype=torch.bfloat16,
)
_WITHOUT_PEFT = ("plain", "ours")
SETTINGS = {
    "llama-2-7b": _LARGE,
    # A vocabulary of 128,256: what an early exit saves.
    "llama-3.1-8b": replace(_LARGE, model=MODELS["Llama-3.1-8B"], methods=_WITHOUT_PEFT),
    # The largest that one H200 holds: 131 GiB of weights.
    "llama-3.1-70b": replace(
        _LARGE, model=MODELS["Llama-3.1-70B"], batches=(4,), steps=4, methods=_WITHOUT_PEFT
    ),
    "tiny": Setting(
        model=_tiny,
        batches=(2,),
        length=32,
        steps=3,
        peft_steps=2,
        hash_tokens=16,
        r=4,
        rho=2.0,
        dtype=torch.float32,
    ),
}


def build_model(setting: Setting, device: torch.device) -> nn.Module:
    """Return the model with random weights, created on the device without a second copy."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(setting.model(), dtype=setting.dtype)
    return model.eval().requires_grad_(False)


def load_ids(vocabulary: int, count: int) -> torch.Tensor:
    """Return token ids of source code by the embedded tokenizer, folded into a vocabulary."""
    with resources.as_file(resources.files("eva_peft.assets") / "tiny_llama") as folder:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # a token of source code is about three bytes long; twice that is enough
    ids = torch.tensor(token_stream(tokenizer, source_texts(6 * count + 20_000)))
    return ids.repeat(-(-count // len(ids)))[:count] % vocabulary


def make_batches(setting: Setting, size: int) -> list[Batch]:
    """Return one different batch per step of a timed run, on the host like those of a loader."""
    ids = load_ids(setting.model().vocab_size, setting.steps * size * setting.length)
    parts = ids.view(setting.steps, size, setting.length)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in parts]


def lora_config(setting: Setting) -> LoraConfig:
    """Return the config of all methods; a similarity of 1 is not reached, so all steps are run."""
    return LoraConfig(
        r=setting.r,
        lora_alpha=setting.r,
        target_modules=TARGETS,
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=setting.rho, tau=1.0),
    )


class Bench:
    """One model, one batch size; the methods are measured on it one after another."""

    def __init__(self, setting: Setting, model: nn.Module, size: int, device: torch.device) -> None:
        self.setting, self.model, self.device = setting, model, device
        self.batches = make_batches(setting, size)
        self.config = lora_config(setting)

    def peak_bytes_above(self, run: Callable[[], Any]) -> int | None:
        """Run, and return the peak of allocated bytes above what was there before."""
        if self.device.type != "cuda":
            run()
            return None
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def forward(self, batch: Batch) -> None:
        inputs = {key: x.to(self.device, non_blocking=True) for key, x in batch.items()}
        with torch.no_grad():
            self.model(**inputs, use_cache=False)

    def calibrate(self, steps: int, stamps: list[float] | None = None) -> eva_kernels.EvaResult:
        """Run our pass; the clock is read after every step."""
        return eva_kernels.calibrate(
            self.model,
            self.batches[:steps],
            self.config,
            max_steps=steps,
            on_not_converged="ignore",
            progress=False,
            callback=None
            if stamps is None
            else lambda numbers: stamps.append(synchronized_now(self.device)),
        )


def measure_plain(bench: Bench) -> dict[str, Any]:
    """Forward passes with the head and without a cache."""

    def run() -> list[float]:
        stamps = [synchronized_now(bench.device)]
        for batch in bench.batches:
            bench.forward(batch)
            stamps.append(synchronized_now(bench.device))
        return _differences(stamps)

    bench.forward(bench.batches[0])
    seconds = run()
    peak = bench.peak_bytes_above(lambda: bench.forward(bench.batches[0]))
    calls = count_device_calls(lambda: bench.forward(bench.batches[0]), bench.device)
    return {"step_s": spread(seconds + run()), "peak_above_weights": peak, "calls_per_step": calls}


def measure_ours(bench: Bench) -> dict[str, Any]:
    """Our pass, run twice: both are timed, and the results must agree bit for bit."""
    steps = bench.setting.steps
    seconds: list[float] = []
    first_step_seconds, results = [], []
    bench.calibrate(2)  # kernels are compiled
    for _ in range(2):
        stamps = [synchronized_now(bench.device)]
        results.append(bench.calibrate(steps, stamps))
        first_step_seconds.append(stamps[1] - stamps[0])
        seconds += _differences(stamps[1:])
    peak = bench.peak_bytes_above(lambda: bench.calibrate(2))
    few, many = (
        count_device_calls(functools.partial(bench.calibrate, n), bench.device) for n in (2, steps)
    )
    return {
        "step_s": spread(seconds),
        "steps_s": seconds,  # those of the first run, then of the second, without the first step
        "host_s": results[0].seconds,  # by phase, of the first run; a fold waits for the device
        "first_step_s": min(first_step_seconds),
        "peak_above_weights": peak,
        "calls_per_step": per_step(few, many, steps - 2),
        "same_bits_twice": bitwise_equal(*results),
        "methods": sorted(set(results[0].method.values())),
    }


def measure_peft(bench: Bench) -> dict[str, Any]:
    """PEFT's EVA: a hash pass over a short batch, then steps over the real ones."""
    steps, model = bench.setting.peft_steps, bench.model
    loader = _HashBatchThenBatches(bench)
    begins: list[float] = []
    ends: list[float] = []

    def forward(module: nn.Module, batch: Batch) -> None:  # PEFT has moved it to the device
        begins.append(synchronized_now(bench.device))
        with torch.no_grad():
            module(**batch, use_cache=False)
        ends.append(synchronized_now(bench.device))
        if len(ends) > steps:
            end_pass(module)

    def run() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            get_eva_state_dict(
                model, loader, bench.config, forward_fn=forward, show_progress_bar=False
            )

    peak = bench.peak_bytes_above(run)
    tokens = bench.batches[0]["input_ids"].numel()
    hash_seconds = ends[0] - begins[0]
    # a step lasts until the next begins; the first is a full start of every decomposition
    seconds = _differences([*begins[1:], ends[-1]])
    return {
        "step_s": spread(seconds[1:]),
        "first_step_s": seconds[0],
        "peak_above_weights": peak,
        "hash_pass_s": hash_seconds,
        "hash_pass_tokens": bench.setting.hash_tokens,
        "hash_pass_extrapolated_s": hash_seconds * tokens / bench.setting.hash_tokens,
    }


# Everything that is compared. A method takes the bench and returns one row.
METHODS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "plain": measure_plain,
    "ours": measure_ours,
    "peft": measure_peft,
}


class _HashBatchThenBatches:
    """A loader whose first iteration, PEFT's hash pass, gives one short batch."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.iterations = bench, 0

    def __len__(self) -> int:
        return len(self.bench.batches)

    def __iter__(self) -> Iterator[Batch]:
        self.iterations += 1
        if self.iterations > 1:
            return iter(self.bench.batches)
        short = self.bench.batches[0]["input_ids"][:1, : self.bench.setting.hash_tokens]
        return iter([{"input_ids": short, "attention_mask": torch.ones_like(short)}])


def _differences(stamps: list[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(stamps)]


def per_step(
    counts_of_few: dict[str, int | None], counts_of_many: dict[str, int | None], steps: int
) -> dict[str, float | None]:
    """Return the counts of one step from two runs that differ by some steps."""
    pairs = {key: (counts_of_few[key], counts_of_many[key]) for key in counts_of_few}
    return {
        key: None if a is None or b is None else (b - a) / steps for key, (a, b) in pairs.items()
    }


def bitwise_equal(first: eva_kernels.EvaResult, second: eva_kernels.EvaResult) -> bool:
    """Tell whether two results agree to the last bit."""
    same_names = first.components.keys() == second.components.keys()
    return (
        same_names
        and first.ranks == second.ranks
        and all(
            torch.equal(tensor, second.components[name])
            for name, tensor in first.components.items()
        )
    )


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare the methods that were measured at each batch size."""
    ratios_by_batch = []
    for size in dict.fromkeys(row["batch"] for row in rows):
        medians = {
            row["method"]: row["step_s"]["median"]
            for row in rows
            if row["batch"] == size and row["status"] == "measured"
        }
        entry: dict[str, Any] = {"batch": size}
        if {"ours", "plain"} <= medians.keys():
            entry["ours_over_plain"] = medians["ours"] / medians["plain"]
        if {"ours", "peft"} <= medians.keys():
            entry["peft_over_ours"] = medians["peft"] / medians["ours"]
        ratios_by_batch.append(entry)
    return ratios_by_batch


def measurement_order(setting: Setting) -> list[tuple[int, str]]:
    """Return (batch, method) in order of value: all on the first batch, then PEFT's last."""
    first, *others = setting.batches
    quick = [name for name in setting.methods if name != "peft"]
    slow = [name for name in setting.methods if name == "peft"]
    rows = [(first, name) for name in setting.methods]
    return rows + [(n, m) for names in (quick, slow) for n in others for m in names]


def write_trace(bench: Bench, path: Path, steps: int = 3) -> None:
    """Profile some steps of our pass, and write what a browser's trace viewer shows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bench.calibrate(steps)
    with torch.profiler.profile() as profile:
        bench.calibrate(steps)
        synchronized_now(bench.device)
    profile.export_chrome_trace(str(path))


def run(
    config: str,
    device: torch.device,
    *,
    seconds: float = 600.0,
    save: Save = lambda result: None,
    trace: Path | None = None,
) -> dict[str, Any]:
    """Measure in order of value while time is left.

    Args:
        config: a name in ``SETTINGS``.
        device: where to measure.
        seconds: nothing is begun that, going by the methods before, would end later.
        save: called with all that was found so far.
        trace: where to write a profile of our steps on the first batch size.
    """
    setting, deadline = SETTINGS[config], time.monotonic() + seconds
    transformers.logging.set_verbosity_error()
    model = build_model(setting, device)
    weights = sum(p.nbytes for p in model.parameters())
    result: dict[str, Any] = {
        "config": config,
        "weights_bytes": weights,
        "allocated_by_model": torch.cuda.memory_allocated() if device.type == "cuda" else None,
        "length": setting.length,
        "rows": [],
    }
    seconds_by_method: dict[str, list[float]] = {}
    for size, method in measurement_order(setting):
        row: dict[str, Any] = {"batch": size, "method": method}
        # time grows at most with the batch
        expected_seconds = 2 * statistics.fmean(seconds_by_method.get(method, [0.0]))
        begin = time.monotonic()
        if begin + expected_seconds > deadline:
            row["status"] = "not reached"
        else:
            try:
                bench = Bench(setting, model, size, device)
                row.update(METHODS[method](bench), status="measured")
            except Exception as error:  # the other methods are worth their time
                row.update(status="failed", reason=f"{type(error).__name__}: {error}"[:500])
            seconds_by_method.setdefault(method, []).append(time.monotonic() - begin)
        result["rows"].append(row)
        result["ratios"] = ratios(result["rows"])
        save(result)
    if trace is not None:
        try:
            write_trace(Bench(setting, model, setting.batches[0], device), trace)
        except Exception as error:  # the numbers are worth more
            result["trace"] = f"{type(error).__name__}: {error}"[:500]
    return result
