"""The LoRA config stored in a result round-trips through JSON."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig
from peft.tuners.lora import config as lora_configs

from eva_kernels import EvaValueError, initialize
from eva_peft._peft_compat import exclude_pattern
from eva_peft.results.config_json import OMITTED_FIELDS, config_from_dict, config_to_dict
from integration.conftest import lora, make_llama, run, text_batches

# A non-default value for every field; REQUIRED_FIELDS has others that PEFT then requires.
VALUES: dict[str, Any] = {
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
    "r": 3,
    "target_modules": {"q_proj", "v_proj"},
    "exclude_modules": {"k_proj"},
    "lora_alpha": 5,
    "lora_dropout": 0.1,
    "fan_in_fan_out": True,
    "bias": "lora_only",
    "use_rslora": True,
    "modules_to_save": ["lm_head"],
    "init_lora_weights": False,
    "layers_to_transform": [0, 1],
    "layers_pattern": "layers",
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 7},
    "megatron_config": {"a": 1},
    "megatron_core": "elsewhere",
    "trainable_token_indices": [1, 2],
    "alora_invocation_tokens": [7],
    "use_qalora": True,
    "qalora_group_size": 8,
    "use_dora": True,
    "layer_replication": [(0, 2), (1, 2)],
    "lora_bias": True,
    "target_parameters": ["experts.up"],
    "ensure_weight_tying": True,
    "base_model_name_or_path": "a/model",
    "revision": "main",
}
if hasattr(lora_configs, "BdLoraConfig"):  # PEFT 0.17 has none
    VALUES["use_bdlora"] = lora_configs.BdLoraConfig(
        target_modules_bd_a=["q_proj"],
        nblocks=2,  # the default of PEFT 0.19 is not a number
    )
REQUIRED_FIELDS = {
    "layers_to_transform": {"layers_pattern": "h"},
    "layers_pattern": {"layers_to_transform": 1},
}
# variants configured by objects, which these tests do not cover
OBJECT_FIELDS = {"velora_config", "monteclora_config", "arrow_config", "kasa_config"}


def test_every_field_of_peft_is_kept_or_omitted_on_purpose() -> None:
    """A new release of PEFT may add fields: each is kept, or omitted on purpose."""
    names = {field.name for field in dataclasses.fields(LoraConfig)}
    assert names - OMITTED_FIELDS - OBJECT_FIELDS <= VALUES.keys()


@pytest.mark.parametrize("name", VALUES)
def test_every_field_round_trips(name: str) -> None:
    if name not in {field.name for field in dataclasses.fields(LoraConfig)}:
        pytest.skip(f"this PEFT has no {name}")
    given = {"target_modules": ["q_proj"], **REQUIRED_FIELDS.get(name, {}), name: VALUES[name]}
    if name == "alora_invocation_tokens":  # PEFT warns of other tasks
        given["task_type"] = "CAUSAL_LM"
    config = LoraConfig(**given)
    kept = json.loads(json.dumps(config_to_dict(config)))
    again = config_from_dict(kept)
    found, expected = getattr(again, name), getattr(config, name)
    if name == "layer_replication":
        found = [tuple(pair) for pair in found]
    assert found == expected
    assert again.to_dict() | {name: None} == config.to_dict() | {name: None}


@pytest.mark.parametrize("given", [["KEY"], r"(?i).*\.key", None])
def test_exclude_pattern_adds_layers_to_exclude_modules(given: str | list[str] | None) -> None:
    pattern = exclude_pattern(LoraConfig(exclude_modules=given), ["head", "a.b"])
    excluded = ["head", "a.b", "x.KEY"] if given else ["head", "a.b"]
    assert all(re.fullmatch(pattern, name) for name in excluded)
    assert not any(re.fullmatch(pattern, name) for name in ("x.head", "a.c", "x.value"))


def test_numpy_numbers_are_converted(tmp_path: Path) -> None:
    config = lora(
        r=np.int64(4),
        rho=np.float64(1),
        target_modules=["q_proj"],
        layers_to_transform=[np.int64(1)],
        alpha_pattern={"q_proj": np.float32(2)},
    )
    model = initialize(
        make_llama(), text_batches(2), config, max_steps=2, on_not_converged="ignore"
    )
    model.eva_result.save(tmp_path / "eva.safetensors")
    model.save_pretrained(tmp_path / "adapter")
    assert LoraConfig.from_pretrained(tmp_path / "adapter").layers_to_transform == [1]
    assert isinstance(config.layers_to_transform[0], np.int64)  # the user's config is not modified


def test_field_unknown_to_peft_is_named() -> None:
    with pytest.raises(EvaValueError, match="sets use_nothing, which the installed PEFT does not"):
        config_from_dict({"r": 2, "use_nothing": True})


def test_alora_invocation_tokens_are_kept() -> None:
    config = lora(target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[7])
    result = run(make_llama(), iter(text_batches(2)), config, max_steps=2)
    done = result.apply(make_llama())
    assert done.peft_config["default"].alora_invocation_tokens == [7]


def test_tied_weights_stay_tied_when_a_result_is_applied() -> None:
    config = lora(
        target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )
    base = make_llama(tie_word_embeddings=True)
    result = run(base, iter(text_batches(2)), config, max_steps=2)
    done = result.apply(make_llama(tie_word_embeddings=True))
    saved = {n: p for n, p in done.named_parameters() if "modules_to_save" in n}
    assert done.peft_config["default"].ensure_weight_tying
    assert len({p.data_ptr() for p in saved.values()}) == 1
    assert any(
        "lm_head" in n
        for n, _ in done.named_parameters(remove_duplicate=False)
        if "modules_to_save" in n
    )
