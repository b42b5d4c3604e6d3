"""The token mask of a batch, from masks of every kind and from labels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

import eva_kernels
from eva_kernels import EvaValueError
from eva_peft.inputs.batch_mask import mask_of_batch
from eva_peft.model.architecture import Architecture
from integration.conftest import (
    VOCABULARY,
    check_shares,
    layer_inputs,
    lora,
    lost,
    run,
    text_batches,
)


def test_mapping_of_masks_by_kind_of_attention() -> None:
    kept = torch.tensor([[True, True, False], [True, False, False]])
    pairs = (kept[:, None, None, :] & kept[:, None, :, None]).expand(2, 1, 3, 3)
    ids = torch.ones(2, 3, dtype=torch.long)
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": {"full_attention": pairs}}
    found = mask_of_batch(batch, lora()).main
    assert found is not None
    assert torch.equal(found, kept)
    batch["attention_mask"] = {"full_attention": None, "sliding_attention": pairs}
    assert torch.equal(mask_of_batch(batch, lora()).main, kept)
    # a window that is narrower than the text is ignored
    batch["attention_mask"] = {"sliding_attention": pairs[..., 1:], "full_attention": pairs}
    assert torch.equal(mask_of_batch(batch, lora()).main, kept)


def test_attention_mask_and_labels_of_different_lengths_are_rejected() -> None:
    ids = torch.ones(2, 6, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones(2, 5)}
    with pytest.raises(EvaValueError, match=r"labels for .*\(2, 6\).* attention_mask .*\(2, 5\)"):
        mask_of_batch(batch, lora())


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.parametrize("cached", [0, 2])
def test_pair_mask_with_a_cache(cached: int, name: str) -> None:
    """With a static cache, whose end is empty, or behind cached tokens."""
    kept = torch.tensor([[True, True, False], [True, False, False]])
    pairs = torch.zeros(2, 1, 3, 8, dtype=torch.bool)
    pairs[:, 0, :, cached : cached + 3] = kept[:, :, None] & kept[:, None, :]
    past = SimpleNamespace(get_seq_length=lambda: cached)
    batch = {"input_ids": torch.ones(2, 3), "attention_mask": pairs, name: past}
    assert torch.equal(mask_of_batch(batch, lora()).main, kept)
    batch["attention_mask"] = pairs[:, :, :1]  # the same for every token
    assert torch.equal(mask_of_batch(batch, lora()).main, kept)
    for mask, own in ((pairs.float(), kept), (pairs & False, kept & False)):
        batch["attention_mask"] = mask
        assert torch.equal(mask_of_batch(batch, lora()).main, own)
    batch["attention_mask"] = torch.cat([torch.ones(2, cached), kept], dim=1)  # with cached tokens
    assert torch.equal(mask_of_batch(batch, lora()).main, kept)


def test_token_masks_of_any_dtype_and_convention() -> None:
    kept = torch.tensor([[1, 1, 0], [1, 0, 0]])
    ids = torch.ones(2, 3, dtype=torch.long)
    for mask in (kept.bool(), kept, kept.float(), (1 - kept) * -1e4, kept - 1):
        found = mask_of_batch({"input_ids": ids, "attention_mask": mask}, lora()).main
        assert torch.equal(found, kept.bool())
    none = mask_of_batch({"input_ids": ids, "attention_mask": torch.zeros(2, 3)}, lora()).main
    assert none is not None
    assert not none.any()
    # several codes per token
    codes = {"input_ids": ids[..., None].expand(2, 3, 4), "attention_mask": kept}
    assert torch.equal(mask_of_batch(codes, lora()).main, kept.bool())


class Translator(nn.Module):
    """Takes masks of the names and kind that ``torch.nn.Transformer`` takes."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(VOCABULARY, 16)
        self.body = nn.Transformer(16, 2, 1, 1, 24, dropout=0.0, batch_first=batch_first)
        self.last = nn.Linear(16, 8)

    def forward(
        self, src: Tensor, tgt: Tensor,
        src_key_padding_mask: Tensor | None = None, tgt_key_padding_mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        texts = [self.words(ids) for ids in (src, tgt)]
        texts = texts if self.body.batch_first else [x.transpose(0, 1) for x in texts]
        masks = {"src": src_key_padding_mask, "tgt": tgt_key_padding_mask}
        padding = {f"{name}_key_padding_mask": mask for name, mask in masks.items()}
        return self.last(self.body(*texts, memory_key_padding_mask=masks["src"], **padding))


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but")
@pytest.mark.parametrize("given", ["names", "positions", "added", "forward_fn"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_key_padding_masks_apply_to_source_and_target(batch_first: bool, given: str) -> None:
    """Both texts are equally long, so that names of layers tell which one a layer reads."""
    source = torch.arange(7) < torch.tensor([7, 4, 2])[:, None]
    target = torch.arange(7) < torch.tensor([3, 7, 5])[:, None]
    padding = [~source, ~target]
    if given == "added":
        padding = [torch.zeros(3, 7).masked_fill(mask, -torch.inf) for mask in padding]
    parts = [(*torch.randint(VOCABULARY, (2, 3, 7)), *padding) for _ in range(4)]
    names = ["src", "tgt", "src_key_padding_mask", "tgt_key_padding_mask"]
    named = [dict(zip(names, part, strict=True)) for part in parts]
    options: dict[str, Any] = {}
    if given == "forward_fn":
        options = {"forward_fn": lambda m, b: m(b[0], b[1], *b[2:])}
    model = Translator(batch_first).eval()
    layers = {"body.encoder.layers.0.linear1": source, "body.decoder.layers.0.linear2": target}
    config = lora(tau=1.0, target_modules=[*layers, "last"])
    data = parts if given in ("positions", "forward_fn") else named
    result = run(model, data, config, method="gram", max_steps=4, **options)
    inputs = layer_inputs(model, named, [*layers, "last"], masked=False)
    for name, mask in {**layers, "last": target}.items():
        kept = (mask if batch_first else mask.mT).flatten()
        assert lost(result.components[name], inputs[name][kept.repeat(4)]) < 1e-6, name


class AdditiveMask(nn.Module):
    """Adds its mask to the scores of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.project = nn.Embedding(VOCABULARY, 12), nn.Linear(12, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.project(self.embed(input_ids)).mean(-1) + attention_mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_additive_token_mask_applies(side: str) -> None:
    model, batches = AdditiveMask(), text_batches(4)
    for batch in batches:
        kept = batch["attention_mask"].bool()
        batch["kept"] = kept.flip(1) if side == "left" else kept
        batch["attention_mask"] = torch.zeros(kept.shape).masked_fill(~batch["kept"], -torch.inf)
    ids = torch.cat([batch["input_ids"][batch.pop("kept")] for batch in batches])
    config = lora(tau=1.0, target_modules=["project"])
    result = run(model, iter(batches), config, method="gram", max_steps=4)
    assert result.tokens == len(ids)
    check_shares(result, "project", model.embed(ids).detach())


@dataclass
class BoolMask:
    """The attention mask of curated-transformers, True for tokens that are attended to."""

    bool_mask: Tensor


def test_mask_in_a_dataclass_applies() -> None:
    kept = torch.tensor([[True, True, False], [True, False, False]])
    batch = {"piece_ids": kept.long(), "attention_mask": BoolMask(kept[:, None, None])}
    mask = mask_of_batch(batch, lora()).main
    assert mask is not None
    assert torch.equal(mask, kept)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6), (2, 3, 5), (2, 1, 3, 2)])
def test_mask_of_unknown_shape_warns_once(shape: tuple[int, ...]) -> None:
    batch = {"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(shape)}
    warned: set[str] = set()
    message = re.escape(f"an attention_mask of shape {shape} is not understood; every")
    with pytest.warns(eva_kernels.EvaWarning, match=message):
        assert mask_of_batch(batch, lora(), warned=warned).main is None
    assert mask_of_batch(batch, lora(), warned=warned).main is None  # and not again


def test_multi_label_classes_are_no_token_mask() -> None:
    """As many labels as tokens; the config tells what they are."""
    several = SimpleNamespace(problem_type="multi_label_classification")
    labels = torch.tensor([[1, -100, 0], [0, 1, 1]])
    batch = {"input_ids": torch.ones(2, 3), "labels": labels}
    assert mask_of_batch(batch, lora(), Architecture(several)).main is None
    other = {"attention_mask": torch.ones(2, 3), "labels": labels}  # of a model without token ids
    for one in (batch, other):
        assert torch.equal(mask_of_batch(one, lora()).main, labels >= 0)


def test_label_mask_value_masks_a_decoder() -> None:
    """Also with several answers per text."""
    both = Architecture(type("Config", (), {"is_encoder_decoder": True})())
    labels = torch.tensor([[5, 7, 7], [-100, 5, 7], [7, 7, 5]])
    for samples in (3, 2):
        batch = {"attention_mask": torch.ones(samples, 4), "labels": labels}
        decoder = mask_of_batch(batch, lora(label_mask_value=7), both).decoder
        assert decoder is not None
        assert torch.equal(decoder, labels != 7)
    # the model makes its decoder inputs from codes
    codes = Architecture(both.config, takes_decoder_ids=True)
    for found, kept in ((codes, labels != 7), (both, None)):
        decoder = mask_of_batch(
            {"labels": labels[..., None]}, lora(label_mask_value=7), found
        ).decoder
        assert (decoder is None) if kept is None else torch.equal(decoder, kept)


def test_labels_mask_tokens_under_other_names() -> None:
    """As in torchtune, whose batches have no padding mask."""
    labels = torch.tensor([[-100, 5, 7], [-100, 5, -100]])
    tokens, other = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3)
    mask = mask_of_batch({"tokens": tokens, "labels": labels}, lora()).main
    assert mask is not None
    assert torch.equal(mask, labels > 0)
    for batch in ({"x": other, "labels": labels}, {"x": other, "y": tokens, "labels": labels}):
        assert mask_of_batch(batch, lora()).main is None
    assert mask_of_batch({"labels": labels, "x": tokens[:, :2]}, lora()).main is None


def test_one_number_per_sample_does_not_crop_the_token_mask() -> None:
    kept = torch.tensor([[True, True, True], [True, False, False]])
    batch = {"species": torch.tensor([1, 2]), "x": torch.randn(2, 3, 8)}
    mask = mask_of_batch({**batch, "attention_mask": kept[:, None, None]}, lora()).main
    assert mask is not None
    assert torch.equal(mask, kept)


@pytest.mark.parametrize("name", ["decoder_input_ids", "dec_input_ids"])
def test_labels_mask_the_decoder_of_a_custom_model(name: str) -> None:
    """As openai-whisper is run, with as many decoder steps as audio frames."""

    class Speech(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.words = nn.Linear(16, 16), nn.Embedding(VOCABULARY, 16)
            self.decoder = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))

        def decode(self, ids: Tensor, audio_states: Tensor) -> Tensor:
            return self.decoder(self.words(ids) + audio_states.mean(1, keepdim=True))

    kept = torch.arange(7) < torch.tensor([7, 4, 2])[:, None]
    data = []
    for _ in range(4):
        ids = torch.randint(VOCABULARY, (3, 7))
        labels = ids.roll(-1, 1).masked_fill(~kept, -100)
        data.append({"input_ids": torch.randn(3, 7, 16), "labels": labels, name: ids})
    model = Speech().eval()
    config = lora(tau=1.0, target_modules=["encoder", "decoder.0"])
    result = run(
        model,
        data,
        config,
        forward_fn=lambda m, b: m.decode(b[name], m.encoder(b["input_ids"])),
        method="gram",
        max_steps=4,
    )
    frames = torch.cat([batch["input_ids"].flatten(0, 1) for batch in data])
    check_shares(result, "encoder", frames)
    audio_states = [model.encoder(b["input_ids"]).mean(1, keepdim=True) for b in data]
    steps = [(model.words(b[name]) + x)[kept] for b, x in zip(data, audio_states, strict=True)]
    check_shares(result, "decoder.0", torch.cat(steps).detach())


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
def test_labels_mask_a_decoder_that_reads_all_but_the_last_of_its_tokens() -> None:
    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.decoder = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 16)

        def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
            return self.decoder(self.words(tgt[:, :-1]) + self.words(src).mean(1, keepdim=True))

    kept = torch.arange(6) < torch.tensor([6, 4, 2])[:, None]
    ids = torch.randint(1, VOCABULARY, (3, 7))
    batch = {"src": ids, "tgt": ids, "labels": ids[:, 1:].masked_fill(~kept, -100)}
    config = lora(tau=1.0, target_modules=["decoder"])
    result = run(Translator().eval(), [batch] * 4, config, method="gram", max_steps=4)
    assert result.tokens == 4 * 12


@pytest.mark.parametrize("prompt", [5, 3, 0], ids=["longer prompt", "as long", "no prompt"])
def test_attention_mask_beside_a_prompt_is_of_the_own_tokens(prompt: int) -> None:
    kept = torch.tensor([[True, True, True], [True, False, False]])
    batch = {"hidden_states": torch.ones(2, 3, 8), "attention_mask": kept.long()}
    batch |= {"encoder_hidden_states": torch.ones(2, prompt, 8)} if prompt else {}
    mask = mask_of_batch(batch, lora())
    assert mask.main is not None
    assert torch.equal(mask.main, kept)
    assert not mask.cross_masks


def test_masks_of_other_units_than_tokens() -> None:
    kept = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "span_mask": kept}
    assert not mask_of_batch(batch, lora()).unit_masks  # without a token mask
    batch["attention_mask"] = batch["input_ids"]
    (spans,) = mask_of_batch(batch, lora()).unit_masks
    assert torch.equal(spans, kept.bool())
    batch["pixel_mask"] = torch.ones(2, 5, 5)
    several = {"mask": kept, "x_padding_mask": kept, "x_attention_mask": kept, "x_mask": 1 - kept}
    more = {"special_tokens_mask": batch["input_ids"], "one_mask": kept[0], "y_mask": "none"}
    batch = {**batch, **several, **more}
    assert len(mask_of_batch(batch, lora()).unit_masks) == 1


class WithHead(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(VOCABULARY, 4)

    def forward(self, **batch: Tensor) -> Tensor:
        return self.head(self.inner(**batch).logits)


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "within a module"])
@pytest.mark.parametrize("given", ["decoder_input_ids", "labels"])
def test_encoder_mask_does_not_mask_a_decoder_of_equal_length(given: str, wrapped: bool) -> None:
    size = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    ends = {"decoder_start_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(0)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **size, **ends))
    model: nn.Module = WithHead(t5) if wrapped else t5
    data = [{**batch, given: batch["input_ids"].flip(0) + 1} for batch in text_batches(4, length=9)]
    linear = (n for n, m in model.named_modules() if isinstance(m, nn.Linear))
    names = [name for name in linear if "lm_head" not in name]
    config = lora(tau=1.0, target_modules=names, use_label_mask=False)
    result = run(model.eval(), data, config, method="gram", max_steps=4)
    keys = ("EncDecAttention.k", "EncDecAttention.v")
    own = [name for name in names if "encoder" in name or name.endswith(keys)]
    if given == "labels":  # the model makes its decoder inputs from them
        data = [{**b, "decoder_input_ids": t5._shift_right(b["labels"])} for b in data]
    assert 0 < len(own) < len(names)
    for name, x in layer_inputs(model, data, names, masked=False).items():
        kept = torch.cat([b["attention_mask"] for b in data]).bool().flatten()
        assert lost(result.components[name], x[kept] if name in own else x) < 1e-6, name
