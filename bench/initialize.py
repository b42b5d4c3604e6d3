"""The whole initialisation on MiniLM: ours, PEFT's, and the plain forward passes."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, initialize_lora_eva_weights
from torch import nn

import eva_kernels

from . import minilm
from .common import RESULTS, save, spread
from .peft_eva import end_pass

FORWARDS, BATCH = 12, 8


def make_adapted_model() -> PeftModel:
    """Return the model with EVA adapters that wait on the meta device."""
    # tau = 1 is not reached: the number of forward passes is the same for all
    config = minilm.lora_config(tau=1.0)
    return get_peft_model(minilm.load_model(), config, low_cpu_mem_usage=True)


def pass_plain(model: PeftModel, batches: list[dict[str, Any]]) -> None:
    """Run the plain forward passes."""
    with torch.no_grad(), model.disable_adapter():
        for batch in batches:
            model(**batch)


def pass_ours(model: PeftModel, batches: list[dict[str, Any]]) -> None:
    """Run our initialisation."""
    eva_kernels.initialize(
        model, batches, max_steps=len(batches), on_not_converged="ignore", progress=False
    )


def pass_peft(model: PeftModel, batches: list[dict[str, Any]]) -> None:
    """Run PEFT's initialisation; the first of its passes is the one that it spends on hashing."""
    num_forwards = 0

    def forward(module: nn.Module, inputs: dict[str, Any]) -> None:
        nonlocal num_forwards
        module(**inputs)
        num_forwards += 1
        if num_forwards >= len(batches):
            end_pass(module)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        initialize_lora_eva_weights(model, batches, forward_fn=forward, show_progress_bar=False)
    assert num_forwards == len(batches), num_forwards


PASSES = {"plain": pass_plain, "ours": pass_ours, "peft": pass_peft}


def timed_pass(name: str, batches: list[dict[str, Any]]) -> tuple[float, PeftModel]:
    """Return the seconds of one pass on a fresh model, and the model."""
    model = make_adapted_model()
    begin = time.perf_counter()
    PASSES[name](model, batches)
    return time.perf_counter() - begin, model


def lora_rows(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return ``lora_A`` of every adapted layer by its name in the base model."""
    return {
        name.replace("base_model.model.", ""): module.lora_A["default"].weight.detach()
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def measure_length(length: int, repeats: int) -> dict[str, Any]:
    """Time the three in turn on texts padded to one length."""
    batches = minilm.load_batches(FORWARDS, BATCH, length)
    seconds: dict[str, list[float]] = {"plain": [], "ours": [], "peft": []}
    for _ in range(repeats):
        for name, values in seconds.items():
            values.append(timed_pass(name, batches)[0])
    pairs = list(zip(seconds["plain"], seconds["ours"], seconds["peft"], strict=True))
    tokens = sum(int(b["attention_mask"].sum()) for b in batches)
    return {
        "padded_to": length,
        "tokens": tokens,
        "filled": tokens / (FORWARDS * BATCH * length),
        **{f"{name}_s": spread(values) for name, values in seconds.items()},
        "peft_over_ours": spread([p / o for _, o, p in pairs]),
        "ours_over_plain": spread([o / f for f, o, _ in pairs]),
        "peft_over_plain": spread([p / f for f, _, p in pairs]),
    }


def measure_ranks() -> dict[str, Any]:
    """Compare lost variance and ranks with exact PCA on the same tokens."""
    batches = minilm.load_batches(FORWARDS, BATCH, 128, join_paragraphs=True)
    base = minilm.load_model()
    names = [n for n, m in base.named_modules() if minilm.is_target(n, m)]
    inputs = minilm.layer_inputs(base, batches, names)
    # PEFT never uses the batch of its hashing pass: give it the same tokens for its steps
    ours = lora_rows(timed_pass("ours", batches)[1])
    peft = lora_rows(timed_pass("peft", [batches[0], *batches])[1])
    covariances = {name: minilm.centred_covariance(parts) for name, parts in inputs.items()}
    spectra = {name: torch.linalg.eigvalsh(c) for name, c in covariances.items()}
    exact = _exact_ranks(spectra, budget=16 * len(names), max_components=32)
    rows = []
    for name in names:
        row: dict[str, Any] = {"layer": name, "exact_rank": exact[name]}
        for label, weights in (("ours", ours), ("peft", peft)):
            rank = len(weights[name]) if name in weights else 0
            row[f"{label}_rank"] = rank
            row[f"{label}_lost"] = (
                minilm.lost_variance(weights[name], covariances[name], spectra[name])
                if rank
                else 0.0
            )
        rows.append(row)
    differ = [r for r in rows if r["ours_rank"] != r["peft_rank"]]
    return {
        "layers": rows,
        "ours_lost_mean": sum(r["ours_lost"] for r in rows) / len(rows),
        "peft_lost_mean": sum(r["peft_lost"] for r in rows) / len(rows),
        "ours_total": sum(r["ours_rank"] for r in rows),
        "peft_total": sum(r["peft_rank"] for r in rows),
        "differ": len(differ),
        "ours_rank_error": sum(abs(r["ours_rank"] - r["exact_rank"]) for r in rows),
        "peft_rank_error": sum(abs(r["peft_rank"] - r["exact_rank"]) for r in rows),
    }


def _exact_ranks(
    spectra: dict[str, torch.Tensor], budget: int, max_components: int
) -> dict[str, int]:
    entries = sorted(
        (-float(value / spectrum.sum()), i, name)
        for i, (name, spectrum) in enumerate(spectra.items())
        for value in spectrum.flip(0)[:max_components]
    )
    ranks = dict.fromkeys(spectra, 0)
    for _, _, name in entries[:budget]:
        ranks[name] += 1
    return ranks


def run(repeats: int = 5, out: Path = RESULTS) -> None:
    """Measure and save."""
    for length in (128, 512):
        timed_pass("ours", minilm.load_batches(2, BATCH, length))  # warm-up
    rows = [measure_length(length, repeats) for length in (128, 512)]
    save(
        "initialize", rows, forwards=FORWARDS, batch=BATCH, repeats=repeats, r=16, rho=2.0, out=out
    )
    ranks = measure_ranks()
    save("ranks", ranks, forwards=FORWARDS, batch=BATCH, r=16, rho=2.0, out=out)
