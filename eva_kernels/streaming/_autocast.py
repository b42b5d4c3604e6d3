"""Keep autocast and tensor subclasses out of the engine's arithmetic."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

_DEVICES = {"cpu", "cuda", "xpu", "mps"}


def without_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """Make a function compute in the dtypes of its tensors, even under the caller's autocast."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch._C._is_any_autocast_enabled():
            return function(*args, **kwargs)
        kinds = _DEVICES | _accelerator_kinds()
        active_kinds = [kind for kind in kinds if torch.is_autocast_enabled(kind)]
        with ExitStack() as stack:
            for kind in active_kinds:
                stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return run


def _accelerator_kinds() -> set[str]:
    """Return the accelerator type of this torch build or of a plug-in, if it has one."""
    try:
        # checking that a device is present would be slow, and does not matter here
        accelerator = torch.accelerator.current_accelerator()
    except RuntimeError:  # of torch 2.6, where there is none
        return set()
    return set() if accelerator is None else {accelerator.type}


def without_subclass(x: Tensor) -> Tensor:
    """Return a tensor without its subclass, which results of operators would inherit.

    Subclasses with ``__torch_dispatch__``, such as distributed tensors, stay what they are.
    """
    if type(x) is Tensor or type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return x
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor)
