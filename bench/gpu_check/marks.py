"""A pytest plugin: the report names the tests that are marked ``gpu``."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Add a property to every test with the mark."""
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.user_properties.append(("gpu", "yes"))
