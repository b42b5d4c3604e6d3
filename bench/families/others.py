"""Models for images, audio, decisions and multimodal inputs; and plain torch modules."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from .family import VOCABULARY, Batch, Family, image_batches, mean_square, seeded, text_batches
from .language import SIZE

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
TEXT = {k: v for k, v in SIZE.items() if k != "pad_token_id"}
IMAGE_TOKEN = AUDIO_TOKEN = VOCABULARY - 1


def _dinov2() -> nn.Module:
    config = {k: v for k, v in VISION.items() if k != "intermediate_size"}
    return hf.Dinov2ForImageClassification(hf.Dinov2Config(**config, mlp_ratio=2, num_labels=3))


def _vit() -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**VISION, num_labels=3))


def _clip() -> nn.Module:
    text = {**TEXT, "bos_token_id": 1, "eos_token_id": 2}
    config = hf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    return hf.CLIPModel(config)


def _image_text_batches(count: int) -> list[Batch]:
    pairs = zip(text_batches(count), image_batches(count, classes=None), strict=True)
    return [{**text, **image} for text, image in pairs]


def _clip_batches(count: int) -> list[Batch]:
    batches = _image_text_batches(count)
    for batch in batches:  # the text model pools at the end-of-text token
        last = batch["attention_mask"].sum(1) - 1
        batch["input_ids"][torch.arange(4), last] = 2
    return batches


def _whisper() -> nn.Module:
    config = hf.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=12,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return hf.WhisperForConditionalGeneration(config)


def _whisper_batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    audio_by_batch = torch.randn(count, 4, 8, 24, generator=generator).cumsum(-1) / 4
    return [
        {"input_features": audio, "labels": text["labels"]}
        for audio, text in zip(
            audio_by_batch, text_batches(count, length=12, labels="tokens"), strict=True
        )
    ]


SPEECH: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 4),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "mask_time_prob": 0.0,
}
ATTENTION = {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"]}


def _wav2vec2() -> nn.Module:
    config = hf.Wav2Vec2Config(**SPEECH, vocab_size=VOCABULARY, pad_token_id=0)
    return hf.Wav2Vec2ForCTC(config)


def _hubert() -> nn.Module:
    config = hf.HubertConfig(**SPEECH, classifier_proj_size=16, num_labels=3)
    return hf.HubertForSequenceClassification(config)


def _audio_batches(count: int, *, classes: bool) -> list[Batch]:
    """Return padded audio of different lengths, each with a class or a short text."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(count):
        lengths = torch.randint(300, 800, (4, 1), generator=generator)
        mask = (torch.arange(800) < lengths).long()
        audio = torch.randn(4, 800, generator=generator).cumsum(-1) / 10
        shape = (4,) if classes else (4, 5)
        labels = torch.randint(1, 3, shape, generator=generator)
        batches.append({"input_values": audio * mask, "attention_mask": mask, "labels": labels})
    return batches


def _siglip() -> nn.Module:
    config = hf.SiglipConfig(text_config=TEXT, vision_config=VISION)
    return hf.SiglipModel(config)


def _swin() -> nn.Module:
    size = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "window_size": 4}
    config = hf.SwinConfig(**size, depths=[1, 1], num_heads=[2, 4], num_labels=3)
    return hf.SwinForImageClassification(config)


def _decisions() -> nn.Module:
    config = hf.DecisionTransformerConfig(
        state_dim=7, act_dim=3, hidden_size=32, max_ep_len=32, n_layer=2, n_head=2
    )
    return hf.DecisionTransformerModel(config)


def _decision_batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(count):
        draw = partial(torch.randn, generator=generator)
        lengths = torch.randint(4, 10, (4, 1), generator=generator)
        states = draw(4, 10, 7).cumsum(1) / 3
        batches.append(
            {
                "states": states,
                "actions": draw(4, 10, 3),
                "rewards": draw(4, 10, 1),
                "returns_to_go": draw(4, 10, 1).cumsum(1),
                "timesteps": torch.arange(10).expand(4, 10),
                "attention_mask": (torch.arange(10) < lengths).long(),
            }
        )
    return batches


def _decision_loss(model: nn.Module, batch: Batch) -> Tensor:
    out = model(**batch)
    mask = batch["attention_mask"].bool()
    errors = (out.action_preds - batch["actions"])[mask].square().mean()
    return errors + out.state_preds[mask].square().mean() + out.return_preds[mask].square().mean()


def _llava() -> nn.Module:
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**SIZE, num_key_value_heads=1),
        vision_config=hf.CLIPVisionConfig(**{**VISION, "patch_size": 8}),
        image_token_id=IMAGE_TOKEN,
    )
    return hf.LlavaForConditionalGeneration(config)


def _llava_batches(count: int) -> list[Batch]:
    batches = []
    for text, image in zip(
        text_batches(count, labels="tokens"), image_batches(count, classes=None), strict=True
    ):
        text["input_ids"][:, 1:5] = IMAGE_TOKEN  # 4 patches per image
        text["labels"][:, 1:5] = -100
        batches.append({**text, **image})
    return batches


def _layout() -> nn.Module:
    # 16 patches and a class token follow the text, in one sequence
    config = hf.LayoutLMv3Config(
        **TEXT, input_size=16, patch_size=4, coordinate_size=4, shape_size=8, num_labels=3
    )
    return hf.LayoutLMv3ForTokenClassification(config)


def _layout_batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    batches = []
    for batch in _image_text_batches(count):
        shape = batch["input_ids"].shape
        boxes = torch.randint(0, 500, (*shape, 2), generator=generator)
        labels = torch.randint(0, 3, shape, generator=generator)
        labels = torch.where(batch["attention_mask"].bool(), labels, -100)
        batches.append({**batch, "bbox": torch.cat([boxes, boxes + 9], 2), "labels": labels})
    return batches


def _qwen2_audio() -> nn.Module:
    audio = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2}
    audio |= {"encoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 20}
    text = hf.Qwen2Config(**SIZE, num_key_value_heads=1)
    config = hf.Qwen2AudioConfig(
        audio_config=audio, text_config=text, audio_token_index=AUDIO_TOKEN, pad_token_id=0
    )
    return hf.Qwen2AudioForConditionalGeneration(config)


def _qwen2_audio_batches(count: int) -> list[Batch]:
    """Return texts with audio of different lengths, padded like the processor's 30 seconds."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for batch in text_batches(count, labels="tokens"):
        tokens = torch.randint(1, 6, (4,), generator=generator)
        frames = 4 * tokens  # four frames per token
        mask = torch.arange(40) < frames[:, None]
        audio = torch.randn(4, 8, 40, generator=generator).cumsum(-1) / 4
        is_audio = torch.arange(batch["input_ids"].shape[1]) < tokens[:, None]
        batch["input_ids"].masked_fill_(is_audio, AUDIO_TOKEN)
        batch["labels"].masked_fill_(is_audio, -100)
        batch["attention_mask"] |= is_audio
        inputs = {"input_features": audio, "feature_attention_mask": mask.long()}
        batches.append({**batch, **inputs})
    return batches


class ConvolutionalNet(nn.Module):
    """A stem; a grouped, a dilated and a pointwise convolution; and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=4)
        self.dilated = nn.Conv2d(16, 16, 3, padding=2, dilation=2)
        self.pointwise = nn.Conv2d(16, 24, 1)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.stem, self.grouped, self.dilated, self.pointwise):
            x = torch.nn.functional.gelu(layer(x))
        return self.head(x.mean((2, 3)))


def _sequential() -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 4)
    )


def _vectors(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return list(torch.randn(count, 40, 20, generator=generator) * 0.8 ** torch.arange(20))


_CONVOLUTIONS = {"target_modules": ["stem", "grouped", "dilated", "pointwise", "head"]}
_IMAGES = {"task_type": None}

OTHERS: dict[str, Family] = {
    "DINOv2": Family(seeded(_dinov2), image_batches),
    "ViT": Family(seeded(_vit), image_batches),
    "Swin": Family(seeded(_swin), image_batches),
    "SigLIP": Family(
        seeded(_siglip),
        _image_text_batches,
        {"exclude_modules": r".*vision_model\.head\.attention.*"},  # never called, used as a weight
        loss=lambda model, batch: model(**batch, return_loss=True).loss,
    ),
    "Wav2Vec2": Family(seeded(_wav2vec2), partial(_audio_batches, classes=False), ATTENTION),
    "HuBERT classifier": Family(seeded(_hubert), partial(_audio_batches, classes=True)),
    "CLIP": Family(
        seeded(_clip),
        _clip_batches,
        loss=lambda model, batch: model(**batch, return_loss=True).loss,
    ),
    "Whisper": Family(seeded(_whisper), _whisper_batches),
    "Decision Transformer": Family(
        seeded(_decisions),
        _decision_batches,
        loss=_decision_loss,
    ),
    "Llava (two token streams)": Family(
        seeded(_llava),
        _llava_batches,
        untrained=(
            r"vision_tower.*layers\.1\.|post_layernorm",
            "the language model reads the last layer but one of the vision tower",
        ),
    ),
    "LayoutLMv3 classifier": Family(
        seeded(_layout),
        _layout_batches,
        # layers such as rel_pos_bias are never called: only their weights are used
        {"task_type": "TOKEN_CLS", "exclude_modules": r".*rel_pos.*|classifier.*"},
    ),
    "Qwen2-Audio": Family(seeded(_qwen2_audio), _qwen2_audio_batches),
    "Conv2d network": Family(
        seeded(ConvolutionalNet),
        lambda count: [b["pixel_values"] for b in image_batches(count, classes=None)],
        _CONVOLUTIONS,
        loss=mean_square,
    ),
    "nn.Sequential": Family(seeded(_sequential), _vectors, loss=mean_square),
}
