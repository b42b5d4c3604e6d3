"""The shapes of published models, and the layers of them that are adapted."""

from __future__ import annotations

from collections.abc import Callable

from transformers import Gemma2Config, LlamaConfig, PretrainedConfig

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _llama(**sizes: int) -> LlamaConfig:
    return LlamaConfig(max_position_embeddings=4096, **sizes)


# As published in the config.json of each model.
MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "Llama-2-7B": lambda: _llama(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    ),
    "Llama-3.1-8B": lambda: _llama(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "Gemma-2-9B": lambda: Gemma2Config(
        vocab_size=256000,
        hidden_size=3584,
        intermediate_size=14336,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        query_pre_attn_scalar=256,
    ),
    "Gemma-2-27B": lambda: Gemma2Config(
        vocab_size=256000,
        hidden_size=4608,
        intermediate_size=36864,
        num_hidden_layers=46,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        query_pre_attn_scalar=144,
    ),
    "Llama-3.1-70B": lambda: _llama(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
}
