"""Padding that only the ``padding_idx`` of a module's own embedding tells."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import eva_kernels
from eva_peft.inputs.embedded_ids import padding_among
from integration.conftest import VOCABULARY, layer_inputs, lora, lost, make_bert, run
from integration.inputs.padding_blocks import EXACT, KEPT, batches, check_kept

REVERSED = KEPT.flip(0)[:, :5]  # of another text, shorter


def words(padding_idx: int | None = 0, size: int = VOCABULARY + 1) -> nn.Embedding:
    embedding = nn.Embedding(size, 16, padding_idx=padding_idx)
    nn.init.normal_(embedding.weight)  # as some do, so that padding, too, has a direction
    return embedding


class Recommender(nn.Module):
    """As SASRec, whose sequences are padded on the left, and whose positions are, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.items, self.positions = words(), words(size=9)
        self.block, self.head = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, sequence: Tensor, following: Tensor) -> Tensor:
        steps = torch.arange(1, sequence.shape[1] + 1) * (sequence != 0)
        x = self.items(sequence) + self.positions(steps)
        x = self.head(x + self.block(x).tanh())
        return (x * self.items(following)).sum(-1)


@pytest.mark.parametrize("by_function", [False, True])
def test_left_padding_of_a_recommender_does_not_count(by_function: bool) -> None:
    options = {"forward_fn": lambda model, batch: model(**batch)} if by_function else {}
    ids = [b["ids"].flip(1) for b in batches()]
    data = [{"sequence": x, "following": x * 5 % VOCABULARY} for x in ids]
    kept = dict.fromkeys(["block", "head"], KEPT.flip(1))
    assert check_kept(Recommender(), data, kept, **options).tokens == 4 * int(KEPT.sum())


class Tagger(nn.Module):
    def __init__(self, padding_idx: int | None = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.before = words(padding_idx), nn.Linear(16, 16)
        self.rnn, self.head = nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x, lengths = self.before(self.words(ids)), (ids != 0).sum(1)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


def test_padding_does_not_count_before_a_recurrent_layer_is_told_of_lengths() -> None:
    check_kept(Tagger(), batches(), {"before": KEPT, "head": KEPT})


class Translator(nn.Module):
    def __init__(self, embeds_both_first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.source, self.target = words(), words()
        self.encoder, self.decoder = nn.Linear(16, 16), nn.Linear(16, 16)
        self.keys, self.head = nn.Linear(16, 16), nn.Linear(16, 5)
        self.embeds_both_first = embeds_both_first

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        y = self.target(tgt) if self.embeds_both_first else None
        memory = self.encoder(self.source(src)).tanh()
        y = self.decoder(self.target(tgt) if y is None else y)
        scores = y @ self.keys(memory).mT
        return self.head(y + scores.softmax(-1) @ memory)


@pytest.mark.parametrize("embeds_both_first", [False, True])
def test_two_texts_of_different_shapes_have_masks_of_their_own(embeds_both_first: bool) -> None:
    data = [{"src": b["ids"], "tgt": b["ids"].flip(0)[:, :5]} for b in batches()]
    kept = {"encoder": KEPT, "keys": KEPT, "decoder": REVERSED, "head": REVERSED}
    check_kept(Translator(embeds_both_first), data, kept)


SEEMS = "ignore:.* seem to be padding:eva_kernels.EvaWarning"


@pytest.mark.parametrize("embeds_both_first", [False, True])
def test_tokens_of_any_text_count_where_two_of_one_shape_were_embedded(
    embeds_both_first: bool,
) -> None:
    """Later layers may read either: the keys here, with any names, read the first."""
    data = [{"src": b["ids"], "tgt": b["ids"].flip(0)} for b in batches()]
    either = KEPT | KEPT.flip(0)
    kept = {"encoder": either if embeds_both_first else KEPT, "keys": either, "decoder": either}
    with pytest.warns(eva_kernels.EvaWarning, match="may read any of them"):
        check_kept(Translator(embeds_both_first), data, kept)


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = words(), nn.Linear(16, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.layer(self.words(ids))


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tower, self.match = Tower(), nn.Linear(16, 16)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        x, y = self.tower(first), self.tower(second)
        return x.mean(1) * self.match(y).mean(1)


@pytest.mark.parametrize("rows", [[2, 1, 0], [0, 0, 0]])  # the latter without padding
@pytest.mark.filterwarnings(SEEMS)
def test_each_call_with_ids_alone_has_a_mask_of_its_own(rows: list[int]) -> None:
    data = [{"first": b["ids"], "second": b["ids"][rows]} for b in batches()]
    model, second = Siamese().eval(), KEPT[rows]
    result = run(model, data, lora(tau=1.0, target_modules=["layer", "match"]), **EXACT)
    inputs = layer_inputs(model, data, ["tower.layer", "match"])
    kept = {"tower.layer": torch.cat([KEPT, second]), "match": KEPT | second}
    for name, rows_kept in kept.items():
        x = inputs[name][rows_kept.flatten().repeat(4)]
        assert lost(result.components[name], x) < 1e-6, name


def test_texts_of_one_shape_beside_a_sound_with_lengths() -> None:
    """In a part that is passed lengths, the mask of the first text must not hide the second."""

    class Model(Tower):
        def forward(self, sound: Tensor, sound_lengths: Tensor, q: Tensor, d: Tensor) -> Tensor:
            x = super().forward(q).sum() + sound.sum() + sound_lengths.sum()
            return x + super().forward(d)

    sound = {"sound": torch.randn(3, 9, 16), "sound_lengths": torch.tensor([9, 5, 3])}
    data = [{**sound, "q": b["ids"], "d": b["ids"][[0, 0, 0]]} for b in batches()]
    model = Model().eval()
    result = run(model, data, lora(tau=1.0, target_modules=["layer"]), **EXACT)
    kept = torch.cat([KEPT, torch.ones_like(KEPT)]).flatten().repeat(4)
    x = layer_inputs(model, data, ["layer"])["layer"][kept]
    assert lost(result.components["layer"], x) < 1e-6


def test_empty_samples_do_not_count() -> None:
    """Such as sentences that pad a document, or news that pad a history."""
    kept = torch.cat([KEPT, torch.zeros_like(KEPT)])
    data = [{"ids": torch.cat([b["ids"], 0 * b["ids"]])} for b in batches()]
    model = nn.Sequential(words(), nn.Linear(16, 16))
    check_kept(model, [b["ids"] for b in data], {"1": kept})


@pytest.mark.parametrize("flat", [False, True])
def test_padding_of_documents_is_known_of_words_and_of_sentences(flat: bool) -> None:
    """Ids are (B, S, T): as in attention networks of hierarchies, or NRMS with its news."""

    class Model(Tower):
        def __init__(self) -> None:
            super().__init__()
            self.sentences = nn.Linear(16, 16)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.words(ids.view(-1, 7) if flat else ids)
            return self.sentences(self.layer(x).mean(-2).view(2, 3, 16))

    torch.manual_seed(0)
    mask = torch.stack([KEPT, KEPT])
    mask[1, 1:] = False
    data = [{"ids": torch.stack([b["ids"], b["ids"]]) * mask} for b in batches()]
    check_kept(Model(), data, {"layer": mask, "sentences": mask.any(-1)})


def test_ids_are_found_under_any_name() -> None:
    class Scaled(nn.Embedding):
        def forward(self, tokens: Tensor) -> Tensor:
            return 4 * super().forward(tokens)

    class Model(Tower):
        def __init__(self) -> None:
            super().__init__()
            self.words = Scaled(VOCABULARY, 16, padding_idx=0)

        def forward(self, ids: Tensor) -> Tensor:
            return self.layer(self.words(tokens=ids))

    torch.manual_seed(0)
    check_kept(Model(), batches(), {"layer": KEPT})


def test_segments_of_zeros_and_ones_hide_no_words() -> None:
    """As in BERT-pytorch, whose segments are embedded with padding_idx=0."""

    class Model(Tower):
        def __init__(self) -> None:
            super().__init__()
            self.segments = words(size=3)

        def forward(self, ids: Tensor, segments: Tensor) -> Tensor:
            return self.layer(self.words(ids) + self.segments(segments))

    torch.manual_seed(0)
    segments = (torch.arange(7) > 1).long() * KEPT
    data = [{"ids": b["ids"], "segments": segments} for b in batches()]
    check_kept(Model(), data, {"layer": KEPT})
    check_kept(Model(), [{**b, "ids": b["ids"][[0] * 3]} for b in data], {"layer": KEPT | True})


def test_mask_in_the_batch_takes_precedence() -> None:
    class Masked(Tagger):
        def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(ids)

    kept = KEPT.clone()
    kept[0, 3:] = False
    data = [{**batch, "attention_mask": kept.long()} for batch in batches()]
    check_kept(Masked(), data, {"before": kept})


@pytest.mark.filterwarnings(SEEMS)
def test_only_padding_idx_tells_padding() -> None:
    every = torch.ones_like(KEPT)
    check_kept(Tagger(None), batches(), {"before": every})
    check_kept(Tagger(VOCABULARY), batches(), {"before": every})


def test_padding_idx_in_models_of_transformers_is_not_consulted() -> None:
    """They attend to padding unless they are passed an attention_mask, as the warning says."""
    model = make_bert()
    assert model.embeddings.word_embeddings.padding_idx == 0
    data = [{"input_ids": b["ids"]} for b in batches()]
    config = lora(tau=1.0, target_modules=["query"])
    with pytest.warns(eva_kernels.EvaWarning, match="no attention_mask hides them"):
        assert run(model, data, config, **EXACT).tokens == 4 * KEPT.numel()


@pytest.mark.parametrize("size", [3, 6])
def test_values_with_the_number_of_padding_count(size: int) -> None:
    """Such as rests in music, missing columns, days of the week, or events, most often none."""
    generator = torch.Generator().manual_seed(0)
    data = [{"ids": torch.randint(0, size, (4, 12), generator=generator)} for _ in range(4)]
    model = Tower().eval()
    check_kept(model, data, {"layer": torch.ones(4, 12, dtype=torch.bool)})


@pytest.mark.parametrize(
    ("ids", "kept"),
    [
        ([[5, 6, 0], [7, 0, 0]], [[1, 1, 0], [1, 0, 0]]),
        ([[0, 5, 6], [0, 0, 7]], [[0, 1, 1], [0, 0, 1]]),
        ([[0, 5, 6, 7], [0, 7, 0, 0]], [[1, 1, 1, 1], [1, 1, 0, 0]]),  # the blank before a text
        ([[5, 6, 0], [0, 0, 0]], [[1, 1, 0], [0, 0, 0]]),
        ([[5, 0, 6, 7, 8, 9], [3, 4, 0, 0, 0, 0]], [[1] * 6, [1, 1, 0, 0, 0, 0]]),  # a word, too
        (
            [[5, 6, 7], [8, 0, 9], [6, 0, 4], [7, 0, 0]],
            [[1, 1, 1], [1, 0, 1], [1, 0, 1], [1, 0, 0]],
        ),
        ([[5, 0, 6, 0], [7, 8, 0, 9], [0, 4, 3, 5]], None),  # values
        ([[5, 6, 7, 0], [8, 9, 4, 3]], None),  # maybe values of the last column
        ([[0, 0, 0], [5, 6, 7]], None),
        ([[0, 0], [0, 0]], None),
        ([[0], [5]], None),
    ],
)
def test_padding_among(ids: list[list[int]], kept: list[list[int]] | None) -> None:
    found = ~padding_among(torch.tensor(ids) == 0)
    assert found.int().tolist() == (kept or [[1] * len(row) for row in ids])
