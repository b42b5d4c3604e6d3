"""Helpers of numeric tests: inputs of given spectrum, independent exact results, tolerances."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from eva_kernels.ops._dispatch import triton_unavailable
from eva_kernels.streaming import InputStream, Options, export_stream, fold_streams

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Tolerance:
    """Largest relative errors due to rounding.

    Attributes:
        sums: of the shift (relative to the sum of magnitudes) and of the sum of squares: one
            rounding per token, and a pairwise sum within a tile.
        products: of the (Q, D) products in Frobenius norm: two chained dot products, of length D
            and of the tokens of a tile, whose errors grow with the root of the length.
        orthonormal: largest entry of ``V V^T - I``: one rounding of each of D entries.
        values: of the singular values of data that the sketch represents exactly; the square root
            halves the relative error ``products`` of a sum of squares.
        cosine: largest ``1 - c`` of a principal cosine c of two spans that differ by rounding only.
    """

    sums: float
    products: float
    orthonormal: float
    values: float
    cosine: float


EPS32, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
_SINGLE = Tolerance(
    sums=4 * EPS32, products=16 * EPS32, orthonormal=4 * EPS32, values=8 * EPS32, cosine=4 * EPS32
)
# Half precision inputs are widened before any arithmetic, or split into parts whose sum is exact,
# so single precision is required.
TOLERANCES = {
    torch.float16: _SINGLE,
    torch.bfloat16: _SINGLE,
    torch.float32: _SINGLE,
    # The reference is rounded to float64, too, and the (Q, Q) work of a fold loses a few digits.
    torch.float64: Tolerance(
        sums=32 * EPS64, products=64 * EPS64, orthonormal=1e-10, values=1e-10, cosine=1e-12
    ),
}
DTYPES = list(TOLERANCES)
# Error of tensor-core products: two bfloat16 planes keep 16 bits of a factor, one keeps 8.
PLANES = {"high": 1e-5, "fast": 5e-3}


# The backends of the streaming ops that run here, and the dtypes of tokens they take.
BACKENDS = ["torch"]
if triton_unavailable("cuda" if torch.cuda.is_available() else "cpu") is None:
    BACKENDS.append("triton")
KINDS = [
    pytest.param(backend, dtype, id=f"{backend}-{str(dtype).removeprefix('torch.')}")
    for backend in BACKENDS
    for dtype in DTYPES
    if backend == "torch" or dtype != torch.float64
]


def products_limit(backend: str, dtype: torch.dtype, precision: str = "high") -> float:
    """Return the largest allowed relative error of products in Frobenius norm."""
    return PLANES[precision] if backend == "triton" else TOLERANCES[dtype].products


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the relative error in Frobenius norm."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-300))


def with_spectrum(
    tokens: int,
    features: int,
    singular_values: Iterable[float] | Tensor,
    *,
    offset: float = 0.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Tensor:
    """Return (tokens, features) data with given singular values after centring.

    ``offset`` is the size of a constant vector added to every token.
    """
    values = torch.as_tensor(singular_values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(tokens, len(values), generator=generator, dtype=torch.float64)
    # Orthogonal to the vector of ones, so that centring does not change the columns' lengths.
    ones = torch.ones(tokens, 1, dtype=torch.float64)
    left = torch.linalg.qr(torch.cat([ones, normal], 1)).Q[:, 1:]
    normal = torch.randn(features, len(values), generator=generator, dtype=torch.float64)
    right = torch.linalg.qr(normal).Q
    shift = torch.randn(features, generator=generator, dtype=torch.float64)
    return ((left * values) @ right.mT + offset * shift / shift.norm()).to(dtype)


def decaying(count: int, power: float = 1.0, scale: float = 100.0) -> Tensor:
    """Return ``scale / j^power`` for j = 1, 2, ..."""
    return scale / torch.arange(1, count + 1, dtype=torch.float64) ** power


def exact(x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return singular values, right singular vectors, sum of squares of centred data, by SVD."""
    centred = x.double() - x.double().mean(0)
    _, values, rows = torch.linalg.svd(centred, full_matrices=False)
    return values, rows, float(centred.square().sum())


def lost_variance(x: Tensor, components: Tensor) -> float:
    """Return ``1 - captured / best``, best being captured by as many principal components."""
    values = exact(x)[0]
    centred, basis = x.double() - x.double().mean(0), torch.linalg.qr(components.double().mT).Q
    best = values[: len(components)].square().sum()
    return float(1 - (centred @ basis).square().sum() / best)


def orthonormality(rows: Tensor) -> float:
    """Return the largest entry of ``V V^T - I``."""
    rows = rows.double()
    return float((rows @ rows.mT - torch.eye(len(rows), dtype=torch.float64)).abs().max())


def principal_cosine(left: Tensor, right: Tensor) -> float:
    """Return the smallest cosine of the principal angles between two spans of rows."""
    bases = [torch.linalg.qr(rows.double().mT).Q for rows in (left, right)]
    return float(torch.linalg.svdvals(bases[0].mT @ bases[1]).min())


def make_stream(
    features: int,
    components: int,
    width: int | None = None,
    *,
    method: str = "sketch",
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    **options: object,
) -> InputStream:
    """Return an empty stream; its width is twice the components, at most D."""
    width = min(features, 2 * components) if width is None else width
    return InputStream(features, components, width, device, dtype, Options(method, **options))


def feed(stream: InputStream, batches: Sequence[Tensor]) -> InputStream:
    """Run one step per batch."""
    for batch in batches:
        stream.add(batch)
        fold_streams([stream])
    return stream


def snapshot(stream: InputStream) -> dict[str, object]:
    """Return a copy of everything that a stream holds."""
    record, tensors = export_stream(stream)
    return {**record, **{name: tensor.clone() for name, tensor in tensors.items()}}


def same(left: dict[str, object], right: dict[str, object]) -> bool:
    """Tell whether two snapshots are equal bit by bit."""
    return left.keys() == right.keys() and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b or a != a
        for a, b in ((left[key], right[key]) for key in left)
    )
