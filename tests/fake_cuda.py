"""CUDA tensors without a GPU: shapes, devices and live bytes are those of a GPU, numbers are none.

A CPU-only build of torch cannot index or fill a fake CUDA tensor, for want of a device guard; one
that does nothing is compiled and registered here. What leaves or enters the device is simulated at
the two doors of the engine, ``_host.read`` and ``_host.upload``.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from eva_kernels.streaming import _basis, _host

__all__ = ["DEVICE", "compiler_missing", "fake_cuda"]

DEVICE = torch.device("cuda", 0)
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new Guard());
"""

Answer = Callable[[Tensor], np.ndarray]


def compiler_missing() -> bool:
    """Tell whether the guard would have to be compiled, and cannot be."""
    return torch.version.cuda is None and torch.version.hip is None and not shutil.which("g++")


@functools.cache
def _register_guard() -> None:
    if torch.version.cuda or torch.version.hip:
        return  # such a build has a guard, and the fake mode makes it do nothing
    root = Path(torch.__file__).parent
    library = Path(tempfile.gettempdir()) / f"noop_guard_{torch.__version__}_{os.getuid()}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory() as folder:
            source, built = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
            source.write_text(GUARD)
            abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
            flags = ["-std=c++20", "-O1", "-fPIC", "-shared", abi, f"-I{root}/include"]
            link = [f"-L{root}/lib", "-lc10", "-o", str(built)]
            subprocess.run(["g++", *flags, str(source), *link], check=True)
            shutil.copy(built, f"{library}.{os.getpid()}")
        os.replace(f"{library}.{os.getpid()}", library)  # another process may do the same
    ctypes.CDLL(str(library))


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
    _register_guard()
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
