"""Q-Formers, whose queries attend to images, with or without the text of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2QFormerConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
)

from eva_peft.inputs.batch_mask import mask_of_batch
from eva_peft.inputs.token_mask import TokenMask
from eva_peft.model.architecture import architecture_of
from integration.conftest import VOCABULARY, lora, lost, run, text_batches

CPU = torch.device("cpu")
SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
SIZE |= {"num_attention_heads": 2}
QUERIES, IMAGE = 3, VOCABULARY - 1


def kept_rows(rule: TokenMask, shape: tuple[int, ...], name: str) -> list[int]:
    rows = rule.rows(torch.Size((*shape, 16)), CPU, name)
    assert rows is not None
    found: list[int] = rows.tolist()
    return found


def rows_of(mask: Tensor) -> list[int]:
    return mask.flatten().nonzero().flatten().tolist()


def with_queries(mask: Tensor) -> Tensor:
    return torch.cat([mask.new_ones(len(mask), QUERIES), mask], dim=1)


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
def test_labels_mask_a_decoder_behind_a_q_former() -> None:
    """Only InstructBLIP's text config tells that decoder inputs are made from labels."""
    torch.manual_seed(0)
    t5 = {"model_type": "t5", "vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24}
    t5 |= {"num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0, "pad_token_id": 0}
    config = InstructBlipConfig(
        vision_config={**SIZE, "image_size": 8, "patch_size": 4},
        qformer_config={**SIZE, "vocab_size": VOCABULARY, "encoder_hidden_size": 16},
        text_config={**t5, "is_encoder_decoder": True},
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
    )
    model = InstructBlipForConditionalGeneration(config).eval()
    (text,) = text_batches(1)
    mask, ids = text["attention_mask"].bool(), text["input_ids"].clamp(max=IMAGE - 1)
    image_tokens = torch.full((len(ids), QUERIES), IMAGE)
    labels = ids[:, :4].masked_fill(~mask[:, :4], -100)
    labels[0, 3] = -100
    batch = {
        "pixel_values": torch.randn(len(ids), 3, 8, 8),
        "input_ids": torch.cat([image_tokens, ids], dim=1),
        "attention_mask": with_queries(mask).long(),
        "qformer_input_ids": ids,
        "qformer_attention_mask": mask.long(),
        "labels": labels,
    }
    ends = "decoder.block.0.layer.0.SelfAttention.q"
    (name,) = (n for n, _ in model.named_modules() if n.endswith(ends))
    result = run(model, iter([batch]), lora(target_modules=[name], tau=1.0), method="gram")
    inputs: list[Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(**batch)
    assert lost(result.components[name], inputs[0][labels != -100].double()) < 1e-6


def test_text_mask_is_repeated_for_each_video_frame() -> None:
    (text,) = text_batches(1)
    mask = text["attention_mask"].bool()
    batch: dict[str, Any] = {
        **text,
        "qformer_attention_mask": mask.long(),
        "pixel_values": torch.ones(len(mask), 2, 3, 8, 8),
    }
    rule, layer = mask_of_batch(batch, lora()), "qformer.encoder.layer.0"
    for one in (mask, with_queries(mask)):
        twice = one.repeat_interleave(2, dim=0)
        assert kept_rows(rule, tuple(twice.shape), f"{layer}.output.dense") == rows_of(twice)
    shape = torch.Size((2 * len(mask), QUERIES, 16))
    assert rule.rows(shape, CPU, f"{layer}.attention.query") is None
    # rows that are no multiple of the samples have no mask
    assert rule.rows(torch.Size((len(mask) + 1, 9, 16)), CPU, f"{layer}.output.dense") is None


@pytest.mark.parametrize("reads_text", [True, False])
def test_q_former_text_uses_the_mask_of_the_models_text(reads_text: bool) -> None:
    model = nn.Linear(1, 1)
    qformer = Blip2QFormerConfig(use_qformer_text_input=reads_text).to_dict()
    model.config = Blip2Config(qformer_config=qformer)
    (text,) = text_batches(1)
    mask = text["attention_mask"].bool()
    batch = {**text, "pixel_values": torch.ones(len(mask), 3, 8, 8)}
    rule, name = mask_of_batch(batch, lora(), architecture_of(model)), "qformer.layer.0.query"
    for one in (mask, with_queries(mask)):
        if reads_text:
            assert kept_rows(rule, tuple(one.shape), name) == rows_of(one)
        else:  # queries only, by chance as many as words
            assert rule.rows(torch.Size((*one.shape, 16)), CPU, name) is None
