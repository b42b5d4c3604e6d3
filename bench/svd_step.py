"""One SVD step on real activations: our stream against PEFT's IncrementalPCA."""

from __future__ import annotations

import time
from typing import Any

import torch
from peft.utils.incremental_pca import IncrementalPCA

from eva_kernels.streaming import InputStream, Options, fold_streams

from . import minilm
from .common import save, spread

LAYERS = {
    "layer 0 query": "encoder.layer.0.attention.self.query",
    "layer 2 attention output": "encoder.layer.2.attention.output.dense",
    "layer 3 intermediate": "encoder.layer.3.intermediate.dense",
    "layer 5 output": "encoder.layer.5.output.dense",
}
COMPONENTS, OVERSAMPLE = 32, 2


def measure(steps: int = 46) -> list[dict[str, Any]]:
    """Time both on the same tokens, step by step in turn, and compare with exact PCA."""
    batches = minilm.load_batches(steps, 12, 128, whole=True)
    inputs = minilm.layer_inputs(minilm.load_model(), batches, list(LAYERS.values()))
    return [_measure_layer(label, inputs[name]) for label, name in LAYERS.items()]


def _measure_layer(label: str, parts: list[torch.Tensor]) -> dict[str, Any]:
    features = parts[0].shape[1]
    width = OVERSAMPLE * COMPONENTS
    ours = InputStream(features, COMPONENTS, width, torch.device("cpu"), options=Options("sketch"))
    peer = IncrementalPCA(COMPONENTS, copy=True, lowrank=True, lowrank_seed=42)
    seconds: dict[str, list[float]] = {"ours": [], "peft": []}
    with torch.no_grad():
        for part in parts:
            begin = time.perf_counter()
            ours.add(part)
            fold_streams([ours])
            middle = time.perf_counter()
            peer.partial_fit(part.to(torch.float32))
            seconds["ours"].append(middle - begin)
            seconds["peft"].append(time.perf_counter() - middle)
    covariance = minilm.centred_covariance(parts)
    spectrum = torch.linalg.eigvalsh(covariance)
    lost = {
        "ours": minilm.lost_variance(ours.spectrum().components, covariance, spectrum),
        "peft": minilm.lost_variance(peer.components_, covariance, spectrum),
    }
    # The first step of each is a start-up (a first basis, a full SVD) and not a step.
    ratios = [p / o for o, p in zip(seconds["ours"][1:], seconds["peft"][1:], strict=True)]
    return {
        "layer": label,
        "features": features,
        "tokens": sum(map(len, parts)) // len(parts),
        "steps": len(parts),
        "ours_ms": spread([1e3 * s for s in seconds["ours"][1:]]),
        "peft_ms": spread([1e3 * s for s in seconds["peft"][1:]]),
        "speedup": spread(ratios),
        "ours_lost": lost["ours"],
        "peft_lost": lost["peft"],
    }


def run(steps: int = 46) -> None:
    """Measure and save."""
    rows = measure(steps)
    save("svd_step", rows, components=COMPONENTS, oversample=OVERSAMPLE, steps=steps)
