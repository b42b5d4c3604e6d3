"""Attention with a mask of its own tokens and one of its context, as in x-transformers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from integration.conftest import VOCABULARY, hooks_of, layer_inputs, lora, lost, run
from integration.inputs.padding_blocks import EXACT, KEPT, LENGTHS, batches

pytestmark = pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")

OWN_TOKEN_LAYERS = [
    "layers.0.to_q",
    "layers.0.to_k",
    "layers.0.to_out",
    "layers.1.to_q",
    "layers.1.to_out",
]
OWN_TOKEN_LAYERS += ["last"]
CONTEXT_LAYERS = ["layers.1.to_k", "layers.1.to_v"]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(16, 16) for _ in range(4))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        keys = x if context is None else context
        key_mask = mask if context is None else context_mask
        pairs = self.to_q(x) @ self.to_k(keys).mT
        if key_mask is not None:
            pairs = pairs.masked_fill(~key_mask[:, None], -torch.inf)
        return x + self.to_out(pairs.softmax(-1) @ self.to_v(keys))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.last = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 4)
        self.layers = nn.ModuleList([Attention(), Attention()])

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        x = self.layers[0](self.words(x), mask=mask)
        x = self.layers[1](x, context=context, mask=mask, context_mask=context_mask)
        return self.last(x)


@pytest.mark.parametrize(
    ("masked_inputs", "steps"),
    [
        *((masked_inputs, n) for masked_inputs in ("context", "both") for n in (5, 7, 9)),
        ("own", 5),
        ("own", 9),
    ],
)
def test_own_mask_and_context_mask_apply_to_their_layers(masked_inputs: str, steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    key_mask = torch.arange(steps) < LENGTHS.flip(0)[:, None]
    masks = {"mask": KEPT} if masked_inputs != "context" else {}
    masks |= {"context_mask": key_mask} if masked_inputs != "own" else {}
    data = [
        {"x": b["ids"], "context": torch.randn(3, steps, 16, generator=generator), **masks}
        for b in batches()
    ]
    model = Decoder().eval()
    before = hooks_of(model)
    result = run(
        model, data, lora(tau=1.0, target_modules=OWN_TOKEN_LAYERS + CONTEXT_LAYERS), **EXACT
    )
    assert hooks_of(model) == before
    kept = dict.fromkeys(OWN_TOKEN_LAYERS, masks.get("mask"))
    kept |= dict.fromkeys(CONTEXT_LAYERS, masks.get("context_mask"))
    for name, x in layer_inputs(model, data, list(kept), masked=False).items():
        mask = kept[name]
        x = x if mask is None else x[mask.flatten().repeat(4)]
        assert lost(result.components[name], x) < 1e-6, name


class EncoderDecoder(nn.Module):
    """Passes its decoder a mask of the decoder's tokens, and none of the encoder's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.source, self.decoder = nn.Embedding(96, 16), Attention(), Decoder()

    def forward(self, source: Tensor, ids: Tensor) -> Tensor:
        context = self.source(self.words(source), mask=source != 0)
        return self.decoder(ids, context, mask=ids != 0)


@pytest.mark.parametrize("steps", [5, 9])
def test_encoder_mask_applies_to_the_context_of_a_decoder_without_it(steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    key_mask = torch.arange(steps) < (steps * LENGTHS.flip(0)[:, None] / 7).ceil()
    data = [
        {
            "source": torch.randint(1, 96, (3, steps), generator=generator) * key_mask,
            "ids": b["ids"],
        }
        for b in batches()
    ]
    kept = {f"decoder.{name}": KEPT for name in OWN_TOKEN_LAYERS} | {
        f"decoder.{n}": key_mask for n in CONTEXT_LAYERS
    }
    kept |= {"source.to_k": key_mask, "source.to_out": key_mask}
    model = EncoderDecoder().eval()
    result = run(model, data, lora(tau=1.0, target_modules=list(kept)), **EXACT)
    for name, x in layer_inputs(model, data, list(kept)).items():
        x = x[kept[name].flatten().repeat(4)]
        assert lost(result.components[name], x) < 1e-6, name


class Prefixed(nn.Module):
    """Reads vectors in front of a text, both with padding."""

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Attention(), Attention()])

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x, mask=mask)
            return x

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.layers, self.last = nn.Embedding(96, 16), self.Blocks(), nn.Linear(16, 4)

    def forward(self, x: Tensor, mask: Tensor, front: Tensor, front_mask: Tensor) -> Tensor:
        x = torch.cat([front, self.words(x)], 1)
        return self.last(self.layers(x, torch.cat([front_mask, mask], 1)))


def test_masks_of_a_prefix_and_of_the_text_both_apply() -> None:
    generator = torch.Generator().manual_seed(1)
    front = torch.arange(4) < torch.tensor([2, 4, 1])[:, None]
    data = [
        {"x": b["ids"], "mask": KEPT, "front": torch.randn(3, 4, 16, generator=generator)}
        | {"front_mask": front}
        for b in batches()
    ]
    names = [f"layers.blocks.{i}.{part}" for i in range(2) for part in ("to_q", "to_out")]
    model, rows = Prefixed().eval(), torch.cat([front, KEPT], 1).flatten().repeat(4)
    result = run(model, data, lora(tau=1.0, target_modules=[*names, "last"]), **EXACT)
    for name, x in layer_inputs(model, data, [*names, "last"], masked=False).items():
        assert lost(result.components[name], x[rows]) < 1e-6, name
    assert result.tokens == int(rows.sum())
