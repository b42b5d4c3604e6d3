"""Encoder-decoders that generate audio: labels of spectra or codes mask the decoder."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import SpeechT5Config, SpeechT5ForTextToSpeech

from eva_peft.inputs.arguments import without_labels
from eva_peft.inputs.batch_mask import mask_of_batch
from eva_peft.model.architecture import architecture_of
from integration.conftest import VOCABULARY, lora, lost, run, text_batches

CPU = torch.device("cpu")
STEPS = torch.arange(8) < torch.tensor([8, 3, 6, 2])[:, None]  # of each sample
BANDS, CODES = 3, 2


class CodecModel(nn.Module):
    """A model that generates audio codes."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=True, reduction_factor=2)

    def forward(
        self, input_ids: Tensor, decoder_input_ids: Tensor | None = None, labels: Any = None
    ) -> Any: ...


def kept_rows(batch: dict[str, Tensor], model: nn.Module, **options: Any) -> list[int] | None:
    rule = mask_of_batch(batch, lora(**options), architecture_of(model))
    rows = rule.rows(torch.Size((*STEPS.shape, 16)), CPU, "decoder.layers.0.fc1")
    return None if rows is None else rows.tolist()


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.parametrize("masked", [True, False])
def test_speecht5_decoder_steps_are_masked_by_labels_or_mask(masked: bool) -> None:
    """SpeechT5 reads every second spectrum; labels or a mask tell which are padding."""
    torch.manual_seed(0)
    config = SpeechT5Config(
        vocab_size=VOCABULARY, hidden_size=16, num_mel_bins=BANDS, speaker_embedding_dim=4,
        speech_decoder_prenet_units=8, speech_decoder_postnet_units=8, encoder_layers=1,
        decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, max_text_positions=64, max_speech_positions=64,
        speech_decoder_prenet_dropout=0.0, reduction_factor=2, use_guided_attention_loss=False,
    )  # fmt: skip
    model = SpeechT5ForTextToSpeech(config).eval()
    (text,) = text_batches(1)
    labels = torch.randn(*STEPS.shape, BANDS)
    batch = {**text, "speaker_embeddings": torch.randn(len(STEPS), 4)}
    if masked:
        batch["decoder_attention_mask"] = STEPS.long()
    batch["labels"] = labels if masked else labels.masked_fill(~STEPS[..., None], -100)
    names = ["speecht5.decoder.prenet.layers.0", "speecht5.decoder.wrapped_decoder.layers.0."
             "feed_forward.intermediate_dense", "speech_decoder_postnet.feat_out"]  # fmt: skip
    result = run(model, iter([batch]), lora(target_modules=names, tau=1.0), method="gram")
    inputs: dict[str, Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: args[0]})
        )
    with torch.no_grad():
        model(**batch)
    for name in names:
        assert lost(result.components[name], inputs[name][STEPS[:, 1::2]].double()) < 1e-6


def test_labels_of_several_codes_per_step_mask_the_decoder() -> None:
    codes = torch.randint(9, (*STEPS.shape, CODES)).masked_fill(~STEPS[..., None], -100)
    codes[0, 0, 0] = -100  # another code of this step has a label
    rows = STEPS.flatten().nonzero().flatten().tolist()
    batch = {"input_ids": torch.ones(4, 5, dtype=torch.long)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    assert kept_rows({**batch, "labels": codes}, CodecModel()) == rows
    by_row = codes.transpose(1, 2).flatten(0, 1)  # a row for each codebook
    assert kept_rows({**batch, "labels": by_row}, CodecModel()) == rows
    mask = {"decoder_attention_mask": STEPS.long()}
    assert kept_rows({**batch, **mask, "labels": by_row}, CodecModel()) == rows
    assert (
        kept_rows({**batch, **mask, "labels": by_row}, CodecModel(), use_label_mask=False) == rows
    )
    assert kept_rows({**batch, "labels": codes}, CodecModel(), use_label_mask=False) is None
    # a mask that fits the decoder inputs counts, whatever the shape of the labels
    given = {**batch, **mask, "decoder_input_ids": STEPS.long(), "labels": by_row[:, 1:]}
    assert kept_rows(given, CodecModel()) == rows
    spectra = {"decoder_input_values": torch.ones(4, 8, BANDS), "labels": torch.ones(4, 8, BANDS)}
    assert kept_rows({**batch, **mask, **spectra}, CodecModel()) == rows  # no label is masked
    whole = CodecModel()
    del whole.config.reduction_factor  # also where decoder inputs are made from labels
    assert kept_rows({**batch, **mask, "labels": spectra["labels"]}, whole) == rows
    # a mask that does not fit the labels is ignored; one that fits counts together with them
    longer = {"decoder_attention_mask": torch.ones(4, 9), "labels": codes[..., 1]}
    assert kept_rows({**batch, **longer}, CodecModel()) == rows
    later = codes[..., 1].masked_fill(torch.arange(8) == 1, -100)
    assert kept_rows({**batch, **mask, "labels": later}, CodecModel()) == [
        i for i in rows if i % 8 != 1
    ]
    filled = {**batch, **mask, "labels": codes[..., 1].relu()}
    assert kept_rows(filled, CodecModel()) == rows


def test_unmasked_decoder_as_long_as_its_text_counts_every_step() -> None:
    text = {"input_ids": torch.ones_like(STEPS, dtype=torch.long), "attention_mask": STEPS.long()}
    rows = text["input_ids"].repeat_interleave(CODES, dim=0)  # as MusicGen receives its codes
    assert kept_rows({**text, "decoder_input_ids": rows}, CodecModel()) is None
    assert kept_rows({**text, "labels": rows}, CodecModel(), use_label_mask=False) is None
    spectra = torch.randn(len(STEPS), 2 * STEPS.shape[1], BANDS)  # every second one is read
    assert kept_rows({**text, "labels": spectra}, CodecModel(), use_label_mask=False) is None


def test_labels_stay_unless_decoder_inputs_are_given() -> None:
    spectra = {"input_ids": torch.ones(1, 3), "labels": torch.ones(1, 4, 2)}
    found = architecture_of(CodecModel())
    assert "labels" in without_labels(spectra, found)
    assert "labels" in without_labels({**spectra, "decoder_input_ids": None}, found)
    for key in ("decoder_input_ids", "decoder_input_values", "decoder_inputs_embeds"):
        assert "labels" not in without_labels({**spectra, key: torch.ones(1, 4)}, found)
