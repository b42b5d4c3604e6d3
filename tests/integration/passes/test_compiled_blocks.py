"""Models whose blocks are each wrapped, by ``torch.compile`` or for activation checkpointing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import eva_kernels
from eva_kernels import EvaRuntimeError
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
    vectors,
    wrapped,
)


def make_compiled() -> nn.Module:
    model = make_llama()
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(block, backend="eager")
    return model


@pytest.mark.parametrize("targets", [PROJECTIONS, "all-linear"], ids=["names", "all-linear"])
@pytest.mark.parametrize("way", ["base", "adapters"])
def test_compiled_blocks_initialise_save_and_load(way: str, targets: Any, tmp_path: Any) -> None:
    texts, config = text_batches(4), lora(r=4, target_modules=targets)
    model: Any = make_compiled()
    if way == "base":
        model = eva_kernels.initialize(model, texts, config, **QUIET)
    else:
        model = eva_kernels.initialize(wrapped(model, config), texts, **QUIET)
    plain = run(make_llama(), texts, lora(r=4, target_modules=targets))
    result = model.eva_result
    assert result.ranks == plain.ranks  # under the names of the uncompiled model
    assert len(set(result.ranks.values())) > 2
    perturb_b(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_compiled(), tmp_path)
    assert same_state(state_of(model), state_of(again))
    torch.testing.assert_close(output_of(again, texts[0]), output_of(model.eval(), texts[0]))


def test_checkpointed_blocks_keep_the_names_of_layers() -> None:
    texts, checkpointed = text_batches(4), make_llama()
    for i, block in enumerate(checkpointed.model.layers):
        checkpointed.model.layers[i] = checkpoint_wrapper(block)
    result, plain = run(checkpointed, texts), run(make_llama(), texts)
    assert result.ranks == plain.ranks
    model = result.apply(make_llama())
    assert set(lora_layers(model)) == {name for name, rank in plain.ranks.items() if rank}


def test_layers_with_rank_zero_stay_removed(tmp_path: Any) -> None:
    names = [f"model.layers.{i}._orig_mod.self_attn.q_proj" for i in range(2)]
    model = wrapped(make_compiled(), lora(target_modules=["q_proj"]))
    rows = {names[0].replace("_orig_mod.", ""): torch.eye(3, 64), names[1]: torch.empty(0, 64)}
    eva_kernels.initialize_lora_eva_weights(model, eva_state_dict=rows)
    assert list(lora_layers(model)) == names[:1]
    assert model.targeted_module_names == names[:1]
    again = {name.replace("_orig_mod.", ""): value for name, value in rows.items()}
    eva_kernels.initialize_lora_eva_weights(model, eva_state_dict=again)
    assert list(lora_layers(model)) == names[:1]
    model.save_pretrained(tmp_path)
    assert list(lora_layers(PeftModel.from_pretrained(make_compiled(), tmp_path))) == names[:1]


def test_names_that_no_pattern_separates_are_an_error() -> None:
    """Patterns may omit ``_orig_mod`` of ``torch.compile``; here other names end like it."""

    class Alike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.my_orig_mod = nn.ModuleDict({"lin": nn.Linear(16, 16)})
            self.mylin = nn.Linear(16, 16)

        def forward(self, x: Any) -> Any:
            return self.mylin(0.3 ** torch.arange(16) * self.my_orig_mod["lin"](x))

    model = wrapped(Alike(), lora())
    before, config = state_of(model), copy.deepcopy(model.peft_config)
    with pytest.raises(EvaRuntimeError, match="layer mylin: PEFT would not find its rank in"):
        eva_kernels.initialize(model, vectors(4, features=16), max_steps=4, **QUIET)
    assert same_state(before, state_of(model))
    assert model.peft_config == config
