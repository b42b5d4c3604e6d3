"""What the values of masks and lengths say of tokens, where they are easily misread."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eva_peft.inputs.mask_contents import (
    is_true_at_padding,
    kept_by_attention,
    kept_by_padding,
    mask_from_lengths,
    seem_kept,
)

LOWER = torch.ones(3, 3).tril()  # causal, or three samples of one, two and three tokens
SHORT = torch.tensor([[1, 0, 0], [1, 0, 0], [1, 1, 1]])
HIDING = 1 - SHORT[:, None].expand(3, 3, 3)  # true at the keys to hide, as in graykode's tutorials
PADDED = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("mask", "kept"),
    [
        (LOWER, None),
        (LOWER[:, None], LOWER),
        (LOWER[:, None, None], LOWER),
        (SHORT, SHORT),
        (PADDED, PADDED),
        (HIDING, SHORT),
        (HIDING.bool(), SHORT),
    ],
    ids=[
        "causal",
        "rows",
        "rows of all heads",
        "short samples",
        "long samples",
        "hiding",
        "hiding, boolean",
    ],
)
def test_causal_masks_are_told_from_padding(mask: Tensor, kept: Tensor | None) -> None:
    found = kept_by_attention(mask)
    assert (found is None) if kept is None else torch.equal(found, kept.bool())


@pytest.mark.parametrize("mask", [torch.zeros(3), torch.tensor([[1.0, 1.0], [0.0, 0.0]])])
def test_padding_masks_without_samples_or_a_token_in_each_are_not_understood(mask: Tensor) -> None:
    assert kept_by_padding(mask) is None


@pytest.mark.parametrize(
    ("lengths", "shape"),
    [
        ([1.0, 0.5], ()),
        ([1.0, 0.5], (2,)),
        ([], (0, 4)),
        ([1.0, 0.0], (2, 4)),
        ([2.0, 1.0], (2, 4)),
    ],
)
def test_numbers_other_than_shares_of_the_longest_are_no_lengths(
    lengths: list[float], shape: tuple[int, ...]
) -> None:
    assert mask_from_lengths(torch.tensor(lengths), shape, [*range(9)]) is None


RIGHT = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 1, 1]])


@pytest.mark.parametrize(
    ("mask", "answer"),
    [
        (RIGHT, True),
        (RIGHT[:1], True),
        (RIGHT[1:], False),  # or left padding, true of what is kept
        (RIGHT.flip(1), False),  # or right padding, with a sample of padding alone
        (1 - RIGHT, False),
        (torch.ones(4, 4).triu(1), False),
        (torch.tensor([[0, 0, 0], [0, 1, 0]]), False),  # tokens to be predicted, say
        (torch.zeros(0, 4), False),
        (torch.zeros(2, 0), False),
    ],
)
def test_true_at_padding_is_told_from_true_elsewhere(mask: Tensor, answer: bool) -> None:
    assert is_true_at_padding(mask.bool()) == answer
    assert not is_true_at_padding(mask)


IDS = torch.tensor([[1, 5, 4, 2, 0, 0, 0], [1, 5, 2, 0, 0, 0, 0], [1, 3, 4, 5, 6, 5, 2]])


@pytest.mark.parametrize(
    ("ids", "pads"),
    [
        (IDS, True),
        (IDS.flip(1), True),
        (IDS[2:], False),
        (torch.where(IDS == 5, 0, IDS), False),
        (IDS[:, :5], False),
        (IDS * 0, False),
    ],
    ids=["right", "left", "no padding", "an id of a word, too", "few", "all"],
)
def test_ids_that_seem_to_be_padding(ids: Tensor, pads: bool) -> None:
    kept = seem_kept(ids)
    assert torch.equal(kept, ids != 0) if kept is not None else not pads
