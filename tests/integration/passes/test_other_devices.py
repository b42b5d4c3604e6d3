"""Passes on accelerators without our kernels agree with the CPU and with an exact PCA."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import eva_kernels
from fake_cuda import compiler_missing
from integration.conftest import (
    QUIET,
    angle,
    layer_inputs,
    lora,
    lora_layers,
    lost,
    make_llama,
    text_batches,
    wrapped,
)
from stand_in import APPLE, INTEL, stand_in

pytestmark = pytest.mark.skipif(compiler_missing(), reason="needs g++ for a device guard")
# Fused attention of the CPU would be called for tensors of the stand-in device.
EAGER = {"attn_implementation": "eager"}


@pytest.fixture(params=[APPLE, INTEL], ids=["apple", "intel"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    with stand_in(request.param):
        yield request.param


@pytest.mark.parametrize("already_wrapped", [False, True])
@pytest.mark.parametrize("method", ["sketch", "gram"])
def test_pass_writes_exact_adapters_on_the_device(
    device: torch.device, method: str, already_wrapped: bool
) -> None:
    batches, options = text_batches(), {**QUIET, "method": method, "max_steps": 6}
    model, config = make_llama(**EAGER).to(device), lora(tau=1.0)
    if already_wrapped:
        model = wrapped(model, config)
    done = eva_kernels.initialize(model, batches, None if already_wrapped else config, **options)
    layers = lora_layers(done)
    inputs = layer_inputs(make_llama(**EAGER), batches, list(layers))
    limit = 0.02 if method == "sketch" else 1e-4
    for name, layer in layers.items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert a.device == b.device == device
        assert a.shape[0] == b.shape[1] == done.eva_result.ranks[name]
        assert not b.detach().cpu().any()
        assert lost(a.detach().cpu(), inputs[name]) <= limit
    assert sum(done.eva_result.ranks.values()) == 14 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_equals_that_of_the_cpu(device: torch.device, dtype: torch.dtype) -> None:
    models = [make_llama(dtype, **EAGER) for _ in range(2)]
    expected = eva_kernels.calibrate(models[0], text_batches(), lora(), **QUIET)
    found = eva_kernels.calibrate(models[1].to(device), text_batches(), lora(), **QUIET)
    assert found.ranks == expected.ranks
    for name, rows in expected.state_dict().items():
        assert angle(found.state_dict()[name], rows) <= 1e-3
        assert device == INTEL or torch.equal(found.state_dict()[name], rows)


def test_pass_resumes_from_a_checkpoint(device: torch.device, tmp_path: Path) -> None:
    batches, options = text_batches(), {**QUIET}
    model = make_llama(**EAGER).to(device)
    expected = eva_kernels.calibrate(model, batches, lora(), **options)
    options |= {"checkpoint": tmp_path / "pass.safetensors", "checkpoint_every": 1}

    def broken() -> Iterator[dict[str, Tensor]]:
        yield from batches[:3]
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        eva_kernels.calibrate(model, broken(), lora(), **options)
    found = eva_kernels.calibrate(model, batches, lora(), **options)
    assert all(
        torch.equal(found.state_dict()[n], rows) for n, rows in expected.state_dict().items()
    )


def test_result_is_applied_on_the_device(device: torch.device, tmp_path: Path) -> None:
    batch = {name: tensor.to(device) for name, tensor in text_batches(1)[0].items()}
    result = eva_kernels.calibrate(make_llama(**EAGER), text_batches(), lora(), **QUIET)
    result.save(tmp_path / "eva.safetensors")
    bases = [make_llama(**EAGER).to(device) for _ in range(2)]
    expected = bases[0](**batch, use_cache=False).logits.detach().cpu()
    done = eva_kernels.EvaResult.load(tmp_path / "eva.safetensors").apply(bases[1])
    assert torch.equal(done(**batch, use_cache=False).logits.detach().cpu(), expected)
    for name, layer in lora_layers(done).items():
        a = layer.lora_A["default"].weight
        assert a.device == device
        assert torch.equal(a.detach().cpu(), result.state_dict()[name])


def test_non_finite_tokens_are_reported(device: torch.device) -> None:
    batches = text_batches()
    model = make_llama(**EAGER)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    with pytest.raises(eva_kernels.EvaError, match=r"q_proj.*NaN"):
        eva_kernels.calibrate(model.to(device), batches, lora(), **QUIET)


def test_estimator_equals_that_of_the_cpu(device: torch.device) -> None:
    torch.manual_seed(3)
    x = torch.randn(200, 24) @ torch.randn(24, 24)
    kept = torch.rand(200) < 0.7
    here = eva_kernels.IncrementalPCA(4).partial_fit(x, mask=kept).partial_fit(x)
    found = eva_kernels.IncrementalPCA(4)
    found.partial_fit(x.to(device), mask=kept.to(device)).partial_fit(x.to(device))
    assert found.components_.device == (INTEL if device == INTEL else torch.device("cpu"))
    projected = found.transform(x.to(device))
    for one, other in (
        (found.components_, here.components_),
        (found.var_, here.var_),
        (projected, here.transform(x)),
    ):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-4)
    whole = eva_kernels.IncrementalPCA(4).fit(torch.arange(48).reshape(12, 4).to(device))
    assert whole.components_.dtype == torch.float64
