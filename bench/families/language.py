"""Language models: decoders, encoders, encoder-decoders, mixtures of experts."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from .family import VOCABULARY, Batch, Family, mean_square, seeded, text_batches

SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 1}
CLASSES = {"task_type": "SEQ_CLS"}


def _llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE, **GROUPED))


def _qwen2() -> nn.Module:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZE, **GROUPED))


def _qwen3() -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZE, **GROUPED, head_dim=16))


def _gemma2() -> nn.Module:
    config = hf.Gemma2Config(**SIZE, **GROUPED, head_dim=16, sliding_window=8)
    return hf.Gemma2ForCausalLM(config)


def _gemma3() -> nn.Module:
    config = hf.Gemma3TextConfig(**SIZE, **GROUPED, head_dim=16, sliding_window=8)
    return hf.Gemma3ForCausalLM(config)


def _gpt_oss() -> nn.Module:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = hf.GptOssConfig(**SIZE, **GROUPED, **experts, head_dim=16, sliding_window=8)
    return hf.GptOssForCausalLM(config)


def _mixtral() -> nn.Module:
    config = hf.MixtralConfig(**SIZE, **GROUPED, num_local_experts=4, num_experts_per_tok=2)
    return hf.MixtralForCausalLM(config)


def _gpt2() -> nn.Module:
    size = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**size, bos_token_id=0, eos_token_id=0))


def _t5_config() -> hf.T5Config:
    size = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_heads": 2}
    return hf.T5Config(**size, num_layers=2, pad_token_id=0, decoder_start_token_id=0)


def _t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(_t5_config())


def _deberta() -> nn.Module:
    config = hf.DebertaV2Config(
        **SIZE,
        num_labels=3,
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=16,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
    )
    return hf.DebertaV2ForSequenceClassification(config)


def _roberta() -> nn.Module:
    return hf.RobertaForSequenceClassification(hf.RobertaConfig(**SIZE, num_labels=3))


def _modernbert() -> nn.Module:
    tokens = dict.fromkeys(("bos_token_id", "cls_token_id"), 1)
    tokens |= dict.fromkeys(("eos_token_id", "sep_token_id"), 2)
    return hf.ModernBertForSequenceClassification(
        hf.ModernBertConfig(**SIZE, **tokens, num_labels=3)
    )


def _bert(kind: str) -> nn.Module:
    return getattr(hf, kind)(hf.BertConfig(**SIZE, num_labels=3))


class RoutedBlock(nn.Module):
    """A feed-forward layer that routes tokens to two of four experts, each a separate module."""

    def __init__(self, width: int = 32, inner: int = 24, experts: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict(
                {
                    "w1": nn.Linear(width, inner, bias=False),
                    "w2": nn.Linear(inner, width, bias=False),
                    "w3": nn.Linear(width, inner, bias=False),
                }
            )
            for _ in range(experts)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = hidden.reshape(-1, hidden.shape[-1])
        weights, chosen = self.gate(tokens).softmax(-1).topk(2)
        out = torch.zeros_like(tokens)
        experts: Iterable[Any] = self.experts
        for e, expert in enumerate(experts):
            token, place = torch.where(chosen == e)
            if len(token):
                x = tokens[token]
                y = expert["w2"](nn.functional.silu(expert["w1"](x)) * expert["w3"](x))
                out.index_add_(0, token, y * weights[token, place, None])
        return out.reshape(hidden.shape)


def _routed() -> nn.Module:
    model = _llama()
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.mlp = RoutedBlock()
    return model


_causal = partial(text_batches, labels="tokens")


def _translation_batches(count: int) -> list[Batch]:
    pairs = zip(
        text_batches(count), text_batches(count, length=12, labels="tokens", seed=6), strict=True
    )
    return [{**source, "labels": target["labels"]} for source, target in pairs]


_FUSED = {
    "target_modules": ["q_proj", "v_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}

LANGUAGE: dict[str, Family] = {
    "Llama": Family(seeded(_llama), _causal, {"task_type": "CAUSAL_LM"}),
    "Llama, bare": Family(
        seeded(lambda: _llama().get_submodule("model")), text_batches, loss=mean_square
    ),
    "Qwen2": Family(seeded(_qwen2), _causal, {"task_type": "CAUSAL_LM"}),
    "Qwen3, left padding": Family(
        seeded(_qwen3),
        partial(text_batches, labels="tokens", left=True),
        {"task_type": "CAUSAL_LM"},
    ),
    "Gemma-2": Family(seeded(_gemma2), _causal, {"task_type": "CAUSAL_LM"}),
    "Gemma-3": Family(seeded(_gemma3), _causal, {"task_type": "CAUSAL_LM"}),
    "GPT-OSS, fused experts": Family(seeded(_gpt_oss), _causal, _FUSED),
    "Mixtral": Family(seeded(_mixtral), _causal, {"task_type": "CAUSAL_LM"}),
    "Mixtral, fused experts": Family(seeded(_mixtral), _causal, _FUSED),
    "Mixtral, experts as modules": Family(seeded(_routed), _causal, {"task_type": "CAUSAL_LM"}),
    "GPT-2 (Conv1D)": Family(seeded(_gpt2), _causal, {"task_type": "CAUSAL_LM"}),
    "T5": Family(seeded(_t5), _translation_batches, {"task_type": "SEQ_2_SEQ_LM"}),
    "T5 encoder": Family(
        seeded(lambda: hf.T5EncoderModel(_t5_config())), text_batches, loss=mean_square
    ),
    "DeBERTa-v3 classifier": Family(
        seeded(_deberta), partial(text_batches, labels="classes"), CLASSES
    ),
    "RoBERTa classifier": Family(
        seeded(_roberta), partial(text_batches, labels="classes"), CLASSES
    ),
    "ModernBERT classifier": Family(
        seeded(_modernbert), partial(text_batches, labels="classes"), CLASSES
    ),
    "BERT classifier": Family(
        seeded(lambda: _bert("BertForSequenceClassification")),
        partial(text_batches, labels="classes"),
        CLASSES,
    ),
    "BERT with pooler, bare": Family(
        seeded(lambda: _bert("BertModel")),
        text_batches,
        loss=lambda model, batch: model(**batch).pooler_output.square().mean(),
    ),
}
