"""The ``fold_measure`` and ``fold_rows`` ops: a fold's (Q, D) work for all layers of a shape."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eva_kernels import ops, reference

from ._case import Case, Prepared

SHAPES = [
    ("Llama-2-7B", 96, 64, 4096),
    ("Llama-2-7B", 32, 64, 11008),
    ("Llama-2-7B", 96, 128, 4096),
]
LIMITS = {"fold_measure": 1e-12, "fold_rows": 1e-6}


def cases(small: bool = False) -> list[Case]:
    """Return the cases for a GPU, or small ones for a rehearsal."""
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


class _Problem:
    """Layers of one shape with the sums of a step, and the inputs of the two passes."""

    def __init__(self, count: int, q: int, d: int, device: torch.device) -> None:
        float64: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.bases = [torch.randn(q, d, device=device) / d**0.5 for _ in range(count)]
        self.products = [torch.randn(q, d, device=device) for _ in range(count)]
        self.means = [torch.randn(d, device=device) for _ in range(count)]
        shifts = [torch.randn(d, **float64) for _ in range(count)]
        squares = [torch.ones((), **float64) for _ in range(count)]
        self.numbers = torch.rand(count, 4 + q, **float64) + 0.5
        self.num_saved = [q // 2] * count
        self.delta, self.mean, _ = reference.fold_prepare(shifts, squares, self.means, self.numbers)
        self.sums = shifts, squares

    def layers(self) -> ops.FoldLayers:
        return ops.fold_layers(self.bases, self.products, *self.sums, self.means, self.num_saved)

    def plain_measure(self) -> tuple[Tensor, Tensor, Tensor]:
        return reference.fold_measure(self.bases, self.products, self.numbers, self.delta)


def _make_measure(count: int, q: int, d: int, device: torch.device) -> Prepared:
    problem = _Problem(count, q, d, device)
    layers = problem.layers()
    expected = problem.plain_measure()

    def native() -> tuple[Tensor, ...]:
        return ops.fold_measure(layers, problem.numbers, problem.delta)

    pairs = zip(native(), expected, strict=True)
    errors = [(a.tril() - b.tril()).abs().max() / b.abs().max() for a, b in pairs]
    error = float(torch.stack(errors).max())  # NaN stays NaN
    # Each basis is read twice: for `along`, and together with the products.
    return _prepared("fold_measure", native, problem.plain_measure, error, 4.0 * 3 * count * q * d)


def _make_rows(count: int, q: int, d: int, device: torch.device) -> Prepared:
    problem = _Problem(count, q, d, device)
    layers, numbers, delta = problem.layers(), problem.numbers, problem.delta
    along = problem.plain_measure()[0]
    # A contraction, so that a basis updated repeatedly stays bounded.
    mixing = torch.linalg.qr(torch.randn(count, q, q, dtype=torch.float64, device=device)).Q
    mixing /= 1 + float(numbers.max())
    summary = numbers.new_full((count, 2 + 2 * q), float(q))
    all_finite = torch.ones((), dtype=torch.bool, device=device)
    arguments = numbers, delta, along, problem.mean, mixing, summary, all_finite

    def native() -> None:
        ops.fold_rows(layers, *arguments)

    def plain() -> None:
        state = problem.bases, problem.products, problem.means, problem.num_saved
        reference.fold_rows(*state, *arguments)

    old_bases = [basis.clone() for basis in problem.bases]
    plain()
    expected = torch.stack(problem.bases)
    torch._foreach_copy_(problem.bases, old_bases)
    native()
    error = float((torch.stack(problem.bases) - expected).abs().max() / expected.abs().max())
    return _prepared("fold_rows", native, plain, error, 4.0 * 3.5 * count * q * d)


def _prepared(
    op: str, native: Callable[[], Any], plain: Callable[[], Any], error: float, nbytes: float
) -> Prepared:
    return Prepared(
        competitors={"native": native, "torch": plain},
        errors={"native": error},
        limit=LIMITS[op],
        flops=0.0,  # they are in float64, for which no ceiling is measured
        nbytes=nbytes,
    )
