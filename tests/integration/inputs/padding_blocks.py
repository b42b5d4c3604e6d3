"""Batches with padding, and blocks of attention that take a mask of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from integration.conftest import VOCABULARY, layer_inputs, lora, lost, run

LENGTHS = torch.tensor([7, 4, 2])
KEPT = torch.arange(7) < LENGTHS[:, None]
EXACT: dict[str, Any] = {"method": "gram", "max_steps": 4}


def batches(lengths: bool = False) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randint(1, VOCABULARY, (3, 7), generator=generator) for _ in range(4)]
    if lengths:  # padding that is not zero
        return [{"ids": ids, "lengths": LENGTHS} for ids in draws]
    return [{"ids": ids * KEPT} for ids in draws]


def check_kept(model: nn.Module, data: list[Any], kept: dict[str, Tensor], **options: Any) -> Any:
    """Check that the layers use the tokens that are kept, bool (B, T), of each of four batches."""
    model.eval()
    result = run(model, data, lora(tau=1.0, target_modules=[*kept]), **EXACT, **options)
    for name, x in layer_inputs(model, data, [*kept], masked=False).items():
        rows = kept[name].flatten().repeat(4)
        assert lost(result.components[name], x[rows]) < 1e-6, name
    return result


class Block(nn.Module):
    """Attention between linear layers; subclasses take the padding mask in different forms."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.before, self.behind = nn.Linear(16, 16), nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=batch_first)

    def run(self, x: Tensor, keys: Tensor, padding: Tensor | None) -> Tensor:
        x = x + self.before(x).tanh()
        keys = x if keys is None else keys
        x = x + self.attention(x, keys, keys, padding, need_weights=False)[0]
        return x + self.behind(x).tanh()


class KeepBlock(Block):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # as x-transformers, ESPnet, NaViT
        return self.run(x, None, ~mask.reshape(len(x), -1, mask.shape[-1]).any(1))
