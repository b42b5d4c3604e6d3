"""Accelerators for which we have no kernels (Apple's and Intel's GPUs), simulated on the CPU.

Values are computed. As on real devices, it is an error to mix devices, to call our operators, which
only exist for CPU and CUDA, and on Apple's GPUs to use float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from bench.fake_cuda import enable_guard

__all__ = ["APPLE", "INTEL", "stand_in"]

APPLE, INTEL = torch.device("mps", 0), torch.device("xpu", 0)
_aten = torch.ops.aten
# operators that accept tensors on two devices
_COPIES = (_aten._to_copy.default, _aten.copy_.default)


class _There(Tensor):
    """A tensor on a simulated device; ``contents`` are on the CPU."""

    contents: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, contents: Tensor, device: torch.device) -> _There:
        if device == APPLE and contents.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"Cannot convert a MPS Tensor to {contents.dtype}")
        like = {"dtype": contents.dtype, "device": device, "requires_grad": contents.requires_grad}
        layout = {"strides": contents.stride(), "storage_offset": contents.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, contents.size(), **layout, **like)
        made.contents = contents
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{self.contents!r} on {self.device}"

    def tolist(self) -> Any:
        return self.contents.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.contents.untyped_storage()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: _There) -> None:
        Tensor.data.__set__(self, other)
        self.contents = other.contents

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    given = [t for t in tensors if isinstance(t, _There)]
    others = [t for t in tensors if not isinstance(t, _There) and t.dim()]
    if given and others and func not in _COPIES:
        raise RuntimeError(f"Expected all tensors to be on the same device: {func}")
    if given and func.namespace == "eva_kernels":
        raise NotImplementedError(f"Could not run {func} on {given[0].device}")
    device = kwargs.get("device") or (given[0].device if given else torch.device("cpu"))
    args, kwargs = tree_map(_contents, args), tree_map(_contents, kwargs)
    if kwargs.get("device") is not None:
        kwargs |= {"device": "cpu", "pin_memory": None}
    made = func(*args, **kwargs)
    if device.type == "cpu" or func is _aten._local_scalar_dense.default:
        return made
    if made is args[0] and not given:  # a copy between devices, which the CPU skips
        made = made.clone()
    known = {id(t.contents): t for t in given}  # in-place operators return their argument

    def place(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else _There(value, device)

    return tree_map(place, made)


def _contents(value: Any) -> Any:
    return value.contents if isinstance(value, _There) else value


class _Factories(TorchDispatchMode):
    """Makes tensors on a simulated device, and copies CPU tensors to it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == self._device.type:
            return _run(func, args, kwargs | {"device": self._device})
        return func(*args, **kwargs)


@contextmanager
def stand_in(device: torch.device) -> Iterator[None]:
    """Simulate a device, ``APPLE`` or ``INTEL``, within the block; needs a C++ compiler."""
    enable_guard(device.type)
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    lifted = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor then copies from the CPU to a device
    state = torch.zeros(16, dtype=torch.uint8)
    module = torch.get_device_module(device)
    known = {"get_rng_state": lambda device: state, "set_rng_state": lambda state, device: None}
    if device == INTEL:
        known["_lazy_init"] = lambda: None
    try:
        with mock.patch.multiple(module, **known), _Factories(device):
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)
        torch.__future__.set_overwrite_module_params_on_conversion(before)
