"""The ``gram`` op: stream a batch once into the exact second moment of a layer input."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ._dispatch import (
    check_contiguous,
    check_precision,
    check_sums,
    choose_backend,
    define_operator,
    kernel_module,
    with_contiguous_columns,
)
from .sketch import device_arch

__all__ = ["gram", "gram_workspace_bytes"]


@torch.no_grad()
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
        x, pivot, scatter, shift, square, rows: as the reference; ``rows`` are not checked on an
            accelerator. Tokens whose features are not contiguous in memory are copied.
        backend, precision: as :func:`sketch`.

    Raises:
        EvaValueError: shapes, dtypes, devices or strides that do not fit.
        EvaRuntimeError: an explicit backend that cannot run.

    Numerics: as :func:`sketch`. Triton computes the upper triangle of tiles and mirrors it.
    Cost: ``2 N D^2`` flops; Triton does half of them, three times as many at ``"high"``.
    """
    check_precision(precision)
    d = pivot.shape[0]
    check_sums(
        "gram",
        x,
        rows,
        d,
        pivot,
        pivot=(pivot, (d,)),
        scatter=(scatter, (d, d)),
        shift=(shift, (d,)),
        square=(square, ()),
    )
    chosen = choose_backend("gram", backend, x, pivot.dtype)
    n = len(x if rows is None else rows)
    if n == 0:
        return
    if chosen == "torch":
        reference.gram(x, pivot, scatter, shift, square, rows)
        return
    check_contiguous("gram", scatter=scatter, shift=shift)
    nbytes = gram_workspace_bytes(n, d, x.dtype, x.device)
    _launch(
        with_contiguous_columns(x),
        pivot.contiguous(),
        scatter,
        shift,
        square,
        torch.empty(nbytes, dtype=torch.uint8, device=x.device),
        None if rows is None else rows.contiguous(),
        precision == "high",
    )


def gram_workspace_bytes(n: int, d: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return the bytes of scratch memory that Triton needs for (n, d) tokens."""
    return int(kernel_module("gram").plan_gram(n, d, dtype.itemsize, device_arch(device)).nbytes)


def _run(
    x: Tensor,
    pivot: Tensor,
    scatter: Tensor,
    shift: Tensor,
    square: Tensor,
    workspace: Tensor,
    rows: Tensor | None,
    high: bool,
) -> None:
    n = len(x if rows is None else rows)
    key = n, x.shape[1], x.stride(0), x.dtype, rows is not None, high, device_arch(x.device)
    sequence = kernel_module("gram").gram_sequence(*key)
    sequence.run((x, rows, pivot, scatter, shift, square), workspace)


_launch = define_operator(
    "gram",
    "(Tensor x, Tensor pivot, Tensor(a!) scatter, Tensor(b!) shift, Tensor(c!) square, "
    "Tensor(d!) workspace, Tensor? rows, bool high) -> ()",
    _run,
)
