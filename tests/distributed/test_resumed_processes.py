"""Checkpoints of passes over two processes."""

from __future__ import annotations

import pytest
import torch

from distributed.conftest import Results
from distributed.scenarios import same

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo"),
]


@pytest.mark.parametrize(
    ("name", "error_names"),
    [
        ("callback_stops_leader", ("Stopped", "EvaRuntimeError")),
        ("loader_stops_follower", ("EvaRuntimeError", "Stopped")),
        ("max_steps_is_raised", (None, None)),
    ],
)
def test_stopped_pass_resumes_with_the_same_result(
    name: str, error_names: tuple[str | None, ...], results: Results
) -> None:
    assert tuple(found[name]["error_name"] for found in results) == error_names
    assert results[0][name]["files"] == ["pass.safetensors"]
    for found in results:
        assert found[name]["whole"]["forwards"] == 6
        assert same(found[name]["resumed"], found[name]["whole"])


@pytest.mark.parametrize(
    ("name", "batches"),
    [
        ("resumed_after_one_loader_ended", 4 + 2),
        ("resumed_after_an_epoch", 4 + 4),
        ("resumed_in_second_epoch", 4 + 4),
    ],
)
def test_pass_resumes_after_the_end_of_a_loader(name: str, batches: int, results: Results) -> None:
    for found in results:
        assert found[name]["whole"]["tokens"] == batches * 4 * 24
        assert same(*found[name].values())


def test_pass_resumes_with_the_state_of_one_process(results: Results) -> None:
    for found in results:
        assert "expert.3" in found["resumed_with_too_few_tokens_in_one"]["whole"]["components"]
        assert same(*found["resumed_with_too_few_tokens_in_one"].values())
        assert same(*found["resumed_after_one_called_a_layer_twice"].values())
        assert same(*found["resumed_before_one_calls_a_layer_twice"].values())


def test_completed_pass_returns_the_same_result_again(results: Results) -> None:
    for found in results:
        first, again = found["pass_repeated"]["whole"], found["pass_repeated"]["resumed"]
        assert first["steps"] == 2  # the last step is incomplete
        assert same(first, again)
        assert same(*found["pass_repeated"]["history"])


def test_resuming_with_fewer_processes_raises(results: Results) -> None:
    kind, message = results[0]["resumed_by_one_process"]
    assert kind == "EvaValueError"
    assert "belongs to another pass: processes: 2 in the file, 1 now. To continue" in message


def test_other_batches_are_warned_about_in_the_process_that_got_them(results: Results) -> None:
    assert results[0]["resumed_with_other_batches_in_one"] == []
    (message,) = results[1]["resumed_with_other_batches_in_one"]
    assert "the loader of process 1 does not yield the batches again" in message
    assert "pass.safetensors has counted: batch 2 differs" in message


def test_checkpoint_of_a_process_other_than_the_first_has_no_effect(results: Results) -> None:
    assert results[0]["checkpoint_in_follower_only"] == ([], [])
    (message,), files = results[1]["checkpoint_in_follower_only"]
    assert "pass.safetensors' has no effect in process 1" in message
    assert files == []
