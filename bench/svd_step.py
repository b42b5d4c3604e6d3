"""One SVD step on real activations: our stream against PEFT's IncrementalPCA."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.utils.incremental_pca import IncrementalPCA

from eva_kernels.streaming import InputStream, Options, fold_streams

from . import minilm
from .common import RESULTS, save, spread

LAYERS = {
    "layer 0 query": "encoder.layer.0.attention.self.query",
    "layer 2 attention output": "encoder.layer.2.attention.output.dense",
    "layer 3 intermediate": "encoder.layer.3.intermediate.dense",
    "layer 5 output": "encoder.layer.5.output.dense",
}
COMPONENTS, OVERSAMPLE = 32, 2
# Streams alternate, ours, PEFT's, ours, ...: each run has the caches to itself, as in practice.
ROUNDS = 3
CPU = torch.device("cpu")


def measure(steps: int = 46) -> list[dict[str, Any]]:
    """Time both on the same tokens, stream by stream in turn, and compare with exact PCA."""
    batches = minilm.load_batches(steps, 12, 128, join_paragraphs=True)
    inputs = minilm.layer_inputs(minilm.load_model(), batches, list(LAYERS.values()))
    return [_measure_layer(label, inputs[name]) for label, name in LAYERS.items()]


def _fold(stream: InputStream, x: torch.Tensor) -> None:
    stream.add(x)
    fold_streams([stream])


def _partial_fit(pca: IncrementalPCA, x: torch.Tensor) -> None:
    pca.partial_fit(x.float())


def _measure_layer(label: str, tokens_by_step: list[torch.Tensor]) -> dict[str, Any]:
    features = tokens_by_step[0].shape[1]
    width = OVERSAMPLE * COMPONENTS
    components_by_method: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {"ours": [], "peft": []}
    with torch.no_grad():
        for _ in range(ROUNDS):
            ours = InputStream(features, COMPONENTS, width, CPU, options=Options("sketch"))
            peft_pca = IncrementalPCA(COMPONENTS, copy=True, lowrank=True, lowrank_seed=42)
            seconds["ours"] += _step_seconds(tokens_by_step, partial(_fold, ours))
            seconds["peft"] += _step_seconds(tokens_by_step, partial(_partial_fit, peft_pca))
            components_by_method = {
                "ours": ours.spectrum().components,
                "peft": peft_pca.components_,
            }
    covariance = minilm.centred_covariance(tokens_by_step)
    spectrum = torch.linalg.eigvalsh(covariance)
    lost = {
        k: minilm.lost_variance(rows, covariance, spectrum)
        for k, rows in components_by_method.items()
    }
    ratios = [p / o for o, p in zip(seconds["ours"], seconds["peft"], strict=True)]
    return {
        "layer": label,
        "features": features,
        "tokens": sum(map(len, tokens_by_step)) // len(tokens_by_step),
        "steps": len(tokens_by_step),
        "ours_ms": spread([1e3 * s for s in seconds["ours"]]),
        "peft_ms": spread([1e3 * s for s in seconds["peft"]]),
        "speedup": spread(ratios),
        "ours_lost": lost["ours"],
        "peft_lost": lost["peft"],
    }


def _step_seconds(
    tokens_by_step: list[torch.Tensor], step: Callable[[torch.Tensor], Any]
) -> list[float]:
    """Return the seconds of each step but the first, a start-up (a first basis, a full SVD)."""
    seconds = []
    for part in tokens_by_step:
        begin = time.perf_counter()
        step(part)
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


def run(steps: int = 46, out: Path = RESULTS) -> None:
    """Measure and save."""
    rows = measure(steps)
    save("svd_step", rows, components=COMPONENTS, oversample=OVERSAMPLE, steps=steps, out=out)
