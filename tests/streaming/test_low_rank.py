"""Tokens of lower rank than the sketch: rows that they do not reach add no variance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eva_kernels import IncrementalPCA


def tokens_of_rank(rank: int, features: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(rank, features, generator=generator)
    return torch.randn(count, rank, generator=generator) @ rows


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_variances_are_not_overestimated(
    dtype: torch.dtype, seed: int, repeated: bool, device: torch.device
) -> None:
    x = tokens_of_rank(5 + seed, 64, 128, seed).to(dtype)
    if repeated:
        x = x[torch.randint(6, (128,), generator=torch.Generator().manual_seed(seed))]
    found = IncrementalPCA(12, method="sketch", backend="triton").partial_fit(x.to(device))
    centred = x.double() - x.double().mean(0)
    exact = torch.linalg.svdvals(centred).square()[:12]
    squares = found.singular_values_.double().cpu().square()
    assert ((squares - exact) / exact.sum()).max() < 5e-5
    if not repeated:  # rounding to 16 bits makes it full rank, with little variance
        assert float(found.explained_variance_ratio_.sum()) == pytest.approx(1, abs=1e-4)


def test_rounding_of_an_outlier_feature_costs_no_other_component(device: torch.device) -> None:
    """Sums of 8 bits make the feature's own eigenvalue exceed the trace."""
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    x *= torch.logspace(0, -2, 64)
    x[:, 7] *= 1e5 / x[:, 7].std()
    found = IncrementalPCA(8, method="sketch", backend="triton", precision="fast")
    for step in x.split(64):
        found.partial_fit(step.to(device))
    exact = torch.linalg.svdvals(x.double() - x.double().mean(0))[:8]
    torch.testing.assert_close(found.singular_values_.double().cpu(), exact, rtol=0.05, atol=0)
