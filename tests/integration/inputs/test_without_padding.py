"""Which batches are trimmed and split by length, and which stay unchanged."""

from __future__ import annotations

import time
from itertools import combinations, pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from eva_peft.inputs.batches import FORWARD_OVERHEAD, without_padding
from eva_peft.model.architecture import Architecture

COLUMNS, LONGEST = 16, 8
CPU = torch.device("cpu")


def batch_of(lengths: list[int], columns: int) -> dict[str, Tensor]:
    mask = (torch.arange(columns) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": 5 * mask, "attention_mask": mask}


# an entry beside ids and mask, and whether the batch is trimmed with it
EXTRA_ENTRIES: dict[str, tuple[str, Tensor, bool]] = {
    "labels": ("labels", torch.ones(2, COLUMNS), True),
    "embeddings": ("inputs_embeds", torch.ones(2, COLUMNS, 2 * COLUMNS), True),
    "ids of several codebooks": ("input_ids", torch.ones(2, COLUMNS, 4), True),
    "images": ("pixel_values", torch.ones(2, 3, 2 * COLUMNS), True),
    "images of another count": ("pixel_values", torch.ones(3, 3, 5), False),
    "integers": ("kinds", torch.ones(2, 3, 2 * COLUMNS, dtype=torch.long), True),
    "no elements": ("crops", torch.ones(2, 0, 5), True),
    "a value per token": ("weights", torch.ones(2, COLUMNS), False),
    "positions in three dimensions": ("position_ids", torch.ones(2, 3, COLUMNS), False),
    "audio aligned with text": ("spectra", torch.ones(2, 80, 2 * COLUMNS), False),
    "a scalar": ("items", torch.tensor(3), False),
}


@pytest.mark.parametrize("case", EXTRA_ENTRIES)
def test_extra_entries_decide_whether_text_is_trimmed(case: str) -> None:
    key, value, cut = EXTRA_ENTRIES[case]
    batch = {**batch_of([3, LONGEST], COLUMNS), key: value}
    (found,) = without_padding(batch, CPU)
    assert (found is batch) == (not cut)
    assert found["attention_mask"].shape == (2, LONGEST if cut else COLUMNS)
    per_token = cut and key in ("labels", "inputs_embeds", "input_ids")
    assert found[key].equal(value[:, :LONGEST] if per_token else value)


def test_decoder_labels_prevent_trimming() -> None:
    architecture = Architecture(SimpleNamespace(is_encoder_decoder=True))
    batch = {**batch_of([3, LONGEST], COLUMNS), "labels": torch.ones(2, COLUMNS)}
    (found,) = without_padding(batch, CPU, architecture)
    assert found is batch


def test_short_samples_are_split_off_where_that_pays() -> None:
    batch = {**batch_of([64, 8] * 8, 64), "classes": torch.arange(16)}
    short, long = without_padding(batch, CPU)
    assert (short["input_ids"].shape, long["input_ids"].shape) == ((8, 8), (8, 64))
    assert (short["classes"].tolist(), long["classes"].tolist()) == (
        list(range(1, 16, 2)),
        list(range(0, 16, 2)),
    )
    images = {**batch, "pixel_values": torch.ones(16, 3, 5)}  # possibly not one per sample
    assert without_padding(images, CPU) == [images]
    assert without_padding(batch, CPU, split_by_length=False) == [batch]
    # a further forward pass costs more on a GPU that is not full
    assert without_padding(batch, torch.device("cuda")) == [batch]


@pytest.mark.parametrize("seed", range(8))
def test_split_by_length_has_minimal_cost(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = sorted((torch.randint(1, 9, (9,), generator=generator) * 40).tolist())

    def cost(groups: list[list[int]]) -> int:
        return sum(len(g) * max(g) + FORWARD_OVERHEAD["cpu"] for g in groups)

    cuts = (c for n in range(9) for c in combinations(range(1, 9), n))
    every = [[lengths[a:b] for a, b in pairwise((0, *cut, 9))] for cut in cuts]
    parts = without_padding(batch_of(lengths, 400), CPU)
    assert cost([p["attention_mask"].sum(1).tolist() for p in parts]) == min(map(cost, every))


def test_split_of_thousands_of_samples_is_fast() -> None:
    lengths = [1 + i % 100 for i in range(20_000)]
    begin = time.perf_counter()
    parts = without_padding(batch_of(lengths, 100), CPU)
    assert time.perf_counter() - begin < 5
    assert sum(int(part["attention_mask"].sum()) for part in parts) == sum(lengths)
