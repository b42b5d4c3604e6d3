"""What a model's config and code show about how it reads a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    BigBirdConfig,
    BigBirdModel,
    DetrConfig,
    FNetConfig,
    FNetModel,
    PegasusXConfig,
    PegasusXModel,
    PreTrainedModel,
    ReformerConfig,
    ReformerModel,
    ResNetConfig,
    SEWConfig,
    SEWModel,
    SpeechT5Config,
    SpeechT5ForSpeechToText,
    T5Config,
    T5ForConditionalGeneration,
)

from eva_peft.inputs.arguments import without_labels
from eva_peft.inputs.batch_mask import mask_of_batch
from eva_peft.model.architecture import architecture_of
from integration.conftest import BOTH_SIDES, VOCABULARY, lora, lost, make_llama, run, text_batches
from integration.padded_text import MASK, SAMPLES, SIZE, TOKENS, text

CPU = torch.device("cpu")


class Outer(nn.Module):
    """A module of the user around a model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **batch: Any) -> Any:
        return self.inner(**batch)


def t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    config = T5Config(vocab_size=VOCABULARY, **sizes, decoder_start_token_id=0, pad_token_id=0)
    return T5ForConditionalGeneration(config).eval()


def test_encoder_decoder_inside_another_module() -> None:
    batches = text_batches(3, padded=True)
    for batch in batches:
        batch["labels"] = torch.where(batch["input_ids"] % 3 > 0, batch["input_ids"], -100)
    plain = run(t5(), iter(batches), lora(target_modules=["q", "k"]), method="gram")
    inside = run(Outer(t5()), iter(batches), lora(target_modules=["q", "k"]), method="gram")
    assert inside.tokens == plain.tokens
    for name, rows in plain.components.items():
        torch.testing.assert_close(inside.components[f"inner.{name}"], rows)


def fnet() -> nn.Module:
    torch.manual_seed(0)
    sizes = {key: n for key, n in SIZE.items() if key != "num_attention_heads"}
    return FNetModel(FNetConfig(**sizes, use_tpu_fourier_optimizations=False)).eval()


class IgnoresMask(Outer):
    """A module around a model that takes no mask."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.inner(input_ids)


def test_padding_that_a_wrapped_model_reads_is_kept() -> None:
    model, batch = IgnoresMask(fnet()), text()
    batch["attention_mask"][:, 10:] = 0  # columns that trimming would remove
    config = lora(target_modules=["encoder.layer.0.intermediate.dense"], tau=1.0)
    kept = run(model, iter([batch]), config, method="gram", max_steps=1, trim_padding=False)
    trimmed = run(model, iter([batch]), config, method="gram", max_steps=1)
    for name, rows in kept.components.items():
        assert torch.equal(trimmed.components[name], rows)


class NeedsLabels(nn.Module):
    """A model whose ``forward`` requires labels."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = BertModel(BertConfig(**SIZE)), nn.Linear(32, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        pooled = self.inner(input_ids, attention_mask).last_hidden_state[:, 0]
        return nn.functional.cross_entropy(self.head(pooled), labels)


@pytest.mark.parametrize("kind", [dict, tuple])
def test_labels_that_forward_requires_are_passed(kind: type) -> None:
    batch: Any = {**text(), "labels": torch.tensor([0, 1, 1, 0])}
    if kind is tuple:
        batch = tuple(batch.values())
    result = run(NeedsLabels().eval(), iter([batch]), lora(target_modules=["query"]), max_steps=1)
    assert result.tokens == int(MASK.sum())


def test_frozen_config_of_an_outer_module() -> None:
    @dataclasses.dataclass(frozen=True)
    class Frozen:
        use_cache: bool = True

    model = make_llama()
    model.config.use_cache = True
    outer = Outer(model)
    outer.config = Frozen()
    outer.forward = lambda **batch: model(**batch)  # type: ignore[method-assign]
    run(outer, iter(text_batches(1)), lora(target_modules=["q_proj"]), max_steps=1)
    assert (outer.config.use_cache, model.config.use_cache) == (True, True)


def sew() -> nn.Module:
    sizes = {**SIZE, "conv_dim": (8, 8), "conv_stride": (4, 2), "conv_kernel": (8, 4)}
    sizes |= {"squeeze_factor": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return SEWModel(SEWConfig(**sizes, num_feat_extract_layers=2))


def speech_t5() -> nn.Module:
    sizes = {**SIZE, "conv_dim": (8, 8), "conv_stride": (4, 2), "conv_kernel": (8, 4)}
    sizes |= BOTH_SIDES | {"num_feat_extract_layers": 2, "max_speech_positions": 64}
    sizes |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return SpeechT5ForSpeechToText(SpeechT5Config(**sizes))


@pytest.mark.parametrize(("make", "frames", "kept"), [(sew, 24, 11), (speech_t5, 48, 23)])
def test_mask_of_audio_frames(make: Callable[[], nn.Module], frames: int, kept: int) -> None:
    counts = torch.tensor([400, 200])
    mask = torch.arange(400) < counts[:, None]
    batch = {"input_values": torch.randn(2, 400), "attention_mask": mask.long()}
    rule = mask_of_batch(batch, lora(), architecture_of(make()))
    rows = rule.rows(torch.Size((2, frames, 32)), CPU, "encoder.layers.0.attention.q_proj")
    assert rows is not None
    assert rows.tolist() == [*range(frames), *range(frames, frames + kept)]


def test_padding_multiple_of_models() -> None:
    pegasus = PegasusXConfig(vocab_size=VOCABULARY, d_model=32, block_size=8, **BOTH_SIDES)
    assert architecture_of(PegasusXModel(pegasus)).padding_multiple == 8
    reformer = ReformerConfig(
        vocab_size=VOCABULARY,
        attn_layers=["local", "lsh"],
        local_attn_chunk_length=6,
        lsh_attn_chunk_length=4,
        num_buckets=4,
        axial_pos_embds=False,
        hidden_size=32,
        attention_head_size=8,
        num_attention_heads=4,
        feed_forward_size=48,
        max_position_embeddings=48,
    )
    assert architecture_of(ReformerModel(reformer)).padding_multiple == 12
    assert architecture_of(nn.Linear(2, 2)).padding_multiple == 1


def test_padding_to_whole_blocks() -> None:
    """BigBird pads to whole blocks, and all tokens attend to the last one."""
    sizes = {**SIZE, "attention_type": "block_sparse", "block_size": 8}
    found = architecture_of(BigBirdModel(BigBirdConfig(**sizes)))
    assert (found.padding_multiple, found.tokens_depend_on_padding) == (8, True)
    mask = torch.arange(20) < torch.tensor([20, 11])[:, None]
    rule = mask_of_batch({"attention_mask": mask.long()}, lora(), found)
    rows = rule.rows(torch.Size((2, 24, 32)), CPU, "encoder.layer.0.attention.self.query")
    assert rows is not None
    assert len(rows) == 31
    full = BigBirdConfig(**{**sizes, "attention_type": "original_full"})
    assert architecture_of(BigBirdModel(full)).padding_multiple == 1


def test_labels_used_only_for_the_loss_are_removed() -> None:
    """An object detector is configured as an encoder-decoder; its labels are for the loss only."""

    class Detector(PreTrainedModel):
        config_class = DetrConfig

        def forward(self, pixel_values: Tensor, labels: Any = None) -> Any: ...

    # without its own config the backbone is fetched from the hub
    config = DetrConfig(
        backbone_config=ResNetConfig(depths=[1], hidden_sizes=[8], embedding_size=8),
        use_timm_backbone=False,
        use_pretrained_backbone=False,
    )
    found = architecture_of(Detector(config))
    assert found.encoder_decoder
    arguments = {"pixel_values": torch.ones(1, 3, 8, 8), "labels": [{}]}
    assert "labels" not in without_labels(arguments, found)


class LooseT5(T5ForConditionalGeneration):
    def forward(self, *args: Any, **options: Any) -> Any:
        return super().forward(*args, **options)


class NarrowBart(BartForConditionalGeneration):
    def forward(self, input_ids: Tensor, labels: Tensor, **options: Any) -> Any:
        return super().forward(input_ids, labels=labels, **options)


def test_labels_that_become_decoder_inputs_are_kept() -> None:
    t5 = T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    bart = BartConfig(vocab_size=9, d_model=8, **BOTH_SIDES)
    arguments = {"input_ids": torch.ones(1, 3), "labels": torch.ones(1, 3)}
    for model in (T5ForConditionalGeneration(t5), LooseT5(t5), NarrowBart(bart)):
        for whole in (model, nn.Sequential(model)):
            assert "labels" in without_labels(arguments, architecture_of(whole))


def test_model_without_a_config_has_default_architecture() -> None:
    found = architecture_of(nn.Linear(2, 2))
    assert not any([found.encoder_decoder, found.tokens_depend_on_padding, found.needs_labels])
    assert (found.text_precedes_images, found.frame_length_functions) == (None, ())


class FrameDecoder(nn.Module):
    """Reads the codes of frames, and has its own loss."""

    base_model_prefix = ""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 5)

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(self.layer(codes).flatten(0, 1), labels.flatten())


class FrameModel(nn.Module):
    """Runs a part for its loss only, as CSM does with the decoder of a frame's codes."""

    base_model_prefix = ""

    def __init__(self, head: str = "lm_head") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.depth_decoder = nn.Embedding(VOCABULARY, 16), FrameDecoder()
        setattr(self, head, nn.Linear(16, VOCABULARY))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> Any:
        states = self.embed(input_ids)
        if labels is None:
            return self.lm_head(states)
        frames = states[labels[..., 0] != -100]
        codes = frames[:, None] * torch.arange(1, 4)[:, None]
        return self.lm_head(states), self.depth_decoder(codes, labels[labels[..., 0] != -100])


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
def test_part_that_runs_only_for_its_loss() -> None:
    model, batch = FrameModel(), text()
    labels = torch.randint(5, (SAMPLES, TOKENS, 3)).masked_fill(~MASK[..., None], -100)
    labels[:, 0] = -100
    config = lora(target_modules=["layer", "lm_head"], tau=1.0)
    result = run(model, iter([{**batch, "labels": labels}]), config, method="gram")
    rows = model.embed(batch["input_ids"])[labels[..., 0] != -100].detach()
    codes = rows[:, None] * torch.arange(1, 4)[:, None]
    assert lost(result.components["depth_decoder.layer"], codes.flatten(0, 1)) < 1e-6
    found = architecture_of(model)
    assert (found.separate_loss_prefixes, found.needs_labels) == (("depth_decoder.",), True)
    # a part with the only head is always called, as are a body and a second model
    body = FrameModel()
    body.depth_decoder.embed = body.embed
    for other in (FrameModel("head"), body, nn.ModuleDict({"a": make_llama(), "b": make_llama()})):
        found = architecture_of(other)
        assert (found.separate_loss_prefixes, found.needs_labels) == ((), False)
    assert architecture_of(make_llama()).separate_loss_prefixes == ()
