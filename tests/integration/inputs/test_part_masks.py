"""Masks passed to parts of a model mark padding, whatever their arguments are called."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import BertModel, T5Config
from transformers.models.t5.modeling_t5 import T5Stack

from eva_peft.inputs import part_masks
from integration.conftest import (
    VOCABULARY,
    hooks_of,
    layer_inputs,
    lora,
    lost,
    make_bert,
    make_llama,
    run,
)
from integration.inputs.padding_blocks import EXACT, KEPT, Block, KeepBlock, batches

NESTED_TENSOR_WARNINGS = [
    "ignore:.*nested tensors is in prototype stage",
    "ignore:enable_nested_tensor is True, but",
]
KEEP_KINDS = ["plain", "rows", "row of all heads", "rows of each"]
KINDS = ["named", "sequence first", "kept", "pairs", "attention", "sequence", "sequences", "any"]
pytestmark = [pytest.mark.filterwarnings(message) for message in NESTED_TENSOR_WARNINGS]


class TextEncoder(nn.Module):
    """Computes its padding mask from token ids or from lengths."""

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


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.parametrize("use_forward_fn", [False, True], ids=["default", "forward_fn"])
@pytest.mark.parametrize(
    "kind", ["ids", "lengths", "one by one", "sequence first", "class token", "decoder"]
)
def test_padding_mask_computed_by_the_model_applies(kind: str, use_forward_fn: bool) -> None:
    model, data = TextEncoder(kind).eval(), batches(kind == "lengths")
    part = {"one by one": "each.1", "decoder": "decoder.layers.0"}.get(kind, "encoder.layers.1")
    kept = pad(KEPT, (1, 0), value=True) if kind == "class token" else KEPT
    rows = (kept.mT if kind == "sequence first" else kept).flatten().repeat(4)
    options = {**EXACT, "forward_fn": lambda m, b: m(*b.values())} if use_forward_fn else EXACT
    names, before = [f"{part}.linear1", f"{part}.linear2"], hooks_of(model)
    result = run(model, data, lora(tau=1.0, target_modules=names), **options)
    assert hooks_of(model) == before
    for name, x in layer_inputs(model, data, names).items():
        assert lost(result.components[name], x[rows]) < 1e-6, name
    assert result.tokens == int(rows.sum())


def test_mask_of_the_batch_takes_precedence() -> None:
    data = [{**b, "attention_mask": KEPT & (torch.arange(7) > 0)} for b in batches()]
    name = "encoder.layers.0.linear1"

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
        model(batch["ids"])

    model, config = TextEncoder("ids").eval(), lora(tau=1.0, target_modules=[name])
    result = run(model, data, config, forward_fn=forward, **EXACT)
    assert result.tokens == 4 * int(KEPT[:, 1:].sum())
    whole = run(model, data, config, prepare_model_inputs_fn=None, forward_fn=forward, **EXACT)
    assert whole.tokens == 4 * KEPT.numel()


def test_failed_forward_leaves_no_hooks() -> None:
    class Fails(TextEncoder):
        def forward(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
            super().forward(ids)
            raise KeyError("after all")

    model = Fails("ids")
    before = hooks_of(model)
    with pytest.raises(KeyError, match="after all"):
        run(model, batches(), lora(target_modules=["last"]), **EXACT)
    assert hooks_of(model) == before


class PaddingBlock(Block):
    def forward(self, x: Tensor, self_attn_padding_mask: Tensor | None = None) -> Tensor:
        return self.run(x, None, self_attn_padding_mask)


class KeysBlock(Block):
    def forward(self, x: Tensor, key_padding_mask: Tensor) -> Tensor:  # as in flash-attn
        return self.run(x, None, ~key_padding_mask)


class PairBlock(Block):
    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.run(x, None, attention_mask[:, 0, 0] < 0)


class KwargsBlock(KeepBlock):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # as in performer-pytorch
        return super().forward(*args, **kwargs)


class SequenceBlock(Block):
    def forward(self, x: Tensor, sequence_id: Tensor) -> Tensor:  # as in ESM C and ESM3
        padding = sequence_id < 0 if sequence_id.dtype == torch.long else ~sequence_id
        return self.run(x, None, padding)


class HiddenBlock(Block):
    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        return self.run(x, None, hidden)


class PaddingFinder(nn.Module):
    """Finds the padding among its token ids, and passes a mask to its blocks."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, first = kind, kind != "sequence first"
        self.words = nn.Embedding(VOCABULARY, 16)
        blocks = {
            "kept": KeysBlock,
            "pairs": PairBlock,
            "attention": HiddenBlock,
            "any": KwargsBlock,
        }
        blocks |= {
            "sequence": SequenceBlock,
            "sequences": SequenceBlock,
            **dict.fromkeys(KEEP_KINDS, KeepBlock),
        }
        self.blocks = nn.ModuleList(blocks.get(kind, PaddingBlock)(first) for _ in range(2))
        self.head = nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x, padding = self.words(ids), ids == 0
        x = x.transpose(0, 1) if self.kind == "sequence first" else x
        for block in self.blocks:
            if self.kind in ("kept", "sequence", "plain"):
                x = block(x, ~padding)
            elif self.kind == "sequences":  # two sequences in one row
                x = block(x, (torch.arange(7) > 2).long().masked_fill(padding, -1))
            elif self.kind in ("rows", "any"):
                x = block(x, mask=~padding[:, None])
            elif self.kind in KEEP_KINDS:
                attended = ~padding[:, None, None]
                x = block(x, attended.expand(-1, 1, 7, -1) if "each" in self.kind else attended)
            elif self.kind == "pairs":
                x = block(x, attention_mask=-1e4 * padding[:, None, None].expand(-1, 1, 7, 7))
            else:
                x = block(x, padding)
        return self.head(x)


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.parametrize("kind", [*KEEP_KINDS, *KINDS])
def test_padding_masks_under_other_argument_names_apply(kind: str) -> None:
    model, data = PaddingFinder(kind).eval(), batches()
    # where only the attention is masked, the layer before it was called without a mask
    names = ["blocks.0.behind", "blocks.1.before", "blocks.1.behind", "head"]
    names += (
        [f"blocks.{i}.attention" for i in range(2)] if kind == "attention" else ["blocks.0.before"]
    )
    before = hooks_of(model)
    result = run(model, data, lora(tau=1.0, target_modules=names), **EXACT)
    assert hooks_of(model) == before
    for name, x in layer_inputs(model, data, names).items():
        rows = (KEPT.mT if kind == "sequence first" else KEPT).flatten().repeat(4)
        assert lost(result.components[name], x[rows]) < 1e-6, name
    assert result.tokens == 4 * int(KEPT.sum())


def test_mask_of_a_decoder_in_the_batch_leaves_the_encoders_in_force() -> None:
    class Model(PaddingFinder):
        def forward(self, ids: Tensor, decoder_attention_mask: Tensor) -> Tensor:
            return super().forward(ids)

    data = [{**batch, "decoder_attention_mask": torch.ones(3, 5)} for batch in batches()]
    config = lora(tau=1.0, target_modules=["before"])
    assert run(Model("plain").eval(), data, config, **EXACT).tokens == 4 * int(KEPT.sum())


@pytest.mark.filterwarnings("ignore:.* seem to be padding:eva_kernels.EvaWarning")
def test_padding_of_keys_does_not_mask_queries() -> None:
    class CrossBlock(Block):
        def forward(self, x: Tensor, keys: Tensor, padding: Tensor) -> Tensor:
            return self.run(x, keys, padding)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.looks = nn.Embedding(VOCABULARY, 16), CrossBlock()

        def forward(self, ids: Tensor) -> Tensor:
            return self.looks(self.words(ids.flip(1)), self.words(ids), ids == 0)

    model, names = Model().eval(), ["looks.before", "looks.behind"]
    result = run(model, batches(), lora(tau=1.0, target_modules=names), **EXACT)
    for name, x in layer_inputs(model, batches(), names).items():
        assert lost(result.components[name], x) < 1e-6, name
    assert result.tokens == 4 * KEPT.numel()


class Classifier(nn.Module):
    """A transformers model in a user's module, which computes the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.bert, self.head = make_bert(), nn.Linear(32, 3)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = ids.ne(0) if mask is None else mask
        return self.head(self.bert(ids, attention_mask=mask).last_hidden_state)


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.parametrize("mask_in_batch", [False, True])
def test_mask_passed_to_an_inner_transformers_model_applies(mask_in_batch: bool) -> None:
    model, data = Classifier().eval(), batches()
    data = [{**b, "mask": KEPT} for b in data] if mask_in_batch else data
    names = ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"]
    names += ["bert.encoder.layer.1.intermediate.dense", "head"]
    result = run(model, data, lora(tau=1.0, target_modules=names), **EXACT)
    for name, x in layer_inputs(model, data, names).items():
        assert lost(result.components[name], x[KEPT.flatten().repeat(4)]) < 1e-6, name
    assert result.tokens == 4 * int(KEPT.sum())


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float])
def test_mask_of_any_type_applies_in_a_model_of_the_users(dtype: torch.dtype) -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.lin = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 4)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return (self.lin(self.words(ids)) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    data = [{**b, "mask": KEPT.to(dtype)} for b in batches()]
    result = run(Mean(), data, lora(tau=1.0, target_modules=["lin"]), **EXACT)
    assert result.tokens == 4 * int(KEPT.sum())


@pytest.mark.parametrize("steps", [3, 7])
def test_encoder_mask_passed_to_a_decoder_masks_only_keys(steps: int) -> None:
    class EncoderDecoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            size = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 1}
            self.config = T5Config(vocab_size=VOCABULARY, use_cache=False, **size)
            self.words = nn.Embedding(VOCABULARY, 16)
            decoder = T5Config.from_dict({**self.config.to_dict(), "is_decoder": True})
            self.encoder, self.decoder = T5Stack(self.config), T5Stack(decoder)

        def forward(self, ids: Tensor) -> Tensor:
            x, mask = self.words(ids), ids.ne(0)
            x = self.encoder(inputs_embeds=x, attention_mask=mask).last_hidden_state
            given = {"encoder_hidden_states": x, "encoder_attention_mask": mask}
            return self.decoder(inputs_embeds=self.words(ids[:, :steps]), **given).last_hidden_state

    model, layer = EncoderDecoder().eval(), "decoder.block.0.layer"
    kept = [f"{layer}.1.EncDecAttention.k", "encoder.block.0.layer.0.SelfAttention.q"]
    whole = [f"{layer}.0.SelfAttention.q", f"{layer}.1.EncDecAttention.q"]
    result = run(model, batches(), lora(tau=1.0, target_modules=kept + whole), **EXACT)
    for name, x in layer_inputs(model, batches(), kept + whole).items():
        x = x[KEPT.flatten().repeat(4)] if name in kept else x
        assert lost(result.components[name], x) < 1e-6, name


@pytest.mark.parametrize(
    "kind",
    [
        "global attention",
        "distances",
        "pairs of as many",
        "plain pairs of as many",
        "to be predicted",
        "plain, to be predicted",
    ],
)
@pytest.mark.filterwarnings("ignore:.* seem to be padding:eva_kernels.EvaWarning")
def test_masks_with_another_meaning_are_ignored(kind: str) -> None:
    class AttentionMask(Block):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.run(x, None, None)

    class PlainMask(Block):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.run(x, None, None)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(VOCABULARY, 16)
            self.block = PlainMask() if "predicted" in kind or "plain" in kind else AttentionMask()

        def forward(self, ids: Tensor) -> Tensor:
            if kind == "pairs of as many":  # as many tokens as samples
                mask = torch.ones(3, 3, dtype=torch.bool).tril()
            elif kind == "plain pairs of as many":  # each with its neighbours
                mask = torch.ones(3, 3, dtype=torch.bool).tril(1).triu(-1)
            elif "to be predicted" in kind:
                mask = torch.arange(7).expand(3, 7) % 3 == 0
                mask = mask if "plain" in kind else mask[:, None]
            elif kind == "distances":  # as in Falcon
                mask = 0.5 * torch.arange(7).expand(3, 1, 7, 7) + torch.full((7, 7), -1e9).triu(1)
            else:  # as in Longformer
                mask = torch.zeros_like(ids).index_fill(1, torch.tensor([0]), 10000)
            return self.block(self.words(ids), mask)

    config = lora(tau=1.0, target_modules=["block.before", "block.behind"])
    ids = [b["ids"][:, : 3 if "pairs" in kind else None] for b in batches()]
    result = run(Model().eval(), [{"ids": each} for each in ids], config, **EXACT)
    assert result.tokens == sum(each.numel() for each in ids)


def test_masks_made_for_each_layer_are_freed() -> None:
    mask_refs: list[weakref.ref[Tensor]] = []
    alive = []

    class AttentionMask(Block):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            alive.append(sum(each() is not None for each in mask_refs))
            return self.run(x, None, None)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(VOCABULARY, 16)
            self.blocks = nn.ModuleList([AttentionMask() for _ in range(4)])

        def forward(self, ids: Tensor) -> Tensor:
            x = self.words(ids)
            for block in self.blocks:
                attended = ids.ne(0)[:, None, None].repeat(1, 1, 7, 1)
                mask_refs.append(weakref.ref(attended))
                x = block(x, attended)
                del attended
            return x

    names = [f"blocks.{i}.before" for i in range(4)]
    result = run(Model().eval(), batches(), lora(tau=1.0, target_modules=names), **EXACT)
    assert set(alive) == {1}
    assert result.tokens == 4 * int(KEPT.sum())


@pytest.mark.parametrize("kind", ["row", "padding_mask", "integers"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.filterwarnings("ignore:.* seem to be padding:eva_kernels.EvaWarning")
def test_ambiguous_mask_is_ignored_where_every_sample_is_padded(kind: str, full: bool) -> None:
    class Row(Block):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.run(x, None, None)

    class Padding(Block):
        def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
            return self.run(x, None, None)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(VOCABULARY, 16)
            self.block = Row() if kind == "row" else Padding()

        def forward(self, ids: Tensor) -> Tensor:  # as in OpenNMT and EnCodec
            kept = ids.ne(0).long() if kind == "integers" else ids.ne(0)
            return self.block(self.words(ids), ids.eq(0)[:, None] if kind == "row" else kept)

    data = batches() if full else [{"ids": pad(b["ids"], (0, 2))} for b in batches()]
    config = lora(tau=1.0, target_modules=["block.before", "block.behind"])
    # no sample is all padding, and integers are zero at padding
    applies = (full and kind == "padding_mask") or kind == "integers"
    expected = KEPT.sum() if applies else data[0]["ids"].numel()
    assert run(Model().eval(), data, config, **EXACT).tokens == 4 * int(expected)


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
def test_no_warning_for_learned_queries_in_a_masked_part() -> None:
    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.asked, self.ask = nn.Parameter(torch.randn(3, 2, 16)), nn.Linear(16, 16)
            self.read = nn.Linear(16, 16)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            scores = self.ask(self.asked) @ self.read(x).mT
            return scores.masked_fill(~attention_mask[:, None], -torch.inf).softmax(-1) @ x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.queries = nn.Embedding(VOCABULARY, 16), Queries()

        def forward(self, ids: Tensor) -> Tensor:
            return self.queries(self.words(ids), ids.ne(0))

    config = lora(tau=1.0, target_modules=["queries.ask", "queries.read"])
    assert run(Model().eval(), batches(), config, **EXACT).tokens == 4 * int(KEPT.sum())


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
def test_padding_of_multi_scale_images_in_one_sequence() -> None:
    class Levels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.project, self.encoder = nn.Linear(3, 16), PairBlock()

        def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> Tensor:
            every = [(pixel_values[..., ::n, ::n], pixel_mask[:, ::n, ::n]) for n in (2, 4)]
            x = torch.cat([pixels.flatten(2).mT for pixels, _ in every], 1)
            keep = torch.cat([mask.flatten(1) for _, mask in every], 1)
            attended = keep[:, None, None].expand(-1, 1, x.shape[1], -1)
            return self.encoder(self.project(x), attention_mask=-1e4 * ~attended)

    mask = (torch.arange(8) < 5).expand(2, 8, 8).clone()
    mask[0] = True
    draws = torch.Generator().manual_seed(0)
    data = [
        {
            "pixel_values": torch.randn(2, 3, 8, 8, generator=draws) * mask[:, None],
            "pixel_mask": mask,
        }
        for _ in range(4)
    ]
    names, model = ["encoder.before", "encoder.behind"], Levels().eval()
    kept = torch.cat([mask[:, ::n, ::n].flatten(1) for n in (2, 4)], 1).flatten()
    result = run(model, data, lora(tau=1.0, target_modules=names), **EXACT)
    for name, x in layer_inputs(model, data, names).items():
        assert lost(result.components[name], x[kept.repeat(4)]) < 1e-6, name
    assert result.tokens == 4 * int(kept.sum())


def test_padding_found_by_a_subclass_of_a_transformers_model() -> None:
    class FindsPadding(BertModel):
        def forward(self, input_ids: Tensor) -> Any:
            return super().forward(input_ids, attention_mask=input_ids.ne(0).long())

    model, name = FindsPadding(make_bert().config).eval(), "encoder.layer.1.output.dense"
    data = [{"input_ids": batch["ids"]} for batch in batches()]
    result = run(model, data, lora(tau=1.0, target_modules=[name]), **EXACT)
    x = layer_inputs(model, data, [name])[name][KEPT.flatten().repeat(4)]
    assert lost(result.components[name], x) < 1e-6


@pytest.mark.parametrize("kind", ["ids", "tensor", "with lengths", "forward_fn"])
def test_no_part_hooks_where_the_batch_has_only_tokens(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooked: list[object] = []
    original = part_masks.CallHooks.registered
    monkeypatch.setattr(
        part_masks.PartMaskHooks, "registered", lambda self: hooked.append(self) or original(self)
    )
    ids = torch.randint(1, VOCABULARY, (2, 6))
    batch: Any = {"tensor": ids, "with lengths": {"input_ids": ids, "lengths": None}}
    batch = batch.get(kind, {"input_ids": ids})
    options: dict[str, Any] = {}
    if kind == "forward_fn":
        options["forward_fn"] = lambda model, batch: model(batch["input_ids"])
    run(make_llama(), [batch], lora(), max_steps=1, **options)
    assert bool(hooked) == (kind in ("with lengths", "forward_fn"))
