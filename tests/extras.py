"""Imports of packages of the extra ``test``, skipping the test where they are missing."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest

# Set by `make test`, which installs the whole extra: there a missing package is an error.
ALL_INSTALLED = "EVA_TESTS_HAVE_ALL_EXTRAS"


def needs(name: str, package: str = "") -> Any:
    """Import a module; if it is not installed, skip the calling test, or fail in `make test`.

    Args:
        name: of the module.
        package: that provides it, if named differently.
    """
    if os.environ.get(ALL_INSTALLED):
        return importlib.import_module(name)
    reason = f"{package or name} is not installed; the extra 'test' brings it"
    return pytest.importorskip(name, reason=reason)


def needs_of(method: str) -> None:
    """Import packages that a PEFT method of the benchmarks needs, but PEFT does not depend on."""
    if method.startswith("corda"):
        needs("attr", "attrs")
