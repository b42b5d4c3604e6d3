"""Warnings name the line of the caller, and similar layers share one warning."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eva_kernels
from eva_peft.errors import listed
from integration.conftest import lora, make_llama, text_batches


class MismatchedInputs(nn.Module):
    """One layer reads more rows than there are tokens; another is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 16)
        self.odd, self.idle = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.odd(torch.cat([x, x[:, :3]], 1))


@pytest.mark.parametrize(
    ("make", "phrases"),
    [
        (MismatchedInputs, ["no token mask fits", "never called", "not converged"]),
        (make_llama, ["not converged"]),
    ],
)
def test_warnings_point_to_the_line_of_the_caller(make: Any, phrases: list[str]) -> None:
    names = ["odd", "idle"] if make is MismatchedInputs else ["q_proj"]
    config = lora(target_modules=names, tau=1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        here = current_line()
        eva_kernels.calibrate(make(), text_batches(1), config, max_steps=1, progress=False)
    caught_messages = [w for w in caught if issubclass(w.category, eva_kernels.EvaWarning)]
    assert len(caught_messages) == len(phrases)
    for one, part in zip(caught_messages, phrases, strict=True):
        assert part in str(one.message)
        assert (one.filename, one.lineno) == (__file__, here + 1)


def current_line() -> int:
    import sys

    return sys._getframe(1).f_lineno


def test_similar_layers_share_one_warning() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(96, 16)
            self.odd = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
            self.last = nn.Linear(16, 16)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            x = self.embed(input_ids)
            return self.last(nn.Sequential(*self.odd)(torch.cat([x, x[:, :3]], 1)))

    config = lora(target_modules=["0", "1", "2", "last"])
    with pytest.warns(eva_kernels.EvaWarning, match="no token mask fits") as caught:
        eva_kernels.calibrate(Deep(), text_batches(4), config, progress=False)
    caught_messages = [
        str(one.message) for one in caught if "no token mask fits" in str(one.message)
    ]
    assert [text.partition(":")[0] for text in caught_messages] == ["layer odd.0", "layer last"]
    assert caught_messages[0].endswith("layers named like odd.* get no warning of their own")


def test_long_lists_of_names_are_shortened() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed(map(str, range(10))) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
