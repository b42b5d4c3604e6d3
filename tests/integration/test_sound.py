"""Models of speech: a mask over samples of sound is a mask over frames; texts that are not cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    HubertConfig,
    HubertModel,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    SiglipTextConfig,
    SiglipTextModel,
    Speech2TextConfig,
    Speech2TextForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from bench.families.others import SPEECH
from eva_kernels import EvaWarning
from eva_peft.token_mask import TokenMask
from integration.conftest import BOTH_SIDES, layer_inputs, lora, lost, run, text_batches

SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def make_wav2vec2() -> nn.Module:
    adapter = {"add_adapter": True, "num_adapter_layers": 1, "output_hidden_size": 24}
    return Wav2Vec2ForCTC(Wav2Vec2Config(**SPEECH, **adapter, vocab_size=30))


def make_hubert() -> nn.Module:
    return HubertModel(HubertConfig(**SPEECH))


def make_speech2text() -> nn.Module:
    config = Speech2TextConfig(
        vocab_size=30, d_model=32, input_feat_per_channel=8, conv_channels=16, **BOTH_SIDES
    )
    return Speech2TextForConditionalGeneration(config)


def sounds(count: int, key: str, *features: int) -> list[dict[str, Tensor]]:
    """Return batches of sound of different lengths, and noise behind them."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(count):
        lengths = torch.randint(300, 1000, (3,), generator=generator)
        mask = (torch.arange(1000) < lengths[:, None]).long()
        found.append({key: torch.randn(3, 1000, *features, generator=generator)})
        found[-1]["attention_mask"] = mask
    return found


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (
            make_wav2vec2,
            {
                "wav2vec2.feature_projection.projection": False,
                "wav2vec2.encoder.layers.1.attention.q_proj": False,
                "lm_head": True,  # behind the adapter, which halves the frames
            },
        ),
        (make_hubert, {"encoder.layers.1.feed_forward.output_dense": False}),
    ],
    ids=["wav2vec2", "hubert"],
)
def test_samples_and_frames(make: Any, layers: dict[str, bool]) -> None:
    torch.manual_seed(0)
    model, data = make().eval(), sounds(4, "input_values")
    names = list(layers)
    config = lora(tau=1.0, target_modules=names)
    result = run(model, data, config, method="gram", max_steps=4)
    for name, behind in layers.items():
        rows = []
        for batch in data:
            seen = layer_inputs(model, [batch], [name], masked=False)[name]
            options = {"add_adapter": behind} if "wav2vec2" in name or behind else {}
            lengths = model._get_feat_extract_output_lengths(
                batch["attention_mask"].sum(1), **options
            )
            frames = seen.reshape(3, -1, seen.shape[-1])
            rows += [part[:n] for part, n in zip(frames, lengths.tolist(), strict=True)]
        assert len(torch.cat(rows)) < len(data) * 3 * frames.shape[1]
        assert lost(result.components[name], torch.cat(rows)) < 1e-6, name


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
def test_an_encoder_of_sound_with_a_decoder_of_text() -> None:
    torch.manual_seed(0)
    model, data = make_speech2text().eval(), sounds(4, "input_features", 8)
    for i, batch in enumerate(data):
        batch["decoder_input_ids"] = torch.arange(3 * 9).reshape(3, 9).add(i) % 30
    name = "model.encoder.layers.0.self_attn.q_proj"
    names = [name, "model.decoder.layers.0.encoder_attn.k_proj"]
    config = lora(tau=1.0, target_modules=names)
    result = run(model, data, config, method="gram", max_steps=4)
    rows = []
    for batch in data:
        seen = layer_inputs(model, [batch], [name], masked=False)[name].reshape(3, 250, 32)
        lengths = model.model.encoder._get_feat_extract_output_lengths(
            batch["attention_mask"].sum(1)
        )
        rows += [part[:n] for part, n in zip(seen, lengths.tolist(), strict=True)]
    assert lost(result.components[name], torch.cat(rows)) < 1e-6


def make_qwen2_audio() -> nn.Module:
    audio = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4}
    audio |= {"encoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 20}
    text = {**SIZE, "model_type": "qwen2", "vocab_size": 96, "num_key_value_heads": 2}
    config = Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=3)
    return Qwen2AudioForConditionalGeneration(config)


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
def test_sound_beside_text() -> None:
    """Frames of padding, most of 30 seconds, do not count in the layers that read sound."""
    torch.manual_seed(0)
    model, mels = make_qwen2_audio().eval(), torch.tensor([40, 21, 13])
    frames = [40 // 2, 11, 7]  # halved by a convolution, and once more behind the pooling
    ids = torch.full((3, 16), 5)
    for row, n in zip(ids, frames, strict=True):
        row[1 : 1 + n // 2] = 3  # a token stands for two frames
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "input_features": torch.randn(3, 8, 40),
        "feature_attention_mask": (torch.arange(40) < mels[:, None]).long(),
    }
    (name,) = (n for n, _ in model.named_modules() if n.endswith("audio_tower.layers.0.fc1"))
    result = run(model, iter([batch]), lora(tau=1.0, target_modules=[name]), method="gram")
    x = layer_inputs(model, [batch], [name], masked=False)[name].reshape(3, 20, 32)
    rows = torch.cat([part[:n] for part, n in zip(x, frames, strict=True)])
    assert lost(result.components[name], rows) < 1e-6


def test_frames_that_layers_see_fewer_of() -> None:
    mask = torch.arange(40) < torch.tensor([40, 21, 13])[:, None]
    rule = TokenMask(torch.ones(3, 16, dtype=torch.bool), mixed=True, sound=mask)
    cpu = torch.device("cpu")
    for count, kept in ((40, [40, 21, 13]), (20, [20, 11, 7]), (10, [10, 6, 4])):
        rows = rule.rows(torch.Size((3, count, 8)), cpu, "audio_tower.layers.0.fc1")
        assert rows is not None
        counts = torch.bincount(rows // count, minlength=3)
        assert counts.tolist() == kept
        # of images as many as there are sounds
        assert rule.rows(torch.Size((3, count, 8)), cpu, "vision_tower.layers.0.fc1") is None
    assert rule.rows(torch.Size((5, 8)), cpu, "audio_tower.layers.0.fc1") is None  # packed


def test_texts_whose_last_position_is_read_are_not_cut() -> None:
    torch.manual_seed(0)
    config = SiglipTextConfig(**SIZE, vocab_size=97, max_position_embeddings=64)
    model, texts = SiglipTextModel(config).eval(), text_batches(6, length=24)
    config_ = lora(tau=1.0, target_modules=["head"])
    result = run(model, texts, config_, method="gram", max_steps=6)
    name = next(iter(result.ranks))
    rows = layer_inputs(model, texts, [name], masked=False)[name]
    assert lost(result.components[name], rows) < 1e-6


def of_one(samples: Tensor) -> int:
    return int((samples - 10) / 4 + 1)  # as Moonshine's, which takes no batch


def of_many(samples: Tensor) -> Tensor:
    return (samples - 10) // 4 + 1


def of_pairs(samples: Tensor) -> tuple[Tensor, Tensor]:
    return samples, samples  # as Qwen2-Audio's


@pytest.mark.parametrize(("lengths", "known"), [(of_one, True), (of_many, True), (of_pairs, False)])
def test_functions_of_lengths(lengths: Any, known: bool) -> None:
    counts = torch.tensor([50, 26, 14])
    mask = torch.arange(50) < counts[:, None]
    rule = TokenMask(mask, frame_lengths=[lengths])
    shape, cpu = torch.Size((3, 11, 8)), torch.device("cpu")
    if not known:
        with pytest.warns(EvaWarning, match="no token mask fits"):
            assert rule.rows(shape, cpu, "layer") is None
        return
    rows = rule.rows(shape, cpu, "layer")
    assert rows is not None
    assert rows.tolist() == [*range(11), *range(11, 11 + 5), *range(22, 22 + 2)]
