"""The ``gram`` op: stream a batch once into the exact second moment of a layer input."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ._dispatch import check_precision, check_sums, choose_backend

__all__ = ["gram"]


def gram(
    x: Tensor,
    pivot: Tensor,
    scatter: Tensor,
    shift: Tensor,
    square: Tensor,
    rows: Tensor | None = None,
    *,
    backend: str = "auto",
    precision: str = "high",
) -> None:
    """Add the sums of one batch, in place; see :func:`eva_kernels.reference.gram`.

    Args:
        x, pivot, scatter, shift, square, rows: as the reference.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.
        precision: ``"high"`` or ``"fast"``; plain PyTorch computes both in the dtype of the state.

    Raises:
        EvaValueError: shapes, dtypes or devices that do not fit.
        EvaRuntimeError: an explicit backend that cannot run.
    """
    check_precision(precision)
    d = pivot.shape[0]
    check_sums(
        "gram",
        x,
        d,
        pivot,
        pivot=(pivot, (d,)),
        scatter=(scatter, (d, d)),
        shift=(shift, (d,)),
        square=(square, ()),
    )
    choose_backend("gram", backend, x)
    reference.gram(x, pivot, scatter, shift, square, rows)
