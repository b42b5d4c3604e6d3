"""CUDA tensors without a GPU: shapes, devices and live bytes as on a GPU, but no values.

Transfers from and to the device are simulated where the engine makes them: ``_host.read`` and
``_host.upload``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.fake_cuda import enable
from eva_kernels.streaming import _basis, _host

__all__ = ["DEVICE", "compiler_missing", "fake_cuda"]

DEVICE = torch.device("cuda", 0)
Answer = Callable[[Tensor], np.ndarray]


def compiler_missing() -> bool:
    """Return whether the device guard would have to be compiled, and cannot be."""
    return torch.version.cuda is None and torch.version.hip is None and not shutil.which("g++")


def _zeros(tensor: Tensor) -> np.ndarray:
    return np.zeros(tensor.shape)


@contextmanager
def fake_cuda(answer: Answer = _zeros) -> Iterator[list[int]]:
    """Make tensors within the block fake; those on ``DEVICE`` behave as on a GPU.

    Args:
        answer: returns what the host reads of a tensor. Zeros mean finite sums, rank 0 and
            components that have not converged.

    Yields:
        A list to which each read appends how many numbers it copied to the host.
    """
    enable()
    reads: list[int] = []

    def read(tensors: Sequence[Tensor]) -> list[np.ndarray]:
        if tensors:
            reads.append(sum(t.numel() for t in tensors))
        return [answer(tensor) for tensor in tensors]

    def upload(host: Tensor, device: torch.device) -> Tensor:
        return host.to(device)  # pinned memory needs a driver

    # Fake tensors must neither use a cached real basis nor stay in the cache.
    _basis.random_basis.cache_clear()
    try:
        with (
            mock.patch.object(_host, "read", read),
            mock.patch.object(_host, "upload", upload),
            FakeTensorMode(allow_non_fake_inputs=True),
            torch.no_grad(),
        ):
            yield reads
    finally:
        _basis.random_basis.cache_clear()
