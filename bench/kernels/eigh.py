"""The ``eigh`` op: the small symmetric eigenproblems of all layer inputs in one launch."""

from __future__ import annotations

import functools
from typing import Any

import torch

from eva_kernels import ops

from ._case import Case, Prepared, fast_path, matrix_cases

SHAPES = [("Llama-2-7B", 96, 64), ("Llama-2-7B", 32, 64), ("Llama-2-7B", 96, 128)]
LIMIT = 1e-11


def cases(small: bool = False) -> list[Case]:
    """Return the cases for a GPU, or small ones for a rehearsal."""
    return matrix_cases("eigh", SHAPES, _make, small)


def _make(count: int, q: int, device: torch.device) -> Prepared:
    # Graded like the scatter matrix of activations: a few directions carry nearly all variance.
    factors = torch.randn(count, q, 4 * q, dtype=torch.float64, device=device)
    factors *= torch.logspace(0, -5, q, dtype=torch.float64, device=device)[:, None]
    matrices = factors @ factors.mT
    expected = torch.linalg.eigvalsh(matrices.cpu()).to(device)
    scale = expected.abs().amax(1)

    def run(backend: str) -> Any:
        return ops.eigh(matrices, backend=backend)

    def error(name: str) -> float:
        values, vectors = run(name)
        residual = (matrices @ vectors - vectors * values[:, None, :]).abs().amax((1, 2)) / scale
        identity = torch.eye(q, dtype=torch.float64, device=device)
        overlap_error = (vectors.mT @ vectors - identity).abs().amax((1, 2))
        value_error = (values - expected).abs().amax(1) / scale
        return float(torch.stack([residual, overlap_error, value_error]).max())

    names = [fast_path("native", run, device), "torch"]
    return Prepared(
        competitors={name: functools.partial(run, name) for name in names},
        errors={name: error(name) for name in names},
        limit=LIMIT,
        flops=0.0,  # iterative: the number of operations is not known in advance
        nbytes=2.0 * matrices.nbytes,
    )
