"""Search for parts of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

__all__ = ["outermost_modules"]


def outermost_modules(
    model: nn.Module, predicate: Callable[[nn.Module], bool], name: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of wanted parts, maybe the model itself, but none inside another."""
    if predicate(model):
        yield name, model
        return
    for child, part in model.named_children():
        yield from outermost_modules(part, predicate, f"{name}.{child}" if name else child)
