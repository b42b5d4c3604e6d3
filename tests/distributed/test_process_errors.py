"""Errors and interrupts of one of two processes: both stop, and say what happened where."""

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
    ("name", "where", "error", "message"),
    [
        ("loader_of_follower_fails", 1, "OSError", "the disk is gone"),
        ("callback_of_leader_fails", 0, "OSError", "the report is gone"),
        ("callback_fails_at_the_end", 0, "OSError", "the report is gone"),
        ("merging_fails", 0, "OSError", "the memory is gone"),
        ("checkpoint_fails_at_the_end", 0, "ValueError", "no such state"),
        ("loader_fails_in_shards", 1, "OSError", "the disk is gone"),
    ],
)
def test_error_in_one_process_reaches_all(
    name: str, where: int, error: str, message: str, results: Results
) -> None:
    assert results[where][name] == (error, message)
    expected = f"process {where} failed: {error}: {message}"
    assert results[1 - where][name] == ("EvaRuntimeError", expected)


def test_failed_pass_frees_its_hook_collectors(results: Results) -> None:
    causes = ["callback", "loader", "not converged", "layer in shards"]
    for found in results:
        assert found["collectors_kept_after_errors"] == {cause: [False] for cause in causes}


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("not_converged", "NotConvergedError", "14 of 14 layers have not converged"),
        ("models_differ", "EvaValueError", "different models, with [2, 4] target layers"),
        (
            "ranks_differ",
            "EvaValueError",
            "different passes: r: 8 in process 0, 4 in process 1; lay",
        ),
        (
            "options_differ",
            "EvaValueError",
            "passes: tokens_per_step: 40 in process 0, 80 in process 1",
        ),
        ("weights_vary", "EvaValueError", "processes 0 and 1 have different weights in model.lay"),
        (
            "resumed_with_fewer_batches",
            "EvaValueError",
            "pass.safetensors was written after 3 batches, but all loaders ended after 2",
        ),
        ("shards_without_a_group", "EvaValueError", "group=None: the model is sharded by FSDP"),
        ("shards_in_smaller_groups", "EvaValueError", "sharded by FSDP over the ranks 0, 1, which"),
        ("flattened_in_smaller_groups", "EvaValueError", "group=a group of the ranks {rank}: the"),
        ("invalid_group", "EvaTypeError", "group='all' must be a torch.distributed process group"),
    ],
)
def test_error_is_the_same_in_all(name: str, error: str, message: str, results: Results) -> None:
    for rank in (0, 1):
        assert results[rank][name][0] == error
        assert message.format(rank=rank) in results[rank][name][1]


@pytest.mark.parametrize(
    ("name", "where", "kind", "message"),
    [
        ("follower_fails_early", 1, "EvaValueError", "memory_budget=1 bytes is too small"),
        (
            "dtypes_differ",
            0,
            "EvaValueError",
            "accumulated in torch.float64 in one process and in torch.float32 in another; load",
        ),
        (
            "shards_of_one_process_leave_the_group",
            1,
            "EvaValueError",
            "group=a group of the ranks 0, 1: the model is sharded by FSDP over the ranks 1, 2",
        ),
        ("leader_finds_no_layer", 0, "EvaValueError", "no layer to initialise"),
        ("checkpoint_cannot_be_written", 0, "EvaValueError", "cannot be written"),
        ("follower_nan_step_3", 1, "NonFiniteError", "self_attn.q_proj, step 3: 96 of 96 tokens"),
        ("leader_nan_step_1", 0, "NonFiniteError", "layer 0, step 1: 5 of 40 tokens hold"),
        ("follower_nan_step_1", 1, "NonFiniteError", "layer 0, step 1: 5 of 40 tokens hold"),
        ("follower_nan_step_2", 0, "NonFiniteError", "layer 0, step 2: 5 of 80 tokens hold"),
        # before the other processes run the batch
        ("prepare_fails_in_shards", 1, "KeyError", "'nothing'"),
        (
            "batch_fails_in_shards",
            1,
            "EvaValueError",
            "the samples of 'input_ids' in a batch have different lengths",
        ),
        # after the other processes have run the batch
        (
            "nan_in_layer_in_shards",
            1,
            "NonFiniteError",
            "layer model.layers.0.mlp.down_proj, step 1: 96 of 96 tokens",
        ),
    ],
)
def test_package_error_in_one_process_reaches_the_other(
    name: str, where: int, kind: str, message: str, results: Results
) -> None:
    found, text = results[where][name]
    assert found == kind
    assert message in text
    expected = f"process {where} failed: {kind}: {text}"
    assert results[1 - where][name] == ("EvaRuntimeError", expected)


def test_interrupt_of_one_process_reaches_all(results: Results) -> None:
    places = {"forward of 1": 1, "forward of 0": 0, "loader of 1": 1, "callback of 0": 0}
    for place, where in places.items():
        assert results[where]["interrupted"][place] == ("KeyboardInterrupt", "Ctrl-C")
        expected = f"process {where} was interrupted (KeyboardInterrupt)"
        assert results[1 - where]["interrupted"][place] == ("EvaRuntimeError", expected)
    assert results[1]["interrupted"]["exit of 1"] == ("SystemExit", "3")
    expected = "process 1 was interrupted (SystemExit)"
    assert results[0]["interrupted"]["exit of 1"] == ("EvaRuntimeError", expected)
    # when the leader already has the result
    assert results[1]["interrupted"]["end of 1"] == ("KeyboardInterrupt", "Ctrl-C")
    assert results[0]["interrupted"]["end of 1"] is None


def test_ctrl_c_while_waiting_is_raised_afterwards(results: Results) -> None:
    (error, _), handler_is_back = results[1]["ctrl_c_while_waiting"]
    assert (error, handler_is_back) == ("KeyboardInterrupt", True)
    message, handler_is_back = results[0]["ctrl_c_while_waiting"]
    assert message == ("EvaRuntimeError", "process 1 was interrupted (KeyboardInterrupt)")
    assert handler_is_back


@pytest.mark.parametrize("place", ["before", "within"])
def test_ctrl_c_in_shards_is_raised_after_the_forward(place: str, results: Results) -> None:
    one, other = (found["ctrl_c_in_shards"][place] for found in results)
    assert other == ("KeyboardInterrupt", "")
    assert one == ("EvaRuntimeError", "process 1 was interrupted (KeyboardInterrupt)")


def test_ctrl_c_before_the_others_arrive_is_raised_at_once(results: Results) -> None:
    (error, _), seconds = results[0]["ctrl_c_before_the_other_arrives"]
    assert error == "KeyboardInterrupt"
    assert seconds < 0.9  # the other arrives after one second
    message, _ = results[1]["ctrl_c_before_the_other_arrives"]
    assert message == ("EvaRuntimeError", "process 0 was interrupted")


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        ("option", "EvaTypeError", "unknown option 'max_step'"),
        ("config", "EvaTypeError", "expected a LoraConfig"),
        ("trained", "EvaValueError", "has been trained"),
        ("not for EVA", "EvaValueError", "can only be used with `init_lora_weights='eva'`"),
        ("busy", "EvaRuntimeError", "another calibration pass is running on this model"),
        ("hooks", "OSError", "no hooks"),
        ("no store", "EvaValueError", "r=-1 must be at least 1"),
    ],
)
def test_error_before_the_pass_reaches_all(
    place: str, error: str, message: str, results: Results
) -> None:
    kind, text = results[1]["errors_before_the_pass"][place]
    assert kind == error
    assert message in text
    expected = f"process 1 failed: {error}: {text}"
    assert results[0]["errors_before_the_pass"][place] == ("EvaRuntimeError", expected)


def test_pass_starts_without_an_accessible_store(results: Results) -> None:
    assert [found["errors_before_the_pass"]["no store, well"] for found in results] == [None, None]


def test_next_pass_works_after_all_processes_failed(results: Results) -> None:
    for rank, found in enumerate(results):
        error, steps = found["both_fail_then_retry"]
        assert error == ("EvaValueError", f"max_steps={-rank} must be at least 1")
        assert steps == 1


def test_batch_is_run_again_in_all_shards_or_none(results: Results) -> None:
    plain, found = results[0]["batch_run_again"], results[0]["batch_run_again_in_shards"]
    assert not isinstance(found, tuple), found
    assert found["tokens"] == plain["tokens"] == 2 * 3 * 80
    assert found["ranks"] == plain["ranks"]
    for name, values in plain["singular_values"].items():
        torch.testing.assert_close(found["singular_values"][name], values, rtol=1e-4, atol=1e-4)
    assert same(found, results[1]["batch_run_again_in_shards"])


def test_failure_inside_a_sharded_model_keeps_its_error(results: Results) -> None:
    error, seconds, log_messages = results[1]["forward_fails_in_shards"]
    assert error == ("KeyError", "'field'")
    assert seconds < 1.5  # the other waits for two seconds, in the model
    [message] = log_messages
    assert "process 1 failed: KeyError: 'field', in forward pass 2 of a sharded model" in message
    assert results[0]["forward_fails_in_shards"][0][0] == "RuntimeError"
