"""Fixtures of the streams."""

from __future__ import annotations

import pytest

from eva_kernels.streaming import _host


@pytest.fixture
def accelerator_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the CPU as a device from which reading values is slow."""
    monkeypatch.setattr(_host, "reads_are_free", lambda device: False)
