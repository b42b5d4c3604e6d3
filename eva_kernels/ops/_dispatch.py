"""Backend choice, the same for every operation: explicit obeys or raises, ``auto`` falls back."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..errors import EvaRuntimeError, EvaValueError

BACKENDS = ("auto", "triton", "torch")
PRECISIONS = ("high", "fast")
_log = logging.getLogger("eva_kernels")
_reasons_logged: set[str] = set()


def triton_unavailable(device_type: str) -> str | None:
    """Return why the Triton kernels cannot run on a device, or ``None`` if they can."""
    return f"this version has no Triton kernels (tensors are on {device_type})"


def choose_backend(op: str, backend: str, x: Tensor) -> str:
    """Return the backend that an op runs on.

    Raises:
        EvaValueError: unknown name.
        EvaRuntimeError: an explicit backend that cannot run; the message says why.
    """
    if backend not in BACKENDS:
        raise EvaValueError(f"backend={backend!r} is unknown; choose one of {BACKENDS}")
    if backend == "torch":
        return "torch"
    reason = triton_unavailable(x.device.type)
    if reason is None:
        return "triton"
    if backend == "triton":
        raise EvaRuntimeError(f'backend="triton" cannot run {op}: {reason}; use "auto" or "torch"')
    if reason not in _reasons_logged:
        _reasons_logged.add(reason)
        _log.info("%s runs on plain PyTorch: %s", op, reason)
    return "torch"


def check_precision(precision: str) -> None:
    """Raise EvaValueError for an unknown precision."""
    if precision not in PRECISIONS:
        raise EvaValueError(f"precision={precision!r} is unknown; choose one of {PRECISIONS}")


def check_sums(
    op: str, x: Tensor, features: int, like: Tensor, **state: tuple[Tensor, tuple[int, ...]]
) -> None:
    """Raise EvaValueError unless x is (N, features), floating, and the state fits it.

    Args:
        op: name for the message.
        x: tokens.
        features: D.
        like: gives the dtype of the computation; ``shift`` and ``square`` are float64.
        state: every tensor of the state with the shape that it must have.
    """
    if x.dim() != 2 or x.shape[1] != features:
        raise EvaValueError(f"{op}: x must be (N, {features}), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise EvaValueError(f"{op}: x must be floating point, got {x.dtype}")
    for name, (tensor, shape) in state.items():
        dtype = torch.float64 if name in ("shift", "square") else like.dtype
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise EvaValueError(
                f"{op}: {name} must be {shape} of {dtype}, "
                f"got {tuple(tensor.shape)} of {tensor.dtype}"
            )
        if tensor.device != x.device:
            raise EvaValueError(f"{op}: x is on {x.device}, {name} on {tensor.device}")
