"""Which batches are cut and divided, and which are left as they are."""

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


# what comes beside ids and a mask, and whether they are cut then
BESIDE: dict[str, tuple[str, Tensor, bool]] = {
    "labels": ("labels", torch.ones(2, COLUMNS), True),
    "embeddings": ("inputs_embeds", torch.ones(2, COLUMNS, 2 * COLUMNS), True),
    "images": ("pixel_values", torch.ones(2, 3, 2 * COLUMNS), True),
    "images of others": ("pixel_values", torch.ones(3, 3, 5), False),
    "integers": ("kinds", torch.ones(2, 3, 2 * COLUMNS, dtype=torch.long), True),
    "nothing": ("crops", torch.ones(2, 0, 5), True),
    "a value a token": ("weights", torch.ones(2, COLUMNS), False),
    "places in three directions": ("position_ids", torch.ones(2, 3, COLUMNS), False),
    "sound in step with text": ("spectra", torch.ones(2, 80, 2 * COLUMNS), False),
    "a number": ("items", torch.tensor(3), False),
}


@pytest.mark.parametrize("case", BESIDE)
def test_what_comes_beside_text(case: str) -> None:
    key, value, cut = BESIDE[case]
    batch = {**batch_of([3, LONGEST], COLUMNS), key: value}
    (found,) = without_padding(batch, CPU)
    assert (found is batch) == (not cut)
    assert found["input_ids"].shape == (2, LONGEST if cut else COLUMNS)
    per_token = cut and key in ("labels", "inputs_embeds")
    assert found[key].equal(value[:, :LONGEST] if per_token else value)


def test_labels_of_a_decoder_are_of_another_stream() -> None:
    architecture = Architecture(SimpleNamespace(is_encoder_decoder=True))
    batch = {**batch_of([3, LONGEST], COLUMNS), "labels": torch.ones(2, COLUMNS)}
    (found,) = without_padding(batch, CPU, architecture)
    assert found is batch


def test_short_samples_run_apart_where_that_pays() -> None:
    batch = {**batch_of([64, 8] * 8, 64), "classes": torch.arange(16)}
    short, long = without_padding(batch, CPU)
    assert (short["input_ids"].shape, long["input_ids"].shape) == ((8, 8), (8, 64))
    assert (short["classes"].tolist(), long["classes"].tolist()) == (
        list(range(1, 16, 2)),
        list(range(0, 16, 2)),
    )
    images = {**batch, "pixel_values": torch.ones(16, 3, 5)}  # maybe not one a sample
    assert without_padding(images, CPU) == [images]
    assert without_padding(batch, CPU, split_by_length=False) == [batch]
    # another pass costs more where a device is not full
    assert without_padding(batch, torch.device("cuda")) == [batch]


@pytest.mark.parametrize("seed", range(8))
def test_no_other_division_costs_less(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = sorted((torch.randint(1, 9, (9,), generator=generator) * 40).tolist())

    def cost(groups: list[list[int]]) -> int:
        return sum(len(g) * max(g) + FORWARD_OVERHEAD["cpu"] for g in groups)

    cuts = (c for n in range(9) for c in combinations(range(1, 9), n))
    every = [[lengths[a:b] for a, b in pairwise((0, *cut, 9))] for cut in cuts]
    parts = without_padding(batch_of(lengths, 400), CPU)
    assert cost([p["attention_mask"].sum(1).tolist() for p in parts]) == min(map(cost, every))


def test_thousands_of_samples_are_divided_at_once() -> None:
    lengths = [1 + i % 100 for i in range(20_000)]
    begin = time.perf_counter()
    parts = without_padding(batch_of(lengths, 100), CPU)
    assert time.perf_counter() - begin < 5
    assert sum(int(part["attention_mask"].sum()) for part in parts) == sum(lengths)
