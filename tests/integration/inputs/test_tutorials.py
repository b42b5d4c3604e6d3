"""Models that users write after tutorials, with the masks of these."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from integration.conftest import VOCABULARY, layer_inputs, lora, lost, run
from integration.inputs.padding_blocks import EXACT, KEPT, batches, check_kept


class HidingAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W_Q, self.W_K = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, Q: Tensor, K: Tensor, attn_mask: Tensor) -> Tensor:
        scores = self.W_Q(Q) @ self.W_K(K).mT
        return Q + scores.masked_fill(attn_mask, -1e9).softmax(-1) @ K


def hide_padding(queries: Tensor, keys: Tensor) -> Tensor:
    return (keys == 0)[:, None].expand(-1, queries.shape[1], -1)


class EncoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.last = HidingAttention(), nn.Linear(16, 16)

    def forward(self, enc_inputs: Tensor, enc_self_attn_mask: Tensor) -> Tensor:
        return self.last(self.attention(enc_inputs, enc_inputs, enc_self_attn_mask))


class DecoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.other, self.last = HidingAttention(), HidingAttention(), nn.Linear(16, 16)

    def forward(
        self, dec_inputs: Tensor, enc_outputs: Tensor, dec_self_attn_mask: Tensor, cross: Tensor
    ) -> Tensor:
        x = self.own(dec_inputs, dec_inputs, dec_self_attn_mask)
        return self.last(self.other(x, enc_outputs, cross))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(VOCABULARY, 16), EncoderLayer()

    def forward(self, enc_inputs: Tensor) -> Tensor:
        return self.layer(self.words(enc_inputs), hide_padding(enc_inputs, enc_inputs))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(VOCABULARY, 16), DecoderLayer()

    def forward(self, dec_inputs: Tensor, enc_inputs: Tensor, enc_outputs: Tensor) -> Tensor:
        own = hide_padding(dec_inputs, dec_inputs)
        causal = torch.ones_like(own[0]).triu(1)
        cross = hide_padding(dec_inputs, enc_inputs)
        return self.layer(self.words(dec_inputs), enc_outputs, own | causal, cross)


def test_pair_masks_true_of_what_is_hidden_apply_to_encoder_and_decoder() -> None:
    """As in graykode's and wmathor's tutorials: made in forward, passed to each layer."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.decoder = Encoder(), Decoder()
            self.projection = nn.Linear(16, 5)

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            return self.projection(self.decoder(target, source, self.encoder(source)))

    data = [{"source": b["ids"], "target": b["ids"].flip(0)[:, :5]} for b in batches()]
    source = ["encoder.layer.attention.W_Q", "encoder.layer.last", "decoder.layer.other.W_K"]
    target = ["decoder.layer.own.W_K", "decoder.layer.other.W_Q", "decoder.layer.last"]
    names, model = [*source, *target, "projection"], Model().eval()
    result = run(model, data, lora(tau=1.0, target_modules=names), **EXACT)
    for name, x in layer_inputs(model, data, names).items():
        kept = KEPT if name in source else KEPT.flip(0)[:, :5]
        assert lost(result.components[name], x[kept.flatten().repeat(4)]) < 1e-6, name


def test_masks_apply_where_forward_of_parts_is_called_directly() -> None:
    """As in codertimo's BERT, and BERT4Rec after it."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(16, 16)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.last(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.block, self.head = nn.Embedding(VOCABULARY, 16), Block(), Block()

        def forward(self, ids: Tensor) -> Tensor:
            mask = (ids > 0)[:, None].repeat(1, ids.shape[1], 1)[:, None]
            return self.head.last(self.block.forward(self.words(ids), mask))

    data, names = batches(), ["block.last", "head.last"]
    model = Model().eval()
    result = run(model, data, lora(tau=1.0, target_modules=names), **EXACT)
    for name, x in layer_inputs(model, data, names).items():
        assert lost(result.components[name], x[KEPT.flatten().repeat(4)]) < 1e-6, name
    assert not any("forward" in vars(part) for part in model.modules())


def test_mask_with_an_axis_of_features_applies() -> None:
    """(B, N, 1), as in Deep Sets: it is multiplied with the features."""

    class DeepSet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.phi, self.rho = nn.Linear(16, 16), nn.Linear(16, 1)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.rho((self.phi(x) * mask).sum(1))

    generator = torch.Generator().manual_seed(0)
    sets = [torch.randn(3, 7, 16, generator=generator) for _ in range(4)]
    for dtype in (torch.bool, torch.float32):
        data = [(x, KEPT[..., None].to(dtype)) for x in sets]
        result = run(DeepSet(), data, lora(tau=1.0, target_modules=["phi"]), **EXACT)
        assert lost(result.components["phi"], torch.cat([x[KEPT] for x in sets]).double()) < 1e-6


@pytest.mark.parametrize("outside", ["head of a model", "all of a model without forward"])
def test_masks_apply_to_a_head_that_a_function_calls(outside: str) -> None:
    """As in The Annotated Transformer's loss, and with Umar Jamil's encode, decode and project."""

    class Block(nn.Module):
        def forward(self, x: Tensor, src_mask: Tensor, tgt_mask: Tensor) -> Tensor:
            return x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.block, self.head = (
                nn.Embedding(VOCABULARY, 16),
                Block(),
                nn.Linear(16, 5),
            )

        def forward(self, decoder_input: Tensor, src_mask: Tensor, tgt_mask: Tensor) -> Tensor:
            return self.block(self.words(decoder_input), src_mask, tgt_mask)

    def function(model: Any, batch: dict[str, Tensor]) -> None:
        decode = model if outside == "head of a model" else model.forward
        ids, *masks = (batch[key] for key in ("decoder_input", "encoder_mask", "decoder_mask"))
        model.head(decode(ids, *masks))

    kept, causal = KEPT.flip(0), torch.ones(7, 7).tril()
    masks = {"encoder_mask": KEPT[:, None, None].int()}
    masks["decoder_mask"] = (kept[:, None, None] * causal).int()
    data = [{"decoder_input": b["ids"].flip(0), **masks} for b in batches()]
    model = Model().eval()
    config = lora(tau=1.0, target_modules=["head"])
    result = run(model, data, config, forward_fn=function, **EXACT)
    x = torch.cat([model.words(b["decoder_input"])[kept] for b in data])
    assert lost(result.components["head"], x.detach().double()) < 1e-6


class GraphTransformer(nn.Module):
    """As DiGress': features of nodes and of edges, which are zero beyond a graph's nodes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.nodes, self.edges, self.out = nn.Linear(16, 16), nn.Linear(6, 6), nn.Linear(16, 16)

    def forward(self, X: Tensor, E: Tensor, node_mask: Tensor) -> Tensor:
        scores = self.edges(E).sum(-1).masked_fill(~node_mask.bool()[:, None], -torch.inf)
        return self.out(scores.softmax(-1) @ self.nodes(X))


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_mask_under_a_name_of_ones_own_hides_nodes_and_their_edges(dtype: torch.dtype) -> None:
    generator, pairs = torch.Generator().manual_seed(0), KEPT[:, :, None] & KEPT[:, None]
    data = []
    for _ in range(4):
        nodes = torch.randn(3, 7, 16, generator=generator) * KEPT[..., None]
        edges = torch.randn(3, 7, 7, 6, generator=generator) * pairs[..., None]
        data.append({"X": nodes, "E": edges, "node_mask": KEPT.to(dtype)})
    kept = {"nodes": KEPT, "edges": pairs, "out": KEPT}
    check_kept(GraphTransformer(), data, kept)


NO_MASKS = {
    "of chosen tokens": KEPT & (torch.arange(7) % 2 == 0),
    "that hides words": KEPT.roll(1, 0),
    "that keeps no sample whole": KEPT[1:],
    "of negative numbers": -1.0 * KEPT,
}


@pytest.mark.parametrize("kind", NO_MASKS)
def test_other_masks_under_a_name_of_ones_own_hide_nothing(kind: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(16, 16)

        def forward(self, x: Tensor, chosen_mask: Tensor) -> Tensor:
            return self.last(x)

    x = torch.randn(4, 3, 7, 16, generator=torch.Generator().manual_seed(0)) * KEPT[..., None]
    mask = NO_MASKS[kind]
    data = [{"x": each[-len(mask) :], "chosen_mask": mask} for each in x]
    result = run(Model(), data, lora(tau=1.0, target_modules=["last"]), **EXACT)
    assert result.tokens == 4 * mask.numel()
