"""``check_padding`` reports padding that counts, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BatchEncoding

import eva_kernels
from bench.families import FAMILIES
from eva_kernels import EvaError, EvaTypeError, EvaValueError
from eva_peft.inputs.other_padding import with_other_padding
from integration.conftest import (
    VOCABULARY,
    hooks_of,
    lora,
    make_bert,
    make_gpt2,
    make_llama,
    make_mlp,
    same_state,
    state_of,
)

# Models whose tokens see padding: SigLIP reads the last position as the sentence, Qwen2-Audio
# convolves over the end of the audio.
FAMILIES_SEEING_PADDING = {"SigLIP": {"text_model.head"}, "Qwen2-Audio": None}
FAMILIES_WITHOUT_MASK = {"DINOv2", "ViT", "Swin", "Whisper", "Conv2d network", "nn.Sequential"}


def text(rows: int = 4, length: int = 10) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 60, (rows, length), generator=generator)
    mask = (torch.arange(length) < torch.arange(length - rows, length)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in FAMILIES_WITHOUT_MASK])
def test_no_padding_counts_in_any_family(name: str) -> None:
    family = FAMILIES[name]
    config = lora(r=4, rho=2.0, **family.config)
    found = eva_kernels.check_padding(family.make_model(), family.make_batches(1)[0], config)
    assert any(rows.padding or rows.left_out for rows in found.layers.values())
    assert all(rows.counted for rows in found.layers.values())
    expected = FAMILIES_SEEING_PADDING.get(name, set())
    assert expected is None or set(found.suspicious) == expected


def test_row_counts_follow_the_mask() -> None:
    batch = text()
    found = eva_kernels.check_padding(make_llama(), batch, lora())
    kept = int(batch["attention_mask"].sum())
    for rows in found.layers.values():
        assert (rows.rows, rows.counted) == (40, kept)
        assert (rows.padding, rows.padding_counted, rows.left_out) == (40 - kept, 0, 0)
        assert rows.change == 0
    assert found.changed == ("input_ids",)


def test_counted_padding_is_reported() -> None:
    batch = text()
    found = eva_kernels.check_padding(make_llama(), batch, lora(), prepare_model_inputs_fn=None)
    padding = int((batch["attention_mask"] == 0).sum())
    assert set(found.suspicious) == set(found.layers)
    assert {rows.padding_counted for rows in found.layers.values()} == {padding}
    (line,) = (line for line in found.summary().splitlines() if line.startswith("q_proj"))
    *numbers, change = line.split()[1:]
    assert numbers == ["2", "40", "40", str(padding), str(padding), "0"]
    assert float(change) > 0.5  # they are different tokens


def test_counted_padding_with_the_end_token_is_reported() -> None:
    batch = text()
    ends = batch["attention_mask"].sum(1, keepdim=True) - 1
    batch["input_ids"][torch.arange(10) >= ends] = 2
    found = eva_kernels.check_padding(make_llama(), batch, lora(), prepare_model_inputs_fn=None)
    padding = int((batch["attention_mask"] == 0).sum())
    assert {rows.padding_counted for rows in found.layers.values()} == {padding}
    first = found.layers["model.layers.0.self_attn.q_proj"]
    assert first.change > 0.5


class Reordered(nn.Module):
    """Reorders the tokens, so that the mask no longer fits."""

    def __init__(self) -> None:
        super().__init__()
        self.bert, self.head = make_bert(), nn.Linear(32, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(hidden[:, torch.arange(hidden.shape[1]).flip(0)])


def test_custom_layer_that_reorders_tokens_is_reported() -> None:
    batch = text()
    found = eva_kernels.check_padding(Reordered().eval(), batch, lora(), early_exit=True)
    assert found.suspicious == ("head",)
    head, mask = found.layers["head"], batch["attention_mask"]
    wrong = int((mask & (1 - mask.flip(1))).sum())
    assert (head.padding_counted, head.left_out) == (wrong, wrong)


class Smeared(nn.Module):
    """Adds a little of the next token to each token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lin = nn.Embedding(64, 16), nn.Linear(16, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.lin(x + 0.01 * x.roll(-1, 1))


def test_tokens_that_see_padding_differ_from_counted_padding() -> None:
    found = eva_kernels.check_padding(Smeared(), text(), lora(target_modules=["lin"]))
    lin = found.layers["lin"]
    assert found.suspicious == ("lin",)
    assert lin.padding_counted == 4  # the last token of each text
    assert 0 < lin.change < 0.05


def test_tokens_left_out_by_labels_are_reported() -> None:
    batch = text()
    labels = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    labels[:, :3] = -100
    found = eva_kernels.check_padding(make_llama(), {**batch, "labels": labels}, lora())
    assert not found.suspicious
    assert {rows.left_out for rows in found.layers.values()} == {12}


def test_changed_batch_can_be_passed() -> None:
    ids = text()["input_ids"]
    lengths = text()["attention_mask"].sum(1)

    def forward(model: Any, batch: Any) -> None:
        ids, lengths = batch
        model(input_ids=ids, attention_mask=torch.arange(10) < lengths[:, None])

    other = torch.where(ids == 0, 7, ids), lengths
    found = eva_kernels.check_padding(
        make_llama(), (ids, lengths), lora(), changed=other, forward_fn=forward
    )
    assert not found.suspicious
    assert {rows.padding for rows in found.layers.values()} == {int((ids == 0).sum())}


def test_parts_in_another_order_need_a_changed_batch_for_a_function() -> None:
    """GPT-2 takes a cache before the mask, but the function knows which part is which."""
    batch = tuple(text().values())
    with pytest.raises(EvaTypeError, match=r"a mask in place of (past_key_values|cache)"):
        eva_kernels.check_padding(make_gpt2(), batch, lora())
    with pytest.raises(EvaValueError, match=r"no mask that marks padding.* or pass as changed="):
        eva_kernels.check_padding(make_gpt2(), batch, lora(), **BY_INDEX)


def test_batch_without_padding_is_an_error() -> None:
    batch = {"input_ids": torch.ones(2, 4).long(), "attention_mask": torch.ones(2, 4).long()}
    with pytest.raises(EvaValueError, match="the batch has no mask that marks padding"):
        eva_kernels.check_padding(make_llama(), batch, lora())
    with pytest.raises(EvaError, match="pass a batch with padding"):
        eva_kernels.check_padding(make_mlp(), torch.randn(8, 24), lora(target_modules=["0"]))
    ragged, options = {"input_ids": [[5, 6, 7], [8, 9]]}, {"forward_fn": lambda *_: None}
    with pytest.raises(EvaValueError, match="as changed= the same batch with other values"):
        eva_kernels.check_padding(make_llama(), ragged, lora(), **options)


def test_model_batch_and_random_state_are_unchanged() -> None:
    model, batch = make_llama().train(), text()
    before, ids = state_of(model), batch["input_ids"].clone()
    random, hooks = torch.get_rng_state(), hooks_of(model)
    eva_kernels.check_padding(model, batch, lora())
    assert same_state(before, state_of(model))
    assert torch.equal(random, torch.get_rng_state())
    assert model.training
    assert hooks_of(model) == hooks
    assert torch.equal(ids, batch["input_ids"])
    with pytest.raises(TypeError, match=re.escape("unknown option 'chnged'")):
        eva_kernels.check_padding(model, batch, lora(), chnged=batch)


def test_contents_change_only_in_padding() -> None:
    pixels = torch.randn(2, 3, 4, 4)
    pixel_mask = torch.ones(2, 4, 4).long()
    pixel_mask[1, :, 2:] = 0
    audio, audio_mask = torch.randn(2, 5, 6), torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    batch = {
        **text(2),
        "image_features": torch.randn(2, 10, 3),  # as many as tokens, and no text
        "decoder_input_ids": text(2)["input_ids"],
        "pixel_values": pixels,
        "pixel_mask": pixel_mask,
        "input_features": audio,
        "feature_attention_mask": audio_mask,
        "position_ids": torch.arange(10).repeat(2, 1),
    }
    changed, names = with_other_padding(batch, make_llama())
    assert set(names) == {"input_ids", "pixel_values", "input_features"}
    differs = changed["pixel_values"] != pixels
    assert torch.equal(differs, (pixel_mask == 0)[:, None].expand_as(differs))
    differs = changed["input_features"] != audio
    assert torch.equal(differs, (audio_mask == 0)[:, None].expand_as(differs))
    differs = changed["input_ids"] != batch["input_ids"]
    assert torch.equal(differs, batch["attention_mask"] == 0)
    assert changed["input_ids"].max() < 60


def test_padding_is_not_replaced_by_special_tokens() -> None:
    model = make_llama()
    model.config.image_token_id = 9
    batch = {
        "input_ids": torch.tensor([[9, 9, 9, 5, 8], [9, 9, 5, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    }
    changed, _ = with_other_padding(batch, model)
    assert set(changed["input_ids"][1, 3:].tolist()) <= {5, 8}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("batch_first", [True, False])
def test_torch_transformer_masks_apply_to_their_own_inputs(batch_first: bool) -> None:
    torch.manual_seed(0)
    model = nn.Transformer(16, 2, 1, 1, 32, batch_first=batch_first)
    lengths = torch.tensor([[6, 5, 3], [6, 6, 5]])
    hidden = [each[:, None] <= torch.arange(6) for each in lengths]
    streams = [torch.randn(3, 6, 16) for _ in hidden]
    src, tgt = streams if batch_first else (x.transpose(0, 1) for x in streams)
    masks = dict(zip(("src_key_padding_mask", "tgt_key_padding_mask"), hidden, strict=True))
    batch = {"src": src, "tgt": tgt, **masks, "memory_key_padding_mask": hidden[0]}
    found = eva_kernels.check_padding(model, batch, lora(target_modules=["linear1"]))
    assert found.changed == ("src", "tgt")
    assert not found.suspicious
    assert [rows.padding for rows in found.layers.values()] == [4, 1]


def test_special_tokens_mask_is_no_padding_mask() -> None:
    batch = text()
    special = torch.zeros(4, 10).long().index_fill_(1, torch.tensor([0, 9]), 1)
    changed, _ = with_other_padding({"special_tokens_mask": special, **batch}, make_llama())
    differs = changed["input_ids"] != batch["input_ids"]
    assert torch.equal(differs, batch["attention_mask"] == 0)
    whole = {"input_ids": torch.arange(40).view(4, 10), "attention_mask": torch.ones(4, 10)}
    _, names = with_other_padding({**whole, "special_tokens_mask": special}, make_llama())
    assert not names


@dataclass
class Fields:
    """A user's batch class."""

    input_ids: Tensor
    attention_mask: Tensor


BY_INDEX = {"forward_fn": lambda model, batch: model(batch[0], attention_mask=batch[1])}
BY_FIELD = {
    "forward_fn": lambda model, batch: model(batch.input_ids, attention_mask=batch.attention_mask)
}
BATCH_KINDS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], dict[str, Any]]] = {
    "tuple": (lambda batch: tuple(batch.values()), BY_INDEX),
    "ids as labels": (lambda batch: (*batch.values(), batch["input_ids"]), BY_INDEX),
    "dataclass": (lambda batch: Fields(**batch), BY_FIELD),
    "encoding": (BatchEncoding, BY_FIELD),
    "lists": (lambda batch: {k: v.tolist() for k, v in batch.items()}, {}),
    "arrays": (lambda batch: {k: v.numpy() for k, v in batch.items()}, {}),
    "a sample": (lambda batch: {k: v[0] for k, v in batch.items()}, {}),
}


@pytest.mark.parametrize("kind", BATCH_KINDS)
def test_every_kind_of_batch_is_checked(kind: str) -> None:
    make, options = BATCH_KINDS[kind]
    batch = text()
    found = eva_kernels.check_padding(make_llama(), make(batch), lora(), **options)
    mask = batch["attention_mask"][: 1 if kind == "a sample" else None]
    hidden = int((mask == 0).sum())
    assert found.changed == ("input_ids",)
    assert {(rows.rows, rows.padding) for rows in found.layers.values()} == {(mask.numel(), hidden)}
    assert not found.suspicious


def test_labels_in_a_tuple_keep_their_place() -> None:
    """They may be an argument, and mask tokens as well."""

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 4)

        def forward(self, ids: Tensor, attention_mask: Tensor, targets: Tensor) -> Tensor:
            return self.head(self.embedding(ids))

    ids, mask = text().values()
    batch = (ids, mask, ids.masked_fill(mask == 0, -100))
    options = {"config": lora(target_modules=["head"]), "forward_fn": lambda m, parts: m(*parts)}
    found = eva_kernels.check_padding(Tagger(), batch, **options)
    head, count = found.layers["head"], int((mask == 0).sum())
    assert (head.counted, head.padding, head.padding_counted) == (40 - count, count, 0)


class MaskedLinear(nn.Module):
    """Receives a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(16, 4)

    def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        return self.lin(x) * (padding_mask == 0)[..., None]


@pytest.mark.parametrize("additive", [False, True])
def test_true_marks_padding_in_a_padding_mask(additive: bool) -> None:
    hidden = text()["attention_mask"] == 0
    mask = torch.zeros(4, 10).masked_fill(hidden, -torch.inf) if additive else hidden
    batch = {"x": torch.randn(4, 10, 16), "padding_mask": mask}
    found = eva_kernels.check_padding(MaskedLinear(), batch, lora(target_modules=["lin"]))
    lin, count = found.layers["lin"], int(hidden.sum())
    assert (lin.counted, lin.padding, lin.padding_counted) == (40 - count, count, 0)


class SpeechEncoder(nn.Module):
    """Receives a mask of samples as feature extractors of transformers make it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lin = nn.Conv1d(1, 8, 4, 4), nn.Linear(8, 4)

    def forward(self, input_values: Tensor, padding_mask: Tensor) -> Tensor:
        return self.lin(self.conv(input_values).mT) * padding_mask[:, ::4, None]


def test_integers_are_zero_at_padding_even_if_every_sample_is_padded() -> None:
    mask = (torch.arange(80) < torch.tensor([[60], [40], [72]])).int()
    batch = {"input_values": torch.randn(3, 1, 80), "padding_mask": mask}
    found = eva_kernels.check_padding(SpeechEncoder(), batch, lora(target_modules=["lin"]))
    lin = found.layers["lin"]
    assert (lin.rows, lin.counted, lin.padding, lin.padding_counted) == (60, 43, 17, 0)


def test_context_uses_the_mask_of_its_name() -> None:
    kept = text()["attention_mask"].flip(0)
    batch = {
        **text(),
        "context": torch.randn(4, 10, 3),
        "context_mask": kept,
        "encoder_hidden_states": torch.randn(4, 10, 3),
        "encoder_attention_mask": kept,
    }
    changed, names = with_other_padding(batch, make_llama())
    assert set(names) == {"input_ids", "context", "encoder_hidden_states"}
    for name in names:
        differs = (changed[name] != batch[name]).reshape(4, 10, -1).any(-1)
        mask = batch["attention_mask"] if name == "input_ids" else kept
        assert torch.equal(differs, mask == 0), name


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("pairs", [False, True])
def test_pair_masks_and_additive_masks_mark_padding(pairs: bool, additive: bool) -> None:
    batch = text()
    mask = batch["attention_mask"] != 0
    kept = mask[:, None, None].expand(4, 1, 10, 10).tril() if pairs else mask
    hidden = torch.zeros(kept.shape).masked_fill(~kept, torch.finfo(torch.float32).min)
    batch["attention_mask"] = hidden if additive else kept
    changed, names = with_other_padding(batch, make_llama())
    assert names == ["input_ids"]
    assert torch.equal(changed["input_ids"] != batch["input_ids"], ~mask)
    if pairs:
        assert not eva_kernels.check_padding(make_llama(), batch, lora()).suspicious
