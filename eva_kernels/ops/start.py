"""The first basis of a layer input: two folds of a warm-up by one call of native code."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import _native
from ._dispatch import define_operator
from .eigh import max_native_width
from .fold import check_layers, columns_per_split
from .fold import runs_natively as folds_natively

__all__ = ["runs_natively", "start"]


def runs_natively(basis: Tensor) -> bool:
    """Tell whether there is native code for a first basis (Q, D) on an accelerator.

    Unlike the passes of a fold it includes a decomposition, which needs enough shared memory.
    """
    if not folds_natively(basis):
        return False
    return isinstance(basis, FakeTensor) or len(basis) <= max_native_width(basis.device.index)


@torch.no_grad()
def start(
    basis: Tensor, products: Tensor, shift: Tensor, square: Tensor, mean: Tensor, tokens: int
) -> None:
    """Write mean and rows of a first basis, and clear the token sums that they are computed from.

    The same as :func:`.fold.fold_prepare` to :func:`.fold.fold_rows` with the mixing of
    ``nystrom(..., goal="whiten")``, then again with that of ``goal="orthogonalise"``; called from
    Python, each step takes longer than on the device. See ``streaming.fold.first_basis``.

    Args:
        basis: V, random, float32 (Q, D), Q at most 128; contiguous, like all arguments.
        products: of V and the tokens about the mean, float32 (Q, D); see :func:`reference.sketch`.
        shift, square: of the tokens, float64 (D,) and ().
        mean: that the sums are about, float32 (D,).
        tokens: number of tokens in the sums, at least 1.

    Raises:
        EvaValueError, EvaTypeError: shapes, devices or dtypes do not fit.
        EvaRuntimeError: the module for this device was not built.
        RuntimeError: Q is too large for the GPU's shared memory; see :func:`runs_natively`.

    Numerics: those of the passes of a fold. Rows beyond the rank keep their random values.
    Cost: ``8 Q^2 D`` flops; some 1 MB of temporary memory.
    """
    check_layers([[basis], [products], [shift], [square], [mean]], [0])
    _start(basis, products, shift, square, mean, tokens)


def _run(
    basis: Tensor, products: Tensor, shift: Tensor, square: Tensor, mean: Tensor, tokens: int
) -> None:
    q, d = basis.shape
    columns = columns_per_split(1, q, d)
    module = _native.load(basis.device)
    nbytes = module.start_bytes(q, d, columns)
    workspace = torch.empty(nbytes, dtype=torch.uint8, device=basis.device)
    tensors = (tensor.data_ptr() for tensor in (basis, products, shift, square, mean))
    numbers = q, d, float(tokens), columns, workspace.data_ptr()
    _native.call(module, "start", *tensors, *numbers, device=basis.device)


_start = define_operator(
    "start",
    "(Tensor(a!) basis, Tensor(b!) products, Tensor(c!) shift, Tensor(d!) square, "
    "Tensor(e!) mean, int tokens) -> ()",
    _run,
)
