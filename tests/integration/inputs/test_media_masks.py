"""Masks of images, patches, tiles and frames: padding does not count in the layers that see it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    Idefics3Config,
    Idefics3Model,
    Kosmos2_5Config,
    Kosmos2_5ForConditionalGeneration,
    ResNetConfig,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

from eva_kernels import EvaWarning
from eva_peft.inputs.batch_mask import mask_of_batch
from eva_peft.inputs.media_masks import (
    audio_mask_of,
    frame_mask_for,
    has_images,
    patch_mask_for,
    pixel_masks_of,
    tile_mask_of,
)
from eva_peft.inputs.token_mask import TokenMask
from eva_peft.model.architecture import architecture_of
from integration.conftest import layer_inputs, lora, lost, run

CPU = torch.device("cpu")
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
SIZE |= {"num_attention_heads": 4}


def padded_images(*sizes: tuple[int, int], height: int = 16, width: int = 16) -> Tensor:
    """Return the pixel mask of images of some sizes that were padded to one size."""
    mask = torch.zeros(len(sizes), height, width, dtype=torch.long)
    for one, (rows, columns) in zip(mask, sizes, strict=True):
        one[:rows, :columns] = 1
    return mask


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
def test_padded_images_beside_text_are_masked() -> None:
    torch.manual_seed(0)
    vision = {**SIZE, "image_size": 16, "patch_size": 4}
    text = {**SIZE, "model_type": "llama", "vocab_size": 96, "pad_token_id": 0}
    config = Idefics3Config(
        vision_config=vision, text_config=text, scale_factor=2, image_token_id=3
    )
    model = Idefics3Model(config).eval()
    # two samples of two images each, the last of them empty
    mask = padded_images((16, 16), (8, 12), (9, 16), (0, 0))
    images = torch.randn(4, 3, 16, 16) * mask[:, None]
    ids = torch.full((2, 12), 5)
    ids[0, :8] = ids[1, :4] = 3
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": images.view(2, 2, 3, 16, 16),
        "pixel_attention_mask": mask.view(2, 2, 16, 16),
    }
    assert architecture_of(model).patch_sizes == (4,)
    name = "vision_model.encoder.layers.0.self_attn.q_proj"
    result = run(model, iter([batch]), lora(target_modules=[name], tau=1.0), method="gram")
    inputs = layer_inputs(model, [batch], [name], masked=False)[name].view(3, 4, 4, 32)
    rows = [inputs[0].flatten(0, 1), inputs[1][:2, :3].flatten(0, 1), inputs[2][:3].flatten(0, 1)]
    assert lost(result.components[name], torch.cat(rows)) < 1e-6


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
def test_mask_over_patches_applies() -> None:
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


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.parametrize(("height", "width"), [(128, 128), (100, 75)])
def test_object_detector_masks_patches_and_not_queries(height: int, width: int) -> None:
    """Padding patches do not count, in the decoder either; queries do, whatever their number.

    By their number, a hundred queries could be a grid of 10 x 10 patches.
    """
    torch.manual_seed(0)
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic",
        out_features=["stage4"],
    )  # fmt: skip
    sides = {f"{side}_{n}": m for side in ("encoder", "decoder") for n, m in
             (("layers", 1), ("attention_heads", 2), ("ffn_dim", 48))}  # fmt: skip
    config = DetrConfig(
        backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False,
        d_model=32, num_queries=100, **sides,
    )  # fmt: skip
    model = DetrForObjectDetection(config).eval()
    mask = padded_images(
        (height, width), (height // 2 + 2, width // 3 + 5), height=height, width=width
    )
    batch = {"pixel_values": torch.randn(2, 3, height, width) * mask[:, None], "pixel_mask": mask}
    grid = -(-height // 32), -(-width // 32)
    kept = functional.interpolate(mask[:, None].float(), grid).bool().flatten()
    names = ["encoder.layers.0.self_attn.q_proj", "decoder.layers.0.encoder_attn.k_proj"]
    names = [f"model.{name}" for name in names]
    result = run(model, iter([batch]), lora(target_modules=names, tau=1.0), method="gram")
    inputs = layer_inputs(model, [batch], names, masked=False)
    for name in names:
        assert len(inputs[name]) == len(kept) > kept.sum()
        assert lost(result.components[name], inputs[name][kept]) < 1e-6
    assert architecture_of(model).patch_sizes == ()
    rule = mask_of_batch(batch, lora(), architecture_of(model))
    for name in (
        "class_labels_classifier",
        "bbox_predictor.layers.0",
        "model.decoder.layers.0.fc1",
    ):
        assert rule.rows(torch.Size((2, 100, 32)), CPU, name) is None


def test_padding_tiles_of_images_are_masked() -> None:
    """Mllama cuts images into tiles, and pads the number of tiles."""
    tiles = torch.tensor([[[1, 1, 0, 0]], [[1, 0, 0, 0]]])
    text = torch.ones(2, 7, dtype=torch.bool)
    rule = TokenMask(text, multimodal=True, tile_mask=tile_mask_of({"aspect_ratio_mask": tiles}))
    kept = tiles.bool().flatten().repeat_interleave(5)
    for shape in ((2, 20, 8), (2, 1, 4, 5, 8), (8, 5, 8)):
        for name in ("vision_model.layers.0.fc1", "language_model.layers.3.cross_attn.k_proj"):
            rows = rule.rows(torch.Size(shape), CPU, name)
            assert rows is not None
            assert rows.tolist() == kept.nonzero().flatten().tolist()
    assert rule.rows(torch.Size((3, 7, 8)), CPU, "vision_model.layers.0.fc1") is None
    for count in (7, 8):  # also as many tokens as there are tiles
        shape = torch.Size((2, count, 8))
        assert rule.rows(shape, CPU, "language_model.layers.0.q_proj") is None
    assert tile_mask_of({"aspect_ratio_mask": tiles[:, 0]}) is None


def test_an_image_that_a_sample_lacks_has_no_tile() -> None:
    """Mllama's processor keeps one tile of it, and says 0 for its aspect ratio."""
    tiles = torch.tensor([[[1, 1, 0], [1, 0, 0]], [[1, 0, 0], [1, 0, 0]]])
    batch = {"aspect_ratio_mask": tiles, "aspect_ratio_ids": torch.tensor([[2, 1], [1, 0]])}
    kept = tile_mask_of(batch)
    assert kept is not None
    assert kept.tolist() == [
        [[True, True, False], [True, False, False]],
        [[True, False, False], [False] * 3],
    ]


def test_incomplete_patches_at_the_edges_are_dropped() -> None:
    """A patch embedding ignores pixels that do not fill a patch."""
    for size in range(15, 90):
        mask = padded_images(
            (size, size + 9), (size - 4, size - 9), height=size, width=size + 9
        ).bool()
        expected = mask.unfold(1, 14, 14).unfold(2, 14, 14)[..., 0, 0].flatten(1)
        found = patch_mask_for(mask, tuple(expected.shape), (14,))
        assert found is not None
        assert torch.equal(found, expected)


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
def test_patch_mask_of_timm_naflexvit_applies() -> None:
    """``NaFlexVit`` is called with the mapping that its loader makes."""
    kept = torch.arange(6) < torch.tensor([6, 4, 3])[:, None]
    mask = mask_of_batch({"patches": torch.randn(3, 6, 12), "patch_valid": kept}, lora())
    with_tokens = torch.cat([torch.ones(3, 2, dtype=torch.bool), kept], 1)  # class, register
    for expected, name in ((kept, "embeds.proj"), (with_tokens, "blocks.0.attn.qkv")):
        rows = mask.rows(torch.Size((*expected.shape, 8)), torch.device("cpu"), name)
        assert rows is not None
        assert torch.equal(rows, expected.flatten().nonzero().flatten())
    for pooled in ((3, 1, 8), (3, 8)):
        assert mask.rows(torch.Size(pooled), torch.device("cpu"), "attn_pool.q") is None


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("connector.perceiver_resampler.layers.0.q_proj", 64),
        ("model.pixel_level_module.decoder.encoder.layers.0.fc1", 16),
        ("multi_modal_projector.ffn.linear_in", 256),
    ],
)
def test_queries_are_not_masked_as_patches(name: str, count: int) -> None:
    size = 980 if count == 256 else 64
    mask = padded_images((size, size), (size // 2, size), height=size, width=size).bool()
    text = torch.ones(2, 5, dtype=torch.bool)
    rule = TokenMask(text, multimodal=True, pixel_masks=[mask], patch_sizes=(14,))
    assert rule.rows(torch.Size((2, count, 8)), CPU, name) is None


def test_patches_that_fit_no_grid_warn() -> None:
    mask = padded_images((16, 16), (8, 8)).bool()
    rule = TokenMask(None, pixel_masks=[mask])
    for windows in ((8, 11, 8), (2, 5, 5, 8)):  # windows of a backbone, as samples or as grids
        assert rule.rows(torch.Size(windows), CPU, "model.encoder.layers.0.fc2") is None
    with pytest.warns(EvaWarning, match=r"fits its input of leading shape \(2, 11\)"):
        assert rule.rows(torch.Size((2, 11, 8)), CPU, "model.encoder.layers.0.fc1") is None


def test_pixel_mask_is_reduced_to_any_patch_size() -> None:
    mask = padded_images((16, 24), (6, 9), width=24).bool()
    for side, kept in ((2, [96, 15]), (4, [24, 6]), (8, [6, 2])):
        patches = patch_mask_for(mask, (2, 16 * 24 // side**2))
        assert patches is not None
        assert patches.sum(1).tolist() == kept
    for leading in ((2, 7), (3, 24), (2, 0), (3,), (2, 4, 24)):
        assert patch_mask_for(mask, leading) is None
    # four or sixteen patches that a model merges into one
    for count, kept in ((96, [96, 15]), (24, [24, 6]), (6, [6, 2])):
        patches = patch_mask_for(mask, (2, count), (2,))
        assert patches is not None
        assert patches.sum(1).tolist() == kept
    assert patch_mask_for(mask[:, 0], (2, 12)) is None  # a mask over patches is not reduced further


def test_pixel_masks_apply_only_to_vision_layers() -> None:
    mask = padded_images((16, 16), (8, 8)).bool()
    text = torch.ones(2, 16, dtype=torch.bool)
    shape = torch.Size((2, 16, 8))
    beside = TokenMask(text, multimodal=True, pixel_masks=[mask])
    assert beside.rows(shape, CPU, "language_model.layers.0.q_proj") is None
    found = beside.rows(shape, CPU, "vision_tower.layers.0.q_proj")
    assert found is not None
    assert len(found) == 16 + 4
    # a text layer with as many tokens as there may be patches, and an audio layer
    assert beside.rows(torch.Size((2, 4, 8)), CPU, "text_encoder.layers.0.fc1") is None
    assert beside.rows(shape, CPU, "audio_tower.layers.0.fc1") is None
    alone = TokenMask(None, pixel_masks=[mask])
    for name in ("model.encoder.layers.0.fc1", "vision_model.blocks.0.fc1"):
        assert alone.rows(shape, CPU, name) is not None
    for name in ("fc1", "encoder_attn.q_proj"):  # queries
        assert alone.rows(shape, CPU, f"model.decoder.layers.0.{name}") is None


@pytest.mark.parametrize("key", ["input_ids", "inputs_embeds"])
def test_text_mask_beside_images_and_other_entries(key: str) -> None:
    kept = torch.arange(7) < torch.tensor([7, 4])[:, None]
    text = {key: torch.ones(2, 7).long() if key == "input_ids" else torch.ones(2, 7, 16)}
    text["attention_mask"] = kept.long()
    rule = mask_of_batch({**text, "pixel_values": torch.ones(2, 3, 8, 8)}, lora())
    for count in (7, 9):  # as many patches as words, or more
        shape = torch.Size((2, count, 8))
        assert rule.rows(shape, CPU, "vision_model.encoder.layers.0.mlp.fc1") is None
    of_text = {"weights": (2, 7), "weight": (2,), "labels": (2, 5), "head_mask": (1, 4)}
    of_text["decoder_inputs_embeds"] = (2, 4, 16)
    others = [{name: torch.ones(shape)} for name, shape in of_text.items()]
    for other in ({"pixel_values": torch.ones(2, 3, 8, 8)}, *others):
        rule = mask_of_batch({**text, **other}, lora())
        assert rule.multimodal == ("pixel_values" in other)
        rows = rule.rows(torch.Size((2, 7, 8)), CPU, "language_model.layers.0.mlp.up_proj")
        assert rows is not None
        assert rows.tolist() == kept.flatten().nonzero().flatten().tolist()


def test_images_that_no_token_attends_to_are_masked() -> None:
    """As in IDEFICS, which pads the number of images per sample."""
    attention = torch.zeros(3, 7, 2, dtype=torch.long)
    attention[0, 2:], attention[1, 3:, 0], attention[2, :1, 1] = 1, 1, 1
    batch = {"image_attention_mask": attention, "pixel_values": torch.randn(3, 2, 3, 8, 8)}
    tiles = tile_mask_of(batch)
    assert tiles is not None
    assert tiles.tolist() == [[[True], [True]], [[True], [False]], [[False], [True]]]
    rule = TokenMask(torch.ones(3, 7, dtype=torch.bool), multimodal=True, tile_mask=tiles)
    kept = tiles.flatten().repeat_interleave(5).nonzero().flatten().tolist()
    for shape, name in (
        ((6, 5, 8), "vision_model.encoder.layers.0.mlp.fc1"),
        ((6, 5, 8), "perceiver_resampler.blocks.0.1.fc"),
        ((3, 10, 8), "gated_cross_attn_layers.0.cross_attn.k_proj"),
    ):
        rows = rule.rows(torch.Size(shape), CPU, name)
        assert rows is not None
        assert rows.tolist() == kept
    # a mask over whole images, as PI0's over cameras, is no mask over patches
    cameras = {"pixel_values": batch["pixel_values"], "pixel_attention_mask": tiles[..., 0]}
    found = tile_mask_of(cameras)
    assert found is not None
    assert torch.equal(found, tiles)
    assert pixel_masks_of(cameras) == ()
    # masks of another kind, as over an image's patches
    for key, other in (
        ("image_attention_mask", attention[:, 0]),
        ("pixel_values", attention.float()),
    ):
        assert tile_mask_of({**batch, key: other}) is None
    assert tile_mask_of({**cameras, "pixel_attention_mask": tiles[:, :1, 0]}) is None


def test_padding_crops_and_their_pooled_rows_are_masked() -> None:
    """Phi-4 pads the number of crops; a row pooled from a padding crop does not count."""
    crops = torch.zeros(2, 3, 4, 4, dtype=torch.long)
    crops[0], crops[1, 0], crops[1, 1, :, :2] = 1, 1, 1
    (mask,) = pixel_masks_of({"image_attention_mask": crops})
    assert torch.equal(mask, crops.view(6, 16).bool())
    rule = TokenMask(torch.ones(2, 7, dtype=torch.bool), multimodal=True, pixel_masks=[mask])
    rows = rule.rows(torch.Size((6, 16, 8)), CPU, "img_processor.encoder.layers.0.mlp.fc1")
    assert rows is not None
    assert rows.tolist() == mask.flatten().nonzero().flatten().tolist()
    for shape in ((6, 8), (6, 1, 8)):
        rows = rule.rows(torch.Size(shape), CPU, "img_processor.head.mlp.fc1")
        assert rows is not None
        assert rows.tolist() == [0, 1, 2, 3, 4]
        assert rule.rows(torch.Size(shape), CPU, "model.layers.0.mlp.fc1") is None


def test_entries_that_are_no_pixel_masks() -> None:
    assert pixel_masks_of({"pixel_values": torch.randn(2, 3, 4, 4)}) == ()
    assert pixel_masks_of({"pixel_mask": torch.ones(3)}) == ()
    (found,) = pixel_masks_of({"pixel_attention_mask": torch.ones(2, 3, 8, 8)})
    assert found.shape == (6, 8, 8)
    sizes = {"image_sizes": torch.ones(2, 3, 2, dtype=torch.long)}  # sizes of images are no images
    assert pixel_masks_of(sizes) == ()
    assert not has_images(sizes)


def test_entries_that_are_audio_masks() -> None:
    kept = torch.arange(50) < torch.tensor([50, 20])[:, None]

    def mask_for(**batch: Tensor) -> Tensor | None:
        return audio_mask_of({"input_features": torch.ones(2, 50, 8), 0: kept, **batch})

    for key in ("input_features_mask", "feature_attention_mask", "mask_of_mine"):
        found = mask_for(**{key: kept.long()})
        assert found is not None
        assert torch.equal(found, kept)
    # these are read elsewhere, or mark what training hides
    for key in ("attention_mask", "decoder_attention_mask", "mask_time_indices"):
        assert mask_for(**{key: kept}) is None
    # also a mask over groups of frames, where the name tells
    found = mask_for(feature_attention_mask=kept[:, ::5])
    assert found is not None
    assert torch.equal(found, kept[:, ::5])
    others = (kept.float(), kept[:, :40], kept[:, :2], kept[:1], kept[..., None])
    for other in others:  # scores, and masks of something else
        assert mask_for(mask_of_mine=other) is None
    assert audio_mask_of({"input_ids": torch.ones(2, 50), "mask_of_mine": kept}) is None
    assert mask_for(input_features_mask=kept[..., None]) is None


@pytest.mark.parametrize(
    ("shape", "leading"),
    [((0, 5), (3, 4)), ((2, 6), (3, 4)), ((2, 3), (4, 1)), ((2, 3), (2, 0)), ((2, 0), (2, 3))],
)
def test_shapes_that_fit_no_frame_mask(shape: tuple[int, int], leading: tuple[int, int]) -> None:
    assert frame_mask_for(torch.ones(shape, dtype=torch.bool), leading) is None


def make_kosmos() -> nn.Module:
    names = {"embed_dim": 32, "layers": 1, "ffn_dim": 48, "attention_heads": 4}
    image = {**SIZE, "patch_embed_hidden_size": 12, "head_dim": 8, "patch_size": 2}
    config = Kosmos2_5Config(
        text_config={**names, "vocab_size": 97, "max_position_embeddings": 64},
        vision_config={**image, "max_num_patches": 64},
        latent_query_num=4,
    )
    return Kosmos2_5ForConditionalGeneration(config)


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.parametrize("patches", [10, 18], ids=["", "as many as tokens"])
def test_all_zero_patches_are_masked_beside_text(patches: int) -> None:
    """Kosmos-2.5 finds padding patches by their zeros; its text has a mask."""
    torch.manual_seed(0)
    model, kept = make_kosmos().eval(), torch.arange(patches) < torch.tensor([[patches], [6], [3]])
    images = torch.randn(3, patches, 2 + 12) * kept[..., None]
    images[..., :2] = kept[..., None] * torch.arange(1, patches + 1)[:, None]
    ids = torch.randint(5, 97, (3, 18))
    ids[:, 1:5] = 3
    text = torch.arange(18) < torch.tensor([[18], [14], [9]])
    batch = {"input_ids": ids, "attention_mask": text.long(), "flattened_patches": images}
    batch["image_embeds_position_mask"] = (ids == 3).long()
    names = {"vision_model.encoder.layer.0.mlp.wo": kept}
    names["text_model.model.layers.0.ffn.fc2"] = text
    result = run(model, [batch], lora(tau=1.0, target_modules=list(names)), method="gram")
    for name, mask in names.items():
        x = layer_inputs(model, [batch], [name], masked=False)[name]
        assert lost(result.components[name], x[mask.flatten()]) < 1e-6, name


@pytest.mark.parametrize(("frames", "stride"), [(100, 8), (137, 4), (39, 2)])
def test_incomplete_last_frame_of_a_convolution_counts(frames: int, stride: int) -> None:
    """As in Qwen3-ASR, which cuts audio into chunks of 100: frames of padding only do not count."""
    lengths = torch.tensor([frames, 88, 16, 1]).clamp_max(frames)
    mask = torch.arange(frames) < lengths[:, None]
    frame_mask = frame_mask_for(mask, (4, -(-frames // stride)))
    assert frame_mask is not None
    assert frame_mask.sum(1).tolist() == [-(-n // stride) for n in lengths.tolist()]


def test_negative_patch_positions_mark_padding() -> None:
    """Gemma 4 gives the position of each patch, and -1 for padding."""
    positions = torch.tensor([[[0, 0], [1, 0], [-1, -1]], [[0, 0], [-1, -1], [-1, -1]]])
    video = torch.zeros(4, 5, 2, dtype=torch.long)
    video[:, 3:] = -1
    batch = {"image_position_ids": positions, "video_position_ids": video}
    masks = pixel_masks_of(batch)
    assert masks[0].tolist() == [[True, True, False], [True, False, False]]
    text = torch.ones(2, 7, dtype=torch.bool)
    rule = TokenMask(text, multimodal=True, pixel_masks=masks)
    name = "vision_tower.encoder.layers.0.mlp.up_proj"
    for mask in masks:
        found = rule.rows(torch.Size((*mask.shape, 8)), CPU, name)
        assert found is not None
        assert found.tolist() == mask.flatten().nonzero().flatten().tolist()
    # positions of text, also of several kinds
    for key in ("position_ids", "decoder_position_ids"):
        assert pixel_masks_of({key: torch.zeros(2, 7, 2, dtype=torch.long)}) == ()
    for shape in ((2, 7), (2, 7, 3)):
        assert pixel_masks_of({"image_position_ids": torch.zeros(shape, dtype=torch.long)}) == ()
    assert pixel_masks_of({"image_position_ids": torch.zeros(2, 7, 2)}) == ()
