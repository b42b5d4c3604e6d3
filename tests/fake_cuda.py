"""CUDA tensors without a GPU: shapes, devices and live bytes are those of a GPU, numbers are none.

What leaves or enters the device is simulated at the two doors of the engine, ``_host.read``
and ``_host.upload``.
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
    """Tell whether the guard would have to be compiled, and cannot be."""
    return torch.version.cuda is None and torch.version.hip is None and not shutil.which("g++")


def _zeros(tensor: Tensor) -> np.ndarray:
    return np.zeros(tensor.shape)


@contextmanager
def fake_cuda(answer: Answer = _zeros) -> Iterator[list[int]]:
    """Make tensors within the block fake; those on ``DEVICE`` behave as on a GPU.

    Args:
        answer: what the host reads of a tensor. Zeros mean finite sums, rank 0 and components
            that have not converged.

    Yields:
        A list that grows by one entry a read: how many numbers it brought to the host.
    """
    enable()
    reads: list[int] = []

    def read(tensors: Sequence[Tensor]) -> list[np.ndarray]:
        if tensors:
            reads.append(sum(t.numel() for t in tensors))
        return [answer(tensor) for tensor in tensors]

    def upload(host: Tensor, device: torch.device) -> Tensor:
        return host.to(device)  # pinned memory needs a driver

    _basis.random_basis.cache_clear()  # what is kept must not be fake, and must not become so
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
