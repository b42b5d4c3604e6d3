"""Count operations that would make the host wait for a device, without a device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eva_kernels.streaming import _host

# Operators that wait for a CUDA device to finish its queue: numbers for Python, data-dependent
# sizes, and factorisations that check their status.
WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "nonzero_numpy",
    "masked_select",
    "equal",
    "is_nonzero",
    "_unique2",
    "unique_dim",
    "_linalg_eigh",
    "_linalg_svd",
    "linalg_eigvals",
    "linalg_inv_ex",
    "linalg_cholesky",
    "_linalg_check_errors",
)


class HostReads(TorchDispatchMode):
    """Count operators, and those among them that would wait.

    Attributes:
        calls: how often each operator ran.
        waits: the same for those that wait; ``read`` counts calls of ``_host.read``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.open = 0  # number of running calls of ``_host.read``

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if not self.open:
            self.calls[name] += 1
            if name in WAITING or (name in ("index", "index_put_") and _by_mask(args)):
                self.waits[name] += 1
        return func(*args, **(kwargs or {}))


def _by_mask(args: Any) -> bool:
    return any(i is not None and i.dtype == torch.bool for i in args[1])


@contextmanager
def counted(monkeypatch: Any) -> Iterator[HostReads]:
    """Count within the block; each call of ``_host.read`` counts as one wait."""
    read, mode = _host.read, HostReads()

    def through(tensors: Any) -> Any:
        mode.waits["read"] += bool(tensors)
        mode.open += 1
        try:
            return read(tensors)
        finally:
            mode.open -= 1

    with monkeypatch.context() as patch, mode:
        patch.setattr(_host, "read", through)
        yield mode
