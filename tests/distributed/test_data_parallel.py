"""Passes over two processes: results, convergence, uneven data, and initialised adapters."""

from __future__ import annotations

import pytest
import torch

import eva_kernels
from distributed.conftest import Results
from distributed.scenarios import own_batches, same, union
from integration.conftest import QUIET, exact_pca, layer_inputs, lora, lost, make_llama

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo"),
]


ANSWERS = [
    "sketch",
    "gram",
    "explicit_group",
    "memory_budgets_differ",
    "leader_has_fewer_batches",
    "leader_has_more_batches",
    "converged_and_frozen",
    "experts",
    "inputs_shared_in_one_process_only",
    "initialised",
    "one_new_layer_differs",
]


@pytest.mark.parametrize("name", ANSWERS)
def test_all_processes_return_the_same_result(name: str, results: Results) -> None:
    assert not isinstance(results[0][name], tuple), results[0][name]
    assert same(results[0][name], results[1][name])


@pytest.mark.parametrize("method", ["sketch", "gram"])
def test_result_is_that_of_all_tokens(method: str, results: Results) -> None:
    found, model, data = results[0][method], make_llama(), union()
    alone = eva_kernels.calibrate(model, data, lora(), max_steps=4, method=method, **QUIET)
    assert found["tokens"] == alone.tokens == 4 * 2 * 4 * 24
    assert (found["steps"], found["forwards"]) == (alone.steps, alone.forwards) == (4, 4)
    assert found["shared_inputs"] == alone.shared_inputs
    inputs = layer_inputs(model, data, list(found["components"]))
    for name, rows in found["components"].items():
        # A sketch is as good as that of one process; gram is exact.
        allowed = 1e-6 if method == "gram" else lost(alone.components[name], inputs[name]) + 0.003
        assert lost(rows, inputs[name]) <= allowed
        if method == "gram":
            values = exact_pca(inputs[name])[0][: len(rows)].sqrt()
            error = (found["singular_values"][name] - values).abs() / values[0]
            assert float(error.max()) <= 1e-5
    if method == "gram":
        assert found["ranks"] == alone.ranks


def test_streams_are_merged_once_and_frozen_in_all_processes(results: Results) -> None:
    inputs = 4 * 2  # in two layers: inputs of q/k/v, o, gate/up, and down
    assert [found["merge_and_add_calls"]["merged"] for found in results] == [inputs, 0]
    one, other = (found["merge_and_add_calls"]["added"] for found in results)
    assert one == other < 8 * inputs


def test_plan_of_the_leader_is_used(results: Results) -> None:
    assert set(results[1]["memory_budgets_differ"]["method"].values()) == {"gram"}


def test_explicit_group_is_used(results: Results) -> None:
    assert same(results[0]["explicit_group"], results[0]["sketch"])


def test_process_outside_the_group_raises(results: Results) -> None:
    assert results[0]["group_of_one"]["tokens"] == 4 * 4 * 24
    kind, message = results[1]["group_of_one"]
    assert kind == "EvaTypeError"
    assert "must be a torch.distributed process group that this process is in" in message


def test_without_a_group_processes_are_independent(results: Results) -> None:
    for rank in (0, 1):
        alone = eva_kernels.calibrate(make_llama(), own_batches(rank), lora(), max_steps=4, **QUIET)
        assert same(results[rank]["alone"]["components"], alone.components)
        assert results[rank]["alone"]["tokens"] == alone.tokens


@pytest.mark.parametrize("name", ["leader_has_fewer_batches", "leader_has_more_batches"])
def test_all_batches_of_uneven_loaders_are_used(name: str, results: Results) -> None:
    found = results[0][name]
    assert found["tokens"] == (2 + 5) * 4 * 24
    assert (found["steps"], found["forwards"]) == (5, 5)


def test_convergence_is_the_same_in_all_processes(results: Results) -> None:
    found = results[1]["converged_and_frozen"]
    assert all(found["converged"].values())
    assert found["steps"] < 30


def test_layers_that_one_process_never_calls(results: Results) -> None:
    from distributed.data_parallel import routed_tokens

    found = results[1]["experts"]
    assert found["uncalled"] == []
    tokens = torch.cat([routed_tokens(rank, step) for step in range(4) for rank in (0, 1)])
    for i in range(4):
        own = tokens[tokens[:, 0] == i].double()
        assert lost(found["components"][f"expert.{i}"], own) <= 0.02


def test_skipped_tokens_of_all_processes_are_counted(results: Results) -> None:
    from distributed.data_parallel import BAD

    assert [found["skipped"] for found in results] == [[sum(map(sum, BAD))] * 4] * 2


def test_inputs_not_shared_in_all_processes_are_separate(results: Results) -> None:
    found = results[0]["inputs_shared_in_one_process_only"]
    assert found["shared_inputs"] == []
    a, b = found["components"].values()
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert found["tokens"] == 2 * 3 * 80


def test_adapters_are_initialised_in_all_processes(results: Results) -> None:
    for rank in (0, 1):
        rows = [p for n, p in results[rank]["initialised"].items() if "lora_A" in n]
        assert len(rows) == 14
        for matrix in rows:
            gram = matrix @ matrix.mT
            torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-5)


def test_loaders_may_use_collective_operations(results: Results) -> None:
    for found in results:
        given, own = found["dispatched"]
        assert same(given, own)


def test_waiting_for_the_others_is_logged(results: Results) -> None:
    [message] = results[0]["one_process_is_late"]
    assert "process 0 of 2 has been waiting for 0.2 seconds for the others to begin" in message
    assert "every process of the group must make the same call" in message
    assert results[1]["one_process_is_late"] == []


def test_batches_without_tokens_are_no_step(results: Results) -> None:
    for found in results:
        assert found["first_batches_have_no_tokens"] == ([1, 2], 2 * 2 * 4 * 24)


def test_data_without_tokens_raise_after_one_epoch(results: Results) -> None:
    assert "no token reached any of the 14 target layers in 2 forward" in results[0]["no_tokens"][1]
    assert results[1]["no_tokens"][0] == "EvaRuntimeError"
