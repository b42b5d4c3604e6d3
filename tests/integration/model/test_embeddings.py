"""Adapters of embeddings and of heads tied to them, which EVA leaves at the default."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from torch import nn
from transformers import BertConfig, BertForMaskedLM, LlamaForCausalLM

import eva_kernels
from eva_kernels import EvaValueError, EvaWarning
from integration.conftest import (
    QUIET,
    VOCABULARY,
    lora,
    make_llama,
    same_state,
    state_of,
    wrapped,
)

NEEDS_TYING = pytest.mark.skipif(
    not hasattr(LoraModel, "_add_targets_to_tie"),
    reason="this PEFT ties what is trained whole alone",
)
TARGETS = [
    ["q_proj", "embed_tokens"],
    ["q_proj", "lm_head"],
    ["q_proj", "embed_tokens", "lm_head"],
    r".*(q_proj|embed_tokens)",
]


def make_tied() -> LlamaForCausalLM:
    return make_llama(tie_word_embeddings=True)


def batches(count: int = 6) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, VOCABULARY, (4, 16), generator=generator) for _ in range(count)]
    return [{"input_ids": part, "labels": part} for part in ids]


def embedding_and_head(model: PeftModel) -> tuple[nn.Module, nn.Module]:
    return model.get_input_embeddings(), model.base_model.model.lm_head


def assert_tied(model: PeftModel) -> None:
    embedding, head = embedding_and_head(model)
    pairs = (("lora_A", "lora_embedding_B"), ("lora_B", "lora_embedding_A"))
    for own, its in pairs:
        weight = getattr(head, own)["default"].weight
        other = getattr(embedding, its)["default"]
        assert weight.data_ptr() == other.data_ptr(), own
        assert torch.equal(weight, other.T), own


@NEEDS_TYING
@pytest.mark.parametrize("targets", TARGETS, ids=["embedding", "head", "both", "regex"])
@pytest.mark.parametrize("way", ["base", "adapters", "meta"])
def test_tied_adapters_stay_tied(way: str, targets: Any, tmp_path: Any) -> None:
    model: Any = make_tied()
    config = lora(
        target_modules=targets,
        ensure_weight_tying=True,
        rank_pattern={"lm_head": 6, "embed_tokens": 6},
        alpha_pattern={"lm_head": 5, "embed_tokens": 5},
    )
    if way != "base":
        model = wrapped(model, config, low_cpu_mem_usage=way == "meta")
    with pytest.warns(EvaWarning, match="the default initialisation"):
        model = eva_kernels.initialize(model, batches(), config if way == "base" else None, **QUIET)
    assert list(model.eva_result.ranks) == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert_tied(model)
    drawn = (
        embedding_and_head(model)[1].lora_A["default"].weight
    )  # as plain LoRA initialises the head
    bound = drawn.shape[1] ** -0.5
    assert 0.8 * bound < drawn.abs().max() <= bound
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if "lm_head" in n or "embed" in n} == {
        f"base_model.model.{part}"
        for part in (
            "model.embed_tokens.lora_embedding_A.default",
            "model.embed_tokens.lora_embedding_B.default",
            "lm_head.lora_A.default.weight",
            "lm_head.lora_B.default.weight",
        )
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for batch in batches(2):
        model(**batch).loss.backward()
        optimizer.step()
    assert_tied(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = PeftModel.from_pretrained(make_tied(), tmp_path)
    assert_tied(again)
    ids = batches(1)[0]
    torch.testing.assert_close(again(**ids).logits, model.eval()(**ids).logits)


@NEEDS_TYING
@pytest.mark.filterwarnings("ignore:.* the default initialisation:eva_kernels.EvaWarning")
def test_tied_adapters_are_unchanged_if_trained_or_on_failure(monkeypatch: Any) -> None:
    config = lora(target_modules=TARGETS[1], ensure_weight_tying=True)
    model = wrapped(make_tied(), config)
    for trained in (False, True):
        if trained:
            torch.nn.init.normal_(embedding_and_head(model)[1].lora_B["default"].weight)
        before = state_of(model)
        with monkeypatch.context() as patch:
            patch.setattr("eva_peft.lora.adapters.pattern_from_values", None)
            with pytest.raises(TypeError, match="not callable"):
                eva_kernels.initialize(model, batches(), overwrite_trained=trained, **QUIET)
        assert same_state(before, state_of(model))
    eva_kernels.initialize(model, batches(), overwrite_trained=True, **QUIET)
    after = state_of(model)
    tied = {n: v for n, v in before.items() if "lm_head" in n or "embed_tokens" in n}
    assert same_state(tied, {name: after[name] for name in tied})


def test_embeddings_of_another_adapter_are_unchanged() -> None:
    model = wrapped(make_llama(), lora(target_modules=["q_proj"]))
    model.add_adapter("other", lora(target_modules=["embed_tokens"], init_lora_weights=True))
    before = {n: v for n, v in state_of(model).items() if "other" in n}
    eva_kernels.initialize(model, batches(), max_steps=2, **QUIET)
    after = state_of(model)
    assert len(before) == 2
    assert same_state(before, {name: after[name] for name in before})


@NEEDS_TYING
def test_rows_for_a_tied_adapter_are_rejected() -> None:
    free = lora(target_modules=["q_proj", "lm_head"])
    result = eva_kernels.calibrate(make_tied(), batches(), free, **QUIET)
    model = wrapped(
        make_tied(), lora(target_modules=["q_proj", "lm_head"], ensure_weight_tying=True)
    )
    before = state_of(model)
    with pytest.raises(EvaValueError, match=r"1 unknown layer \(lm_head\)"):
        result.apply(model)
    assert same_state(before, state_of(model))


@NEEDS_TYING
@pytest.mark.parametrize("compiled", [False, True])
def test_config_of_the_existing_adapter_decides_on_tying(compiled: bool) -> None:
    free, base = lora(target_modules=TARGETS[1]), make_tied()
    base = torch.compile(base, backend="eager") if compiled else base
    model = wrapped(base, lora(target_modules=TARGETS[1], ensure_weight_tying=True))
    with pytest.warns(EvaWarning) as warned:
        eva_kernels.initialize(model, batches(), free, **QUIET)
    assert any("adapter of lm_head keeps the default" in str(each.message) for each in warned)
    assert all(name.endswith("q_proj") for name in model.eva_result.ranks)
    if not compiled:  # PEFT does not tie the adapters of a compiled model
        assert_tied(model)


@NEEDS_TYING
def test_only_tied_layers_are_an_error() -> None:
    config = lora(target_modules=["lm_head"], ensure_weight_tying=True)
    with pytest.raises(EvaValueError, match=r"no layer to initialise.*matches lm_head"):
        eva_kernels.initialize(make_tied(), batches(), config, **QUIET)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")  # 0.17
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_adapter_on_meta_gets_the_default(dtype: torch.dtype) -> None:
    config = lora(target_modules=["q_proj", "embed_tokens"])
    model = wrapped(make_tied().to(dtype), config, low_cpu_mem_usage=True)
    with pytest.warns(EvaWarning, match="keep the default"):
        model = eva_kernels.initialize(model, batches(), **QUIET)
    assert not any(p.is_meta for p in model.parameters())
    embedding = model.get_input_embeddings()
    first, second = embedding.lora_embedding_A["default"], embedding.lora_embedding_B["default"]
    assert not first.any()  # as PEFT initialises it
    assert second.std() > 0.5
    assert first.requires_grad
    plain = wrapped(make_tied().to(dtype), lora(target_modules=["q_proj", "embed_tokens"]))
    assert first.dtype == plain.get_input_embeddings().lora_embedding_A["default"].dtype
    model(**batches(1)[0]).loss.backward()
    assert first.grad.any()


@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning")
def test_head_that_peft_does_not_tie_is_initialised() -> None:
    """PEFT ties layers named ``lm_head``; the head of BERT has another name."""
    torch.manual_seed(0)
    bert_config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    model = BertForMaskedLM(bert_config).eval()
    config = lora(target_modules=["query", "decoder"], ensure_weight_tying=True)
    data = [{"input_ids": batch["input_ids"]} for batch in batches()]
    done = eva_kernels.initialize(model, data, config, **QUIET)
    head = done.base_model.model.cls.predictions.decoder
    assert head.get_base_layer().weight is done.get_input_embeddings().weight
    rows = head.lora_A["default"].weight
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:EVA reads the inputs of linear:eva_kernels.EvaWarning")
def test_embedding_adapter_of_a_plain_module_gets_the_default() -> None:
    model = nn.Sequential(nn.Embedding(VOCABULARY, 16), nn.Linear(16, 16))
    adapted = wrapped(model, lora(target_modules=["0", "1"]), low_cpu_mem_usage=True)
    generator = torch.Generator().manual_seed(0)
    data = [torch.randint(0, VOCABULARY, (4, 9), generator=generator) for _ in range(5)]
    eva_kernels.initialize(adapted, data, **QUIET)
    assert not any(p.is_meta for p in adapted.parameters())
    assert adapted(data[0]).shape == (4, 9, 16)


def test_adapter_of_embeddings_only_is_rejected_but_may_train() -> None:
    model = wrapped(make_llama(), lora(target_modules=["embed_tokens"]))
    with pytest.raises(EvaValueError, match=r"model\.embed_tokens, whose inputs EVA cannot"):
        eva_kernels.initialize(model, batches(), **QUIET)
    assert not eva_kernels.is_initialized(model)
    eva_kernels.EvaCallback("raise").on_train_begin(None, None, None, model=model)
    eva_kernels.watch(model.train(), "raise")(**batches(1)[0]).loss.backward()
