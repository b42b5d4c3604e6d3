"""Eigen-decomposition of a batch of small symmetric matrices."""

from __future__ import annotations

import functools
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from .. import _native
from ..errors import EvaRuntimeError, EvaTypeError, EvaValueError
from ._dispatch import log_fallback

__all__ = ["BACKENDS", "MAX_WIDTH", "eigh", "lapack_eigh", "max_native_width"]

BACKENDS = ("auto", "native", "torch")
# Limit of a block's shared memory on a GPU; wider matrices fill the device without batching.
MAX_WIDTH = 128


@torch.no_grad()
def eigh(matrices: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Decompose symmetric matrices, ``A = W diag(w) W^T``, in one launch on a GPU.

    The plain twin is :func:`lapack_eigh`, guarded against NaN, for which LAPACK raises.

    Args:
        matrices: float64 (L, Q, Q), any strides; the lower triangles are read, nothing else.
        backend: "native" (compiled C++ or CUDA Jacobi, Q at most 128), "torch", or "auto": on CUDA
            native where it was built and Q fits the device, otherwise torch, with the reason logged
            once; on other devices torch, since LAPACK is faster than the C++ twin.

    Returns:
        ``values`` (L, Q), ascending, and ``vectors`` (L, Q, Q), whose columns are orthonormal and
        belong to the values. Both are NaN for a matrix whose lower triangle holds a NaN or an
        infinity; other matrices are not affected. Native code does not synchronise with the host.

    Raises:
        EvaTypeError: ``matrices`` is not a float64 tensor.
        EvaValueError: a wrong shape, an unknown ``backend``, or "native" with Q above 128.
        EvaRuntimeError: ``backend="native"`` and the module for this device was not built, or the
            device has too little shared memory for Q.

    Numerics: float64, backward stable on every backend. The native one is a Jacobi method: small
        eigenvalues of graded positive definite matrices ``D H D`` with a well conditioned H have
        high relative accuracy, unlike those of torch. In each of its vectors the component of
        largest magnitude (the first of equals) is positive; torch's signs are LAPACK's.
        Bitwise reproducible for the same backend and device.
    Cost: native ``8 L Q^3`` flops a sweep, 4 to 10 sweeps; ``16 L Q^2`` bytes of memory.
    Reference: Golub and Van Loan, Matrix Computations, section 8.5; Demmel and Veselic 1992,
        Jacobi's method is more accurate than QR.
    """
    _check(matrices)
    if backend not in BACKENDS:
        raise EvaValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    width, kind = matrices.shape[-1], matrices.device.type
    if backend == "native":
        if width > MAX_WIDTH:
            raise EvaValueError(f"backend='native' takes Q up to {MAX_WIDTH}, not {width}")
        if kind not in _native.MODULES:
            _native.load(matrices.device)  # raises, and says why
        return _decompose(matrices, False)
    if backend == "auto" and kind == "cuda":
        if width <= MAX_WIDTH:
            return _decompose(matrices, True)
        log_fallback("eigh", f"Q = {width} is above {MAX_WIDTH}")
    return _eigh_by_torch(matrices)


def lapack_eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """As ``torch.linalg.eigh``, with a fallback where that fails; reads the lower triangles only.

    MKL's divide and conquer fails to converge on some matrices with mostly zero rows, which come
    from features that never vary: on about one in a hundred of those with more than a hundred rows.

    Raises:
        torch.linalg.LinAlgError: NumPy's does not converge either, or a matrix is not finite.
    """
    try:
        values, vectors = torch.linalg.eigh(matrices)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        found = _numpy_eigh(matrices)
        if found is None:
            raise error
        values, vectors = found
    return values, vectors


def _numpy_eigh(matrices: Tensor) -> tuple[Tensor, Tensor] | None:
    # if NumPy uses MKL, too, another scale helps
    lower = matrices.tril()
    scale = lower.abs().amax((-1, -2), keepdim=True).clamp_min(torch.finfo(lower.dtype).tiny)
    try:
        arrays = np.linalg.eigh((lower / scale).cpu().numpy())
    except np.linalg.LinAlgError:
        return None
    values, vectors = (torch.from_numpy(array).to(matrices.device) for array in arrays)
    return values * scale[..., 0], vectors


# Whether the GPU module is used is decided inside the operator, so that a simulation with fake
# tensors sees one call, as on a machine with the module, and needs no driver.
@torch.library.custom_op("eva_kernels::eigh", mutates_args=(), device_types="cpu")
def _decompose(matrices: Tensor, may_fall_back: bool) -> tuple[Tensor, Tensor]:
    """Run native code; ``may_fall_back`` allows a CUDA tensor to be decomposed by torch."""
    return _launch(_native.load("cpu"), matrices)


@_decompose.register_kernel("cuda")
def _decompose_cuda(matrices: Tensor, may_fall_back: bool) -> tuple[Tensor, Tensor]:
    device = matrices.device
    module = _native.load_or_none(device) if may_fall_back else _native.load(device)
    if module is None:
        return _eigh_by_torch(matrices)
    max_width = max_native_width(device.index)
    if matrices.shape[-1] <= max_width:
        return _launch(module, matrices)
    reason = f"a block of this GPU has shared memory for Q up to {max_width}"
    if not may_fall_back:
        raise EvaRuntimeError(f"backend='native' cannot run: {reason}")
    log_fallback("eigh", reason)
    return _eigh_by_torch(matrices)


@_decompose.register_fake
def _decompose_fake(matrices: Tensor, may_fall_back: bool) -> tuple[Tensor, Tensor]:
    return _empty_results(matrices)


def _empty_results(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return memory for values and vectors; each vector is contiguous, as in torch's result."""
    count, width = matrices.shape[:2]
    return matrices.new_empty((count, width)), matrices.new_empty((count, width, width)).mT


def _launch(module: ModuleType, matrices: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = _empty_results(matrices)
    matrices = matrices.contiguous()  # held until the launch
    addresses = (values.data_ptr(), vectors.data_ptr())
    arguments = (matrices.data_ptr(), *matrices.shape[:2], *addresses)
    _native.call(module, "eigh", *arguments, device=matrices.device)
    return values, vectors


@functools.cache
def max_native_width(device_index: int) -> int:
    """Return the largest Q that a block of this GPU has shared memory for."""
    return int(_native.load(f"cuda:{device_index}").eigh_max_width(device_index))


def _eigh_by_torch(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose with LAPACK; NaN where a matrix is not finite."""
    count = matrices.shape[0]
    # No `~` and no indexing: a simulated GPU without a driver supports only operators like these.
    nonfinite = matrices.tril().isfinite().flatten(1).all(1).logical_not()
    values, vectors = lapack_eigh(matrices.masked_fill(nonfinite.view(count, 1, 1), 0.0))
    values.masked_fill_(nonfinite.view(count, 1), torch.nan)
    vectors.masked_fill_(nonfinite.view(count, 1, 1), torch.nan)
    return values, vectors


def _check(matrices: Tensor) -> None:
    if not isinstance(matrices, Tensor) or matrices.dtype != torch.float64:
        kind = matrices.dtype if isinstance(matrices, Tensor) else type(matrices).__name__
        raise EvaTypeError(f"matrices must be a float64 tensor, not {kind}")
    if matrices.dim() != 3 or matrices.shape[1] != matrices.shape[2]:
        raise EvaValueError(f"matrices must be (L, Q, Q), not {tuple(matrices.shape)}")
