"""Base models whose weights accelerate keeps on the CPU or on disk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import PeftModel
from torch import nn

import eva_kernels
from integration.conftest import (
    QUIET,
    lora,
    lora_layers,
    make_llama,
    output_of,
    perturb_b,
    text_batches,
    wrapped,
)


def offloaded(kind: str, folder: Any) -> nn.Module:
    cpu = torch.device("cpu")
    if kind == "cpu":
        return cpu_offload(make_llama(), execution_device=cpu)
    return disk_offload(make_llama(), folder / "weights", execution_device=cpu)


@pytest.mark.filterwarnings("ignore:EVA reads the inputs of linear layers:eva_kernels.EvaWarning")
@pytest.mark.parametrize("kind", ["cpu", "disk"])
@pytest.mark.parametrize("way", ["base", "adapters", "embedding"])
def test_adapters_of_offloaded_layers_are_on_the_execution_device(
    kind: str, way: str, tmp_path: Any
) -> None:
    texts = text_batches(4)
    targets: Any = "all-linear" if way != "embedding" else ["q_proj", "down_proj", "embed_tokens"]
    base = offloaded(kind, tmp_path)
    assert next(base.parameters()).is_meta
    before = output_of(base, texts[0])
    if way == "base":
        model = eva_kernels.initialize(base, texts, lora(target_modules=targets), **QUIET)
    else:
        adapted = wrapped(base, lora(target_modules=targets))
        model = eva_kernels.initialize(adapted, texts, **QUIET)
    assert not any(p.is_meta for n, p in model.named_parameters() if "lora_" in n)
    assert eva_kernels.is_initialized(model)
    torch.testing.assert_close(output_of(model, texts[0]), before)
    result = model.eva_result
    for name, layer in lora_layers(model).items():
        rows = result.state_dict()[name]
        torch.testing.assert_close(layer.lora_A["default"].weight.detach(), rows)
    perturb_b(model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again = PeftModel.from_pretrained(make_llama(), tmp_path / "adapter").eval()
    torch.testing.assert_close(output_of(again, texts[0]), output_of(model, texts[0]))
