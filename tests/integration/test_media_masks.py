"""Masks over images: padding does not count in the layers that see it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    Idefics3Config,
    Idefics3Model,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

from eva_peft.media_masks import patches_seen, pixel_mask
from eva_peft.token_mask import TokenMask
from integration.conftest import layer_inputs, lora, lost, run

CPU = torch.device("cpu")
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
SIZE |= {"num_attention_heads": 4}


def pixels(*sizes: tuple[int, int], height: int = 16, width: int = 16) -> Tensor:
    """Return the mask of images of some sizes that were padded to one."""
    mask = torch.zeros(len(sizes), height, width, dtype=torch.long)
    for one, (rows, columns) in zip(mask, sizes, strict=True):
        one[:rows, :columns] = 1
    return mask


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
def test_images_of_several_sizes_beside_text() -> None:
    torch.manual_seed(0)
    vision = {**SIZE, "image_size": 16, "patch_size": 4}
    text = {**SIZE, "model_type": "llama", "vocab_size": 96, "pad_token_id": 0}
    config = Idefics3Config(
        vision_config=vision, text_config=text, scale_factor=2, image_token_id=3
    )
    model = Idefics3Model(config).eval()
    # two samples of two images each, the last of which is none
    mask = pixels((16, 16), (8, 12), (9, 16), (0, 0))
    images = torch.randn(4, 3, 16, 16) * mask[:, None]
    ids = torch.full((2, 12), 5)
    ids[0, :8] = ids[1, :4] = 3
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": images.view(2, 2, 3, 16, 16),
        "pixel_attention_mask": mask.view(2, 2, 16, 16),
    }
    name = "vision_model.encoder.layers.0.self_attn.q_proj"
    result = run(model, iter([batch]), lora(target_modules=[name], tau=1.0), method="gram")
    seen = layer_inputs(model, [batch], [name], masked=False)[name].view(3, 4, 4, 32)
    rows = [seen[0].flatten(0, 1), seen[1][:2, :3].flatten(0, 1), seen[2][:3].flatten(0, 1)]
    assert lost(result.components[name], torch.cat(rows)) < 1e-6


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
def test_patches_by_themselves() -> None:
    torch.manual_seed(0)
    config = Siglip2VisionConfig(**SIZE, num_patches=16, patch_size=4)
    model = Siglip2VisionModel(config).eval()
    mask = (torch.arange(12) < torch.tensor([12, 8, 6])[:, None]).long()
    batch = {
        "pixel_values": torch.randn(3, 12, 48),
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([[3, 4], [2, 4], [2, 3]]),
    }
    (name,) = (n for n, _ in model.named_modules() if n.endswith("layers.0.self_attn.q_proj"))
    result = run(model, iter([batch]), lora(target_modules=[name], tau=1.0), method="gram")
    rows = layer_inputs(model, [batch], [name], masked=False)[name][mask.bool().flatten()]
    assert lost(result.components[name], rows) < 1e-6


def test_patches_that_layers_see_fewer_of() -> None:
    mask = pixels((16, 24), (6, 9), width=24).bool()
    for side, kept in ((2, [96, 15]), (4, [24, 6]), (8, [6, 2])):
        patches = patches_seen(mask, (2, 16 * 24 // side**2))
        assert patches is not None
        assert patches.sum(1).tolist() == kept
    for leading in ((2, 7), (3, 24), (2, 0), (2,), (2, 4, 24)):
        assert patches_seen(mask, leading) is None


def test_only_layers_that_see_images() -> None:
    mask = pixels((16, 16), (8, 8)).bool()
    text = torch.ones(2, 16, dtype=torch.bool)
    shape = torch.Size((2, 16, 8))
    beside = TokenMask(text, mixed=True, pixels=mask)
    assert beside.rows(shape, CPU, "language_model.layers.0.q_proj") is None
    found = beside.rows(shape, CPU, "vision_tower.layers.0.q_proj")
    assert found is not None
    assert len(found) == 16 + 4
    alone = TokenMask(None, pixels=mask)
    assert alone.rows(shape, CPU, "model.encoder.layers.0.fc1") is not None
    assert alone.rows(shape, CPU, "model.decoder.layers.0.fc1") is None  # queries


def test_what_is_no_mask_of_pixels() -> None:
    assert pixel_mask({"pixel_values": torch.randn(2, 3, 4, 4)}) is None
    assert pixel_mask({"pixel_mask": torch.ones(3)}) is None
    found = pixel_mask({"pixel_attention_mask": torch.ones(2, 3, 8, 8)})
    assert found is not None
    assert found.shape == (6, 8, 8)
