"""Keep the engine's arithmetic as it is written."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_DEVICES = {"cpu", "cuda", "xpu", "mps"}


def without_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function compute in the dtypes of its tensors, whatever autocast is on around it."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch._C._is_any_autocast_enabled():
            return function(*args, **kwargs)
        casting = [kind for kind in _DEVICES | _own() if torch.is_autocast_enabled(kind)]
        with ExitStack() as stack:
            for kind in casting:
                stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return run


def _own() -> set[str]:
    """Return the type of this machine's accelerator, which may be none that torch knows itself."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return set() if found is None else {found.type}
