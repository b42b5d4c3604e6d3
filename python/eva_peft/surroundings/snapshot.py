"""Restore a model: modules, parameters, hooks, flags and attributes, but not tensor values."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from .interrupts import temporarily, undone_on_failure

__all__ = [
    "ModelSnapshot",
    "remove_hook",
    "requires_grad_restorer",
    "restored",
    "restored_on_failure",
]

# Exactly these types: subclasses may have internal state that refilling would break.
_CONTAINERS = (dict, OrderedDict, list, set)


class ModelSnapshot:
    """The structure of a model, by reference: no tensor is copied.

    Every attribute of every module and of the configs they hold, the contents of the dicts, lists
    and sets among these (children, parameters, buffers, hooks, what LoRA layers store by adapter),
    and the ``requires_grad`` flags. Values that are written in place are not restored.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        owners: dict[int, Any] = {id(m): m for m in modules}
        for module in modules:
            for name in ("config", "generation_config"):
                config = vars(module).get(name)
                if hasattr(config, "__dict__"):
                    owners[id(config)] = config
        self._containers: list[tuple[Any, Any]] = []
        for owner in owners.values():
            attributes = vars(owner)
            self._save(attributes)
            for value in attributes.values():
                if type(value) in _CONTAINERS:
                    self._save(value)
        tensors = (*model.parameters(), *model.buffers())
        self._restore_requires_grad = requires_grad_restorer(tensors)

    def _save(self, container: Any) -> None:
        self._containers.append((container, container.copy()))

    def restore(self) -> None:
        """Restore everything, in its order; may be interrupted, and run again."""
        for container, saved in self._containers:
            if isinstance(container, list):
                container[:] = saved
            else:
                container.clear()
                container.update(saved)
        self._restore_requires_grad()


def requires_grad_restorer(tensors: Iterable[Tensor]) -> Callable[[], None]:
    """Return a repeatable function that restores the present ``requires_grad`` of tensors."""
    flags = [(tensor, tensor.requires_grad) for tensor in tensors]

    def restore() -> None:
        for tensor, flag in flags:
            if tensor.requires_grad != flag:
                tensor.requires_grad_(flag)

    return restore


def restored(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context that restores the model on exit, with or without an exception."""
    return temporarily(ModelSnapshot(model).restore)


def restored_on_failure(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context that restores the model if an exception leaves it, Ctrl-C included."""
    return undone_on_failure(ModelSnapshot(model).restore)


def remove_hook(module: nn.Module, hook: Callable[..., None]) -> None:
    """Remove a forward hook or pre-hook from a module without its handle; may be run again."""
    option_tables = (module._forward_pre_hooks_with_kwargs, module._forward_hooks_always_called)
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, other in hooks.items() if other == hook]:
            for table in option_tables:
                table.pop(key, None)
            hooks.pop(key, None)
