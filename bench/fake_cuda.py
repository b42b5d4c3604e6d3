"""Fake tensors on a simulated GPU: the shapes and the memory of a run, without the numbers.

``FakeTensorMode`` runs a program on tensors without contents, and :class:`LiveMemory` counts the
bytes that would be allocated. Both are blind to what has no tensor: see ``simulated_memory``.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

# The allocator of CUDA hands out multiples of this many bytes.
ALLOCATION_GRANULE = 512
# The name must not contain "flash": transformers would look for a package of that kernel.
ATTENTION = "simulated_fused_attention"

_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::DeviceGuardImplRegistrar registrar(
    c10::DeviceType::KIND, new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::KIND>());
"""


@functools.cache
def enable() -> None:
    """Make fake CUDA tensors and fused attention usable in this process; needs a C++ compiler."""
    AttentionInterface.register(ATTENTION, _attention)
    if not (torch.version.cuda or torch.version.hip):  # has one, which FakeTensorMode replaces
        enable_guard("cuda")


@functools.cache
def enable_guard(kind: str) -> None:
    """Register a device guard that does nothing; it is compiled.

    A build of torch has none for the devices that it cannot drive, and every operator on a tensor
    that is said to be on one asks for it.

    Args:
        kind: a type of device for which this torch was not built.
    """
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(_GUARD.replace("KIND", kind.upper()))
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        compiler = [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-fPIC", "-shared", abi]
        paths = [f"-I{root}/include", str(source), f"-L{root}/lib", "-lc10"]
        subprocess.run([*compiler, *paths, "-o", str(library)], check=True)
        ctypes.CDLL(str(library))


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    # Without a device torch would choose the attention that stores all scores. The fake
    # implementation of this operator allocates what the fused CUDA kernel does, whatever the
    # arguments for windows and score caps.
    outputs = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, True, False, scale=scaling
    )
    return outputs[0].transpose(1, 2).contiguous(), None


def apply_to_module(
    module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True
) -> nn.Module:
    """Do what ``nn.Module._apply`` does, which cannot swap the contents of fake tensors."""
    for child in module.children() if recurse else ():
        apply_to_module(child, convert)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                converted = convert(parameter)
            module._parameters[name] = nn.Parameter(converted, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else convert(buffer)
    return module


class LiveMemory(TorchDispatchMode):
    """Count the bytes of all live CUDA storages, as ``torch.cuda.memory_allocated`` would.

    Attributes:
        live: bytes at present.
        peak: most bytes since :meth:`reset_peak`.
        where: what was running when ``peak`` was reached, outermost first.
        peak_of: most bytes while something of a name was running, since :meth:`reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.where: tuple[str, ...] = ()
        self.peak_of: dict[str, int] = {}
        self._running: list[str] = []
        self._live_storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type == "cuda":
                self._count_storage(leaf.untyped_storage())
        return out

    def reset_peak(self) -> None:
        """Look for a new peak from here on."""
        self.peak, self.where, self.peak_of = self.live, tuple(self._running), {}

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Name what runs in a block."""
        self._running.append(name)
        try:
            yield
        finally:
            self._running.pop()

    def track_modules(self, model: nn.Module) -> None:
        """Name the modules of a model while they run."""

        def enter(name: str, *ignored: Any) -> None:
            self._running.append(name)

        def leave(*ignored: Any) -> None:
            self._running.pop()

        for name, module in model.named_modules():
            name = name or type(model).__name__
            module.register_forward_pre_hook(functools.partial(enter, name))
            # a hook of the pass may end the forward by an exception
            module.register_forward_hook(leave, always_call=True)

    def _count_storage(self, storage: torch.UntypedStorage) -> None:
        # A storage has one Python object for life, whose end is that of the memory.
        key = id(storage)
        if key in self._live_storages:
            return
        size = -(-storage.nbytes() // ALLOCATION_GRANULE) * ALLOCATION_GRANULE
        self._live_storages[key] = weakref.ref(storage, lambda _: self._release(key, size))
        self.live += size
        for name in self._running:
            self.peak_of[name] = max(self.live, self.peak_of.get(name, 0))
        if self.live > self.peak:
            self.peak, self.where = self.live, tuple(self._running)

    def _release(self, key: int, size: int) -> None:
        del self._live_storages[key]
        self.live -= size
