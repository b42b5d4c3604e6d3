"""What a model's config and code show about how it reads a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
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
    CLIPVisionConfig,
    CLIPVisionModel,
    DetrConfig,
    FNetConfig,
    FNetModel,
    GitConfig,
    GitModel,
    LayoutLMv3Config,
    LayoutLMv3Model,
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
    VisualBertConfig,
    VisualBertForQuestionAnswering,
    VisualBertModel,
)

from eva_kernels import EvaWarning
from eva_peft.inputs.arguments import without_labels
from eva_peft.inputs.batch_mask import mask_of_batch
from eva_peft.inputs.token_mask import TokenMask
from eva_peft.model.architecture import architecture_of
from integration.conftest import (
    BOTH_SIDES,
    VOCABULARY,
    layer_inputs,
    lora,
    lost,
    make_llama,
    run,
    text_batches,
)

CPU = torch.device("cpu")
SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
VISION = {"image_size": 16, "patch_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4}
VISION |= {"hidden_size": 32, "intermediate_size": 48}
LENGTHS = torch.tensor([14, 9, 7, 5])
SAMPLES, TOKENS = len(LENGTHS), 14
MASK = torch.arange(TOKENS) < LENGTHS[:, None]


def text() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "input_ids": torch.randint(3, VOCABULARY, (SAMPLES, TOKENS)),
        "attention_mask": MASK.long(),
    }


def layoutlm() -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    config = LayoutLMv3Config(**SIZE, input_size=16, patch_size=8, coordinate_size=4, shape_size=8)
    boxes = torch.zeros(SAMPLES, TOKENS, 4, dtype=torch.long)
    batch = {**text(), "bbox": boxes, "pixel_values": torch.randn(SAMPLES, 3, 16, 16)}
    return LayoutLMv3Model(config), batch, torch.cat([MASK, torch.ones(SAMPLES, 5).bool()], 1)


def visual_bert() -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    box_mask = torch.arange(5) < torch.tensor([5, 3, 2, 1])[:, None]
    batch = {
        **text(),
        "visual_embeds": torch.randn(SAMPLES, 5, 16),
        "visual_attention_mask": box_mask.long(),
    }
    model = VisualBertModel(VisualBertConfig(**SIZE, visual_embedding_dim=16))
    return model, batch, torch.cat([MASK, box_mask], 1)


def git() -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    model = GitModel(GitConfig(**SIZE, vision_config=VISION))
    batch = {**text(), "pixel_values": torch.randn(SAMPLES, 3, 16, 16)}
    return model, batch, torch.cat([torch.ones(SAMPLES, 5).bool(), MASK], 1)


@pytest.mark.parametrize("make", [layoutlm, visual_bert, git])
def test_mask_of_text_and_images_in_one_sequence(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model, batch, mask = make()
    model.eval()
    name = "encoder.layer.0.attention.self.query"
    config = lora(target_modules=[name], tau=1.0)
    result = run(model, iter([batch]), config, method="gram", max_steps=1)
    rows = layer_inputs(model, [batch], [name], masked=False)[name][mask.flatten()]
    assert result.tokens == int(mask.sum())
    assert lost(result.components[name], rows) < 1e-6


def visual_bert_qa() -> Any:
    config = VisualBertConfig(**SIZE, visual_embedding_dim=16)
    _, batch, mask = visual_bert()
    return VisualBertForQuestionAnswering(config), batch, mask


@pytest.mark.parametrize("wrap", [False, True])
def test_base_model_prefix_does_not_decide_the_modality(wrap: bool) -> None:
    """All layers of this model are below ``visual_bert``, and read text too."""
    model, batch, mask = visual_bert_qa()
    outer = nn.ModuleDict({"net": model}) if wrap else model
    assert architecture_of(outer).name_prefixes == ("net.",) * wrap + ("visual_bert.",)
    rule = mask_of_batch(batch, lora(), architecture_of(outer))
    name = "net." * wrap + "visual_bert.encoder.layer.0.attention.self.query"
    rows = rule.rows(torch.Size((*mask.shape, 32)), CPU, name)
    assert rows is not None
    assert rows.tolist() == mask.flatten().nonzero().flatten().tolist()


def test_name_of_a_vision_tower_decides_the_modality() -> None:
    """The first model of transformers in the module reads images, as its name shows."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision_tower = CLIPVisionModel(CLIPVisionConfig(**VISION))
            self.text = make_llama()

    rule = mask_of_batch(
        {**text(), "pixel_values": torch.ones(SAMPLES, 3, 16, 16)}, lora(), architecture_of(Both())
    )
    shape = torch.Size((SAMPLES, TOKENS, 32))  # as many patches as words
    names = [n for n, _ in Both().named_modules() if n.endswith("layers.0.mlp.fc1")]
    assert [rule.rows(shape, CPU, name) for name in names] == [None]
    assert rule.rows(shape, CPU, "text.model.layers.0.mlp.up_proj") is not None


def test_name_prefixes_are_whole_path_components() -> None:
    both = nn.ModuleDict({"text": make_llama(), "text_vision": make_llama()})
    assert architecture_of(both).name_prefixes == ()
    assert architecture_of(nn.ModuleDict({"text": make_llama()})).name_prefixes == (
        "text.",
        "model.",
    )


def test_name_of_the_only_model_does_not_decide_the_modality() -> None:
    outer = nn.ModuleDict({"vision_language": make_llama()})
    batch = {**text(), "pixel_values": torch.ones(SAMPLES, 3, 16, 16)}
    rule = mask_of_batch(batch, lora(), architecture_of(outer))
    for name in ("vision_language.model.layers.0.mlp.up_proj", "vision_language.lm_head"):
        rows = rule.rows(torch.Size((SAMPLES, TOKENS, 64)), CPU, name)
        assert rows is not None
        assert len(rows) == int(MASK.sum())


def test_boxes_have_their_own_mask() -> None:
    _, batch, mask = visual_bert_qa()
    rule = mask_of_batch(batch, lora())
    rows = rule.rows(torch.Size((SAMPLES, 5, 16)), CPU, "embeddings.visual_projection")
    assert rows is not None
    assert len(rows) == int(mask[:, TOKENS:].sum())
    # LXMERT's cross attention reads both, in layers named visual
    rows = rule.rows(torch.Size((SAMPLES, TOKENS, 16)), CPU, "x_layers.0.visual_attention.att.key")
    assert rows is not None
    assert len(rows) == int(mask[:, :TOKENS].sum())


def test_q_former_reads_text_after_its_queries() -> None:
    batch = {
        **text(),
        "qformer_attention_mask": MASK.long(),
        "pixel_values": torch.ones(4, 3, 8, 8),
    }
    rule = mask_of_batch(batch, lora())
    for count, kept in ((TOKENS, MASK), (TOKENS + 6, torch.cat([MASK[:, :6] | True, MASK], 1))):
        rows = rule.rows(torch.Size((SAMPLES, count, 32)), CPU, "qformer.layers.0.query")
        assert rows is not None
        assert rows.tolist() == kept.flatten().nonzero().flatten().tolist()
    layer = "qformer.encoder.layer.0"
    for name in ("crossattention.attention.key", "crossattention.attention.query",
                 "crossattention.output.dense", "intermediate_query.dense"):  # fmt: skip
        for count in (TOKENS, TOKENS + 6):  # patches or queries, as many as words by chance
            shape = torch.Size((SAMPLES, count, 32))
            assert rule.rows(shape, CPU, f"{layer}.{name}") is None


@pytest.mark.parametrize("count", [3, TOKENS + 2])
def test_masks_of_words_and_entities(count: int) -> None:
    entities = (torch.arange(count) < torch.tensor([3, 1, 2, 0])[:, None]).long()
    model = nn.Linear(1, 1)
    model.config = SimpleNamespace(model_type="luke")
    batch = {**text(), "entity_attention_mask": entities}
    rule = mask_of_batch(batch, lora(), architecture_of(model))
    both = torch.cat([MASK, entities.bool()], 1)
    for mask in (MASK, entities.bool(), both):
        rows = rule.rows(torch.Size((*mask.shape, 32)), CPU, "encoder.layer.0.output.dense")
        assert rows is not None
        assert rows.tolist() == mask.flatten().nonzero().flatten().tolist()


class UnknownPrefix(nn.Module):
    """A language model with extra tokens before the text, which its config does not mention."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.prefix = make_llama(), nn.Linear(16, 64)

    def forward(self, features: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Any:
        embedded = self.inner.get_input_embeddings()(input_ids)
        return self.inner(inputs_embeds=torch.cat([self.prefix(features), embedded], 1))


def test_unknown_order_of_tokens_warns() -> None:
    model, batch = UnknownPrefix().eval(), {**text(), "features": torch.randn(SAMPLES, 3, 16)}
    config = lora(target_modules=["inner.model.layers.0.self_attn.q_proj"])
    message = r"q_proj: no token mask fits its input of leading shape \(4, 17\)"
    with pytest.warns(EvaWarning, match=message):
        run(model, iter([batch]), config, max_steps=1)
    # no warning where the mask omits nothing
    run(model, iter([{**batch, "attention_mask": torch.ones_like(MASK).long()}]), config)


@pytest.mark.parametrize("name", ["encoder.visn_fc.visn_fc", "encoder.r_layers.0.attention.query"])
def test_as_many_boxes_as_words_get_no_text_mask(name: str) -> None:
    rule = TokenMask(MASK, multimodal=True)
    assert rule.rows(torch.Size((SAMPLES, TOKENS, 8)), CPU, name) is None
    assert rule.rows(torch.Size((SAMPLES, TOKENS, 8)), CPU, "encoder.layer.0.query") is not None


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
