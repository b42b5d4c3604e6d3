"""Layers that read a slice of the tokens, as the ColBERT head of BGE-M3, which skips the first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eva_kernels import EvaWarning
from eva_peft.inputs.fits import TokenSlice, token_slice_of
from integration.conftest import layer_inputs, lora, lost, make_bert, run
from integration.inputs.padding_blocks import EXACT, KEPT, batches

SLICES = {
    "all but the first": slice(1, None),
    "all but the last": slice(None, -1),
    "all but both ends": slice(1, -1),
}


class Retriever(nn.Module):
    """Projects a slice of the tokens of a text."""

    def __init__(self, part: slice, copied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.part, self.copied = part, copied
        self.bert, self.vectors = make_bert(), nn.Linear(32, 8)

    def forward(self, query: dict[str, Tensor] | None = None, **text: Tensor) -> Tensor:
        whole = self.bert(**(query or text)).last_hidden_state
        part = whole[:, self.part]
        return self.vectors(part.clone() if self.copied else part)


def texts(left: bool = False, nested: bool = False) -> list[dict[str, Any]]:
    kept = KEPT.flip(1) if left else KEPT
    data: list[dict[str, Any]] = [
        {"input_ids": b["ids"].flip(1) if left else b["ids"], "attention_mask": kept.long()}
        for b in batches()
    ]
    return [{"query": each} for each in data] if nested else data


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("nested", [False, True], ids=["mask in batch", "mask in nested batch"])
@pytest.mark.parametrize("part", SLICES.values(), ids=SLICES)
def test_padding_in_a_slice_of_the_sequence_is_masked(
    part: slice, nested: bool, left: bool
) -> None:
    model, data = Retriever(part).eval(), texts(left, nested)
    result = run(model, data, lora(tau=1.0, target_modules=["vectors"]), **EXACT)
    kept = (KEPT.flip(1) if left else KEPT)[:, part]
    x = layer_inputs(model, data, ["vectors"])["vectors"]
    assert lost(result.components["vectors"], x[kept.flatten().repeat(4)]) < 1e-6
    assert result.tokens == 4 * int(kept.sum())


@pytest.mark.filterwarnings("error::eva_kernels.EvaWarning")
def test_padding_in_a_slice_of_a_single_text_is_masked() -> None:
    model, config = Retriever(slice(1, None)).eval(), lora(target_modules=["vectors"])
    data = [{name: value[1:2] for name, value in batch.items()} for batch in texts()]
    result = run(model, data, config, trim_padding=False, **EXACT)
    assert result.tokens == 4 * int(KEPT[1, 1:].sum())


def test_draw_limit_applies_to_the_sliced_tokens() -> None:
    model, config = Retriever(slice(1, None)).eval(), lora(target_modules=["vectors"])
    result = run(model, texts(), config, tokens_per_step=5, **EXACT)
    assert result.tokens == 4 * 5


def test_slice_of_one_token_per_sample_ignores_the_mask() -> None:
    model = Retriever(slice(None, 1)).eval()
    config = lora(tau=1.0, target_modules=["vectors"])
    result = run(model, texts(left=True), config, **EXACT)
    assert result.tokens == 4 * len(KEPT)


def test_copied_slice_warns_and_is_not_masked() -> None:
    model, config = Retriever(slice(1, None), copied=True).eval(), lora(target_modules=["vectors"])
    with pytest.warns(EvaWarning, match=r"layer vectors: no token mask fits"):
        result = run(model, texts(), config, **EXACT)
    assert result.tokens == 4 * KEPT[:, 1:].numel()


def test_token_slice_of_recognises_slices_of_the_token_dimension() -> None:
    whole = torch.zeros(3, 7, 12)
    assert token_slice_of(whole[:, 1:]) == TokenSlice(7, 1)
    assert token_slice_of(whole[:, 2:-1]) == TokenSlice(7, 2)
    assert token_slice_of(whole[1:, :-1]) == TokenSlice(7, 0)
    assert token_slice_of(whole[1:2, 1:]) == TokenSlice(7, 1)
    assert token_slice_of(whole[..., 4:8][:, 3:]) == TokenSlice(7, 3)
    others = [whole, whole[1:], whole[..., 4:8], whole[:, 0], whole[:, 2:3], whole[:, ::2]]
    others += [whole.mT, whole.mT[:, 1:], whole[:1].expand(3, 7, 12)[:, 1:], whole[:, 1:].clone()]
    others += [whole.flatten()[5:173].view(2, 7, 12)[:, 1:]]
    others += [whole[:, :1].expand(3, 7, 12), whole.as_strided((2, 3, 12), (84, 12, 1), 60)]
    for other in others:
        assert token_slice_of(other) is None, (other.shape, other.stride())
