"""Packages of the extra ``test`` that a machine with a torch of its own may lack."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest

# Set by `make test`, which installs the whole extra: a test that is skipped there tests nothing.
ALL_INSTALLED = "EVA_TESTS_HAVE_ALL_EXTRAS"


def needs(name: str) -> Any:
    """Import a package; where it is not installed, skip what asks for it, or fail `make test`."""
    if os.environ.get(ALL_INSTALLED):
        return importlib.import_module(name)
    return pytest.importorskip(name, reason=f"{name} is not installed; the extra 'test' brings it")
