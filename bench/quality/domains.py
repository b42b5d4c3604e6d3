"""The domains by name."""

from __future__ import annotations

import functools
from collections.abc import Callable

from . import decisions, images, language, pretrained, understanding
from .domain import Domain, Recipe

_MODULES = {
    "language": language,
    "understanding": understanding,
    "images": images,
    "decisions": decisions,
    "pretrained": pretrained,
}
# Takes minutes on a GPU, and is meaningless on a CPU: run only on request.
ON_REQUEST = ("pretrained",)
RECIPES: dict[str, Recipe] = {name: module.RECIPE for name, module in _MODULES.items()}
_BUILD: dict[str, Callable[[str], Domain]] = {
    name: module.build for name, module in _MODULES.items()
}


@functools.cache
def domain(name: str, data: str = "embedded") -> Domain:
    """Return a domain, built once per process."""
    return _BUILD[name](data)
