"""Packages of the extra ``test`` that a machine with a torch of its own may lack."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest

# Set by `make test`, which installs the whole extra: a test that is skipped there tests nothing.
ALL_INSTALLED = "EVA_TESTS_HAVE_ALL_EXTRAS"


def needs(name: str, package: str = "") -> Any:
    """Import a module; where it is not installed, skip what asks for it, or fail `make test`.

    Args:
        name: of the module.
        package: that has it, if of another name.
    """
    if os.environ.get(ALL_INSTALLED):
        return importlib.import_module(name)
    reason = f"{package or name} is not installed; the extra 'test' brings it"
    return pytest.importorskip(name, reason=reason)


def needs_of(method: str) -> None:
    """Import what a method of the benchmarks needs, and PEFT, which has it, does not depend on."""
    if method.startswith("corda"):
        needs("attr", "attrs")
