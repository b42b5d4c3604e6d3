"""Speech models: a mask over audio samples becomes a mask over frames."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    HubertConfig,
    HubertModel,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    SeamlessM4Tv2Config,
    SeamlessM4Tv2ForSpeechToText,
    SiglipTextConfig,
    SiglipTextModel,
    Speech2TextConfig,
    Speech2TextForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from bench.families.others import SPEECH
from eva_kernels import EvaWarning
from eva_peft.inputs.batch_mask import mask_of_batch, warn_of_counted_padding
from eva_peft.inputs.media_masks import frame_mask_for
from eva_peft.inputs.token_mask import TokenMask
from eva_peft.model.architecture import Architecture, architecture_of
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


def audio_batches(count: int, key: str, *features: int) -> list[dict[str, Tensor]]:
    """Return batches of audio of different lengths, padded with noise."""
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
def test_mask_of_samples_becomes_a_mask_of_frames(make: Any, layers: dict[str, bool]) -> None:
    torch.manual_seed(0)
    model, data = make().eval(), audio_batches(4, "input_values")
    names = list(layers)
    config = lora(tau=1.0, target_modules=names)
    result = run(model, data, config, method="gram", max_steps=4)
    for name, behind in layers.items():
        rows = []
        for batch in data:
            inputs = layer_inputs(model, [batch], [name], masked=False)[name]
            options = {"add_adapter": behind} if "wav2vec2" in name or behind else {}
            lengths = model._get_feat_extract_output_lengths(
                batch["attention_mask"].sum(1), **options
            )
            frames = inputs.reshape(3, -1, inputs.shape[-1])
            rows += [part[:n] for part, n in zip(frames, lengths.tolist(), strict=True)]
        assert len(torch.cat(rows)) < len(data) * 3 * frames.shape[1]
        assert lost(result.components[name], torch.cat(rows)) < 1e-6, name


@pytest.mark.parametrize("axis", [None, 2, 1], ids=["samples", "frames", "bands first"])
def test_sound_that_ends_in_silence_and_has_no_mask_is_warned_of(axis: int | None) -> None:
    (batch,) = audio_batches(1, "input_values")
    sound, mask = batch["input_values"], batch["attention_mask"]
    if axis is None:  # normalised with its padding, as a feature extractor does without a mask
        key, padded = "input_values", torch.where(mask > 0, sound, 0.1)
    else:
        key, padded = "input_features", (sound * mask).unsqueeze(axis).repeat_interleave(3, axis)
    quiet = {key: padded, "attention_mask": mask}, {key: padded, "sound_mask": mask}
    warned: set[str] = set()
    for given in (*quiet, {key: torch.randn(padded.shape)}):
        warn_of_counted_padding(given, TokenMask(None), None, warned)
    with pytest.warns(EvaWarning, match="sounds begin or end in silence.*attention_mask"):
        warn_of_counted_padding({key: padded}, TokenMask(None), None, warned)
    warn_of_counted_padding({key: padded}, TokenMask(None), None, warned)  # only once


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
def test_audio_encoder_with_a_text_decoder_masks_frames() -> None:
    torch.manual_seed(0)
    model, data = make_speech2text().eval(), audio_batches(4, "input_features", 8)
    for i, batch in enumerate(data):
        batch["decoder_input_ids"] = torch.arange(3 * 9).reshape(3, 9).add(i) % 30
    name = "model.encoder.layers.0.self_attn.q_proj"
    names = [name, "model.decoder.layers.0.encoder_attn.k_proj"]
    config = lora(tau=1.0, target_modules=names)
    result = run(model, data, config, method="gram", max_steps=4)
    rows = []
    for batch in data:
        inputs = layer_inputs(model, [batch], [name], masked=False)[name].reshape(3, 250, 32)
        lengths = model.model.encoder._get_feat_extract_output_lengths(
            batch["attention_mask"].sum(1)
        )
        rows += [part[:n] for part, n in zip(inputs, lengths.tolist(), strict=True)]
    assert lost(result.components[name], torch.cat(rows)) < 1e-6


def make_qwen2_audio() -> nn.Module:
    audio = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4}
    audio |= {"encoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 20}
    text = {**SIZE, "model_type": "qwen2", "vocab_size": 96, "num_key_value_heads": 2}
    config = Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=3)
    return Qwen2AudioForConditionalGeneration(config)


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
def test_audio_beside_text_masks_padding_frames() -> None:
    """Padding frames, up to 30 seconds, do not count in the layers that read audio."""
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
    ends = {"audio_tower.layers.0.fc1": frames, "multi_modal_projector.linear": [10, 5, 3]}
    names = [n for n, _ in model.named_modules() if n.endswith(tuple(ends))]
    result = run(model, iter([batch]), lora(tau=1.0, target_modules=names), method="gram")
    for name, kept in zip(names, ends.values(), strict=True):
        x = layer_inputs(model, [batch], [name], masked=False)[name].reshape(3, -1, 32)
        rows = torch.cat([part[:n] for part, n in zip(x, kept, strict=True)])
        assert lost(result.components[name], rows) < 1e-6, name


def test_frame_mask_is_reduced_to_fewer_frames() -> None:
    mask = torch.arange(40) < torch.tensor([40, 21, 13])[:, None]
    rule = TokenMask(torch.ones(3, 16, dtype=torch.bool), multimodal=True, audio_mask=mask)
    cpu = torch.device("cpu")
    for count, kept in ((40, [40, 21, 13]), (20, [20, 11, 7]), (10, [10, 6, 4])):
        rows = rule.rows(torch.Size((3, count, 8)), cpu, "audio_tower.layers.0.fc1")
        assert rows is not None
        counts = torch.bincount(rows // count, minlength=3)
        assert counts.tolist() == kept
        left = TokenMask(
            torch.ones(3, 16, dtype=torch.bool), multimodal=True, audio_mask=mask.flip(1)
        )
        assert left.rows(torch.Size((3, count, 8)), cpu, "audio_tower.layers.0.fc1") is None
        # images, as many as audio clips
        assert rule.rows(torch.Size((3, count, 8)), cpu, "vision_tower.layers.0.fc1") is None
    assert rule.rows(torch.Size((5, 8)), cpu, "audio_tower.layers.0.fc1") is None  # packed


CPU = torch.device("cpu")
LENGTHS = torch.tensor([40, 21, 13])
KEPT = torch.arange(40) < LENGTHS[:, None]


def kept_of(batch: dict[str, Tensor], name: str, *leading: int, **architecture: Any) -> Any:
    """Return how many rows of each clip count in a layer's input."""
    mask = mask_of_batch(batch, lora(), Architecture(**architecture))
    rows = mask.rows(torch.Size((*leading, 8)), CPU, name)
    return None if rows is None else torch.bincount(rows // leading[1], minlength=3).tolist()


@pytest.mark.parametrize("key", ["padding_mask", "input_values_mask", "input_features_mask"])
@pytest.mark.parametrize("text", [False, True])
def test_audio_masks_under_other_names_apply(key: str, text: bool) -> None:
    batch = {"input_values": torch.randn(3, 1, 40), key: KEPT.long()}
    if text:
        batch["input_ids"] = batch["attention_mask"] = torch.ones(3, 16, dtype=torch.long)
    for name in ("audio_tower.fc1", "acoustic_tokenizer.fc1", "multi_modal_projector.linear"):
        assert kept_of(batch, name, 3, 20) == [20, 11, 7]
    alone = kept_of(batch, "layers.0.q_proj", 3, 20)
    assert alone == (None if text else [20, 11, 7])  # this layer reads text here
    assert kept_of(batch, "decoder.layers.0.encoder_attn.q_proj", 3, 20) is None
    assert kept_of({**batch, "pixel_values": torch.randn(3, 3, 8, 8)}, "mm_proj", 3, 20) is None


def test_masks_that_do_not_fit_the_audio_are_ignored() -> None:
    values = torch.randn(3, 40)
    for mask in (KEPT[:, :39], KEPT[:2], KEPT.float(), KEPT[:, :, None]):
        assert kept_of({"input_values": values, "padding_mask": mask}, "layer", 3, 20) is None


def test_frame_mask_without_a_length_function_of_the_model() -> None:
    batch = {"input_features": torch.randn(3, 40, 8), "attention_mask": KEPT.long()}
    assert kept_of(batch, "layers.0.q_proj", 3, 10) == [10, 6, 4]
    decoder = {**batch, "decoder_input_ids": torch.ones(3, 10, dtype=torch.long)}
    both = type("Config", (), {"is_encoder_decoder": True})()
    assert kept_of(decoder, "model.encoder.fc1", 3, 10, config=both) == [10, 6, 4]
    assert kept_of(decoder, "model.decoder.encoder_attn.k_proj", 3, 10, config=both) == [10, 6, 4]
    assert kept_of(decoder, "model.decoder.fc1", 3, 10, config=both) is None  # every step counts
    with pytest.warns(EvaWarning, match="no token mask fits"):
        assert kept_of(decoder, "model.decoder.fc1", 3, 9, config=both) is None


def test_mask_of_a_transcript_does_not_mask_frames() -> None:
    """A collator may leave it beside the labels of Whisper."""
    (texts,) = text_batches(1)
    samples, tokens = texts["input_ids"].shape
    batch = {"input_features": torch.randn(samples, 8, 200), "labels": texts["input_ids"]}
    batch["attention_mask"] = texts["attention_mask"]
    rule = mask_of_batch(batch, lora(), Architecture(SimpleNamespace(is_encoder_decoder=True)))
    shape = torch.Size((samples, 5 * tokens, 8))
    with pytest.warns(EvaWarning, match="no token mask fits"):
        rows = rule.rows(shape, torch.device("cpu"), "encoder.layers.0.fc1")
    assert rows is None


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.parametrize("name", ["encoder.layers.0.self_attn.relative_k_proj", "enc.linear_pos"])
def test_relative_positions_are_not_masked_as_frames(name: str) -> None:
    """FastConformer reads them once per clip, as in Parakeet, Canary and Nemotron."""
    batch = {"input_features": torch.randn(3, 40, 8), "attention_mask": KEPT.long()}
    assert kept_of(batch, "encoder.layers.0.self_attn.q_proj", 3, 10) == [10, 6, 4]
    for functions in ((), (lambda n: n // 4,)):
        assert kept_of(batch, name, 3, 19, frame_length_functions=functions) is None


def test_audio_split_into_chunks_is_masked() -> None:
    batch = {"input_features": torch.randn(3, 40, 8), "input_features_mask": KEPT.long()}
    # the model gives lengths of whole clips, which would be as many frames
    mask = mask_of_batch(batch, lora(), Architecture(frame_length_functions=(lambda n: n // 4,)))
    rows = mask.rows(torch.Size((6, 10, 8)), CPU, "audio_tower.conv_out")
    assert rows is not None  # each clip is cut into two chunks, halved by a convolution
    assert torch.bincount(rows // 10, minlength=6).tolist() == [10, 10, 10, 1, 7, 0]


def test_every_length_function_is_tried() -> None:
    class Part(nn.Module):
        def _get_subsampling_output_length(self, samples: Tensor) -> Tensor:
            return samples // 4

    class Whole(Part):
        """Has a method that it does not use, as CohereAsr."""

        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([Part(), Part()])

        def _get_feat_extract_output_lengths(self, samples: Tensor) -> Tensor:
            return samples // 384

    lengths = architecture_of(Whole()).frame_length_functions
    assert [int(each(torch.tensor(768))) for each in lengths] == [2, 192]


def test_length_function_is_tried_with_each_config() -> None:
    """OmniASR's outermost model inherits one that needs the strides in its encoder's config."""

    class Part(nn.Module):
        def __init__(self, **config: int) -> None:
            super().__init__()
            self.config = SimpleNamespace(**config)

        def _get_subsampling_output_length(self, samples: Tensor) -> Tensor:
            return samples // self.config.stride

    whole, encoder = Part(), Part(stride=4)
    encoder.layers = nn.ModuleList([Part(), Part()])
    for layer in encoder.layers:
        layer.config = encoder.config
    whole.encoder = encoder
    lengths = architecture_of(whole).frame_length_functions
    assert len(lengths) == 2
    rule = TokenMask(torch.arange(48) < torch.tensor([[48], [32]]), frame_length_functions=lengths)
    rows = rule.rows(torch.Size((2, 12, 8)), CPU, "encoder.layer")
    assert rows is not None
    assert rows.tolist() == [*range(12), *range(12, 12 + 8)]


def test_text_is_not_trimmed_where_its_last_position_is_read() -> None:
    torch.manual_seed(0)
    config = SiglipTextConfig(**SIZE, vocab_size=97, max_position_embeddings=64)
    model, texts = SiglipTextModel(config).eval(), text_batches(6, length=24)
    config_ = lora(tau=1.0, target_modules=["head"])
    result = run(model, texts, config_, method="gram", max_steps=6)
    name = next(iter(result.ranks))
    rows = layer_inputs(model, texts, [name], masked=False)[name]
    assert lost(result.components[name], rows) < 1e-6


def length_of_one(samples: Tensor) -> int:
    return int((samples - 10) / 4 + 1)  # as in Moonshine, for a single clip


def lengths_of_many(samples: Tensor) -> Tensor:
    return (samples - 10) // 4 + 1


def lengths_around_pooling(samples: Tensor) -> tuple[Tensor, Tensor]:
    return samples // 2, (samples - 10) // 4 + 1  # as in Qwen2-Audio: before and after pooling


def no_lengths(samples: Tensor) -> None: ...


@pytest.mark.parametrize(
    ("lengths", "known"),
    [
        (length_of_one, True),
        (lengths_of_many, True),
        (lengths_around_pooling, True),
        (no_lengths, False),
    ],
)
def test_length_functions_of_every_form_give_frame_masks(lengths: Any, known: bool) -> None:
    counts = torch.tensor([50, 26, 14])
    mask = torch.arange(50) < counts[:, None]
    rule = TokenMask(mask, frame_length_functions=[lengths])
    shape, cpu = torch.Size((3, 11, 8)), torch.device("cpu")
    if not known:
        with pytest.warns(EvaWarning, match="no token mask fits"):
            assert rule.rows(shape, cpu, "layer") is None
        return
    rows = rule.rows(shape, cpu, "layer")
    assert rows is not None
    assert rows.tolist() == [*range(11), *range(11, 11 + 5), *range(22, 22 + 2)]
    rows = rule.rows(torch.Size((3, 2, 11, 8)), cpu, "layer")  # by heads, as WavLM's gates
    assert rows is not None
    heads = torch.arange(11)[None, None] < torch.tensor([11, 5, 2])[:, None, None].expand(3, 2, 1)
    assert rows.tolist() == heads.flatten().nonzero().flatten().tolist()
    written = TokenMask(None, mask, encoder_decoder=True, frame_length_functions=[lengths])
    with pytest.warns(EvaWarning, match="no token mask fits"):  # the decoder reads text
        assert written.rows(shape, cpu, "decoder.layer") is None


@pytest.mark.parametrize("frames", [20, 18])  # the last window of a clip may be short
def test_mask_over_groups_of_frames_is_expanded(frames: int) -> None:
    """As in Granite speech models, whose encoder receives no mask and has a generic name."""
    counts = torch.tensor([4, 1, 2])
    mask = torch.arange(4) < counts[:, None]
    rule = TokenMask(
        torch.ones(3, 9, dtype=torch.bool), multimodal=True, audio_mask=mask, audio_only=True
    )
    cpu = torch.device("cpu")
    rows = rule.rows(torch.Size((3, frames, 8)), cpu, "encoder.layers.0.ff1.up_proj")
    assert rows is not None
    kept = torch.arange(frames) < 5 * counts[:, None]
    assert rows.tolist() == kept.flatten().nonzero().flatten().tolist()
    rows = rule.rows(torch.Size((3, 4, 8)), cpu, "projector.linear")
    assert rows is not None
    assert rows.tolist() == mask.flatten().nonzero().flatten().tolist()
    # text, and frames among other tokens
    assert rule.rows(torch.Size((3, 20, 8)), cpu, "language_model.layers.0.mlp.up_proj") is None
    assert rule.rows(torch.Size((3, 5, 8)), cpu, "encoder.layers.0.ff1.up_proj") is None
    # relative positions of the frames of a single clip, as in Wav2Vec2-BERT
    assert frame_mask_for(mask[:1], (1, 7)) is None
    halves = frame_mask_for(mask, (3, 7))
    assert halves is not None
    assert halves.sum(1).tolist() == [7, 2, 4]
    # a text encoder without a mask
    rule = TokenMask(None, multimodal=True, audio_mask=mask, audio_only=True)
    for count in (4, 9):
        shape = torch.Size((3, count, 8))
        assert rule.rows(shape, cpu, "text_encoder.layer.0.query") is None


@pytest.mark.parametrize("beside", ["input_features", "pixel_values", "scores"])
def test_projector_reads_text_where_the_batch_has_nothing_else(beside: str) -> None:
    (texts,) = text_batches(1)
    samples, tokens = texts["input_ids"].shape
    rule = mask_of_batch({**texts, beside: torch.randn(samples, 5)}, lora())
    rows = rule.rows(torch.Size((samples, tokens, 8)), torch.device("cpu"), "projector")
    kept = texts["attention_mask"].flatten().nonzero().flatten().tolist()
    assert (None if rows is None else rows.tolist()) == (kept if beside == "scores" else None)


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
def test_seamless_adapter_and_cross_attention_mask_frames() -> None:
    torch.manual_seed(0)
    parts = ("encoder", "decoder", "speech_encoder", "t2u_encoder", "t2u_decoder")
    sizes = {f"{part}_layers": 1 for part in parts}
    sizes |= {f"{part}_attention_heads": 4 for part in parts}
    sizes |= {f"{part}_ffn_dim": 48 for part in ("encoder", "decoder", "t2u_encoder")}
    config = SeamlessM4Tv2Config(
        **sizes, vocab_size=64, hidden_size=32, speech_encoder_intermediate_size=48,
        feature_projection_input_dim=16, num_adapter_layers=1, t2u_vocab_size=50,
        t2u_decoder_ffn_dim=48, conv_depthwise_kernel_size=7,
    )  # fmt: skip
    model = SeamlessM4Tv2ForSpeechToText(config).eval()
    mask = torch.arange(48) < torch.tensor([[48], [29], [16]])
    batch = {"input_features": torch.randn(3, 48, 16), "attention_mask": mask.long()}
    batch["decoder_input_ids"] = torch.randint(4, 60, (3, 5))
    kept = (torch.arange(7) < torch.tensor([[7], [4], [3]])).flatten()
    names = ["speech_encoder.adapter.layers.0.ffn.intermediate_dense"]
    names += ["text_decoder.layers.0.cross_attention.k_proj"]
    result = run(model, [batch], lora(tau=1.0, target_modules=names), method="gram")
    for name, x in layer_inputs(model, [batch], names, masked=False).items():
        assert lost(result.components[name], x[kept]) < 1e-6, name


class Halving(nn.Module):
    """As Granite Speech 5, halves the frames in two layers, and pads them to whole blocks."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"context_size": 16, "subsample_layers": [1, 2]}
        self.config = SimpleNamespace(model_type="granite_speech5_encoder", **sizes)

    def _get_subsampling_output_length(self, lengths: Tensor) -> Tensor:
        return lengths // 2 // 2


@pytest.mark.parametrize(
    ("frames", "kept"),
    [
        (83, [83, 60, 45]),
        (96, [83, 60, 45]),
        (41, [41, 30, 22]),
        (48, [41, 30, 22]),
        (32, [20, 15, 11]),
    ],
)
def test_frames_are_halved_and_padded_to_whole_blocks(frames: int, kept: list[int]) -> None:
    mask = torch.arange(83) < torch.tensor([83, 60, 45])[:, None]
    batch = {"input_features": torch.randn(3, 83, 8), "attention_mask": mask.long()}
    rule = mask_of_batch(batch, lora(), architecture_of(Halving()))
    rows = rule.rows(torch.Size((3, frames, 8)), CPU, "encoder.layers.2.self_attn.q_proj")
    found = torch.arange(3 * frames) if rows is None else rows
    assert torch.bincount(found // frames, minlength=3).tolist() == kept


def test_frames_that_fit_as_they_are_are_not_taken_for_padded_ones() -> None:
    mask = torch.arange(33) < torch.tensor([33, 32, 16])[:, None]  # halved twice: 8, padded to 16
    batch = {"input_features": torch.randn(3, 33, 8), "attention_mask": mask.long()}
    rule = mask_of_batch(batch, lora(), architecture_of(Halving()))
    rows = rule.rows(torch.Size((3, 16, 8)), CPU, "encoder.layers.1.feed_forward2.linear1")
    assert rows is not None
    assert torch.bincount(rows // 16, minlength=3).tolist() == [16, 16, 8]
