"""Where warnings point: at the line of the user's that called the package."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eva_kernels
from eva_peft.errors import listed
from integration.conftest import lora, make_llama, text_batches


class Odd(nn.Module):
    """Half of its layers see other rows than there are tokens, or none."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 16)
        self.odd, self.idle = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.odd(torch.cat([x, x[:, :3]], 1))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Odd, ["no token mask fits", "never called", "not converged"]),
        (make_llama, ["not converged"]),
    ],
)
def test_warnings_name_the_line_of_the_caller(make: Any, words: list[str]) -> None:
    names = ["odd", "idle"] if make is Odd else ["q_proj"]
    config = lora(target_modules=names, tau=1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        here = line()
        eva_kernels.calibrate(make(), text_batches(1), config, max_steps=1, progress=False)
    told = [w for w in caught if issubclass(w.category, eva_kernels.EvaWarning)]
    assert len(told) == len(words)
    for one, part in zip(told, words, strict=True):
        assert part in str(one.message)
        assert (one.filename, one.lineno) == (__file__, here + 1)


def line() -> int:
    import sys

    return sys._getframe(1).f_lineno


def test_layers_of_one_kind_have_one_warning() -> None:
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
    told = [str(one.message) for one in caught if "no token mask fits" in str(one.message)]
    assert [text.partition(":")[0] for text in told] == ["layer odd.0", "layer last"]
    assert told[0].endswith("layers named like odd.* get no warning of their own")


def test_names_in_a_message() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed(map(str, range(10))) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
