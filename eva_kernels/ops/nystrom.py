"""The (Q, Q) part of a fold for all layers at once, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import _native
from ..errors import EvaTypeError, EvaValueError
from ._dispatch import define_operator
from .eigh import MAX_WIDTH, max_native_width

__all__ = ["nystrom", "runs_natively"]

GOALS = ("solve", "whiten", "orthogonalise")  # as csrc/nystrom.h numbers them
SCRATCH_MATRICES = 3  # (Q, Q) matrices a layer, see csrc/nystrom.h


def runs_natively(core: Tensor) -> bool:
    """Tell whether there is native code for matrices (L, Q, Q) on an accelerator.

    On a simulated GPU there always is: simulated is a machine with the module.
    """
    width, device = core.shape[-1], core.device
    if device.type != "cuda" or width > MAX_WIDTH:
        return False
    if isinstance(core, FakeTensor):
        return True
    return _native.load_or_none(device) is not None and width <= max_native_width(device.index)


@torch.no_grad()
def nystrom(
    core: Tensor,
    metric: Tensor,
    ceiling: Tensor,
    tolerance: float,
    *,
    trace: Tensor | None = None,
    goal: str = "solve",
) -> tuple[Tensor, Tensor]:
    """Decompose C from the image ``Y = V C`` of a basis V of Q rows, for L layers.

    The native twin of ``streaming.nystrom.nystrom``, which has the mathematics.

    Args:
        core: ``B = Y V^T``, float64 (L, Q, Q); only lower triangles are read.
        metric: ``Y Y^T``, float64 (L, Q, Q), symmetric.
        ceiling: upper bound of the rank, float64 (L,).
        tolerance: rows off orthonormal by more than this are uneven.
        trace: of C, float64 (L,): if the eigenvalues sum to more, some come from rounding errors of
            rows that the data do not reach, and these are left out. Only "solve" reads it.
        goal: "solve": all of it. "whiten": any rows ``mixing^T Y`` with ``mixing^T B mixing = 1``,
            in a thirtieth of the time unless B is singular. "orthogonalise": B is the Gram matrix
            of Y itself, of rows of any lengths; for every j the first j rows keep their span,
            linearly dependent rows are dropped, and ``ceiling`` is not read. The last two do not
            read ``metric`` and return no squares.

    Returns:
        ``mixing`` (L, Q, Q), ``mixing^T Y`` are the new rows; ``summary`` (L, 2 + 2 Q), see
        csrc/nystrom.h: rank, uneven (0 or 1), squares (Q), captured (Q). Both float64, without a
        synchronisation.

    Raises:
        EvaValueError, EvaTypeError: shapes, devices or dtypes do not fit, or Q is above 128.
        EvaRuntimeError: the module for this device was not built.

    Numerics: float64. Whitens by a Cholesky factor where that loses nothing, by eigenvectors
        where the core is singular. Bitwise reproducible on the same device. A layer that is not
        finite has rank 0 ("orthogonalise": that of its finite rows); the others are not affected.
    Cost: one eigen-decomposition and some ``25 Q^3`` flops per layer; memory 4 (Q, Q) per layer.
    Reference: Tropp, Yurtsever, Udell and Cevher 2017, arXiv 1706.05736.
    """
    _check(core, metric, ceiling, trace)
    if goal not in GOALS:
        raise EvaValueError(f"goal must be one of {', '.join(GOALS)}, not {goal!r}")
    return _nystrom(
        core.contiguous(),
        metric.contiguous(),
        ceiling.contiguous(),
        None if trace is None else trace.contiguous(),
        float(tolerance),
        GOALS.index(goal),
    )


def _run(
    core: Tensor,
    metric: Tensor,
    ceiling: Tensor,
    trace: Tensor | None,
    tolerance: float,
    goal: int,
) -> tuple[Tensor, Tensor]:
    module = _native.load(core.device)
    mixing, summary = _empty_results(core)
    count, width = core.shape[:2]
    scratch = core.new_empty(SCRATCH_MATRICES * core.numel() if core.device.type == "cuda" else 0)
    inputs = core.data_ptr(), metric.data_ptr(), ceiling.data_ptr()
    bound = 0 if trace is None else trace.data_ptr()
    outputs = scratch.data_ptr(), mixing.data_ptr(), summary.data_ptr()
    numbers = count, width, tolerance, goal
    _native.call(module, "nystrom", *inputs, bound, *numbers, *outputs, device=core.device)
    return mixing, summary


def _empty_results(core: Tensor, *given: object) -> tuple[Tensor, Tensor]:
    count, width = core.shape[:2]
    return core.new_empty(core.shape), core.new_empty(count, 2 + 2 * width)


_nystrom = define_operator(
    "nystrom",
    "(Tensor core, Tensor metric, Tensor ceiling, Tensor? trace, float tolerance, int goal)"
    " -> (Tensor, Tensor)",
    _run,
    _empty_results,
)


def _check(core: Tensor, metric: Tensor, ceiling: Tensor, trace: Tensor | None) -> None:
    bounds = {"ceiling": ceiling} if trace is None else {"ceiling": ceiling, "trace": trace}
    given = {"core": core, "metric": metric, **bounds}
    for name, tensor in given.items():
        if tensor.dtype != torch.float64:
            raise EvaTypeError(f"{name} must be float64, not {tensor.dtype}")
        if tensor.device != core.device:
            raise EvaValueError(f"{name} is on {tensor.device}, core on {core.device}")
    if core.dim() != 3 or core.shape[1] != core.shape[2] or metric.shape != core.shape:
        shapes = f"{tuple(core.shape)} and {tuple(metric.shape)}"
        raise EvaValueError(f"core and metric must both be (L, Q, Q), not {shapes}")
    for name, bound in bounds.items():
        if bound.shape != core.shape[:1]:
            raise EvaValueError(f"{name} must be ({len(core)},), not {tuple(bound.shape)}")
    if core.shape[1] > MAX_WIDTH:
        raise EvaValueError(f"Q is at most {MAX_WIDTH}, not {core.shape[1]}")
