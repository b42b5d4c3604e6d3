"""``EvaResult.apply`` with other ranks, another config, some layers only, or repeatedly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

import eva_kernels
from eva_kernels import EvaResult, EvaValueError, EvaWarning
from integration.conftest import (
    Clash,
    lora,
    lora_layers,
    make_llama,
    run,
    same_state,
    state_of,
    text_batches,
    vectors,
    wrapped,
)


def test_apply_with_another_allocation(llama_result: EvaResult) -> None:
    model = llama_result.apply(make_llama(), r=2)
    layers = lora_layers(model)
    assert sum(layer.r["default"] for layer in layers.values()) == 28
    assert model.peft_config["default"].r == 2
    assert model.eva_result.base_ranks == dict.fromkeys(llama_result.ranks, 2)
    assert model.peft_config["default"].lora_alpha == 4
    for layer in layers.values():  # alpha / r of the pass, whatever the new rank
        assert layer.scaling["default"] == pytest.approx(8 / 4)
    model = llama_result.apply(make_llama(), min_rank=1)
    assert len(lora_layers(model)) == 14


def test_apply_with_another_config(llama_result: EvaResult) -> None:
    model = llama_result.apply(make_llama(), lora(lora_alpha=32, use_rslora=True))
    layers = lora_layers(model)
    assert {name: layer.r["default"] for name, layer in layers.items()} == llama_result.ranks
    for layer in layers.values():
        assert layer.scaling["default"] == pytest.approx(32 / 4**0.5)
    few = lora(target_modules=["q_proj"])
    with pytest.raises(EvaValueError, match="12 unknown layers"):
        llama_result.apply(make_llama(), few)
    with pytest.warns(EvaWarning, match="12 unknown layers"):
        model = llama_result.apply(make_llama(), few, strict=False)
    ranks = {name: layer.r["default"] for name, layer in lora_layers(model).items()}
    assert ranks == {n: rank for n, rank in llama_result.ranks.items() if n.endswith("q_proj")}


@pytest.mark.parametrize("trained", [True, False])
def test_apply_to_a_missing_adapter_is_an_error(trained: bool, llama_result: EvaResult) -> None:
    model = wrapped(make_llama(), lora())
    before = state_of(model)
    with pytest.raises(EvaValueError, match=r"the model has no .*adapter 'mine'"):
        llama_result.apply(model, adapter_name="mine", overwrite_trained=trained)
    assert same_state(before, state_of(model))


def test_whiten_of_the_applied_config_is_used(llama_result: Any) -> None:
    for config in (lora(whiten=True), lora()):
        model = llama_result.apply(make_llama(), config)
        for name, layer in lora_layers(model).items():
            norms = layer.lora_A["default"].weight.detach().norm(dim=1)
            values = llama_result.singular_values[name][: len(norms)]
            whitened = config.eva_config.whiten
            torch.testing.assert_close(norms, values**-0.5 if whitened else torch.ones(len(norms)))


def test_rows_without_variance_are_not_whitened(llama_result: EvaResult) -> None:
    result = copy.deepcopy(llama_result)
    name = next(name for name, rank in result.ranks.items() if rank > 1)
    result.singular_values[name][1] = 0
    rows, plain = (result.state_dict(whiten)[name] for whiten in (True, False))
    assert torch.equal(rows[1], plain[1])
    assert not torch.equal(rows[0], plain[0])


def test_layers_missing_from_the_adapter_need_strict_false(llama_result: EvaResult) -> None:
    model = wrapped(make_llama(), lora(target_modules=["q_proj"]))
    with pytest.raises(EvaValueError, match="unknown layers"):
        llama_result.apply(model)
    with pytest.warns(EvaWarning, match="12 unknown layers"):
        llama_result.apply(model, strict=False)
    state = llama_result.state_dict()
    for name, layer in lora_layers(model).items():
        assert torch.equal(layer.lora_A["default"].weight, state[name])


def test_result_with_rank_zero_can_be_applied_again(tmp_path: Path) -> None:
    result = run(make_llama(), text_batches(3), lora(r=1, rho=8.0), max_steps=3)
    none = [name for name, rank in result.ranks.items() if not rank]
    assert none
    model = result.apply(make_llama())
    before = state_of(model)
    result.apply(model)
    assert same_state(before, state_of(model))
    state = {f"base_model.model.{name}": rows for name, rows in result.state_dict().items()}
    eva_kernels.initialize_lora_eva_weights(model, eva_state_dict=state)
    assert same_state(before, state_of(model))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_llama(), tmp_path, is_trainable=True)
    assert same_state(before, state_of(result.apply(again)))
    result.ranks[none[0]] = 1  # needs an adapter that was removed
    with pytest.raises(EvaValueError, match=f"1 unknown layer .{none[0]}"):
        result.apply(model)
    result.ranks = {**result.ranks, none[0]: 0, "no.such.layer": 0}
    result.components["no.such.layer"] = torch.eye(4)
    with pytest.raises(EvaValueError, match=r"1 unknown layer .no\.such\.layer"):
        result.apply(model)


def test_layer_of_rank_zero_has_no_entries_of_the_adapter() -> None:
    model = wrapped(Clash(), lora(init_lora_weights=True))
    model.add_adapter("mine", lora(use_dora=True))
    entries = entries_of(model, "sub.lin", "mine")
    result = run(Clash(), vectors(4, features=16), lora(), max_steps=4)
    assert result.ranks["sub.lin"] == 0
    result.apply(model, adapter_name="mine")
    assert {"r", "scaling", "lora_A", "lora_B"} < entries
    known = lora_layers(model)["sub.lin"].other_param_names
    assert entries_of(model, "sub.lin", "mine") == {"use_dora", "lora_bias"}.difference(known)
    assert entries_of(model, "lin", "mine") == entries
    assert "sub.lin" in lora_layers(model)


def entries_of(model: nn.Module, layer: str, adapter: str) -> set[str]:
    """Return the attributes of a layer that have an entry for an adapter."""
    lora_layer = lora_layers(model)[layer]
    kinds = (dict, nn.ModuleDict, nn.ParameterDict)
    attributes = {**vars(lora_layer), **lora_layer._modules}.items()
    return {name for name, value in attributes if isinstance(value, kinds) and adapter in value}
