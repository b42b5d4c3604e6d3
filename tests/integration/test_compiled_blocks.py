"""Models whose blocks are compiled one by one, as accelerate's regional compilation does it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

import eva_kernels
from integration.conftest import (
    PROJECTIONS,
    QUIET,
    lora,
    lora_layers,
    make_llama,
    output_of,
    perturb_b,
    run,
    same_state,
    state_of,
    text_batches,
    wrapped,
)


def make_compiled() -> nn.Module:
    model = make_llama()
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(block, backend="eager")
    return model


@pytest.mark.parametrize("targets", [PROJECTIONS, "all-linear"], ids=["names", "all-linear"])
@pytest.mark.parametrize("way", ["base", "adapters"])
def test_initialise_save_and_load(way: str, targets: Any, tmp_path: Any) -> None:
    texts, config = text_batches(4), lora(r=4, target_modules=targets)
    model: Any = make_compiled()
    if way == "base":
        model = eva_kernels.initialize(model, texts, config, **QUIET)
    else:
        model = eva_kernels.initialize(wrapped(model, config), texts, **QUIET)
    plain = run(make_llama(), texts, lora(r=4, target_modules=targets))
    result = model.eva_result
    assert result.ranks == plain.ranks  # by the names of the model that is not compiled
    assert len(set(result.ranks.values())) > 2
    perturb_b(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_compiled(), tmp_path)
    assert same_state(state_of(model), state_of(again))
    torch.testing.assert_close(output_of(again, texts[0]), output_of(model.eval(), texts[0]))


def test_layers_without_rank_stay_away(tmp_path: Any) -> None:
    names = [f"model.layers.{i}._orig_mod.self_attn.q_proj" for i in range(2)]
    model = wrapped(make_compiled(), lora(target_modules=["q_proj"]))
    rows = {names[0].replace("_orig_mod.", ""): torch.eye(3, 64), names[1]: torch.empty(0, 64)}
    eva_kernels.initialize_lora_eva_weights(model, eva_state_dict=rows)
    assert list(lora_layers(model)) == names[:1]
    assert model.targeted_module_names == names[:1]
    model.save_pretrained(tmp_path)
    assert list(lora_layers(PeftModel.from_pretrained(make_compiled(), tmp_path))) == names[:1]
