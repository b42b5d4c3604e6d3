"""Which layers of a base model get adapters: as PEFT chooses them."""

from __future__ import annotations

import copy
import re
from importlib import import_module
from typing import Any

import pytest
import torch
from peft import PeftModel, TaskType
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

import eva_kernels
from eva_peft._peft_compat import (
    exclude_pattern,
    matches_parameter,
    matches_target,
    resolved_config,
)
from integration.conftest import (
    QUIET,
    lora,
    lora_layers,
    make_llama,
    output_of,
    same_state,
    state_of,
    text_batches,
    vectors,
    wrapped,
)
from integration.lora.small_models import Attentive


@pytest.mark.parametrize("prepared", [True, False])
def test_attention_and_output_projection_are_initialised(prepared: bool, tmp_path: Any) -> None:
    data, config = vectors(4), lora(target_modules=["lin", "mha"])
    model = wrapped(Attentive(), config) if prepared else Attentive()
    done = eva_kernels.initialize(model, data, None if prepared else config, max_steps=3, **QUIET)
    assert set(done.eva_result.ranks) == {"lin", "mha", "mha.out_proj"}
    layers = lora_layers(done)
    assert set(layers) == {"lin", "mha", "mha.base_layer.out_proj"}
    for layer in layers.values():
        rows = layer.lora_A["default"].weight
        torch.testing.assert_close(rows @ rows.mT, torch.eye(len(rows)), atol=2e-6, rtol=0)
    done.eval()
    assert torch.allclose(output_of(done, data[0]), output_of(Attentive().eval(), data[0]))
    optimizer = torch.optim.SGD([p for p in done.parameters() if p.requires_grad], 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        done(data[0]).square().sum().backward()
        optimizer.step()
    assert all(m.lora_B["default"].weight.any() for m in layers.values())
    done.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Attentive(), tmp_path).eval()
    # PEFT merges into the attention's weight and unmerges on every call, which rounds
    torch.testing.assert_close(output_of(again, data[0]), output_of(done, data[0]))


def test_replicated_layers_of_a_peft_model_are_initialised() -> None:
    config = lora(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]])
    model = wrapped(make_llama(), config)
    done = eva_kernels.initialize(model, text_batches(2), max_steps=2, **QUIET)
    assert len(done.eva_result.ranks) == 3
    again = done.eva_result.apply(make_llama())
    assert {n: m.r["default"] for n, m in lora_layers(again).items()} == {
        n: m.r["default"] for n, m in lora_layers(done).items()
    }


@pytest.mark.filterwarnings("ignore:.*never called:eva_kernels.EvaWarning")
def test_all_linear_omits_mamba_layers_that_peft_rejects() -> None:
    """ "all-linear" selects what PEFT adapts."""
    size = {"vocab_size": 96, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 1}
    model = MambaForCausalLM(MambaConfig(**size, pad_token_id=0, bos_token_id=0, eos_token_id=0))
    called: list[str] = []
    own: Any = model.backbone.layers[0].mixer.dt_proj
    hook = own.register_forward_hook(lambda *args: called.append("dt_proj"))
    model(**text_batches(1)[0])
    hook.remove()
    done = eva_kernels.initialize(model, text_batches(4), max_steps=4, **QUIET)
    ends = {name.rpartition(".")[2] for name in done.eva_result.ranks}
    assert ends == {
        "in_proj",
        "x_proj",
        *called,
    }  # later releases use the weight of dt_proj directly


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(q|v)_proj"])
def test_target_string_that_peft_splits_into_letters(targets: str, monkeypatch: Any) -> None:
    """As PEFT 0.19 does for models whose experts transformers 5 has fused."""
    conversion = pytest.importorskip("peft.utils.transformers_weight_conversion")

    def convert(config: Any, model: nn.Module, conversions: Any) -> None:
        config.target_modules = set(config.target_modules or ())

    expected = eva_kernels.initialize(
        make_llama(), text_batches(4), lora(target_modules=targets), **QUIET
    )
    name = "convert_peft_config_for_transformers"
    for module in (conversion, import_module("eva_peft._peft_compat")):
        monkeypatch.setattr(module, name, convert)
    done = eva_kernels.initialize(
        make_llama(), text_batches(4), lora(target_modules=targets), **QUIET
    )
    assert done.eva_result.ranks == expected.eva_result.ranks
    assert same_state(state_of(done), state_of(expected))


def test_target_parameters_alone_add_the_default_modules_of_peft() -> None:
    config = lora(target_modules=None, target_parameters=["mlp.down_proj.weight"])
    model = eva_kernels.initialize(make_llama(), text_batches(3), config, max_steps=3, **QUIET)
    ends = {name.split(".", 3)[-1] for name in model.eva_result.ranks}
    assert ends == {"self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj.weight"}
    assert len(model.eva_result.ranks) == len(lora_layers(model)) == 6


@pytest.mark.parametrize(
    ("task", "heads"),
    [
        (TaskType.TOKEN_CLS, ["classifier", "score"]),
        ("QUESTION_ANS", ["qa_outputs"]),
        (None, []),
    ],
)
def test_heads_of_a_task_are_saved_and_not_adapted(task: Any, heads: list[str]) -> None:
    """The given config is not modified."""
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("body", "classifier", "qa_outputs")})
    config = lora(task_type=task, target_modules="All-Linear", modules_to_save=["norm"])
    before = copy.deepcopy(config)
    found = resolved_config(model, config)
    assert config == before
    assert found.modules_to_save == ["norm", *heads]
    assert [n for n in model if matches_target(found, n)] == [n for n in model if n not in heads]


@pytest.mark.parametrize(
    ("excluded", "matched", "unmatched"),
    [
        ("(?i)q_.*", ["Q_proj", "a.b"], ["x.q_proj", "a_b", "x.a.b"]),
        (["nor.m"], ["nor.m", "x.nor.m", "a.b"], ["xnor.m", "nor_m"]),
        (None, ["a.b"], ["a_b"]),
    ],
)
def test_exclude_pattern_extends_exclude_modules(
    excluded: Any, matched: list[str], unmatched: list[str]
) -> None:
    pattern = exclude_pattern(lora(exclude_modules=excluded), ["a.b"])
    assert [
        n for n in [*matched, *unmatched] if re.fullmatch(pattern, n)
    ] == matched  # as PEFT matches it


def test_target_parameters_match_whole_names() -> None:
    config = lora(target_parameters=["proj"])
    names = ["proj", "a.proj", "up_proj", "proj.a"]
    assert [n for n in names if matches_parameter(config, n)] == names[:2]
