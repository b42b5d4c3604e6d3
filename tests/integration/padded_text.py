"""A batch of padded text, and sizes for tiny transformers models that read it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from integration.conftest import VOCABULARY

SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LENGTHS = torch.tensor([14, 9, 7, 5])
SAMPLES, TOKENS = len(LENGTHS), 14
MASK = torch.arange(TOKENS) < LENGTHS[:, None]


def text() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "input_ids": torch.randint(3, VOCABULARY, (SAMPLES, TOKENS)),
        "attention_mask": MASK.long(),
    }
