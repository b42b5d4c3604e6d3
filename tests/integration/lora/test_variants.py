"""LoRA variants that restrict rows or ranks: BD-LoRA, KaSA and QA-LoRA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn

import eva_kernels
from eva_kernels import EvaRuntimeError, EvaValueError
from integration.conftest import (
    QUIET,
    layer_inputs,
    lora,
    lora_layers,
    lost,
    make_llama,
    output_of,
    perturb_b,
    same_state,
    state_of,
    text_batches,
    wrapped,
)

NEEDS_BDLORA = pytest.mark.skipif(
    not hasattr(LoraConfig(), "use_bdlora"), reason="this PEFT has no BD-LoRA"
)


def bdlora_config(first: list[str], second: list[str], **fields: Any) -> LoraConfig:
    from peft.tuners.lora.config import BdLoraConfig

    blocks = BdLoraConfig(first, second, nblocks=2, match_strict=False)
    return lora(target_modules=["q_proj", "down_proj"], use_bdlora=blocks, **fields)


@NEEDS_BDLORA
@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (
            lambda: bdlora_config(["down_proj"], []),
            EvaValueError,
            "lora_A of down_proj block-diagonal",
        ),
        (lambda: bdlora_config([], ["q_proj"]), EvaRuntimeError, "lora_B of q_proj block-diagonal"),
    ],
)
def test_unsupported_bdlora_is_rejected_before_the_pass(
    config: Callable[[], LoraConfig], error: type[Exception], message: str
) -> None:
    for model, given in ((make_llama(), config()), (wrapped(make_llama(), config()), None)):
        with pytest.raises(error, match=f"use_bdlora makes {message}"):
            eva_kernels.initialize(model, iter(()), given, **QUIET)


@NEEDS_BDLORA
@pytest.mark.parametrize("meta", [False, True])
def test_bdlora_keeps_its_ranks(meta: bool, tmp_path: Path) -> None:
    config, batches = bdlora_config([], ["q_proj"], rho=1.0, tau=1.0), text_batches()
    model = wrapped(make_llama(), config, low_cpu_mem_usage=meta)
    before = output_of(make_llama(), batches[0])
    done = eva_kernels.initialize(model, batches, method="gram", max_steps=6, **QUIET)
    assert torch.equal(output_of(done, batches[0]), before)
    layers = lora_layers(done)
    inputs = layer_inputs(make_llama(), batches, list(layers))
    for name, layer in layers.items():
        kind = "BlockDiagonalLinear" if "q_proj" in name else "Linear"
        assert type(layer.lora_B["default"]).__name__ == kind
        assert lost(layer.lora_A["default"].weight.detach(), inputs[name]) <= 1e-4
    perturb_b(done)
    done.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_llama(), tmp_path)
    assert torch.equal(output_of(again, batches[0]), output_of(done, batches[0]))
    target = wrapped(make_llama(), config)
    states = state_of(target)
    with pytest.raises(EvaRuntimeError, match="use_bdlora makes lora_B of q_proj block-diagonal"):
        done.eva_result.apply(target, r=3)
    assert same_state(states, state_of(target))


@pytest.mark.skipif(not hasattr(LoraConfig(), "kasa_config"), reason="this PEFT has no KaSA")
def test_kasa_weights_are_not_truncated_again() -> None:
    from peft.tuners.lora.config import KasaConfig

    def adapted(**fields: Any) -> PeftModel:
        return wrapped(make_llama(), lora(**fields, **kasa))

    kasa: dict[str, Any] = {"kasa_config": KasaConfig()}
    kept, changing, plain = adapted(rho=1.0), adapted(), make_llama()
    result = eva_kernels.calibrate(changing, text_batches(2), max_steps=2, **QUIET)
    assert result.ranks != result.base_ranks
    eva_kernels.initialize(kept, text_batches(2), max_steps=2, **QUIET)
    before = [state_of(model) for model in (changing, kept, plain)]
    calls: list[Callable[[], Any]] = [
        lambda: eva_kernels.initialize(changing, text_batches(2), max_steps=2, **QUIET),
        lambda: eva_kernels.initialize_lora_eva_weights(changing, text_batches(2)),
        lambda: result.apply(kept),
        lambda: result.apply(plain),
    ]
    for call in calls:
        with pytest.raises(EvaRuntimeError, match="kasa_config: PEFT removes as many components"):
            call()
    assert all(map(same_state, before, map(state_of, (changing, kept, plain))))
    assert result.apply(plain, rho=1.0).eva_result.ranks == result.base_ranks
    fresh = adapted()
    for name, weight in kept.named_parameters():
        assert "base_layer" not in name or torch.equal(weight, fresh.get_parameter(name))


class GPTQQuantLinear(nn.Linear):
    """Has the name of gptqmodel's layer, whose inputs PEFT averages in groups."""


def test_qalora_groups_are_rejected_before_the_pass() -> None:
    config = lora(target_modules=["q_proj"], use_qalora=True, qalora_group_size=4)
    eva_kernels.calibrate(make_llama(), text_batches(1), config, max_steps=1, **QUIET)
    for wrap in (False, True):
        model = make_llama()
        model.model.layers[1].self_attn.q_proj.__class__ = GPTQQuantLinear
        model, given = (wrapped(model, config), None) if wrap else (model, config)
        with pytest.raises(
            EvaValueError, match=r"use_qalora makes lora_A of model.layers.1\S+ read"
        ):
            eva_kernels.initialize(model, iter(()), given, **QUIET)
