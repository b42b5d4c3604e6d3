"""The backends of operations with native code for every device, and the lack of it."""

from collections.abc import Iterator

import pytest
import torch

from eva_kernels import _native


@pytest.fixture(params=["native", "torch"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    if request.param == "native" and (reason := _native.unavailable_reason(device.type)):
        # tests/packaging builds the C++ module, so a broken build fails there.
        pytest.skip(reason)
    return request.param


@pytest.fixture
def no_cached_modules() -> Iterator[None]:
    """Clear the caches of loaded modules before and after the test."""
    kept = _native._module_or_reason, _native.load_or_none
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()


@pytest.fixture
def without_modules(no_cached_modules: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no compiled module be found."""
    monkeypatch.setattr(_native, "MODULES", {"cpu": "eva_kernels._absent"})
