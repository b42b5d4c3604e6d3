"""Backend choice for all operations: an explicit one is used or raises, ``auto`` falls back."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import DeviceContext

from ..errors import EvaRuntimeError, EvaValueError

BACKENDS = ("auto", "triton", "torch")
PRECISIONS = ("high", "fast")
# Dtypes that the tensor cores take, directly or as two bfloat16 planes.
TOKEN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MIN_FEATURES, MAX_WIDTH = 16, 256
logger = logging.getLogger("eva_kernels")
_reasons_logged: set[str] = set()


@functools.cache
def kernel_module(name: str) -> ModuleType:
    """Return a module of kernels (which needs Triton), faster than an import statement would."""
    return importlib.import_module(f"eva_kernels.kernels.{name}")


@functools.cache
def _triton_import_error() -> str | None:
    """Return why the kernels cannot be imported, or ``None``."""
    try:
        kernel_module("sketch")
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return None


def triton_unavailable(device: torch.device | str) -> str | None:
    """Return why the Triton kernels cannot run on a device, or ``None`` if they can."""
    device = torch.device(device)
    if device.type not in ("cuda", "cpu"):
        return f"there are no Triton kernels for device type {device.type!r}"
    reason = _triton_import_error()
    if reason is not None:
        return reason
    if device.type == "cpu":
        if kernel_module("primitives").INTERPRET.value:
            return None
        return "tensors are on the CPU; Triton's interpreter needs TRITON_INTERPRET=1 at import"
    arch = kernel_module("launch").arch_of(device)
    return arch if isinstance(arch, str) else None


def _unsupported_reason(x: Tensor, state_dtype: torch.dtype, width: int) -> str | None:
    """Return why the kernels cannot take these tensors, or ``None``."""
    if x.dtype not in TOKEN_DTYPES or state_dtype != torch.float32:
        return f"tokens of {x.dtype} with sums of {state_dtype} are supported by PyTorch only"
    if x.shape[1] < MIN_FEATURES:
        return f"{x.shape[1]} features are fewer than the {MIN_FEATURES} of a tensor-core tile"
    if width > MAX_WIDTH:
        return f"a width of {width} is above {MAX_WIDTH}"
    return None


def choose_backend(op: str, backend: str, x: Tensor, state: torch.dtype, width: int = 1) -> str:
    """Return the backend that an op runs on.

    Args:
        op: name for messages.
        backend: one of ``BACKENDS``. ``"auto"`` never runs Triton's interpreter on a CPU, which is
            slow and for tests only.
        x: tokens, (N, D).
        state: dtype of the sums.
        width: Q, 1 for ops without one.

    Raises:
        EvaValueError: unknown name.
        EvaRuntimeError: an explicit backend that cannot run; the message says why.
    """
    if backend not in BACKENDS:
        raise EvaValueError(f"backend={backend!r} is unknown; choose one of {BACKENDS}")
    if backend == "torch":
        return "torch"
    if backend == "auto" and x.device.type == "cpu":
        reason: str | None = "tensors are on the CPU"
    else:
        reason = triton_unavailable(x.device) or _unsupported_reason(x, state, width)
    if reason is None:
        return "triton"
    if backend == "triton":
        raise EvaRuntimeError(f'backend="triton" cannot run {op}: {reason}; use "auto" or "torch"')
    log_fallback(op, reason)
    return "torch"


def log_fallback(op: str, reason: str) -> None:
    """Log why an op runs on plain PyTorch, each reason once."""
    if reason not in _reasons_logged:
        _reasons_logged.add(reason)
        logger.info("%s runs on plain PyTorch: %s", op, reason)


def check_precision(precision: str) -> None:
    """Raise EvaValueError for an unknown precision."""
    if precision not in PRECISIONS:
        raise EvaValueError(f"precision={precision!r} is unknown; choose one of {PRECISIONS}")


def check_tokens(op: str, x: Tensor, rows: Tensor | None) -> None:
    """Raise EvaValueError unless x is floating point and rows are valid indices for it."""
    if not x.is_floating_point():
        raise EvaValueError(f"{op}: x must be floating point, got {x.dtype}")
    if rows is None:
        return
    if rows.dim() != 1 or rows.dtype != torch.int64:
        raise EvaValueError(
            f"{op}: rows must be a vector of torch.int64, got {tuple(rows.shape)} of {rows.dtype}"
        )
    if rows.device != x.device:
        raise EvaValueError(f"{op}: x is on {x.device}, rows on {rows.device}")


def check_sums(
    op: str,
    x: Tensor,
    rows: Tensor | None,
    features: int,
    like: Tensor,
    **state: tuple[Tensor, tuple[int, ...]],
) -> None:
    """Raise EvaValueError unless x is (N, features), floating point, and rows and state fit it.

    Args:
        op: name for the message.
        x: tokens.
        rows: indices into ``x``.
        features: D.
        like: has the dtype of the computation; ``shift`` and ``square`` are float64.
        state: every tensor of the state with its required shape.
    """
    if x.dim() != 2 or x.shape[1] != features:
        raise EvaValueError(f"{op}: x must be (N, {features}), got {tuple(x.shape)}")
    check_tokens(op, x, rows)
    for name, (tensor, shape) in state.items():
        dtype = torch.float64 if name in ("shift", "square") else like.dtype
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise EvaValueError(
                f"{op}: {name} must be {shape} of {dtype}, "
                f"got {tuple(tensor.shape)} of {tensor.dtype}"
            )
        if tensor.device != x.device:
            raise EvaValueError(f"{op}: x is on {x.device}, {name} on {tensor.device}")


def define_operator(
    name: str,
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any] = lambda *given: None,
) -> Callable[..., Any]:
    """Return a lightweight operator, for calls that are frequent in a step or take many tensors.

    A ``torch.library.custom_op`` spends 40 microseconds per call (more with lists of tensors) on
    gradients and version counters, which are not needed here. Fake tensors, compilers and profilers
    see this operator like any other.

    Args:
        name: within ``torch.ops.eva_kernels``.
        schema: arguments and results, ``(Tensor x, Tensor(a!) out) -> ()``; ``!`` marks outputs.
        run: its implementation on every device.
        fake: its implementation on fake tensors; the default is for operators without results.
    """
    qualified_name = f"eva_kernels::{name}"
    torch.library.define(qualified_name, schema)
    torch.library.impl(qualified_name, ("cpu", "cuda"), run)
    torch.library.register_fake(qualified_name, fake)
    operator: Callable[..., Any] = getattr(torch.ops.eva_kernels, name).default
    return operator


def is_observed(x: Tensor) -> bool:
    """Tell whether operators are traced, intercepted or profiled, or x is of a subclass."""
    return (
        torch.compiler.is_compiling()  # first: a compiler cannot trace the rest
        or type(x) is not Tensor
        or torch._C._len_torch_dispatch_stack() > 0
        or _functions_are_observed()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.profiler._is_profiler_enabled
    )


def _functions_are_observed() -> bool:
    # a default device is a mode, too, but only affects the creation of tensors
    count = torch._C._len_torch_function_stack()
    modes = map(torch._C._get_function_stack_at, range(count))
    return count > 0 and any(type(mode) is not DeviceContext for mode in modes)


def with_contiguous_columns(x: Tensor) -> Tensor:
    """Return x, or a copy whose features are contiguous in memory."""
    return x if x.stride(1) == 1 else x.contiguous()


def check_contiguous(op: str, **state: Tensor) -> None:
    """Raise EvaValueError if a tensor that a kernel writes to is not contiguous."""
    for name, tensor in state.items():
        if not tensor.is_contiguous():
            raise EvaValueError(f"{op}: {name} must be contiguous, strides are {tensor.stride()}")
