"""A device without float64, as Apple's GPUs, that is not there: the CPU plays it.

Numbers are real. What a real one refuses is refused: float64, and tensors of two devices.
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

__all__ = ["NARROW", "narrow_device"]

NARROW = torch.device("mps", 0)
_aten = torch.ops.aten
# what takes tensors of two devices
_COPIES = (_aten._to_copy.default, _aten.copy_.default)


class _Narrow(Tensor):
    """A tensor on ``NARROW``; ``contents`` are on the CPU, in memory of its own."""

    contents: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, contents: Tensor) -> _Narrow:
        if contents.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"Cannot convert a MPS Tensor to {contents.dtype}")
        like = {"dtype": contents.dtype, "device": NARROW, "requires_grad": contents.requires_grad}
        layout = {"strides": contents.stride(), "storage_offset": contents.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, contents.size(), **layout, **like)
        made.contents = contents
        return made

    def tolist(self) -> Any:
        return self.contents.tolist()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: _Narrow) -> None:
        Tensor.data.__set__(self, other)
        self.contents = other.contents

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    given = [t for t in tensors if isinstance(t, _Narrow)]
    others = [t for t in tensors if not isinstance(t, _Narrow) and t.dim()]
    if given and others and func not in _COPIES:
        raise RuntimeError(f"Expected all tensors to be on the same device: {func}")
    device = kwargs.get("device")
    narrow = bool(given) if device is None else torch.device(device) == NARROW
    args, kwargs = tree_map(_contents, args), tree_map(_contents, kwargs)
    if device is not None:
        kwargs |= {"device": "cpu", "pin_memory": None}
    made = func(*args, **kwargs)
    if not narrow or func is _aten._local_scalar_dense.default:
        return made
    if made is args[0] and not given:  # a copy that the CPU does not make
        made = made.clone()
    known = {id(t.contents): t for t in given}  # what was written to is returned itself
    return tree_map(lambda value: _on_device(value, known), made)


def _on_device(value: Any, known: dict[int, _Narrow]) -> Any:
    if not isinstance(value, Tensor):
        return value
    return known[id(value)] if id(value) in known else _Narrow(value)


def _contents(value: Any) -> Any:
    return value.contents if isinstance(value, _Narrow) else value


class _Factories(TorchDispatchMode):
    """Makes tensors on ``NARROW``, and copies of others there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == NARROW.type:
            return _run(func, args, kwargs | {"device": NARROW})
        return func(*args, **kwargs)


@contextmanager
def narrow_device() -> Iterator[None]:
    """Let ``NARROW`` exist within the block; needs a C++ compiler."""
    enable_guard(NARROW.type)
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    state = torch.zeros(16, dtype=torch.uint8)
    known = {"get_rng_state": lambda device: state, "set_rng_state": lambda state, device: None}
    try:
        with mock.patch.multiple(torch.mps, **known), _Factories():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
