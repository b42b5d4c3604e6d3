"""Models that receive the lengths of samples instead of masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from integration.conftest import VOCABULARY, hooks_of, layer_inputs, lora, lost, run
from integration.inputs.padding_blocks import EXACT, KEPT, LENGTHS, batches, check_kept

pytestmark = pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")


class Tagger(nn.Module):
    """A recurrent network between two linear layers, as in flair."""

    def __init__(self, first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.words = first, nn.Embedding(VOCABULARY, 16)
        self.before, self.behind = nn.Linear(16, 16), nn.Linear(16, 16)
        self.reads = nn.GRU(16, 16, batch_first=first)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        x = self.before(self.words(ids))
        packed = pack_padded_sequence(x, lengths, batch_first=self.first)
        return self.behind(pad_packed_sequence(self.reads(packed)[0], batch_first=self.first)[0])

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.forward(*batch.values()).mean()  # runs no hooks


class Forecaster(nn.Module):
    """Takes the whole batch as one argument, as models of pytorch-forecasting do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.past, self.future = nn.Linear(16, 16), nn.Linear(16, 16)
        self.mixed = nn.Linear(16, 16)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        past = self.past(x["encoder_values"]).mean(1, keepdim=True)
        return self.mixed(self.future(x["decoder_values"]) + past)


@pytest.mark.parametrize("how", ["samples first", "sequence first", "direct forward", "tuple"])
def test_lengths_mask_padding(how: str) -> None:
    first = how != "sequence first"
    model = Tagger(first).eval()
    data: list[Any] = batches(lengths=True)
    if not first:
        data = [{**batch, "ids": batch["ids"].mT} for batch in data]
    rows = (KEPT if first else KEPT.mT).flatten().repeat(4)
    names, before = ["before", "behind"], hooks_of(model)
    inputs = layer_inputs(model, data, names)
    options = dict(EXACT)
    if how == "direct forward":
        options["forward_fn"] = lambda model, batch: model.loss(batch)
    data = [tuple(batch.values()) for batch in data] if how == "tuple" else data
    result = run(model, data, lora(tau=1.0, target_modules=names), **options)
    assert hooks_of(model) == before
    for name, x in inputs.items():
        assert lost(result.components[name], x[rows]) < 1e-6, name
    assert result.tokens == 4 * int(KEPT.sum())


TARGETS = {"with target": torch.zeros(3), "with a target of every token": torch.zeros(7 + 4 + 2)}
TARGETS["with a loss weight"] = torch.tensor(0.5)


@pytest.mark.parametrize("how", ["batch", "by name", "packed by the model", *TARGETS])
def test_a_packed_sequence_masks_the_padding_that_a_model_gives_it(how: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.reads, self.behind = nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 16)

        def forward(self, x: Any) -> Tensor:
            if not isinstance(x, PackedSequence):
                x = pack(x)
            return self.behind(pad_packed_sequence(self.reads(x)[0], batch_first=True)[0])

    def pack(x: Tensor) -> PackedSequence:
        return pack_padded_sequence(x, LENGTHS[[1, 0, 2]], batch_first=True, enforce_sorted=False)

    generator = torch.Generator().manual_seed(0)
    drawn, model = [torch.randn(3, 7, 16, generator=generator) for _ in range(4)], Model().eval()
    data: list[Any] = drawn if how == "packed by the model" else [pack(x) for x in drawn]
    x = layer_inputs(model, [{"x": packed} for packed in data], ["behind"], masked=False)["behind"]
    data = [{"x": packed} for packed in data] if how == "by name" else data
    data = [(packed, TARGETS[how]) for packed in data] if how in TARGETS else data
    result = run(model, data, lora(tau=1.0, target_modules=["behind"]), **EXACT)
    assert lost(result.components["behind"], x[KEPT[[1, 0, 2]].flatten().repeat(4)]) < 1e-6


@pytest.mark.parametrize(
    "lengths", [LENGTHS - 1, LENGTHS[:2], LENGTHS[:0], LENGTHS.float() / 8, 10**12 * LENGTHS]
)
def test_lengths_that_do_not_fit_the_samples_are_ignored(lengths: Tensor) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.last = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 4)

        def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
            return self.last(self.words(ids))

    ids = torch.randint(1, VOCABULARY, (4, *KEPT.shape))
    data = [{"ids": each, "lengths": lengths} for each in ids]
    result = run(Model().eval(), data, lora(tau=1.0, target_modules=["last"]), **EXACT)
    assert result.tokens == 4 * KEPT.numel()


def test_encoder_and_decoder_lengths_mask_their_own_series() -> None:
    generator = torch.Generator().manual_seed(0)
    data = [
        {
            "encoder_values": torch.randn(3, 7, 16, generator=generator) * KEPT[..., None],
            "encoder_lengths": LENGTHS,
            "decoder_values": torch.randn(3, 2, 16, generator=generator),
            "decoder_lengths": torch.tensor([2, 2, 1]),
        }
        for _ in range(4)
    ]
    future = torch.tensor([[True, True], [True, True], [True, False]])
    kept = {"past": KEPT, "future": future, "mixed": future}
    model, config = Forecaster().eval(), lora(tau=1.0, target_modules=list(kept))
    inputs = layer_inputs(model, [{"x": batch} for batch in data], list(kept))
    result = run(model, data, config, **EXACT)
    for name, x in inputs.items():
        assert lost(result.components[name], x[kept[name].flatten().repeat(4)]) < 1e-6, name
    assert result.tokens == 4 * int(KEPT.sum())


class TextToSpeech(nn.Module):
    """Receives lengths of texts and of spectra, as FastPitch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.text = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 16)
        self.frames = nn.Conv1d(16, 16, 1)

    def forward(self, ids: Tensor, ids_lengths: Tensor, y: Tensor, y_lengths: Tensor) -> Tensor:
        return self.text(self.words(ids)).mean(1) + self.frames(y).mean(2)


@pytest.mark.parametrize("padded", [True, False])
def test_text_and_spectrum_lengths_mask_their_own_inputs(padded: bool) -> None:
    lengths, frames = LENGTHS if padded else torch.full((3,), 7), torch.tensor([5, 9, 3])
    kept, frame_rows = torch.arange(7) < lengths[:, None], torch.arange(9) < frames[:, None]
    data = [{"ids": batch["ids"], "ids_lengths": lengths} for batch in batches()]
    spectra = [torch.randn(3, 16, 9) for _ in data]
    data = [{**b, "y": y, "y_lengths": frames} for b, y in zip(data, spectra, strict=True)]
    model, config = TextToSpeech().eval(), lora(tau=1.0, target_modules=["text", "frames"])
    result = run(model, data, config, **EXACT)
    words = torch.cat([model.words(batch["ids"])[kept] for batch in data]).detach()
    assert lost(result.components["text"], words) < 1e-6
    assert lost(result.components["frames"], torch.cat([y.mT[frame_rows] for y in spectra])) < 1e-6


def test_lengths_apply_only_to_the_input_they_are_named_after() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text, self.frames = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor, y_lengths: Tensor, y: Tensor | None = None) -> Tensor:
            return self.text(x).mean(1) + (0 if y is None else self.frames(y).mean(1))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.first, self.second = nn.Embedding(VOCABULARY, 16), Part(), Part()

        def forward(self, ids: Tensor, y: Tensor) -> Tensor:
            x, lengths = self.words(ids), y.ne(0).any(-1).sum(1)
            return self.first(x, lengths) + self.second(x, lengths, y)

    kept = torch.arange(9) < torch.tensor([5, 9, 3])[:, None]
    spectra = [torch.randn(3, 9, 16) * kept[..., None] for _ in range(4)]
    data = [{"ids": b["ids"], "y": y} for b, y in zip(batches(True), spectra, strict=True)]
    config = lora(tau=1.0, target_modules=["second.frames"])
    result = run(Model().eval(), data, config, **EXACT)
    frame_rows = torch.cat([y[kept] for y in spectra])
    assert lost(result.components["second.frames"], frame_rows) < 1e-6


@pytest.mark.parametrize("name", ["wav_lens", "x_len", "length"])
@pytest.mark.parametrize("fractions", [False, True], ids=["counts", "fractions"])
def test_lengths_as_counts_or_as_fractions_of_the_longest(name: str, fractions: bool) -> None:
    """Fractions as in SpeechBrain, counts as in NeMo."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reads = nn.Linear(16, 16)

        def forward(self, x: Tensor, **how: Tensor) -> Tensor:
            return self.reads(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.part = nn.Embedding(VOCABULARY, 16), Part()
            self.last = nn.Linear(16, 4)

        def forward(self, ids: Tensor, sizes: Tensor) -> Tensor:
            argument = sizes / sizes.max() if fractions else sizes
            return self.last(self.part(self.words(ids), **{name: argument}))

    data = [{"ids": b["ids"], "sizes": b["lengths"]} for b in batches(lengths=True)]
    for targets in (["part.reads"], ["last"]):
        config, model = lora(tau=1.0, target_modules=targets), Model().eval()
        result = run(model, data, config, forward_fn=lambda m, b: m(*b.values()), **EXACT)
        assert result.tokens == 4 * int(KEPT.sum())
        x = layer_inputs(model, data, targets)[targets[0]]
        assert lost(result.components[targets[0]], x[KEPT.flatten().repeat(4)]) < 1e-6


def test_mask_of_an_inner_layer_applies_behind_it() -> None:
    """An encoder receives audio lengths, its layers a mask of frames, as in NeMo."""
    frames = KEPT[:, ::2]

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reads = nn.Linear(16, 16)

        def forward(self, x: Tensor, pad_mask: Tensor) -> Tensor:
            return self.reads(x)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.layer, self.behind = nn.Linear(16, 16), Layer(), nn.Linear(16, 16)

        def forward(self, audio_signal: Tensor, length: Tensor) -> Tensor:
            x = self.before(audio_signal)[:, ::2]
            return self.behind(self.layer(x, pad_mask=~frames))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.head = Encoder(), nn.Linear(16, 4)

        def forward(self, audio_signal: Tensor, length: Tensor) -> Tensor:
            return self.head(self.encoder(audio_signal=audio_signal, length=length))

    generator = torch.Generator().manual_seed(0)
    data = [
        {"audio_signal": torch.randn(3, 7, 16, generator=generator), "length": LENGTHS}
        for _ in range(4)
    ]
    names = ["encoder.before", "encoder.layer.reads", "encoder.behind", "head"]
    model = Model().eval()
    result = run(model, data, lora(tau=1.0, target_modules=names), **EXACT)
    for name, x in layer_inputs(model, data, names, masked=False).items():
        kept = KEPT if name == "encoder.before" else frames
        assert lost(result.components[name], x[kept.flatten().repeat(4)]) < 1e-6, name


class EncoderDecoder(nn.Module):
    """Receives lengths or a mask of its source only."""

    def __init__(self, along: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.along, self.words = along, nn.Embedding(VOCABULARY, 16)
        self.enc, self.dec = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(
        self,
        src: Tensor,
        src_lengths: Tensor | None = None,
        tgt: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        source = self.enc(self.words(src)).mean(self.along, keepdim=True)
        return self.dec(self.words(tgt) + source)


@pytest.mark.parametrize("sequence_first", [False, True])
@pytest.mark.parametrize("argument", ["src_lengths", "src_key_padding_mask"])
def test_source_padding_does_not_mask_a_target_of_equal_length(
    argument: str, sequence_first: bool
) -> None:
    kept = KEPT[:, :6]
    value = kept.sum(1) if argument == "src_lengths" else ~kept
    data = []
    for batch in batches(lengths=True):
        src, tgt = batch["ids"][:, :6], batch["ids"][:, 1:]
        data.append({"src": src, "tgt": tgt, argument: value})
        if sequence_first:
            data[-1] |= {"src": src.mT, "tgt": tgt.mT}
    model = EncoderDecoder(0 if sequence_first else 1).eval()
    result = run(model, data, lora(tau=1.0, target_modules=["enc", "dec"]), **EXACT)
    rows = (kept.mT if sequence_first else kept).flatten().repeat(4)
    inputs = layer_inputs(model, data, ["enc", "dec"], masked=False)
    assert lost(result.components["enc"], inputs["enc"][rows]) < 1e-6
    assert lost(result.components["dec"], inputs["dec"]) < 1e-6
    assert result.tokens == 4 * kept.numel()


@pytest.mark.parametrize("kind", ["ids", "frames", "sequence first", "parts"])
def test_lengths_mask_padding_to_a_fixed_size(kind: str) -> None:
    """No sample is as long as the batch is wide, as where all are padded to one size (d2l)."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(16, 16)

        def forward(self, x: Tensor, valid_lens: Tensor) -> Tensor:
            return self.last(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.layer = nn.Embedding(VOCABULARY, 16), Layer()

        def forward(self, x: Tensor, valid_lens: Tensor | None = None) -> Tensor:
            x = x if x.is_floating_point() else self.words(x)
            lens = (
                (x[..., 0] != self.words.weight[0, 0]).sum(1) if valid_lens is None else valid_lens
            )
            return self.layer(x, lens)

    data = [{"x": functional.pad(b["ids"][:, :6], (0, 3))} for b in batches()]
    kept, lengths = functional.pad(KEPT[:, :6], (0, 3)), LENGTHS.clamp(max=6)
    if kind != "parts":
        data = [{**b, "valid_lens": lengths} for b in data]
    if kind == "frames":
        frames = torch.randn(4, 3, 9, 16, generator=torch.Generator().manual_seed(0))
        data = [{**b, "x": x * kept[..., None]} for b, x in zip(data, frames, strict=True)]
    if kind == "sequence first":
        data, kept = [{**b, "x": b["x"].mT} for b in data], kept.mT
    check_kept(Model(), data, {"layer.last": kept})
