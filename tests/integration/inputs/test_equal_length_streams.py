"""A mask of one stream does not apply to another one with as many tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from integration.conftest import VOCABULARY, layer_inputs, lora, lost, make_bert, run
from integration.inputs.padding_blocks import EXACT, KEPT, Block, KeepBlock, batches, check_kept


class EncoderDecoder(nn.Module):
    """Pads sources and targets to the same length, and masks the encoder only."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        options: Any = {"dropout": 0.0, "batch_first": True}
        self.kind, self.words = kind, nn.Embedding(VOCABULARY, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, **options)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoderLayer(16, 2, 24, **options)
        self.asks = CrossLayer()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.encoder(self.words(ids), src_key_padding_mask=ids == 0)
        x = x * ids.ne(0)[..., None]  # torch leaves the outputs at padding undefined
        if self.kind == "torch":
            return self.decoder(self.words(ids.flip(1)), x)
        return self.asks(self.words(ids.flip(1)), x, dec_enc_attn_mask=ids.ne(0)[:, None])


class CrossLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.linear1 = CrossAttention(), nn.Linear(16, 16)

    def forward(self, x: Tensor, enc_output: Tensor, dec_enc_attn_mask: Tensor) -> Tensor:
        return self.linear1(self.attention(x, enc_output, enc_output, dec_enc_attn_mask))


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear2 = nn.Linear(16, 16)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (self.linear2(q) @ k.mT).masked_fill(~mask, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("kind", ["torch", "other names"])
def test_encoder_mask_does_not_mask_a_decoder_of_equal_length(kind: str) -> None:
    model = EncoderDecoder(kind).eval()
    whole = ["decoder.linear1", "decoder.linear2"]
    whole = whole if kind == "torch" else ["asks.linear1", "asks.attention.linear2"]
    kept = ["encoder.layers.0.linear2"]
    result = run(model, batches(), lora(tau=1.0, target_modules=whole + kept), **EXACT)
    for name, x in layer_inputs(model, batches(), whole + kept).items():
        x = x[KEPT.flatten().repeat(4)] if name in kept else x
        assert lost(result.components[name], x) < 1e-6, name


def test_text_mask_does_not_mask_images_of_equal_length() -> None:
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    size["num_attention_heads"] = 2
    ends = {"bos_token_id": 1, "eos_token_id": 1}
    text = {**size, **ends, "vocab_size": VOCABULARY, "max_position_embeddings": 5}
    images = {**size, "image_size": 8, "patch_size": 4}  # 4 patches and a class token

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.clip = CLIPModel(CLIPConfig(text_config=text, vision_config=images))

        def forward(self, ids: Tensor, images: Tensor) -> Tensor:
            text_inputs = {"input_ids": ids, "attention_mask": ids.ne(0).long()}
            return self.clip(pixel_values=images, **text_inputs).logits_per_text

    data = [{"ids": b["ids"][:, :5], "images": torch.randn(3, 3, 8, 8)} for b in batches()]
    names = [f"clip.{kind}_model.encoder.layers.0.mlp.fc1" for kind in ("text", "vision")]
    model = Model().eval()
    result = run(model, data, lora(tau=1.0, target_modules=names), **EXACT)
    for name, x in layer_inputs(model, data, names).items():
        x = x[KEPT[:, :5].flatten().repeat(4)] if "text" in name else x
        assert lost(result.components[name], x) < 1e-6, name


class MaskedIdentity(nn.Module):
    def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        return x + 1


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_mask_of_a_tower_applies_to_a_text_head_and_not_to_a_vision_head(tower: str) -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.told = nn.Embedding(VOCABULARY, 16), MaskedIdentity()
            self.add_module(f"{tower}_head", nn.Linear(16, 16))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.told(self.words(ids), padding_mask=ids == 0)
            return self.get_submodule(f"{tower}_head")(x)

    config = lora(tau=1.0, target_modules=[f"{tower}_head"])
    whole = tower == "vision"
    tokens = run(Towers().eval(), batches(), config, **EXACT).tokens
    assert tokens == 4 * (KEPT.numel() if whole else int(KEPT.sum()))


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_mask_of_a_tower_applies_to_text_heads_inside_a_part_with_lengths(tower: str) -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.told = nn.Embedding(VOCABULARY, 16), MaskedIdentity()
            self.add_module(f"{tower}_head", nn.Linear(16, 16))

        def forward(self, sound: Tensor, lengths: Tensor, ids: Tensor) -> Tensor:
            x = self.told(self.words(ids), padding_mask=ids == 0)
            return self.get_submodule(f"{tower}_head")(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.towers = Towers()

        def forward(self, ids: Tensor) -> Tensor:
            return self.towers(torch.zeros(3, 9, 16), torch.tensor([9, 3, 5]), ids)

    config = lora(tau=1.0, target_modules=[f"{tower}_head"])
    tokens = run(Model().eval(), batches(), config, **EXACT).tokens
    assert tokens == 4 * (KEPT.numel() if tower == "vision" else int(KEPT.sum()))


def test_layer_behind_a_masked_audio_layer_is_masked() -> None:
    class AudioTower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.audio_layer, self.audio_head = MaskedIdentity(), nn.Linear(16, 16)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            padding = torch.arange(x.shape[1]) >= lengths[:, None]
            return self.audio_head(self.audio_layer(x, padding_mask=padding))

    data = [{"x": torch.randn(3, 7, 16), "lengths": KEPT.sum(1)} for _ in range(4)]
    config = lora(tau=1.0, target_modules=["audio_head"])
    assert run(AudioTower().eval(), data, config, **EXACT).tokens == 4 * int(KEPT.sum())


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.parametrize("steps", [4, 7])
def test_context_mask_of_a_part_applies_only_to_its_context(steps: int) -> None:
    class ContextBlock(Block):
        def __init__(self) -> None:
            super().__init__()
            self.keys, self.inner = nn.Linear(16, 16), KeepBlock()

        def forward(self, x: Tensor, context: Tensor, context_mask: Tensor) -> Tensor:
            x = self.inner(x, mask=KEPT.flip(0)[:, :steps])  # of its own tokens
            return self.run(x, self.keys(context), ~context_mask)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words = nn.Embedding(VOCABULARY, 16)
            self.encoder, self.decoder = KeepBlock(), ContextBlock()

        def forward(self, source: Tensor, target: Tensor, mask: Tensor) -> Tensor:
            context = self.encoder(self.words(source), mask=mask)
            return self.decoder(self.words(target), context=context, context_mask=mask)

    data = [{"source": b["ids"], "target": b["ids"].flip(0)[:, :steps]} for b in batches()]
    data = [{**b, "mask": KEPT} for b in data]
    names = ["encoder.before", "encoder.behind", "decoder.before", "decoder.behind"]
    names += ["decoder.inner.before", "decoder.inner.behind"]
    names += ["decoder.keys"] if steps != 7 else []  # ambiguous with equal lengths
    model = Model().eval()
    result = run(model, data, lora(tau=1.0, target_modules=names), **EXACT)
    for name, x in layer_inputs(model, data, names).items():
        behind_inner = name in ("decoder.before", "decoder.behind")
        own = KEPT.flip(0)[:, :steps] if "inner" in name or behind_inner else KEPT
        whole = steps == 7 and behind_inner
        x = x if whole else x[own.flatten().repeat(4)]
        assert lost(result.components[name], x) < 1e-6, name


class WordReader(nn.Module):
    """Reads words and spans of a text encoded by a transformers model, as GLiNER."""

    def __init__(self) -> None:
        super().__init__()
        self.bert, self.down, self.reads = make_bert(), nn.Linear(32, 16), KeepBlock()
        self.behind, self.spans = nn.Linear(16, 16), nn.Linear(32, 16)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, lengths: Tensor, span_mask: Tensor
    ) -> Tensor:
        x = self.down(self.bert(input_ids, attention_mask=attention_mask).last_hidden_state)
        words = x[:, 1:5]
        words = self.reads(words, mask=torch.arange(4) < lengths[:, None])
        words = self.behind(words)
        first, last = torch.triu_indices(4, 4)
        return self.spans(torch.cat([words[:, first], words[:, last]], -1))


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.parametrize("use_forward_fn", [False, True], ids=["default", "forward_fn"])
def test_words_and_spans_have_their_own_masks_beside_the_batch_mask(use_forward_fn: bool) -> None:
    lengths = torch.tensor([4, 3, 1])
    words = torch.arange(4) < lengths[:, None]
    spans = words[:, torch.triu_indices(4, 4)[1]]
    given = {"attention_mask": KEPT.long(), "lengths": lengths, "span_mask": spans.long()}
    data = [{"input_ids": batch["ids"], **given} for batch in batches()]
    kept = {"bert.encoder.layer.0.intermediate.dense": KEPT, "down": KEPT, "spans": spans}
    kept |= {"reads.before": words, "reads.behind": words, "behind": words}
    model = WordReader().eval()
    options = {**EXACT, "forward_fn": lambda m, b: m(**b)} if use_forward_fn else EXACT
    result = run(model, data, lora(tau=1.0, target_modules=list(kept)), **options)
    for name, x in layer_inputs(model, data, list(kept), False).items():
        assert lost(result.components[name], x[kept[name].flatten().repeat(4)]) < 1e-6, name


def test_mask_with_as_many_samples_as_tokens_applies() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.block = nn.Embedding(VOCABULARY, 16), KeepBlock()

        def forward(self, ids: Tensor) -> Tensor:
            return self.block(self.words(ids), ids.ne(0))

    data = [{"ids": batch["ids"][[1, 0, 2], :3]} for batch in batches()]
    result = run(Model().eval(), data, lora(target_modules=["block.before"]), **EXACT)
    assert result.tokens == 4 * (3 + 3 + 2)


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.parametrize("steps", [4, 7])
def test_source_and_target_masks_apply_to_their_streams(steps: int) -> None:
    class DecoderBlock(Block):
        def __init__(self) -> None:
            super().__init__()
            self.keys = nn.Linear(16, 16)

        def forward(self, x: Tensor, memory: Tensor, src_mask: Tensor, tgt_mask: Tensor) -> Tensor:
            return self.run(x, self.keys(memory), ~src_mask[:, 0])

    class Model(nn.Module):  # as in The Annotated Transformer
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words = nn.Embedding(VOCABULARY, 16)
            self.encoder, self.decoder = KeepBlock(), DecoderBlock()

        def forward(self, src: Tensor, tgt: Tensor, src_mask: Tensor, tgt_mask: Tensor) -> Tensor:
            memory = self.encoder(self.words(src), src_mask)
            return self.decoder(self.words(tgt), memory, src_mask, tgt_mask)

    targets = KEPT.flip(0)[:, :steps]
    pairs = targets[:, None] & torch.ones(steps, steps, dtype=torch.bool).tril()
    masks = {"src_mask": KEPT[:, None], "tgt_mask": pairs}
    data = [{"src": b["ids"], "tgt": b["ids"].flip(0)[:, :steps], **masks} for b in batches()]
    kept = {"encoder.before": KEPT, "encoder.behind": KEPT}
    kept |= {"decoder.before": targets, "decoder.behind": targets}
    kept |= {"decoder.keys": KEPT} if steps != 7 else {}  # ambiguous with equal lengths
    model = Model().eval()
    result = run(model, data, lora(tau=1.0, target_modules=list(kept)), **EXACT)
    for name, x in layer_inputs(model, data, list(kept), False).items():
        assert lost(result.components[name], x[kept[name].flatten().repeat(4)]) < 1e-6, name


@pytest.mark.parametrize("kind", ["tokens", "row", "pairs"])
def test_text_without_padding_is_whole_after_a_padded_one(kind: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words = nn.Embedding(VOCABULARY, 16)
            self.block, self.behind = KeepBlock(), KeepBlock()

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return self.encode(first).sum() + self.encode(second).sum()

        def encode(self, ids: Tensor) -> Tensor:
            attended = ids.ne(0)
            x = self.block(self.words(ids), attended[:, None] if kind == "row" else attended)
            if kind == "pairs":  # where padding attends to itself, too
                return self.behind(x, torch.ones(len(x), 7, 7, dtype=torch.bool).tril())
            return self.behind(x, attended)

    data = [{"first": b["ids"], "second": b["ids"].clamp(min=1)} for b in batches()]
    names, model = ["block.behind", "behind.before"], Model().eval()
    kept = torch.stack([KEPT, torch.ones_like(KEPT)]).flatten().repeat(4)
    result = run(model, data, lora(tau=1.0, target_modules=names), **EXACT)
    for name, x in layer_inputs(model, data, names).items():
        assert lost(result.components[name], x[kept]) < 1e-6, name


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.parametrize("mask_in_batch", [True, False])
def test_layer_behind_words_keeps_their_mask_after_spans(mask_in_batch: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.text = nn.Embedding(VOCABULARY, 16)
            self.reads, self.spans = KeepBlock(), KeepBlock()
            self.behind, self.vision_head = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(
            self, input_ids: Tensor, lengths: Tensor, attention_mask: Tensor | None = None
        ) -> Tensor:
            attended = torch.arange(4) < lengths[:, None]
            words = self.reads(self.text(input_ids)[:, 1:5], attended)
            spans = self.spans(words[:, :3] + words[:, 1:], attended[:, 1:])
            images = self.vision_head(self.text.weight[:12].view(3, 4, 16))  # as many as words
            return self.behind(words).sum() + spans.sum() + images.sum()

    lengths = torch.tensor([4, 3, 2])
    attended = {"attention_mask": KEPT.long()} if mask_in_batch else {}
    data = [{"input_ids": b["ids"], "lengths": lengths, **attended} for b in batches()]
    words = torch.arange(4) < lengths[:, None]
    kept = {"behind": words, "spans.before": words[:, 1:]}
    kept |= {} if mask_in_batch else {"vision_head": torch.ones(3, 4, dtype=torch.bool)}
    model = Model().eval()
    result = run(model, data, lora(tau=1.0, target_modules=list(kept)), **EXACT)
    for name, x in layer_inputs(model, data, list(kept), False).items():
        assert lost(result.components[name], x[kept[name].flatten().repeat(4)]) < 1e-6, name


@pytest.mark.filterwarnings("ignore:.* seem to be padding:eva_kernels.EvaWarning")
def test_lengths_of_keys_do_not_mask_queries() -> None:
    """As d2l's attention names them, for queries and keys of as many tokens."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W_q, self.W_k = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(
            self, queries: Tensor, keys: Tensor, values: Tensor, valid_lens: Tensor
        ) -> Tensor:
            scores = self.W_q(queries) @ self.W_k(keys).mT
            hidden = torch.arange(keys.shape[1]) >= valid_lens[:, None, None]
            return scores.masked_fill(hidden, -1e6).softmax(-1) @ values

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.attention = nn.Embedding(VOCABULARY, 16), Attention()

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            x, lengths = self.words(source), (source != 0).sum(1)
            return self.attention(self.words(target), x, x, lengths)

    ids = torch.randint(1, VOCABULARY, (4, *KEPT.shape))
    data = [{"source": b["ids"], "target": y} for b, y in zip(batches(), ids, strict=True)]
    check_kept(Model(), data, {"attention.W_q": torch.ones_like(KEPT)})


def test_mask_of_keys_applies_to_keys_that_are_all_that_a_part_reads() -> None:
    class Keys(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(16, 16)

        def forward(self, keys: Tensor, mask: Tensor) -> Tensor:
            return self.project(keys) * mask[..., None]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.keys = nn.Embedding(VOCABULARY, 16), Keys()

        def forward(self, ids: Tensor) -> Tensor:
            return self.keys(self.words(ids), ids != 0)

    check_kept(Model(), batches(), {"keys.project": KEPT})
