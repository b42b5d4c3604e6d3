"""The ``sketch`` op: stream a batch once into the sums of a sketched layer input."""

from __future__ import annotations

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
    is_observed,
    kernels,
    with_contiguous_columns,
    workspace_for,
)

__all__ = ["sketch", "sketch_unchecked", "sketch_workspace_bytes"]


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
    state = basis, pivot, products, shift, square
    sketch_unchecked(x, state, rows, backend, precision == "high", workspace)


def sketch_unchecked(
    x: Tensor,
    state: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    rows: Tensor | None,
    backend: str,
    high: bool,
    workspace: Tensor | None = None,
) -> None:
    """Do what :func:`sketch` does for a caller whose tensors are known to fit, without gradients.

    What looks at the tensors of every layer input of every step takes as long as their launch.

    Args:
        x, rows: of the shapes, dtypes and device that :func:`sketch` asks for.
        state: basis, pivot, products, shift and square, the same.
        backend, workspace: as :func:`sketch`.
        high: ``precision="high"``.
    """
    basis, pivot, products, shift, square = state
    q = int(basis.shape[0])  # of a traced tensor, too
    chosen = choose_backend("sketch", backend, x, basis.dtype, q)
    if (x if rows is None else rows).shape[0] == 0:
        return
    if chosen == "torch":
        with torch.no_grad():
            reference.sketch(x, *state, rows)
        return
    check_contiguous("sketch", products=products, shift=shift)
    x = with_contiguous_columns(x)
    sequence = _sequence(x, rows, q, high)
    basis, pivot = basis.contiguous(), pivot.contiguous()
    workspace = workspace_for("sketch", x, sequence.nbytes, workspace)
    rows = None if rows is None else rows.contiguous()
    if is_observed(x):
        _launch(x, basis, pivot, products, shift, square, workspace, rows, high)
    else:
        sequence.run((x, rows, basis, pivot, products, shift, square), workspace)


def _sequence(x: Tensor, rows: Tensor | None, q: int, high: bool) -> Any:
    n, d = (x if rows is None else rows).shape[0], x.shape[1]
    kind = int(n), q, int(d), int(x.stride(0)), x.dtype, rows is not None, high
    return kernels("sketch").sketch_sequence(*kind, device_arch(x.device))


def sketch_workspace_bytes(n: int, q: int, d: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return the bytes of scratch memory that Triton needs for (n, d) tokens and a (q, d) basis."""
    plan = kernels("sketch_plan").plan_sketch(n, q, d, dtype != torch.bfloat16, device_arch(device))
    return int(plan.nbytes)


def device_arch(device: torch.device) -> Any:
    """Return the architecture whose launch numbers are used on a device.

    Raises:
        EvaRuntimeError: there are none; the message says why.
    """
    arch = kernels("launch").arch_of(device)
    if isinstance(arch, str):
        raise EvaRuntimeError(arch)
    return arch


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
    sequence = _sequence(x, rows, len(basis), high)
    sequence.run((x, rows, basis, pivot, products, shift, square), workspace)


_launch = define_operator(
    "sketch",
    "(Tensor x, Tensor basis, Tensor pivot, Tensor(a!) products, Tensor(b!) shift, "
    "Tensor(c!) square, Tensor(d!) workspace, Tensor? rows, bool high) -> ()",
    _run,
)
