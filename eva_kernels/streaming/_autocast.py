"""Keep the engine's arithmetic as it is written."""

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
    """Let a function compute in the dtypes of its tensors, whatever autocast is on around it."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch._C._is_any_autocast_enabled():
            return function(*args, **kwargs)
        # Of this build of torch, which may know its type by a plug-in. Whether there is one takes
        # long to tell, and is of no account.
        built_for = torch.accelerator.current_accelerator()
        own = set() if built_for is None else {built_for.type}
        casting = [kind for kind in _DEVICES | own if torch.is_autocast_enabled(kind)]
        with ExitStack() as stack:
            for kind in casting:
                stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return run


def plain(x: Tensor) -> Tensor:
    """Return a tensor without the ways of its class, which all that is made of it would have.

    Those of classes that stand for tensors elsewhere, as distributed ones, are what they are.
    """
    if type(x) is Tensor or type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return x
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor)
