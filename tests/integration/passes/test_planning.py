"""Plans of the states of layers: the method within the memory budget, sizes and estimates."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import eva_kernels
from eva_kernels import EvaTypeError, EvaValueError
from eva_peft.model.targets import Target
from eva_peft.passes.planning import num_components_of
from integration.conftest import Clash, lora, make_llama, run, vectors


def test_default_memory_budget_is_a_share_of_the_model() -> None:
    def method(rows: int, dtype: torch.dtype) -> str:
        with torch.device("meta"):
            parts = {"embed": nn.Embedding(rows, 64), "lin": nn.Linear(64, 8)}
            model = nn.ModuleDict(parts).to(dtype)
        (found,) = eva_kernels.estimate(model, lora(target_modules=["lin"])).method.values()
        return found

    small = nn.ModuleDict({"lin": nn.Linear(64, 8)})
    config = lora(target_modules=["lin"])
    exact = eva_kernels.estimate(small, config, method="gram").state_bytes
    rows = int(exact / 0.03) // 64  # of one byte each
    assert method(rows // 4, torch.float32) == method(rows // 2, torch.bfloat16) == "gram"
    assert method(rows // 5, torch.float32) == method(rows // 4, torch.bfloat16) == "sketch"


def test_memory_budget_counts_the_size_of_float64() -> None:
    model = make_llama().double()
    most = eva_kernels.estimate(model, lora(), method="gram").state_bytes
    found = eva_kernels.estimate(model, lora(), memory_budget=most - 1)
    assert set(found.method.values()) == {"gram", "sketch"}


def test_oversample_scales_the_width_of_a_sketch() -> None:
    """Also for a model so small that the memory budget is at its minimum."""
    config, state = lora(target_modules=["q_proj"]), []
    for oversample in (1.0, 2.0, 4.0):
        options = {"oversample": oversample}
        state.append(eva_kernels.estimate(make_llama(), config, method="sketch", **options))
        eva_kernels.estimate(make_llama(), config, **options)
    assert 1.5 < state[1].state_bytes / state[0].state_bytes < 3
    assert 1.5 < state[2].state_bytes / state[1].state_bytes < 3


def test_layers_of_one_width_share_their_largest_component_count() -> None:
    config = lora(rank_pattern={"lin": 6})
    result = run(Clash(False), vectors(3, features=16), config, max_steps=3)
    counts = {name: len(values) for name, values in result.singular_values.items()}
    assert result.rank_steps == {}
    assert counts == {"lin": 12, "sub.lin": 12, "sub.other": 8, "head": 8}


@pytest.mark.parametrize(("rank", "step", "count"), [(4, 4, 4), (6, 3, 6), (6, 2, 8), (5, 1, 7)])
def test_component_counts_are_multiples_of_the_rank_multiple(
    rank: int, step: int, count: int
) -> None:
    target = Target("a", nn.Linear(32, 8), 32, 8, rank, 1.0, rank_multiple=step)
    assert num_components_of(target, 1.4) == count
    assert num_components_of(dataclasses.replace(target, in_features=step), 1.4) == step


def test_estimate_scales_with_tokens_and_element_size() -> None:
    model, few, many = make_llama(), (2, 24), (4, 24)
    found = {dtype: [eva_kernels.estimate(model.to(dtype), lora(), shape) for shape in (few, many)]
             for dtype in (torch.bfloat16, torch.float32)}  # fmt: skip
    half, whole = found[torch.bfloat16], found[torch.float32]
    assert [2 * e.activation_bytes for e in half] == [e.activation_bytes for e in whole]
    assert 2 * whole[0].activation_bytes == whole[1].activation_bytes
    # the widest layer reads 96 features, in 64 tokens at least
    assert all(e.workspace_bytes >= 4 * 64 * 96 for e in whole)


@pytest.mark.parametrize("shape", [24, None, "24", (4.0, 24), torch.ones(2)])
def test_batch_shape_of_wrong_type_is_rejected(shape: Any) -> None:
    with pytest.raises(EvaTypeError, match=r"batch_shape=.* must be \(samples, tokens\)"):
        eva_kernels.estimate(make_llama(), lora(), shape)


@pytest.mark.parametrize("shape", [(), (8,), (2, 3, 8), (2, 0), (-2, -8)])
def test_batch_shape_of_wrong_length_or_sign_is_rejected(shape: Any) -> None:
    with pytest.raises(EvaValueError, match=r"must be \(samples, tokens\), both at least 1"):
        eva_kernels.estimate(make_llama(), lora(), shape)
