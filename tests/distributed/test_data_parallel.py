"""Passes over two processes: results, errors, interrupts, sharded models, and checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import eva_kernels
from distributed.scenarios import own_batches, same, union
from distributed.shards import PEFT_LOADS_DIVIDED
from integration.conftest import QUIET, exact_pca, layer_inputs, lora, lost, make_llama

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo"),
]
Results = tuple[dict[str, Any], dict[str, Any]]  # of either process, by scenario


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Run all scenarios in two processes and return the results of each."""
    folder = tmp_path_factory.mktemp("processes")
    paths = [ROOT / "tests", ROOT, ROOT / "python", os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, paths)), "TRITON_INTERPRET": "1"}
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launcher += ["--log-dir", str(folder / "log")]
    command = [sys.executable, "-m", *launcher, str(Path(__file__).with_name("worker.py"))]
    done = subprocess.run(
        [*command, str(folder)], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    return one, other


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

    assert [found["skipped"] for found in results] == [[sum(map(sum, BAD))] * 2] * 2


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


def test_loaders_may_use_collective_operations(results: Results) -> None:
    for found in results:
        given, own = found["dispatched"]
        assert same(given, own)


def test_waiting_for_the_others_is_logged(results: Results) -> None:
    [message] = results[0]["one_process_is_late"]
    assert "process 0 of 2 has been waiting for 0.2 seconds for the others to begin" in message
    assert "every process of the group must make the same call" in message
    assert results[1]["one_process_is_late"] == []


def test_data_without_tokens_raise_after_one_epoch(results: Results) -> None:
    assert "no token reached any of the 14 target layers in 2 forward" in results[0]["no_tokens"][1]
    assert results[1]["no_tokens"][0] == "EvaRuntimeError"


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
