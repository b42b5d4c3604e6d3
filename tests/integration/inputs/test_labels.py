"""Which part of a batch labels its tokens, and labels as the only sign of padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eva_peft.inputs.roles import token_labels_of
from integration.conftest import VOCABULARY, lora, lost, run, text_batches

IDS = 3 + torch.arange(8).reshape(2, 4)
TEXTS = text_batches(4)


class Tagger(nn.Module):
    """A module of the user's that takes token ids, and targets by a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 5)

    def forward(self, ids: Tensor, y: Tensor | None = None) -> Tensor:
        return self.head(self.embedding(ids))


@pytest.mark.parametrize("by_function", [False, True])
@pytest.mark.parametrize("ignored", [-100, -1], ids=["as torch", "as makemore"])
@pytest.mark.parametrize("names", [None, ("ids", "y"), ("y", "ids")])
def test_labels_under_any_name_mask_tokens_of_a_users_module(
    names: tuple[str, str] | None, ignored: int, by_function: bool
) -> None:
    """They may be the only sign of padding, as losses ignore negative ones, too."""
    config = lora(target_modules=["head"], tau=1.0)
    loader = [
        (b["input_ids"], b["input_ids"].masked_fill(b["attention_mask"] == 0, ignored))
        for b in TEXTS
    ]
    batches: list[Any] = [*loader]
    if names is not None:
        batches = [{name: {"ids": ids, "y": y}[name] for name in names} for ids, y in loader]
    key = 0 if names is None else "ids"
    options = {"forward_fn": lambda model, batch: model(batch[key])} if by_function else {}
    model = Tagger()
    result = run(model, iter(batches), config, method="gram", **options)
    kept = torch.cat([ids[labels != ignored] for ids, labels in loader])
    assert lost(result.components["head"], model.embedding(kept).detach().double()) < 1e-6


NO_LABELS = {
    "sparse": torch.eye(2, 4, dtype=torch.long).to_sparse(),
    "uint16": torch.ones(2, 4, dtype=torch.uint16),
    "complex": torch.ones(2, 4, dtype=torch.complex64),
}


@pytest.mark.parametrize("kind", NO_LABELS)
@pytest.mark.parametrize("named", [False, True])
def test_parts_that_are_no_labels_are_not_compared(kind: str, named: bool) -> None:
    parts = {"ids": IDS, "more_ids": IDS, "y": NO_LABELS[kind]}
    assert token_labels_of(parts if named else tuple(parts.values())) is None
