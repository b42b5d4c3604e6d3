"""The ``sketch`` op: stream a batch once into the sums of a sketched layer input."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ._dispatch import check_precision, check_sums, choose_backend

__all__ = ["sketch"]


def sketch(
    x: Tensor,
    basis: Tensor,
    pivot: Tensor,
    products: Tensor,
    shift: Tensor,
    square: Tensor,
    rows: Tensor | None = None,
    *,
    backend: str = "auto",
    precision: str = "high",
) -> None:
    """Add the sums of one batch, in place; see :func:`eva_kernels.reference.sketch`.

    Args:
        x, basis, pivot, products, shift, square, rows: as the reference.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.
        precision: ``"high"`` or ``"fast"``; plain PyTorch computes both in the dtype of the state.

    Raises:
        EvaValueError: shapes, dtypes or devices that do not fit.
        EvaRuntimeError: an explicit backend that cannot run.
    """
    check_precision(precision)
    q, d = basis.shape
    check_sums(
        "sketch",
        x,
        d,
        basis,
        basis=(basis, (q, d)),
        pivot=(pivot, (d,)),
        products=(products, (q, d)),
        shift=(shift, (d,)),
        square=(square, ()),
    )
    choose_backend("sketch", backend, x)
    reference.sketch(x, basis, pivot, products, shift, square, rows)
