"""Rank allocation against a brute force that sorts and spends one rank at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eva_kernels.errors import EvaValueError
from eva_kernels.streaming import allocate_ranks

examples = settings(max_examples=25, deadline=None, derandomize=True, database=None)
# Few distinct values, exact in binary, so that ties are common, more so with costs.
values = st.sampled_from([0.0, 0.0625, 0.125, 0.25, 0.25, 0.5, float("nan")])


def descending(entries: list[float]) -> Tensor:
    return torch.tensor(sorted(entries, key=lambda v: -v if v == v else 1.0), dtype=torch.float64)


layers = st.lists(st.lists(values, max_size=6).map(descending), max_size=6)


def brute_force(ratios: list[Tensor], budget: int, costs: list[int], floor: int) -> list[int]:
    limits = [sum(1 for v in row.tolist() if v > 0) for row in ratios]
    ranks = [min(floor, limit) for limit in limits]
    left = budget - sum(r * c for r, c in zip(ranks, costs, strict=True))
    pool = [
        (-row[j].item() / costs[i], i, j)
        for i, row in enumerate(ratios)
        for j in range(ranks[i], limits[i])
    ]
    for _, i, _ in sorted(pool):
        if costs[i] <= left:
            ranks[i], left = ranks[i] + 1, left - costs[i]
    return ranks


@examples
@given(ratios=layers, budget=st.integers(0, 40))
def test_equals_brute_force(ratios: list[Tensor], budget: int):
    assert allocate_ranks(ratios, budget) == brute_force(ratios, budget, [1] * len(ratios), 0)


@examples
@given(ratios=layers, extra=st.integers(0, 60), floor=st.integers(0, 3), data=st.data())
def test_equals_brute_force_with_costs(ratios: list[Tensor], extra: int, floor: int, data):
    prices = st.lists(st.sampled_from([1, 2, 4, 8]), min_size=len(ratios), max_size=len(ratios))
    costs = data.draw(prices)
    budget = extra + floor * sum(costs)
    found = allocate_ranks(ratios, budget, costs=costs, min_rank=floor)
    assert found == brute_force(ratios, budget, costs, floor)
    assert sum(r * c for r, c in zip(found, costs, strict=True)) <= budget


@examples
@given(ratios=layers, budget=st.integers(0, 30))
def test_larger_budget_never_lowers_a_rank(ratios: list[Tensor], budget: int):
    smaller, larger = allocate_ranks(ratios, budget), allocate_ranks(ratios, budget + 1)
    assert 0 <= sum(larger) - sum(smaller) <= 1
    assert all(a <= b for a, b in zip(smaller, larger, strict=True))


def test_largest_ratios_get_the_budget():
    ratios = [torch.tensor([0.5, 0.1, 0.01]), torch.tensor([0.4, 0.3, 0.2])]
    assert allocate_ranks(ratios, 4) == [1, 3]
    assert allocate_ranks(ratios, 5) == [2, 3]


def test_ties_go_to_the_earlier_layer():
    ratios = [torch.tensor([0.25, 0.25])] * 3
    assert allocate_ranks(ratios, 1) == [1, 0, 0]
    assert allocate_ranks(ratios, 3) == [2, 1, 0]


def test_zero_and_nan_ratios_get_no_rank():
    nan = float("nan")
    ratios = [torch.tensor([0.5, 0.0]), torch.tensor([0.0, 0.0]), torch.tensor([nan, nan])]
    assert allocate_ranks(ratios, 6) == [1, 0, 0]
    assert allocate_ranks(ratios, 6, min_rank=2) == [1, 0, 0]


def test_every_layer_gets_the_minimum_rank():
    ratios = [torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0.01, 0.005])]
    assert allocate_ranks(ratios, 3) == [3, 0]
    assert allocate_ranks(ratios, 3, min_rank=1) == [2, 1]


def test_costs_change_the_order():
    ratios = [torch.tensor([0.6, 0.5]), torch.tensor([0.4, 0.3])]
    assert allocate_ranks(ratios, 4, costs=[4, 1]) == [0, 2]
    # A component that no longer fits the budget is skipped; a cheaper one may still fit.
    assert allocate_ranks([torch.tensor([0.9]), torch.tensor([0.1])], 2, costs=[3, 2]) == [0, 1]


def test_ratios_of_different_dtypes():
    ratios = [torch.tensor([0.5, 0.25]), torch.tensor([0.4], dtype=torch.float64)]
    assert allocate_ranks(ratios, 2) == [1, 1]


def test_no_layers():
    assert allocate_ranks([], 8) == []
    assert allocate_ranks([torch.empty(0)], 8) == [0]


def test_minimum_ranks_above_the_budget_raise():
    message = "min_rank=2 for 3 layers costs 6, more than the budget of 5"
    with pytest.raises(EvaValueError, match=message):
        allocate_ranks([torch.tensor([0.5, 0.2])] * 3, 5, min_rank=2)
    with pytest.raises(EvaValueError, match="costs 30, more than the budget of 20"):
        allocate_ranks([torch.tensor([0.5])] * 3, 20, costs=[10, 10, 10], min_rank=1)
    with pytest.raises(EvaValueError, match=r"min_rank=2 for 3 layers costs 3, more than .* 2;"):
        allocate_ranks([torch.tensor([0.5, 0.2])] * 3, 2, min_rank=[1, 2, 0])
    for count in (1, 4):
        with pytest.raises(EvaValueError, match=f"min_rank has {count} entries for 3 layers"):
            allocate_ranks([torch.tensor([0.5])] * 3, 20, min_rank=[1] * count)


@pytest.mark.parametrize("costs", [None, [1, 3, 2, 5]])
def test_ratios_given_as_one_array_with_a_row_per_layer(costs: list[int] | None) -> None:
    ratios = np.sort(np.random.default_rng(0).random((4, 6)))[:, ::-1].copy()
    ratios[1, 4:], ratios[2, 1:] = 0.0, np.nan
    for budget in (0, 3, 9, 100):
        assert allocate_ranks(ratios, budget, costs=costs) == allocate_ranks(
            list(ratios), budget, costs=costs
        )


@pytest.mark.parametrize("budget", [1, 100, 777, 2000])
def test_largest_of_many_ratios_get_the_budget(budget: int) -> None:
    ratios = np.sort(np.random.default_rng(0).random((64, 32)))[:, ::-1]
    least = np.sort(ratios, axis=None)[-budget]
    assert allocate_ranks(ratios, budget) == (ratios >= least).sum(1).tolist()
