"""Transducers: a joint network reads every pair of a frame of sound and a step of the decoder."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from eva_peft.inputs.batch_mask import mask_of_batch
from eva_peft.model.architecture import architecture_of
from integration.conftest import exact_pca, lora, run

FEATURES, BLANK, PAD = 8, 9, 0
FRAMES, STEPS = torch.tensor([40, 24, 12]), torch.tensor([3, 6, 4])


class Transducer(nn.Module):
    """Its encoder makes a frame of four spectra, as Parakeet's of eight."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            model_type="transducer", blank_token_id=BLANK, pad_token_id=PAD
        )
        self.encoder = nn.Conv1d(FEATURES, 16, 4, 4)
        self.words, self.decoder_projector = nn.Embedding(BLANK + 1, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, BLANK + 1)

    def _get_subsampling_output_length(self, lengths: Tensor) -> Tensor:
        return lengths // 4

    def forward(
        self,
        input_features: Tensor,
        decoder_input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        frames = self.encoder(input_features.mT).mT
        steps = self.decoder_projector(self.words(decoder_input_ids))
        return self.head((frames[:, :, None] + steps[:, None]).relu())


def padded_batch(samples: list[dict[str, Tensor]], padding: int) -> dict[str, Tensor]:
    def pad(key: str, value: float) -> Tensor:
        parts = [sample[key][0] for sample in samples]
        return nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)

    labels = pad("decoder_input_ids", padding)[:, 1:]
    return {
        "input_features": pad("input_features", 7.0),
        "attention_mask": (torch.arange(40) < FRAMES[:, None]).long(),
        "decoder_input_ids": pad("decoder_input_ids", BLANK),
        "labels": labels,
    }


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.parametrize("padding", [-100, BLANK, PAD])
def test_pairs_of_padding_do_not_count(padding: int) -> None:
    torch.manual_seed(0)
    model, read = Transducer().eval(), {"decoder_projector": [], "head": []}
    samples = [
        {
            "input_features": torch.randn(1, frames, FEATURES),
            "decoder_input_ids": torch.tensor([[BLANK, *torch.randint(1, BLANK, (steps - 1,))]]),
        }
        for frames, steps in zip(FRAMES.tolist(), STEPS.tolist(), strict=True)
    ]
    names = list(read)
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: read[name].append(args[0].detach().flatten(0, -2))
        )
    for sample in samples:
        model(**sample)
    expected = {name: torch.cat(rows) for name, rows in read.items()}
    data = [padded_batch(samples, padding)]
    result = run(model, data, lora(tau=1.0, target_modules=names), method="gram", max_steps=1)
    for name in names:
        values = exact_pca(expected[name])[0].sqrt()
        found = result.singular_values[name].double()
        torch.testing.assert_close(found, values[: len(found)], rtol=1e-4, atol=1e-4)


def test_bands_of_frames_that_are_as_many_as_steps_all_count() -> None:
    sample = {"input_features": torch.randn(1, 40, FEATURES)}
    samples = [{**sample, "decoder_input_ids": torch.ones(1, n, dtype=torch.long)} for n in STEPS]
    rule = mask_of_batch(padded_batch(samples, PAD), lora(), architecture_of(Transducer()))
    leading = (3, 10, 6)  # samples, frames, bands
    rows = rule.rows(torch.Size((*leading, 4)), torch.device("cpu"), "encoder.subsampling.layers.6")
    assert rows is not None
    assert torch.bincount(rows // 60).tolist() == [60, 36, 18]


def test_labels_mask_steps_that_no_blank_precedes() -> None:
    samples = [{"input_features": torch.randn(1, 40, FEATURES)} for _ in range(3)]
    for sample, steps in zip(samples, STEPS.tolist(), strict=True):
        sample["decoder_input_ids"] = torch.ones(1, steps, dtype=torch.long)
    batch = padded_batch(samples, PAD)
    batch["decoder_input_ids"] = batch["decoder_input_ids"][:, 1:]
    found = mask_of_batch(batch, lora(), architecture_of(Transducer())).decoder
    assert found is not None
    assert torch.equal(found, batch["labels"] != PAD)
