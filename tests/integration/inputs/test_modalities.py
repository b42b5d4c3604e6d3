"""Batches of text beside images, boxes or entities: which mask a layer gets."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GitConfig,
    GitModel,
    LayoutLMv3Config,
    LayoutLMv3Model,
    VisualBertConfig,
    VisualBertForQuestionAnswering,
    VisualBertModel,
)

from eva_kernels import EvaWarning
from eva_peft.inputs.batch_mask import mask_of_batch
from eva_peft.inputs.token_mask import TokenMask
from eva_peft.model.architecture import architecture_of
from integration.conftest import layer_inputs, lora, lost, make_llama, run
from integration.padded_text import MASK, SAMPLES, SIZE, TOKENS, text

CPU = torch.device("cpu")
VISION = {"image_size": 16, "patch_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4}
VISION |= {"hidden_size": 32, "intermediate_size": 48}


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


class ImagesAndText(nn.Module):
    """Images before a text of which the model hides no padding, as in OpenCLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.words = nn.Linear(16, 8), nn.Embedding(99, 16)
        self.text = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.visual(image.flatten(2).mT), self.text(self.words(text))


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.parametrize("size", [(3, 3), (9,)], ids=["images", "spectra"])
def test_mask_of_text_that_forward_fn_passes_behind_other_media(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, names, ids = ImagesAndText(), ["visual", "text.0", "text.2"], text()["input_ids"]
    inputs = [{"image": torch.randn(SAMPLES, 16, *size), "text": ids.roll(i, 0)} for i in range(4)]
    data = [{**b, "attention_mask": MASK.roll(i, 0).long()} for i, b in enumerate(inputs)]
    result = run(
        model,
        data,
        lora(target_modules=names, tau=1.0),
        forward_fn=lambda m, b: m(b["image"], b["text"]),
        method="gram",
        max_steps=4,
    )
    kept = torch.cat([batch["attention_mask"].bool().flatten() for batch in data])
    for name, x in layer_inputs(model, inputs, names).items():
        assert lost(result.components[name], x if name == "visual" else x[kept]) < 1e-6
