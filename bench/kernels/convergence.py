"""The ``convergence`` op over all layer inputs of a model in one launch."""

from __future__ import annotations

import functools
from typing import Any

import torch

from eva_kernels.ops import convergence

from ._case import Case, Prepared, fast_path

COMPONENTS = 32
# model -> (D, layer inputs) of a decoder: three inputs of the hidden width, one of the inner
MODELS = {
    "Llama-2-7B": [(4096, 96), (11008, 32)],
    "Gemma-2-9B": [(3584, 84), (4096, 42), (14336, 42)],
    "Llama-3.1-70B": [(8192, 240), (28672, 80)],
}
LIMIT = 1e-6


def cases(small: bool = False) -> list[Case]:
    """Return the cases for a GPU, or small ones for a rehearsal."""
    models = {"tiny": [(64, 3), (96, 1)]} if small else MODELS
    return [
        Case(
            op="convergence",
            model=model,
            shape={"L": sum(count for _, count in widths), "K": COMPONENTS},
            make=functools.partial(_make, widths),
        )
        for model, widths in models.items()
    ]


def _make(widths: list[tuple[int, int]], device: torch.device) -> Prepared:
    shapes = [(COMPONENTS, d) for d, count in widths for _ in range(count)]
    previous = [torch.randn(shape, device=device) for shape in shapes]
    current = [matrix + 0.1 * torch.randn_like(matrix) for matrix in previous]
    ranks = [COMPONENTS // 2] * len(shapes)

    def run(backend: str) -> Any:
        return convergence(previous, current, ranks, 0.99, backend=backend)

    truth = torch.cat(
        [
            torch.nn.functional.cosine_similarity(u.double(), v.double()).abs()
            for u, v in zip(previous, current, strict=True)
        ]
    )

    def error(name: str) -> float:
        similarity, unconverged = run(name)
        counts = (truth.view(-1, COMPONENTS)[:, : ranks[0]] < 0.99).sum(1)
        # a wrong count is a wrong answer, however accurate the similarities are
        wrong = (unconverged != counts).any().double()
        return float(torch.maximum(wrong, (similarity.double() - truth).abs().max()))

    names = [fast_path("native", run, device), "torch"]
    values = sum(rows * d for rows, d in shapes)
    return Prepared(
        competitors={name: functools.partial(run, name) for name in names},
        errors={name: error(name) for name in names},
        limit=LIMIT,
        # each pair of rows needs three dot products in float64, without tensor cores
        flops=0.0,
        nbytes=8.0 * values,
    )
