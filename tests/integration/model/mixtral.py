"""A tiny Mixtral, and the targets that adapt its fused experts."""

from __future__ import annotations

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from integration.conftest import VOCABULARY, fused

EXPERTS = 4
FUSED = {
    "target_modules": ["q_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}


def make_mixtral() -> MixtralForCausalLM:
    torch.manual_seed(7)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    return fused(MixtralForCausalLM(config).eval())
