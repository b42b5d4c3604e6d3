"""The ``sketch`` op: stream a batch once into the sums of a sketched layer input."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..errors import EvaRuntimeError
from ._dispatch import (
    check_contiguous,
    check_precision,
    check_sums,
    choose_backend,
    define_operator,
    with_contiguous_columns,
    workspace_for,
)

__all__ = ["sketch", "sketch_workspace_bytes"]


@torch.no_grad()
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
    workspace: Tensor | None = None,
) -> None:
    """Add the sums of one batch, in place; see :func:`eva_kernels.reference.sketch`.

    Args:
        x, basis, pivot, products, shift, square, rows: as the reference. ``rows`` are not checked
            on an accelerator. Tokens whose features are not neighbours in memory are copied.
        backend: ``"triton"``, ``"torch"``, or ``"auto"``: Triton on a GPU for bfloat16, float16
            and float32 tokens with D >= 16 and Q <= 256, else PyTorch, the reason logged once.
        precision: ``"high"`` keeps 16 bits of every factor in the tensor cores, ``"fast"`` the 8
            of one bfloat16; plain PyTorch computes both in the dtype of the state.
        workspace: scratch memory for Triton, (at least :func:`sketch_workspace_bytes`,) uint8;
            allocated if ``None``.

    Raises:
        EvaValueError: shapes, dtypes, devices or strides that do not fit.
        EvaRuntimeError: an explicit backend that cannot run.

    Numerics: Triton's error relative to the norm of the products is at most 1e-5 (``"high"``) and
        5e-3 (``"fast"``), with outliers and offsets of 800 too. The same bits for the same input.
    Cost: ``4 N D Q`` flops, on tensor cores twice that for bfloat16 tokens at ``"high"``, three
        times for float16 and float32; X is read once from memory and once from the L2 cache.
    """
    check_precision(precision)
    q, d = basis.shape
    check_sums(
        "sketch",
        x,
        rows,
        d,
        basis,
        basis=(basis, (q, d)),
        pivot=(pivot, (d,)),
        products=(products, (q, d)),
        shift=(shift, (d,)),
        square=(square, ()),
    )
    chosen = choose_backend("sketch", backend, x, basis.dtype, q)
    if (len(x) if rows is None else len(rows)) == 0:
        return
    if chosen == "torch":
        reference.sketch(x, basis, pivot, products, shift, square, rows)
        return
    check_contiguous("sketch", products=products, shift=shift)
    n = len(x) if rows is None else len(rows)
    nbytes = sketch_workspace_bytes(n, q, d, x.dtype, x.device)
    _launch(
        with_contiguous_columns(x),
        basis.contiguous(),
        pivot.contiguous(),
        products,
        shift,
        square,
        workspace_for("sketch", x, nbytes, workspace),
        None if rows is None else rows.contiguous(),
        precision == "high",
    )


def sketch_workspace_bytes(n: int, q: int, d: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return the bytes of scratch memory that Triton needs for (n, d) tokens and a (q, d) basis."""
    from ..kernels.sketch_plan import plan_sketch

    return plan_sketch(n, q, d, dtype != torch.bfloat16, device_arch(device)).nbytes


def device_arch(device: torch.device) -> Any:
    """Return the architecture whose launch numbers are used on a device.

    Raises:
        EvaRuntimeError: there are none; the message says why.
    """
    from ..kernels.launch import arch_of

    arch = arch_of(device)
    if isinstance(arch, str):
        raise EvaRuntimeError(arch)
    return arch


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which Triton launches on a device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _run(
    x: Tensor,
    basis: Tensor,
    pivot: Tensor,
    products: Tensor,
    shift: Tensor,
    square: Tensor,
    workspace: Tensor,
    rows: Tensor | None,
    high: bool,
) -> None:
    from ..kernels.sketch import launch_sketch

    arch = device_arch(x.device)
    with on_device(x.device):
        launch_sketch(x, basis, pivot, products, shift, square, rows, workspace, high, arch)


_launch = define_operator(
    "sketch",
    "(Tensor x, Tensor basis, Tensor pivot, Tensor(a!) products, Tensor(b!) shift, "
    "Tensor(c!) square, Tensor(d!) workspace, Tensor? rows, bool high) -> ()",
    _run,
)
