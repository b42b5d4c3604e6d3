"""The streams of tokens: real layer inputs of MiniLM, and a synthetic one with outlier features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import minilm

TEXTS, LENGTH = 12, 128  # texts per batch, and tokens per text
# Synthetic stream: a few features that are large and far from zero, as in language models.
OUTLIERS, OUTLIER_SCALE, OUTLIER_OFFSET = 6, 60.0, 300.0
DECAY, FLOOR = 0.6, 0.05

LAYERS = {
    "layer 0 query": "encoder.layer.0.attention.self.query",
    "layer 2 attention output": "encoder.layer.2.attention.output.dense",
    "layer 3 intermediate": "encoder.layer.3.intermediate.dense",
    "layer 5 query": "encoder.layer.5.attention.self.query",
    "layer 5 output": "encoder.layer.5.output.dense",
    "layer 0 attention output": "encoder.layer.0.attention.output.dense",
    "layer 1 intermediate": "encoder.layer.1.intermediate.dense",
    "layer 4 attention output": "encoder.layer.4.attention.output.dense",
    "layer 5 intermediate": "encoder.layer.5.intermediate.dense",
}
SYNTHETIC = "synthetic, outliers"


@dataclass(frozen=True)
class Sizes:
    """The streams of a run, and their sizes.

    Attributes:
        layers: labels of ``LAYERS``.
        steps: number of steps of these real streams.
        features, tokens, synthetic_steps: D, N and number of steps of the synthetic stream.
    """

    layers: Sequence[str]
    steps: int
    features: int
    tokens: int
    synthetic_steps: int

    @property
    def labels(self) -> list[str]:
        """Labels of all streams."""
        return [*self.layers, SYNTHETIC]


class Inputs:
    """The streams of a run; the model runs once, when the first real stream is requested."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self._real: dict[str, list[Tensor]] | None = None

    def steps(self, label: str) -> tuple[int, Iterator[Tensor]]:
        """Return the number of steps, and the tokens of each, (N, D) float32."""
        sizes = self.sizes
        if label == SYNTHETIC:
            stream = outlier_stream(sizes.features, sizes.tokens, sizes.synthetic_steps)
            return sizes.synthetic_steps, stream
        if self._real is None:
            batches = minilm.load_batches(sizes.steps, TEXTS, LENGTH, join_paragraphs=True)
            names = [LAYERS[layer] for layer in sizes.layers]
            self._real = minilm.layer_inputs(minilm.load_model(), batches, names)
        return sizes.steps, iter(self._real[LAYERS[label]])


def outlier_stream(features: int, tokens: int, steps: int, seed: int = 0) -> Iterator[Tensor]:
    """Yield steps of synthetic tokens, (N, D) float32.

    The spectrum follows a power law over half of the directions, on top of a floor of noise, and a
    few features are larger than all others by a factor of ``OUTLIER_SCALE``.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = features // 2
    values = torch.arange(1, rank + 1, dtype=torch.float32).pow(-DECAY)
    mixing = torch.linalg.qr(torch.randn(features, rank, generator=generator)).Q.mT
    scale, offset = torch.ones(features), torch.randn(features, generator=generator)
    chosen = torch.randperm(features, generator=generator)[:OUTLIERS]
    scale[chosen], offset[chosen] = OUTLIER_SCALE, OUTLIER_OFFSET
    for _ in range(steps):
        signal = (torch.randn(tokens, rank, generator=generator) * values) @ mixing
        noise = torch.randn(tokens, features, generator=generator) * (FLOOR / features**0.5)
        yield (signal + noise) * scale + offset * features**-0.5
