"""The backends of operations with native code for every device."""

import pytest
import torch

from eva_kernels import _native


@pytest.fixture(params=["native", "torch"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    if request.param == "native" and (reason := _native.unavailable_reason(device.type)):
        # tests/packaging builds the C++ module, so a broken build fails there.
        pytest.skip(reason)
    return request.param
