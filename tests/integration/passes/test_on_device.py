"""A whole pass on the device of the model, a GPU if there is one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import eva_kernels
from integration.conftest import (
    QUIET,
    hooks_of,
    layer_inputs,
    lora,
    lora_layers,
    lost,
    make_llama,
    output_of,
    text_batches,
)


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["sketch", "gram"])
def test_pass_writes_exact_adapters_on_the_device(
    method: str, dtype: torch.dtype, device: torch.device, tmp_path: Path
) -> None:
    model, batches = make_llama(dtype).to(device), text_batches()
    device_batches = [to_device(batch, device) for batch in batches]
    before = output_of(model, device_batches[0])
    options = {**QUIET, "method": method, "max_steps": len(batches)}
    done = eva_kernels.initialize(model, batches, lora(tau=1.0), **options)
    assert torch.equal(output_of(done, device_batches[0]), before)
    assert hooks_of(done) == 0
    result, layers = done.eva_result, lora_layers(done)
    assert set(result.method.values()) == {method}
    assert sum(result.ranks.values()) == 14 * 4
    inputs = layer_inputs(make_llama(dtype).to(device), device_batches, list(layers))
    limit = 0.02 if method == "sketch" else 1e-4
    for name, layer in layers.items():
        a = layer.lora_A["default"].weight
        assert a.device == layer.lora_B["default"].weight.device == device
        assert lost(a.detach().cpu(), inputs[name].cpu()) <= limit
    result.save(tmp_path / "eva.safetensors")
    loaded = eva_kernels.EvaResult.load(tmp_path / "eva.safetensors")
    again = lora_layers(loaded.apply(make_llama(dtype).to(device)))
    for name, layer in layers.items():
        weights = (one.lora_A["default"].weight for one in (layer, again[name]))
        assert torch.equal(*weights)


def test_loader_may_refill_its_tensors(device: torch.device) -> None:
    texts = text_batches(padded=False)

    def refilling() -> Iterator[dict[str, Tensor]]:
        batch = {name: torch.empty_like(tensor) for name, tensor in texts[0].items()}
        if device.type == "cuda":
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        for text in texts:
            for name, tensor in text.items():
                batch[name].copy_(tensor)
            yield batch

    found, expected = (
        eva_kernels.calibrate(make_llama().to(device), data, lora(tau=1.0), **QUIET, max_steps=6)
        for data in (refilling(), iter(texts))
    )
    for name, rows in expected.components.items():
        assert torch.equal(found.components[name], rows)


def test_two_passes_are_bitwise_equal(device: torch.device) -> None:
    found = [
        eva_kernels.calibrate(make_llama().to(device), text_batches(), lora(), **QUIET)
        for _ in range(2)
    ]
    states = [result.state_dict() for result in found]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
