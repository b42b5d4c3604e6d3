"""Encoder-decoders that write sound, spectra or codes: what labels tell of their padding."""

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


class Codes(nn.Module):
    """Whatever writes codes of sound."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=True, reduction_factor=2)

    def forward(
        self, input_ids: Tensor, decoder_input_ids: Tensor | None = None, labels: Any = None
    ) -> Any: ...


def kept(batch: dict[str, Tensor], model: nn.Module, **options: Any) -> list[int] | None:
    rule = mask_of_batch(batch, lora(**options), architecture_of(model))
    rows = rule.rows(torch.Size((*STEPS.shape, 16)), CPU, "decoder.layers.0.fc1")
    return None if rows is None else rows.tolist()


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.parametrize("masked", [True, False])
def test_spectra_are_made_of_labels(masked: bool) -> None:
    """SpeechT5 takes one spectrum of two, and hears from the labels, or a mask, which are none."""
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
             "feed_forward.intermediate_dense"]  # fmt: skip
    result = run(model, iter([batch]), lora(target_modules=names, tau=1.0), method="gram")
    seen: dict[str, Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0]})
        )
    with torch.no_grad():
        model(**batch)
    for name in names:
        assert lost(result.components[name], seen[name][STEPS[:, 1::2]].double()) < 1e-6


def test_labels_of_several_codes_a_step() -> None:
    codes = torch.randint(9, (*STEPS.shape, CODES)).masked_fill(~STEPS[..., None], -100)
    codes[0, 0, 0] = -100  # of another code there is a label
    rows = STEPS.flatten().nonzero().flatten().tolist()
    batch = {"input_ids": torch.ones(4, 5, dtype=torch.long)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    assert kept({**batch, "labels": codes}, Codes()) == rows
    by_row = codes.transpose(1, 2).flatten(0, 1)  # a row for each codebook
    assert kept({**batch, "labels": by_row}, Codes()) == rows
    mask = {"decoder_attention_mask": STEPS.long()}
    assert kept({**batch, **mask, "labels": by_row}, Codes()) == rows
    assert kept({**batch, **mask, "labels": by_row}, Codes(), use_label_mask=False) == rows
    assert kept({**batch, "labels": codes}, Codes(), use_label_mask=False) is None
    # a mask that fits what the decoder is given counts, whatever there are labels for
    given = {**batch, **mask, "decoder_input_ids": STEPS.long(), "labels": by_row[:, 1:]}
    assert kept(given, Codes()) == rows
    spectra = {"decoder_input_values": torch.ones(4, 8, BANDS), "labels": torch.ones(4, 8, BANDS)}
    assert kept({**batch, **mask, **spectra}, Codes()) == rows  # none of which is left out
    whole = Codes()
    del whole.config.reduction_factor  # nor where they are made of labels
    assert kept({**batch, **mask, "labels": spectra["labels"]}, whole) == rows
    # where it does not fit, what is made of labels has their shape; where it does, both count
    longer = {"decoder_attention_mask": torch.ones(4, 9), "labels": codes[..., 1]}
    assert kept({**batch, **longer}, Codes()) == rows
    later = codes[..., 1].masked_fill(torch.arange(8) == 1, -100)
    assert kept({**batch, **mask, "labels": later}, Codes()) == [i for i in rows if i % 8 != 1]
    filled = {**batch, **mask, "labels": codes[..., 1].relu()}
    assert kept(filled, Codes()) == rows


def test_all_steps_count_where_nothing_is_said_of_a_decoder_as_long_as_its_text() -> None:
    text = {"input_ids": torch.ones_like(STEPS, dtype=torch.long), "attention_mask": STEPS.long()}
    rows = text["input_ids"].repeat_interleave(CODES, dim=0)  # as MusicGen is given its codes
    assert kept({**text, "decoder_input_ids": rows}, Codes()) is None
    assert kept({**text, "labels": rows}, Codes(), use_label_mask=False) is None
    spectra = torch.randn(len(STEPS), 2 * STEPS.shape[1], BANDS)  # of which one of two is taken
    assert kept({**text, "labels": spectra}, Codes(), use_label_mask=False) is None


def test_labels_stay_unless_the_decoders_inputs_are_given() -> None:
    spectra = {"input_ids": torch.ones(1, 3), "labels": torch.ones(1, 4, 2)}
    found = architecture_of(Codes())
    assert "labels" in without_labels(spectra, found)
    assert "labels" in without_labels({**spectra, "decoder_input_ids": None}, found)
    for key in ("decoder_input_ids", "decoder_input_values", "decoder_inputs_embeds"):
        assert "labels" not in without_labels({**spectra, key: torch.ones(1, 4)}, found)
