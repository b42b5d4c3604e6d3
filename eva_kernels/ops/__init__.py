"""One function per operation: check the arguments, choose the backend, launch."""

from __future__ import annotations

import torch

from .. import _native
from ..reference import token_norms
from ._dispatch import (
    BACKENDS,
    PRECISIONS,
    check_precision,
    check_tokens,
    triton_unavailable,
)
from .convergence import convergence
from .eigh import eigh
from .fold import FoldLayers, fold_layers, fold_measure, fold_prepare, fold_rows
from .gram import gram, gram_workspace_bytes
from .nystrom import nystrom
from .sketch import SketchInto, device_arch, sketch, sketch_unchecked, sketch_workspace_bytes
from .start import start

__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "FoldLayers",
    "SketchInto",
    "backend_report",
    "check_precision",
    "check_tokens",
    "convergence",
    "eigh",
    "fold_layers",
    "fold_measure",
    "fold_prepare",
    "fold_rows",
    "gram",
    "gram_workspace_bytes",
    "nystrom",
    "sketch",
    "sketch_unchecked",
    "sketch_workspace_bytes",
    "start",
    "token_norms",
]


def backend_report() -> list[tuple[str, str, str]]:
    """Return ``(op, backend, reason)`` for every op on this machine's default device."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for op in ("sketch", "gram"):
        reason = triton_unavailable(kind) if kind == "cuda" else "tensors are on the CPU"
        reason_or_arch = reason or f"launch parameters of {_arch_name()}"
        rows.append((op, "torch" if reason else "triton", reason_or_arch))
    reason = _native.unavailable_reason(kind)
    rows.append(("convergence", "torch" if reason else "native", reason or _native.MODULES[kind]))
    if kind == "cpu":
        reason = "LAPACK and BLAS are faster than the compiled twins on the CPU"
    for op in ("eigh", "fold"):
        rows.append((op, "torch" if reason else "native", reason or _native.MODULES[kind]))
    return rows


def _arch_name() -> str:
    return str(device_arch(torch.device("cuda")).name)
