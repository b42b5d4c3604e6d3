"""Models sharded or divided over two processes."""

from __future__ import annotations

import pytest
import torch

from distributed.conftest import Results
from distributed.scenarios import same
from distributed.shards import PEFT_LOADS_DIVIDED

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo"),
]


def test_state_of_sharded_adapters_is_that_of_whole_ones(results: Results) -> None:
    for rank in (0, 1):
        assert results[rank]["adapters_in_shards"] == {
            "initialised": [True, None, None],
            "not initialised": [False, *["NotInitializedError"] * 2],
            "trained": True,
            "dora": [False, True],
            "flattened": [["EvaRuntimeError", None, "EvaRuntimeError"]] * 2,
        }


def test_sharded_models_can_be_calibrated_but_not_initialised(results: Results) -> None:
    for rank in (0, 1):
        found = results[rank]["initialised_in_shards"]
        kinds = {name: kind for name, (kind, _) in found.items()}
        assert kinds == dict.fromkeys(("adapters", "base"), "EvaRuntimeError")
        assert all("Initialise before sharding" in message for _, message in found.values())
    gram = results[0]["gram"]
    assert same(results[0]["calibrated_in_shards"], {"in shards": gram, "flattened": gram})


def test_shards_run_equally_many_forwards_if_lengths_differ(results: Results) -> None:
    plain, found = results[0]["batch_lengths_differ"], results[0]["batch_lengths_differ_in_shards"]
    assert found["tokens"] == plain["tokens"] == 3 * (12 * 60 + 60 + 11 * 4)
    assert found["ranks"] == plain["ranks"]
    for name, values in plain["singular_values"].items():
        torch.testing.assert_close(found["singular_values"][name], values, rtol=1e-4, atol=1e-4)


def test_replicas_that_are_whole_may_run_alone(results: Results) -> None:
    for rank in (0, 1):
        assert results[rank]["replicated_shards_without_a_group"]["forwards"] == 4 - rank


def test_sharding_group_is_accepted_again_after_a_pass(results: Results) -> None:
    for rank in (0, 1):
        assert "forwards" in results[rank]["replicated_shards_twice"]


def test_shards_stop_at_the_end_of_the_shortest_loader(results: Results) -> None:
    found = results[0]["numbers_of_batches_differ_in_shards"]
    assert found["tokens"] == 2 * 3 * 4 * 24
    assert same(found, results[1]["numbers_of_batches_differ_in_shards"])


def test_models_with_divided_layers_raise_in_all_functions(results: Results) -> None:
    assert results[0]["divided"] == results[1]["divided"]
    assert len(results[0]["divided"]) == 2 * 5
    first = results[0]["first_divided_by_transformers"]
    assert first in ("model.embed_tokens", "model.layers.0.self_attn.q_proj")
    for call, message in results[0]["divided"].items():
        layer = "model.layers.0.mlp.gate_proj" if "torch" in call else first
        assert f"layer {layer} is divided among processes" in message, call
        assert "load it into the divided model by PeftModel.from_pretrained" in message


@pytest.mark.skipif(not PEFT_LOADS_DIVIDED, reason="needs PEFT 0.21.1")
def test_adapters_can_be_loaded_into_divided_layers(results: Results) -> None:
    initialised, whole, divided = results[1]["adapters_loaded_into_divided_model"]
    assert initialised
    torch.testing.assert_close(divided, whole, rtol=1e-4, atol=1e-5)
