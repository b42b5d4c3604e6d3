"""One function an operation: check the arguments, choose the backend, launch."""

from __future__ import annotations

import torch

from .. import _native
from ._dispatch import BACKENDS, PRECISIONS, choose_backend, triton_unavailable
from .convergence import convergence
from .gram import gram
from .sketch import sketch

__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "backend_report",
    "choose_backend",
    "convergence",
    "gram",
    "sketch",
]


def backend_report() -> list[tuple[str, str, str]]:
    """Return ``(op, backend, reason)`` for every op on this machine's default device."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for op in ("sketch", "gram"):
        why = triton_unavailable(kind)
        rows.append((op, "torch" if why else "triton", why or f"Triton runs on {kind}"))
    why = _native.unavailable(kind)
    rows.append(("convergence", "torch" if why else "native", why or _native.MODULES[kind]))
    return rows
