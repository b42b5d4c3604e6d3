"""The ``fold_measure`` and ``fold_rows`` ops: the (Q, D) work of a fold, all layers of a shape."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eva_kernels import ops

from ._case import Case, Prepared, fast_path

SHAPES = [
    ("Llama-2-7B", 96, 64, 4096),
    ("Llama-2-7B", 32, 64, 11008),
    ("Llama-2-7B", 96, 128, 4096),
]
LIMITS = {"fold_measure": 1e-12, "fold_rows": 1e-6}


def cases(small: bool = False) -> list[Case]:
    """Return the cases of a GPU, or small ones for a rehearsal."""
    shapes = [("tiny", 3, 16, 300)] if small else SHAPES
    return [
        Case(
            op=op,
            model=model,
            shape={"L": count, "Q": q, "D": d},
            make=functools.partial(make, count, q, d),
            dtype=torch.float32,
        )
        for model, count, q, d in shapes
        for op, make in (("fold_measure", _make_measure), ("fold_rows", _make_rows))
    ]


def _layers(
    count: int, q: int, d: int, device: torch.device
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    like: dict[str, Any] = {"dtype": torch.float64, "device": device}
    bases = [torch.randn(q, d, device=device) / d**0.5 for _ in range(count)]
    products = [torch.randn(q, d, device=device) for _ in range(count)]
    return bases, products, torch.randn(count, d, **like), torch.rand(count, 1 + q, **like)


def _make_measure(count: int, q: int, d: int, device: torch.device) -> Prepared:
    inputs = _layers(count, q, d, device)

    def run(backend: str) -> tuple[Tensor, ...]:
        return ops.fold_measure(*inputs, backend=backend)

    wanted = run("torch")

    def error(backend: str) -> float:
        pairs = zip(run(backend), wanted, strict=True)
        return max(float((a.tril() - b.tril()).abs().max() / b.abs().max()) for a, b in pairs)

    # A basis is read for `along`, and again with its products.
    return _prepared("fold_measure", run, error, device, 4.0 * 3 * count * q * d)


def _make_rows(count: int, q: int, d: int, device: torch.device) -> Prepared:
    inputs = _layers(count, q, d, device)
    along = ops.fold_measure(*inputs, backend="torch")[0]
    # A contraction: a basis that is renewed again and again stays within bounds.
    mixing = torch.linalg.qr(torch.randn(count, q, q, dtype=torch.float64, device=device)).Q
    mixing /= 1 + float(inputs[3].max())
    sound = torch.ones((), dtype=torch.bool, device=device)
    before = [basis.new_empty(q // 2, d) for basis in inputs[0]]

    def run(backend: str) -> None:
        ops.fold_rows(*inputs, along, mixing, sound, before, backend=backend)

    def error(backend: str) -> float:
        kept = [basis.clone() for basis in inputs[0]]
        run("torch")
        wanted = torch.stack(inputs[0])
        torch._foreach_copy_(inputs[0], kept)
        run(backend)
        found = torch.stack(inputs[0])
        torch._foreach_copy_(inputs[0], kept)
        return float((found - wanted).abs().max() / wanted.abs().max())

    return _prepared("fold_rows", run, error, device, 4.0 * 3.5 * count * q * d)


def _prepared(
    op: str,
    run: Callable[[str], Any],
    error: Callable[[str], float],
    device: torch.device,
    nbytes: float,
) -> Prepared:
    names = [fast_path("native", run, device), "torch"]
    return Prepared(
        competitors={name: functools.partial(run, name) for name in names},
        errors={name: error(name) for name in names},
        limit=LIMITS[op],
        flops=0.0,  # of float64, for which no ceiling is measured
        nbytes=nbytes,
    )
