"""What torch's own transformers are told of padding, whatever the batch calls it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from integration.conftest import VOCABULARY, hooks_of, layer_inputs, lora, lost, run

LENGTHS = torch.tensor([7, 4, 2])
KEPT = torch.arange(7) < LENGTHS[:, None]
EXACT: dict[str, Any] = {"method": "gram", "max_steps": 4}
SAYS = [
    "ignore:.*nested tensors is in prototype stage",
    "ignore:enable_nested_tensor is True, but",
]
pytestmark = [pytest.mark.filterwarnings(says) for says in SAYS]


class Texts(nn.Module):
    """Makes its mask of token ids, or of lengths."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.words = kind, nn.Embedding(VOCABULARY, 16)
        first = kind != "sequence first"
        options: Any = {"dropout": 0.0, "batch_first": first}
        layers = [nn.TransformerEncoderLayer(16, 2, 24, **options) for _ in range(2)]
        self.each = nn.ModuleList(layers) if kind == "one by one" else None
        self.encoder = nn.TransformerEncoder(layers[0], 2) if self.each is None else None
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 24, **options), 1)
        self.last = nn.Linear(16, 4)

    def forward(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        padding = ids == 0 if lengths is None else torch.arange(ids.shape[1]) >= lengths[:, None]
        x = self.words(ids)
        if self.kind == "class token":
            x, padding = pad(x, (0, 0, 1, 0), value=1.0), pad(padding, (1, 0))
        x = x.transpose(0, 1) if self.kind == "sequence first" else x
        if self.kind == "decoder":
            return self.last(self.decoder(x, x.flip(1), tgt_key_padding_mask=padding))
        if self.each is not None:
            for layer in self.each:
                x = layer(x, src_key_padding_mask=padding)
            return self.last(x)
        assert self.encoder is not None
        return self.last(self.encoder(x, src_key_padding_mask=padding))


def batches(lengths: bool = False) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randint(1, VOCABULARY, (3, 7), generator=generator) for _ in range(4)]
    if lengths:  # whose padding is no zero
        return [{"ids": ids, "lengths": LENGTHS} for ids in draws]
    return [{"ids": ids * KEPT} for ids in draws]


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.parametrize("of_own", [False, True], ids=["default", "forward_fn"])
@pytest.mark.parametrize(
    "kind", ["ids", "lengths", "one by one", "sequence first", "class token", "decoder"]
)
def test_padding_that_a_model_finds_itself(kind: str, of_own: bool) -> None:
    model, data = Texts(kind).eval(), batches(kind == "lengths")
    part = {"one by one": "each.1", "decoder": "decoder.layers.0"}.get(kind, "encoder.layers.1")
    kept = pad(KEPT, (1, 0), value=True) if kind == "class token" else KEPT
    rows = (kept.mT if kind == "sequence first" else kept).flatten().repeat(4)
    options = {**EXACT, "forward_fn": lambda m, b: m(*b.values())} if of_own else EXACT
    names, before = [f"{part}.linear1", f"{part}.linear2"], hooks_of(model)
    result = run(model, data, lora(tau=1.0, target_modules=names), **options)
    assert hooks_of(model) == before
    for name, x in layer_inputs(model, data, names).items():
        assert lost(result.components[name], x[rows]) < 1e-6, name
    assert result.tokens == int(rows.sum())


def test_what_a_batch_says_of_its_tokens_goes_first() -> None:
    data = [{**b, "attention_mask": KEPT & (torch.arange(7) > 0)} for b in batches()]
    name = "encoder.layers.0.linear1"

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        model(batch["ids"])

    model, config = Texts("ids").eval(), lora(tau=1.0, target_modules=[name])
    result = run(model, data, config, forward_fn=forward, **EXACT)
    assert result.tokens == 4 * int(KEPT[:, 1:].sum())
    whole = run(model, data, config, prepare_model_inputs_fn=None, forward_fn=forward, **EXACT)
    assert whole.tokens == 4 * KEPT.numel()


def test_a_failure_leaves_nothing() -> None:
    class Fails(Texts):
        def forward(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
            super().forward(ids)
            raise KeyError("after all")

    model = Fails("ids")
    before = hooks_of(model)
    with pytest.raises(KeyError, match="after all"):
        run(model, batches(), lora(target_modules=["last"]), **EXACT)
    assert hooks_of(model) == before
