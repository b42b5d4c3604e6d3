"""Which parts of a model are looked at for what they are told, and what of that counts."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from eva_peft.inputs.padding_told import parts_told
from integration.conftest import VOCABULARY, lora, make_bert, wrapped


def test_layers_with_adapters_are_looked_at_where_those_within_may_be_told() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.first = nn.Embedding(VOCABULARY, 32), nn.Linear(32, 32)
            self.looks, self.base_layer = nn.MultiheadAttention(32, 2), 3
            self.bert = make_bert()

        def forward(self, ids: Tensor, **more: Any) -> Tensor:
            x = self.first(self.words(ids))
            return self.looks(x, x, x, **more)[0]

    config = lora(target_modules=["first", "looks", "query"], init_lora_weights=True)
    model = wrapped(Model(), config)
    found = [part for part in parts_told(model) if isinstance(part, LoraLayer)]
    base = model.base_model.model
    assert found == [base.looks]
    assert base in parts_told(model)
