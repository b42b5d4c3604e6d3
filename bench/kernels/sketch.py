"""The ``sketch`` op at the shapes of language models."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from eva_kernels.ops import sketch

from ._case import ERROR_LIMITS, SKETCH_PASSES, Case, Prepared, fast_path
from ._timing import relative_error

# model, D, N, Q; the most informative first, as time may run out
SHAPES = [
    ("Llama-2-7B", 4096, 8192, 64),
    ("Llama-2-7B", 4096, 2048, 64),
    ("Llama-2-7B", 11008, 2048, 64),
    ("Llama-2-7B", 11008, 8192, 64),
    ("Llama-2-7B", 4096, 2048, 128),
    ("Llama-2-7B", 4096, 8192, 128),
    ("Llama-2-7B", 11008, 2048, 128),
    ("Llama-2-7B", 11008, 8192, 128),
    ("Gemma-2-9B", 3584, 8192, 64),
    ("Gemma-2-9B", 14336, 8192, 64),
    ("Llama-3.1-70B", 8192, 8192, 64),
    ("Llama-3.1-70B", 28672, 8192, 64),
    ("Llama-3.2-1B", 2048, 2048, 64),
    ("Llama-3.2-1B", 8192, 2048, 64),
]
VARIANTS = [(torch.bfloat16, "fast"), (torch.float16, "high"), (torch.float32, "high")]


def cases(small: bool = False) -> list[Case]:
    """Return the cases for a GPU, or small ones for a rehearsal."""
    if small:
        return [_case("tiny", 64, 96, 16, torch.bfloat16, "high")]
    found = [_case(*shape, torch.bfloat16, "high") for shape in SHAPES]
    return found[:4] + [_case(*SHAPES[0], *variant) for variant in VARIANTS] + found[4:]


def _case(model: str, d: int, n: int, q: int, dtype: torch.dtype, precision: str) -> Case:
    with_peft = q == 64 and d in (4096, 11008) and n == 2048
    return Case(
        op="sketch",
        model=model,
        shape={"N": n, "D": d, "Q": q},
        make=functools.partial(_make, d, n, q, dtype, precision, with_peft),
        dtype=dtype,
        precision=precision,
    )


def tokens(n: int, d: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return random tokens with features of very different scales, some with a large mean."""
    scale = torch.rand(d, device=device).mul_(4).exp_()
    offset = 8 * torch.randn(d, device=device)
    return torch.randn(n, d, device=device).mul_(scale).add_(offset).to(dtype)


def _make(
    d: int,
    n: int,
    q: int,
    dtype: torch.dtype,
    precision: str,
    with_peft: bool,
    device: torch.device,
) -> Prepared:
    x = tokens(n, d, dtype, device)
    pivot = x[: n // 4].float().mean(0)
    basis = torch.linalg.qr(torch.randn(d, q, device=device)).Q.mT.contiguous()

    def zero_sums() -> tuple[torch.Tensor, ...]:
        float64: dict[str, Any] = {"dtype": torch.float64, "device": device}
        products = torch.zeros(q, d, device=device)
        return products, torch.zeros(d, **float64), torch.zeros((), **float64)

    def run(backend: str, sums: tuple[torch.Tensor, ...]) -> Any:
        return sketch(x, basis, pivot, *sums, backend=backend, precision=precision)

    fast = fast_path("triton", lambda name: run(name, zero_sums()), device)
    names = [fast, "torch"]
    exact_sums = truth(x, basis, pivot)

    def error(name: str) -> float:
        sums = zero_sums()
        run(name, sums)
        return relative_error(sums, exact_sums)

    errors = {name: error(name) for name in names}
    sums = {name: zero_sums() for name in names}
    competitors: dict[str, Callable[[], Any]] = {
        name: functools.partial(run, name, sums[name]) for name in names
    }
    if with_peft:
        # PEFT imports transformers, which takes seconds
        from peft.utils.incremental_pca import IncrementalPCA

        pca = IncrementalPCA(q // 2, copy=True, lowrank=True, lowrank_seed=42)
        pca.partial_fit(x.float())
        competitors["peft step"] = lambda: pca.partial_fit(x.float())
    passes = SKETCH_PASSES.get((precision, dtype), 1)
    nbytes = x.nbytes + 3 * basis.nbytes  # reads X and V; reads and writes the products
    return Prepared(competitors, errors, ERROR_LIMITS[precision], 4.0 * passes * n * d * q, nbytes)


def truth(
    x: torch.Tensor, basis: torch.Tensor, pivot: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return products (Q, D), shift (D,) and square () of the tokens in float64."""
    centred = x.double() - pivot.double()
    products = (centred @ basis.double().mT).mT @ centred
    return products, centred.sum(0), centred.square().sum()
