"""Masks of cross-attended inputs, and of inputs that a model pads to a longer sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForQuestionAnswering,
    BridgeTowerConfig,
    BridgeTowerModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    LEDConfig,
    LEDForConditionalGeneration,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LongformerConfig,
    LongformerModel,
    PegasusXConfig,
    PegasusXModel,
)

import eva_kernels
from eva_kernels import EvaValueError, EvaWarning
from eva_peft.inputs.batch_mask import mask_of_batch
from eva_peft.inputs.token_mask import TokenMask
from integration.conftest import (
    BOTH_SIDES,
    QUIET,
    VOCABULARY,
    layer_inputs,
    lora,
    lora_layers,
    lost,
    run,
    text_batches,
)

SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


class CrossAttention(nn.Module):
    """Pixels that attend to text, with layer names as in diffusers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn2 = nn.ModuleDict({name: nn.Linear(16, 16) for name in ("to_q", "to_k", "to_v")})

    def forward(
        self, sample: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor
    ) -> Tensor:
        parts = [encoder_hidden_states] * 2
        q, k, v = (layer(x) for layer, x in zip(self.attn2.values(), [sample, *parts], strict=True))
        hidden = (encoder_attention_mask == 0)[:, None, :]
        return (q @ k.mT).masked_fill(hidden, -1e9).softmax(-1) @ v


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
def test_encoder_attention_mask_applies_only_to_keys_and_values() -> None:
    generator, mask = torch.Generator().manual_seed(0), torch.ones(3, 7)
    mask[1, 4:], mask[2, 2:] = 0, 0
    batches = [
        {
            "sample": torch.randn(3, 7, 16, generator=generator),  # as many as text tokens
            "encoder_hidden_states": torch.randn(3, 7, 16, generator=generator).cumsum(1),
            "encoder_attention_mask": mask,
        }
        for _ in range(4)
    ]
    config = lora(tau=1.0, target_modules=["to_q", "to_k", "to_v"])
    result = run(CrossAttention(), batches, config, method="gram", max_steps=4)
    text = torch.cat([b["encoder_hidden_states"][mask.bool()] for b in batches])
    pixels = torch.cat([b["sample"].flatten(0, 1) for b in batches])
    for name, rows in (("to_q", pixels), ("to_k", text), ("to_v", text)):
        assert lost(result.components[f"attn2.{name}"], rows) < 1e-6, name
    # the mask of the model's own text never applies to them
    rule = TokenMask(mask[:, :5].bool(), cross_masks=[mask.bool()])
    with pytest.warns(EvaWarning, match=r"to_k: no token mask fits.*\(3, 5\)"):
        assert rule.rows(torch.Size((3, 5, 16)), torch.device("cpu"), "attn2.to_k") is None


class ImageModel(nn.Module):
    """Makes images from text, with layer names as in diffusers."""

    def __init__(self, mask: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mask = mask
        self.caption_projection = nn.ModuleDict({"linear_1": nn.Linear(16, 12)})
        self.txt_in, self.img_in = nn.Linear(16, 12), nn.Linear(16, 12)
        self.attn = nn.ModuleDict({"add_k_proj": nn.Linear(12, 12), "to_add_out": nn.Linear(12, 4)})
        self.ff_context, self.ff = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, **masks: Tensor
    ) -> Tensor:
        assert list(masks) == [self.mask]
        text = self.caption_projection["linear_1"](encoder_hidden_states)
        text = self.ff_context(text + self.txt_in(encoder_hidden_states))
        pixels = self.ff(self.img_in(hidden_states))
        return pixels + self.attn["to_add_out"](self.attn["add_k_proj"](text)).mean()


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.parametrize("use_forward_fn", [True, False], ids=["forward_fn", "default"])
@pytest.mark.parametrize(
    "name",
    [
        *["encoder_attention_mask", "encoder_hidden_states_mask", "encoder_mask"],
        *["text_embedding_mask", "attention_mask"],
    ],
)
def test_padding_of_the_prompt_of_an_image_model_is_masked(name: str, use_forward_fn: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(7) < torch.tensor([7, 4, 2])[:, None]
    pixels = 9 if name == "attention_mask" else 7  # as many as text tokens where names tell
    batches = [
        {
            "hidden_states": torch.randn(3, pixels, 16, generator=generator),
            "encoder_hidden_states": torch.randn(3, 7, 16, generator=generator).cumsum(1),
            name: mask,
        }
        for _ in range(4)
    ]
    options: dict[str, Any] = {"forward_fn": lambda m, b: m(**b)} if use_forward_fn else {}
    model, config = ImageModel(name), lora(tau=1.0, target_modules="all-linear")
    result = run(model, batches, config, method="gram", max_steps=4, **options)
    inputs = layer_inputs(model, batches, list(result.ranks), masked=False)
    assert len(inputs) == 7
    for layer, x in inputs.items():
        text = layer not in ("img_in", "ff")
        rows = x[mask.flatten().repeat(4)] if text else x
        assert lost(result.components[layer], rows) < 1e-6, layer


PROMPT = """caption_projection.linear_1 context_embedder.proj_in context_refiner.0.attn.to_q txt_in
    blocks.0.txt_mlp.net.2 blocks.0.attention.txt_kv_proj transformer_blocks.1.ff_context.net.0.proj
    condition_embedder.text_embedder.linear_1 patch_embed.text_proj text_fusion.0 blocks.0.ff_t.w1
    text_transformer_blocks.0.feed_forward.in_layer time_caption_embed.caption_embedder.1 txt_ff.w2
    transformer_blocks.0.encoder_proj encoder_hidden_states_proj encoder_hid_proj.0 llm_cond_proj
    cross_attention_proj.0 time_embed.pooler.to_kv attn.add_q_proj attn.to_add_out"""


def test_prompt_layers_are_recognised_by_diffusers_names() -> None:
    """The names are those of diffusers models."""
    kept = torch.arange(5) < torch.tensor([5, 3, 1])[:, None]
    mask = TokenMask(None, cross_masks=[kept])
    shape, device = torch.Size((3, 5, 8)), torch.device("cpu")
    rows = {name: mask.rows(shape, device, name) for name in PROMPT.split()}
    assert [name for name, found in rows.items() if found is None] == []
    for name in ("attn2.to_k", "dec_block.cross_attention.to_key", "cross_attention.to_value"):
        assert mask.rows(shape, device, name) is not None, name
    for name in ("blocks.0.attn.to_q", "ff.net.2", "x_embedder", "img_mlp.net.2", "attn2.to_q"):
        assert mask.rows(shape, device, name) is None, name


def test_masks_of_two_encoders() -> None:
    lengths = torch.tensor([5, 3, 1])[:, None]
    first, second = (torch.arange(width) < lengths for width in (5, 9))
    batch = {"encoder_attention_mask": first, "encoder_attention_mask_1": second}
    mask, device = mask_of_batch(batch, lora()), torch.device("cpu")
    for kept in (first, second):
        rows = mask.rows(torch.Size((*kept.shape, 8)), device, "context_embedder")
        assert rows is not None
        assert torch.equal(rows, kept.flatten().nonzero().flatten())
    # image layers get neither mask nor warning; a model's own text keeps its own mask
    assert mask.rows(torch.Size((3, 5, 8)), device, "blocks.0.attn.to_k") is None
    own = TokenMask(~first, cross_masks=[first]).rows(
        torch.Size((3, 5, 8)), device, "context_embedder"
    )
    assert own is not None
    assert torch.equal(own, (~first).flatten().nonzero().flatten())


def test_decoder_keys_use_the_mask_of_the_encoder_states() -> None:
    torch.manual_seed(0)
    config = BertConfig(**SIZE, is_decoder=True, add_cross_attention=True)
    model, texts = BertLMHeadModel(config).eval(), text_batches(4, length=9)
    mask = torch.ones(4, 9).long()
    mask[1:, 5:] = 0
    generator = torch.Generator().manual_seed(0)
    for batch in texts:
        batch["encoder_hidden_states"] = torch.randn(4, 9, 32, generator=generator).cumsum(1)
        batch["encoder_attention_mask"] = mask
    name = "bert.encoder.layer.0.crossattention.self.key"
    query = name.replace("key", "query")
    found = run(
        model, texts, lora(tau=1.0, target_modules=[name, query]), method="gram", max_steps=4
    )
    given = torch.cat([b["encoder_hidden_states"][mask.bool()] for b in texts])
    assert lost(found.components[name], given) < 1e-6
    assert lost(found.components[query], layer_inputs(model, texts, [query])[query]) < 1e-6


def test_gpt2_decoder_masks_keys_by_source_and_queries_by_labels() -> None:
    torch.manual_seed(0)
    decoder = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1
    )
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**SIZE), decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    model, texts = EncoderDecoderModel(config=config).eval(), text_batches(4)
    for batch, other in zip(texts, text_batches(4, seed=3, labels=True), strict=True):
        batch["labels"] = other["labels"]  # as long as the input on purpose
        batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(other["labels"])
    cross = "decoder.transformer.h.0.crossattention."
    names = [f"{cross}c_attn", f"{cross}q_attn"]  # keys and values, and queries
    masks = [lambda b: b["attention_mask"].bool(), lambda b: b["labels"] != -100]
    found = run(
        model, texts, lora(tau=1.0, target_modules=names), method="gram", max_steps=4
    ).components
    for name, mask in zip(names, masks, strict=True):
        inputs = [layer_inputs(model, [b], [name], masked=False)[name] for b in texts]
        rows = [x[mask(b).flatten()] for x, b in zip(inputs, texts, strict=True)]
        assert lost(found[name], torch.cat(rows)) < 1e-6, name


def with_images(length: int, size: int) -> list[dict[str, Tensor]]:
    """Return batches of images and padded texts; the first text of each batch has no padding."""
    torch.manual_seed(0)
    texts = text_batches(4, length=length)
    for batch in texts:
        batch["attention_mask"][0] = 1  # so that no batch is trimmed
    return [{**batch, "pixel_values": torch.randn(4, 3, size, size)} for batch in texts]


def blip(make: type[nn.Module], **labels: Tensor) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """Return a model, and batches whose texts have as many tokens as images have patches: 17."""
    torch.manual_seed(0)
    small = {k: v for k, v in SIZE.items() if k.startswith(("hidden", "inter", "num"))}
    special = {"bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "pad_token_id": 0}
    config = BlipConfig(
        text_config={**SIZE, **special, "encoder_hidden_size": 32},
        vision_config={**small, "image_size": 16, "patch_size": 4},
        projection_dim=16,
    )
    return make(config).eval(), [{**batch, **labels} for batch in with_images(17, 16)]


def check_streams(
    model: nn.Module, batches: list[dict[str, Tensor]], given: dict[str, Tensor], text: list[str],
    others: list[str],
) -> None:  # fmt: skip
    """Text layers use the rows that the text mask keeps, other layers all rows."""
    names = [*text, *others]
    found = run(
        model, batches, lora(tau=1.0, target_modules=names), method="gram", max_steps=4
    ).components
    for name in names:
        inputs = [
            layer_inputs(model, [{**b, **given}], [name], masked=False)[name] for b in batches
        ]
        masks = [b["attention_mask"].bool().flatten() for b in batches]
        rows = [x[m] if name in text else x for x, m in zip(inputs, masks, strict=True)]
        assert lost(found[name], torch.cat(rows)) < 1e-6, name


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
def test_image_keys_are_unmasked_with_as_many_patches_as_tokens() -> None:
    model, batches = blip(BlipForConditionalGeneration)
    cross = "text_decoder.bert.encoder.layer.1.crossattention.self"
    check_streams(model, batches, {}, [f"{cross}.query"], [f"{cross}.key", f"{cross}.value"])


@pytest.mark.parametrize("length", [17, 9])
@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
def test_blip_question_answering_masks_each_stream(length: int) -> None:
    answers = torch.randint(3, VOCABULARY, (4, length))
    model, batches = blip(BlipForQuestionAnswering, labels=answers)
    for batch in batches:
        batch["attention_mask"][:, 12:] = 0  # the decoder attends to these, so nothing is cut
    question, answer = (
        f"text_{part}.layer.1.crossattention.self"
        for part in ("encoder.encoder", "decoder.bert.encoder")
    )
    text = [f"{question}.query", f"{answer}.key", f"{answer}.value"]
    others = [f"{question}.key", f"{answer}.query", answer.replace("self", "output.dense")]
    check_streams(model, batches, {"decoder_input_ids": answers}, text, others)


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
def test_cross_attention_between_text_and_images_in_both_directions() -> None:
    batches = with_images(17, 16)  # as many patches as tokens
    small = {k: v for k, v in SIZE.items() if k.startswith(("hidden", "inter", "num"))}
    vision = {"hidden_size": 64, "num_hidden_layers": 2, "image_size": 16, "patch_size": 4}
    config = BridgeTowerConfig(**small, text_config=SIZE, vision_config=vision)
    text, images = (
        [f"cross_modal_{stream}_layers.1.crossattention.self.{n}" for n in ("key", "value")]
        for stream in ("image", "text")
    )
    check_streams(BridgeTowerModel(config).eval(), batches, {}, text, images)


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
def test_sam3_text_prompts_are_masked_in_every_reader() -> None:
    sam3 = pytest.importorskip("transformers.models.sam3", reason="transformers has no SAM 3 yet")
    batches = with_images(16, 56)  # as many patches as tokens
    small = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    layered = {**small, "num_layers": 1}
    backbone = {
        "model_type": "sam3_vit_model", **small, "num_hidden_layers": 2, "image_size": 56,
        "window_size": 2, "global_attn_indexes": [1], "pretrain_image_size": 28,
    }  # fmt: skip
    config = sam3.Sam3Config(
        vision_config={
            "backbone_config": backbone,
            "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        },
        text_config={"model_type": "clip_text_model", **SIZE, "projection_dim": 16},
        geometry_encoder_config=layered,
        detr_encoder_config=layered,
        detr_decoder_config={**layered, "num_queries": 10},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 4},
    )
    decoder = "detr_decoder.layers.0."
    text, images = (
        [f"{reader}cross_attn.{n}_proj" for reader in readers for n in "kv"]
        for readers in (
            ["detr_encoder.layers.0.", f"{decoder}text_", "mask_decoder.prompt_"],
            [f"{decoder}vision_"],
        )
    )
    check_streams(sam3.Sam3Model(config).eval(), batches, {}, text, images)


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
def test_text_padded_to_an_attention_window_keeps_its_mask() -> None:
    torch.manual_seed(0)
    config = LongformerConfig(**SIZE, attention_window=[8, 16], pad_token_id=1)
    model, texts = LongformerModel(config).eval(), text_batches(4, length=21)
    names = ["encoder.layer.1.attention.self.query", "encoder.layer.1.intermediate.dense"]
    config_ = lora(tau=1.0, target_modules=names)
    result = run(model, texts, config_, method="gram", max_steps=4, trim_padding=False)
    for name in names:
        rows = []
        for batch in texts:
            inputs = layer_inputs(model, [batch], [name], masked=False)[name]
            shape = (32, 4) if "self" in name else (4, 32)
            x = inputs.reshape(*shape, -1)
            x = x.transpose(0, 1) if "self" in name else x
            rows.append(x[:, :21][batch["attention_mask"].bool()])
        assert lost(result.components[name], torch.cat(rows)) < 1e-6, name


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
def test_led_pads_only_the_encoder_to_a_window() -> None:
    torch.manual_seed(0)
    config = LEDConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        **BOTH_SIDES,
        attention_window=8,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
    )
    model = LEDForConditionalGeneration(config).eval()
    pairs = zip(text_batches(4, length=21), text_batches(4, length=11, seed=3), strict=True)
    batches = [
        {
            **source,
            "decoder_input_ids": target["input_ids"],
            "decoder_attention_mask": target["attention_mask"],
        }
        for source, target in pairs
    ]
    names = ["led.encoder.layers.0.fc1", "led.decoder.layers.0.fc1"]
    config_ = lora(tau=1.0, target_modules=names)
    result = run(model, batches, config_, method="gram", max_steps=4, trim_padding=False)
    for name, length, key in zip(names, (21, 11), ("", "decoder_"), strict=True):
        rows = []
        for batch in batches:
            inputs = layer_inputs(model, [batch], [name], masked=False)[name].reshape(4, -1, 32)
            rows.append(inputs[:, :length][batch[f"{key}attention_mask"].bool()])
        assert lost(result.components[name], torch.cat(rows)) < 1e-6, name


def make_llama4() -> nn.Module:
    torch.manual_seed(0)
    config = Llama4TextConfig(
        **SIZE,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=4,
        num_experts_per_tok=1,
        pad_token_id=0,
    )
    model = Llama4ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model


# PEFT 0.17 warns and proceeds
@pytest.mark.filterwarnings("ignore:Unsupported layer type .*Experts:UserWarning")
def test_transposed_experts_keep_the_default_initialisation() -> None:
    """Llama 4 stores expert weights as (E, in, out), which PEFT does not account for."""
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    config = lora(target_modules=["q_proj"], target_parameters=experts)
    with pytest.warns(EvaWarning, match="16 layers keep the default.*stored as .in, out."):
        model = eva_kernels.initialize(make_llama4(), text_batches(3), config, **QUIET)
    assert {n.rpartition(".")[2] for n in model.eva_result.ranks} == {"q_proj"}
    assert len(lora_layers(model)) == 2 + 4
    config = lora(target_modules=[], target_parameters=experts)
    with pytest.raises(EvaValueError, match="none of the 16 layers, because the weights are"):
        run(make_llama4(), text_batches(3), config)


@pytest.mark.filterwarnings(r"ignore:.*leading shape \(4, 3\)")  # global tokens of the layers
@pytest.mark.parametrize("length", [21, 16])
def test_text_shifted_by_half_a_window_keeps_its_mask(length: int) -> None:
    torch.manual_seed(0)
    config = PegasusXConfig(
        vocab_size=VOCABULARY, d_model=32, **BOTH_SIDES, block_size=8, num_global_tokens=3
    )
    encoder, (text,) = PegasusXModel(config).eval().encoder, text_batches(1, length=length)
    names = ["q_proj", "out_proj", "fc1"]
    found = eva_kernels.check_padding(encoder, text, lora(target_modules=names))
    whole, kept = length + -length % 8, int(text["attention_mask"].sum())
    for name, rows in found.layers.items():
        shift = 8 if "layers.1.self_attn" in name else 0
        assert rows.rows == 4 * (whole + shift + 3), name
        assert (rows.counted, rows.padding_counted) == (kept + 4 * 3, 0), name
