"""The ``gram`` op at the shapes of language models."""

from __future__ import annotations

import functools
from typing import Any

import torch

from eva_kernels.ops import gram

from ._case import ERROR_LIMITS, GRAM_PASSES, Case, Prepared, fast_path
from ._timing import relative_error
from .sketch import tokens

SHAPES = [
    ("Llama-2-7B", 4096, 2048),
    ("Llama-2-7B", 4096, 8192),
    ("Llama-3.2-1B", 2048, 2048),
    ("Llama-3.2-1B", 2048, 8192),
]


def cases(small: bool = False) -> list[Case]:
    """Return the cases for a GPU, or small ones for a rehearsal."""
    shapes = [("tiny", 64, 96)] if small else SHAPES
    return [
        Case(
            op="gram",
            model=model,
            shape={"N": n, "D": d},
            make=functools.partial(_make, d, n, torch.bfloat16, "high"),
            dtype=torch.bfloat16,
            precision="high",
        )
        for model, d, n in shapes
    ]


def _make(d: int, n: int, dtype: torch.dtype, precision: str, device: torch.device) -> Prepared:
    x = tokens(n, d, dtype, device)
    pivot = x[: n // 4].float().mean(0)

    def zero_sums() -> tuple[torch.Tensor, ...]:
        float64: dict[str, Any] = {"dtype": torch.float64, "device": device}
        return (
            torch.zeros(d, d, device=device),
            torch.zeros(d, **float64),
            torch.zeros((), **float64),
        )

    def run(backend: str, sums: tuple[torch.Tensor, ...]) -> Any:
        return gram(x, pivot, *sums, backend=backend, precision=precision)

    centred = x.double() - pivot.double()
    truth = (centred.mT @ centred, centred.sum(0), centred.square().sum())
    del centred

    def error(name: str) -> float:
        sums = zero_sums()
        run(name, sums)
        return relative_error(sums, truth)

    names = [fast_path("triton", lambda name: run(name, zero_sums()), device), "torch"]
    sums = {name: zero_sums() for name in names}
    passes = GRAM_PASSES.get(precision, 1)
    return Prepared(
        competitors={name: functools.partial(run, name, sums[name]) for name in names},
        errors={name: error(name) for name in names},
        limit=ERROR_LIMITS[precision],
        # a symmetric product needs only half of the 2 N D^2 flops
        flops=1.0 * passes * n * d * (d + 1),
        nbytes=x.nbytes + 2 * 4 * d * d,
    )
