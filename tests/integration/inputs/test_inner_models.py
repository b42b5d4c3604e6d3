"""Models inside a user's module are masked by what they are called with, not by the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from integration.conftest import VOCABULARY, layer_inputs, lora, lost, make_bert, run, text_batches
from integration.inputs.padding_blocks import KEPT, KeepBlock, batches

EXACT: dict[str, Any] = {"method": "gram", "max_steps": 4}
TEXTS = text_batches(4)


class Pair(PreTrainedModel):
    """Two texts with an encoder each, in a subclass of ``PreTrainedModel``."""

    config_class, base_model_prefix, _supports_sdpa = BertConfig, "pair", True

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.asked, self.found = BertModel(config), BertModel(config)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, ids: Tensor, mask: Tensor
    ) -> Tensor:
        asked = self.asked(input_ids, attention_mask).pooler_output
        found: Tensor = self.found(ids, mask).pooler_output
        return asked @ found.mT


@pytest.mark.parametrize("length", [24, 17])
def test_two_encoders_in_a_pretrained_model_subclass_use_own_masks(length: int) -> None:
    others = text_batches(4, length=length, seed=1)
    batches = [
        {**b, "ids": o["input_ids"], "mask": o["attention_mask"]}
        for b, o in zip(TEXTS, others, strict=True)
    ]
    model = Pair(make_bert().config).eval()
    result = run(model, batches, lora(target_modules=["output.dense"], tau=1.0), **EXACT)
    for name, x in layer_inputs(model, batches, list(result.components), False).items():
        own = "mask" if name.startswith("found") else "attention_mask"
        kept = torch.cat([batch[own].bool().flatten() for batch in batches])
        assert lost(result.components[name], x[kept]) < 1e-6, name


class Retriever(nn.Module):
    """One encoder for a question and its passages, which are two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = make_bert()

    def forward(self, query: dict[str, Tensor], passage: dict[str, Tensor]) -> Tensor:
        asked = self.encoder(**query).pooler_output
        found: Tensor = self.encoder(**passage).pooler_output
        return asked @ found.mT


@pytest.mark.parametrize("forward_fn", [None, lambda model, pair: model(*pair)])
@pytest.mark.parametrize("kind", [tuple, list])
def test_texts_that_are_positional_arguments_use_own_masks(kind: Any, forward_fn: Any) -> None:
    pairs = list(zip(TEXTS, text_batches(4, seed=1), strict=True))
    config = lora(target_modules=["encoder.layer.0.output.dense"], tau=1.0)
    result = run(Retriever(), map(kind, pairs), config, forward_fn=forward_fn, **EXACT)
    texts = [text for pair in pairs for text in pair]
    kept = torch.cat([text["attention_mask"].bool().flatten() for text in texts])
    for name, components in result.components.items():
        inner = name.removeprefix("encoder.")
        x = layer_inputs(make_bert(), texts, [inner], False)[inner]
        assert lost(components, x[kept]) < 1e-6


class SequenceFirst(nn.Module):
    """A torch encoder layer that takes the sequence dimension first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.words, self.layer = nn.Embedding(VOCABULARY, 32), nn.TransformerEncoderLayer(32, 2, 48)

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None) -> Tensor:
        padding = input_ids == 0 if attention_mask is None else attention_mask == 0
        x: Tensor = self.layer(self.words(input_ids).movedim(1, 0), src_key_padding_mask=padding)
        return x


@pytest.mark.parametrize("masked", [False, True])
def test_label_mask_applies_to_sequence_first_inputs(masked: bool) -> None:
    texts, name = text_batches(4, labels=True), "layer.linear1"
    for batch in texts:
        batch["labels"][:, :4] = -100
        batch["labels"][batch["attention_mask"] == 0] = -100
        batch |= {} if masked else {"input_ids": batch["input_ids"] * batch.pop("attention_mask")}
    model = SequenceFirst().eval()
    result = run(model, texts, lora(target_modules=[name], tau=1.0), **EXACT)
    kept = torch.cat([(batch["labels"] != -100).T.flatten() for batch in texts])
    assert result.tokens == int(kept.sum())
    x = layer_inputs(model, texts, [name], False)[name]
    assert lost(result.components[name], x[kept]) < 1e-6


class Captioner(nn.Module):
    """A text decoder that attends to images with as many patches as it has tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        fields = {**sizes, "intermediate_size": 48, "is_decoder": True, "add_cross_attention": True}
        self.text_decoder = BertModel(BertConfig(vocab_size=VOCABULARY, **fields))
        self.vision, self.patches = make_bert(), nn.Linear(12, 32)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Any:
        images = self.vision(inputs_embeds=self.patches(pixel_values.flatten(2))).last_hidden_state
        return self.text_decoder(input_ids, attention_mask.bool(), encoder_hidden_states=images)


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
def test_text_mask_in_another_dtype_does_not_mask_image_keys() -> None:
    """The batch has images, but the inner model that receives the mask does not."""
    torch.manual_seed(0)
    batches = [{**batch, "pixel_values": torch.randn(4, 24, 3, 2, 2)} for batch in TEXTS]
    model, name = Captioner().eval(), "text_decoder.encoder.layer.0.crossattention.self.key"
    result = run(model, batches, lora(target_modules=[name], tau=1.0), **EXACT)
    assert result.tokens == 4 * 4 * 24
    x = layer_inputs(model, batches, [name], False)[name]
    assert lost(result.components[name], x) < 1e-6


class PrefixReader(nn.TransformerEncoderLayer):
    """Reads the first tokens of its samples, of which there may be none."""

    def __init__(self) -> None:
        super().__init__(32, 2, 48, batch_first=True)
        self.begin = nn.Linear(32, 4)

    def forward(self, src: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        x: Tensor = self.begin(src[:, :3])
        return x


@pytest.mark.filterwarnings("ignore:1 layer was never called with a token that counts")
def test_inner_layer_called_without_samples() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(VOCABULARY, 32)
            self.other, self.chosen = make_bert(), PrefixReader()

        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Any = None) -> Tensor:
            self.other(input_ids, attention_mask)
            padding = attention_mask[:0] == 0
            x: Tensor = self.chosen(self.words(input_ids[:0]), src_key_padding_mask=padding)
            return x

    config = lora(target_modules=["query", "begin"], tau=1.0)
    result = run(Model(), text_batches(4, labels=True), config, **EXACT)
    assert result.tokens == sum(int(batch["attention_mask"].sum()) for batch in TEXTS)


class Twice(nn.Module):
    """One text in two layers with different masks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.words = nn.Embedding(VOCABULARY, 32)
        self.whole, self.end = (
            nn.TransformerEncoderLayer(32, 2, 48, batch_first=True) for _ in range(2)
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor, end: Tensor) -> Tensor:
        x = self.words(input_ids)
        whole: Tensor = self.whole(x, src_key_padding_mask=attention_mask == 0)
        return whole + self.end(x, src_key_padding_mask=~end)


@pytest.mark.parametrize("later", [False, True])
def test_layers_with_one_input_under_different_masks(later: bool) -> None:
    """Also where the first masks are equal, so that the layers seem to share their input."""
    model, names = Twice().eval(), ["whole.self_attn", "end.self_attn"]
    batches: list[dict[str, Tensor]] = []
    for batch in TEXTS:
        begin = 0 if later and not batches else 5
        end = batch["attention_mask"].bool() & (torch.arange(24) >= begin)
        batches.append({**batch, "end": end})
    result = run(model, batches, lora(target_modules=names, tau=1.0), **EXACT)
    x = torch.cat([model.words(batch["input_ids"]).detach().flatten(0, 1) for batch in batches])
    for name, own in zip(names, ("attention_mask", "end"), strict=True):
        kept = torch.cat([batch[own].bool().flatten() for batch in batches])
        assert lost(result.components[name], x[kept]) < 1e-6, name


class TwoDecoders(nn.Module):
    """Two decoders that attend to one tensor under different masks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        fields = {**sizes, "intermediate_size": 48, "is_decoder": True, "add_cross_attention": True}
        config = BertConfig(vocab_size=VOCABULARY, **fields)
        self.first, self.second = BertModel(config), BertModel(config)

    def forward(self, ids: Tensor, features: Tensor, begin: Tensor, end: Tensor) -> None:
        for part, mask in ((self.first, begin), (self.second, end)):
            part(ids, encoder_hidden_states=features, encoder_attention_mask=mask)


def test_decoders_with_one_context_under_different_masks() -> None:
    torch.manual_seed(0)
    positions, batches = torch.arange(11).expand(4, -1), []
    for batch in TEXTS:
        masks = {"begin": (positions < 7).long(), "end": (positions > 3).long()}
        batches.append({"ids": batch["input_ids"], "features": torch.randn(4, 11, 32), **masks})
    model, name = TwoDecoders().eval(), "encoder.layer.0.crossattention.self.key"
    names = [f"first.{name}", f"second.{name}"]
    result = run(model, batches, lora(target_modules=names, tau=1.0), **EXACT)
    for layer, own in zip(names, ("begin", "end"), strict=True):
        kept = torch.cat([batch["features"][batch[own] > 0] for batch in batches])
        assert lost(result.components[layer], kept) < 1e-6, layer


class EncoderDecoder(nn.Module):
    """An encoder-decoder, T5 or a custom one, that receives the mask of its source."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        torch.manual_seed(7)
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}
        config = T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes)
        self.both = CustomDecoder() if own else T5ForConditionalGeneration(config)
        self.head = nn.Linear(32, 4)

    def forward(self, **batch: Tensor) -> Any:
        return self.head(self.both(**batch)[-1])  # T5 returns the states of its encoder last


class CustomDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.reader = nn.Embedding(VOCABULARY, 32), CrossBlock()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        decoder_input_ids: Tensor,
        decoder_attention_mask: Tensor,
    ) -> tuple[Tensor]:
        source = self.words(input_ids)
        return (self.reader(self.words(decoder_input_ids), source, attention_mask),)


class CrossBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.across = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(
        self, x: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor
    ) -> Tensor:
        kept = encoder_attention_mask[..., None]
        read = (self.across(encoder_hidden_states) * kept).sum(1, keepdim=True)
        return torch.tanh(self.up(x)) + read


@pytest.mark.parametrize("own", [False, True], ids=["t5", "own"])
def test_decoder_keeps_its_mask_beside_the_mask_of_the_source(own: bool) -> None:
    target_mask = torch.arange(9) < torch.tensor([9, 3, 6, 4])[:, None]
    model, batches, reference_batches = EncoderDecoder(own).eval(), [], []
    for batch in TEXTS:
        ids = batch["input_ids"][:, :9]
        given = {"decoder_input_ids": ids, "decoder_attention_mask": target_mask.long()}
        labels = ids.masked_fill(~target_mask, -100)
        batches.append({**batch, **(given if own else {"labels": labels})})
        ids = ids if own else model.both._shift_right(labels)
        reference_batches.append({**batch, **given, "decoder_input_ids": ids})
    names = ["up", "across"] if own else ["q", "o", "k"]
    result = run(model, batches, lora(target_modules=names, tau=1.0), **EXACT)
    source = torch.cat([b["attention_mask"].bool().flatten() for b in batches])
    for name, x in layer_inputs(model, reference_batches, list(result.components), False).items():
        kept = source if len(x) == len(source) else target_mask.flatten().repeat(len(batches))
        assert lost(result.components[name], x[kept]) < 1e-6, name


class WordLabeller(nn.Module):
    """Compares words of a text with labels that are texts, as GLiNER's bi-encoder."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.text, self.labels, self.down = make_bert(), make_bert(), nn.Linear(32, 16)
        self.reads, self.words, self.head = KeepBlock(), nn.Linear(16, 16), nn.Linear(32, 16)

    def forward(
        self, ids: Tensor, asked: Tensor, lengths: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        mask = ids.ne(0) if attention_mask is None else attention_mask
        x = self.down(self.text(ids, attention_mask=mask).last_hidden_state)
        x = self.reads(x[:, 1:5], torch.arange(4) < lengths[:, None])
        labels = self.labels(asked, attention_mask=asked.ne(0).long()).last_hidden_state
        return self.words(x) @ self.head(labels).mT


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.parametrize("own", [False, True], ids=["default", "forward_fn"])
@pytest.mark.parametrize("masked", [False, True])
def test_masks_of_parts_apply_behind_other_inner_models(masked: bool, own: bool) -> None:
    lengths, asked = torch.tensor([4, 3, 1]), torch.arange(5) < torch.tensor([2, 5, 3])[:, None]
    more = {"lengths": lengths, **({"attention_mask": KEPT.long()} if masked else {})}
    data = [{**b, "asked": b["ids"][:, :5].clamp(min=1) * asked, **more} for b in batches()]
    words = torch.arange(4) < lengths[:, None]
    kept = {"down": KEPT, "reads.before": words, "words": words, "head": asked}
    kept |= {"labels.encoder.layer.0.output.dense": asked}
    options = {**EXACT, "forward_fn": lambda m, b: m(**b)} if own else EXACT
    model = WordLabeller().eval()
    result = run(model, data, lora(tau=1.0, target_modules=list(kept)), **options)
    for name, x in layer_inputs(model, data, list(kept), masked=False).items():
        assert lost(result.components[name], x[kept[name].flatten().repeat(4)]) < 1e-6, name
