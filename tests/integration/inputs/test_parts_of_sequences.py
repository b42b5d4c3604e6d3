"""Layers that read some of the tokens: all but the first, as the head of ColBERT in BGE-M3."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eva_kernels import EvaWarning
from eva_peft.inputs.fits import TokenSlice, token_slice_of
from integration.conftest import layer_inputs, lora, lost, make_bert, run
from integration.inputs.test_part_masks import EXACT, KEPT, batches

PARTS = {
    "behind the first": slice(1, None),
    "before the last": slice(None, -1),
    "between": slice(1, -1),
}


class Retrieves(nn.Module):
    """Makes vectors of the tokens of a text, but for some."""

    def __init__(self, part: slice, copied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.part, self.copied = part, copied
        self.bert, self.vectors = make_bert(), nn.Linear(32, 8)

    def forward(self, query: dict[str, Tensor] | None = None, **text: Tensor) -> Tensor:
        whole = self.bert(**(query or text)).last_hidden_state
        part = whole[:, self.part]
        return self.vectors(part.clone() if self.copied else part)


def texts(left: bool = False, within: bool = False) -> list[dict[str, Any]]:
    kept = KEPT.flip(1) if left else KEPT
    data: list[dict[str, Any]] = [
        {"input_ids": b["ids"].flip(1) if left else b["ids"], "attention_mask": kept.long()}
        for b in batches()
    ]
    return [{"query": each} for each in data] if within else data


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("within", [False, True], ids=["batch tells", "model tells"])
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_padding_does_not_count_where_a_layer_reads_some_of_the_tokens(
    part: slice, within: bool, left: bool
) -> None:
    model, data = Retrieves(part).eval(), texts(left, within)
    result = run(model, data, lora(tau=1.0, target_modules=["vectors"]), **EXACT)
    kept = (KEPT.flip(1) if left else KEPT)[:, part]
    x = layer_inputs(model, data, ["vectors"])["vectors"]
    assert lost(result.components["vectors"], x[kept.flatten().repeat(4)]) < 1e-6
    assert result.tokens == 4 * int(kept.sum())


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
def test_the_same_of_a_single_text() -> None:
    model, config = Retrieves(slice(1, None)).eval(), lora(target_modules=["vectors"])
    data = [{name: value[1:2] for name, value in batch.items()} for batch in texts()]
    result = run(model, data, config, trim_padding=False, **EXACT)
    assert result.tokens == 4 * int(KEPT[1, 1:].sum())


def test_a_draw_is_of_the_tokens_that_are_read() -> None:
    model, config = Retrieves(slice(1, None)).eval(), lora(target_modules=["vectors"])
    result = run(model, texts(), config, tokens_per_step=5, **EXACT)
    assert result.tokens == 4 * 5


def test_one_token_of_each_sample_counts_whatever_the_mask() -> None:
    model = Retrieves(slice(None, 1)).eval()
    config = lora(tau=1.0, target_modules=["vectors"])
    result = run(model, texts(left=True), config, **EXACT)
    assert result.tokens == 4 * len(KEPT)


def test_of_a_copy_nobody_knows_which_tokens_it_has() -> None:
    model, config = Retrieves(slice(1, None), copied=True).eval(), lora(target_modules=["vectors"])
    with pytest.warns(EvaWarning, match=r"layer vectors: no token mask fits"):
        result = run(model, texts(), config, **EXACT)
    assert result.tokens == 4 * KEPT[:, 1:].numel()


def test_what_a_tensor_is_a_part_of() -> None:
    whole = torch.zeros(3, 7, 12)
    assert token_slice_of(whole[:, 1:]) == TokenSlice(7, 1)
    assert token_slice_of(whole[:, 2:-1]) == TokenSlice(7, 2)
    assert token_slice_of(whole[1:, :-1]) == TokenSlice(7, 0)
    assert token_slice_of(whole[1:2, 1:]) == TokenSlice(7, 1)
    assert token_slice_of(whole[..., 4:8][:, 3:]) == TokenSlice(7, 3)
    others = [whole, whole[1:], whole[..., 4:8], whole[:, 0], whole[:, 2:3], whole[:, ::2]]
    others += [whole.mT, whole.mT[:, 1:], whole[:1].expand(3, 7, 12)[:, 1:], whole[:, 1:].clone()]
    others += [whole.flatten()[5:173].view(2, 7, 12)[:, 1:]]
    for other in others:
        assert token_slice_of(other) is None, (other.shape, other.stride())
