"""Layers that remove padding and read all samples as one, as in flash-linear-attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eva_kernels
from integration.conftest import QUIET, lora, text_batches


class Unpadding(nn.Module):
    """A layer on the unpadded tokens of all samples, and one on the tokens padded again."""

    def __init__(self, samples: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.samples, self.embed = samples, nn.Embedding(128, 12)
        self.all_at_once, self.padded = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x, index = self.embed(input_ids), attention_mask.flatten().nonzero().expand(-1, 12)
        rows = x.flatten(0, 1).gather(0, index).view(*self.samples, -1, 12)
        y = self.all_at_once(rows).view(-1, 12)
        return self.padded(torch.zeros_like(x).flatten(0, 1).scatter(0, index, y).view(x.shape))


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.parametrize("limit", [None, 20])
@pytest.mark.parametrize("samples", [(), (1,)])
def test_label_mask_applies_to_unpadded_tokens(samples: tuple[int, ...], limit: int | None) -> None:
    model, batches = Unpadding(samples), text_batches(4, labels=True)
    for batch in batches:
        batch["labels"][:, :3] = -100
    options: dict[str, Any] = {**QUIET, "method": "gram", "tokens_per_step": limit}
    config = lora(tau=1.0, target_modules=["all_at_once", "padded"])
    result = eva_kernels.calibrate(model, batches, config, max_steps=4, **options)
    kept = [b["labels"] != -100 for b in batches]
    if limit is not None:
        assert result.tokens == 4 * limit
        return
    x = [model.embed(b["input_ids"])[k] for b, k in zip(batches, kept, strict=True)]
    for name, rows in {"all_at_once": x, "padded": [model.all_at_once(part) for part in x]}.items():
        tokens = torch.cat(rows).double()
        found = result.singular_values[name].double()
        truth = torch.linalg.svdvals(tokens - tokens.mean(0))[: len(found)]
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)
