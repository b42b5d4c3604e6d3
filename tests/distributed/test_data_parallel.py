"""A pass over two processes: one answer, that of all tokens, and no process left waiting."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import eva_kernels
from distributed.shards import PEFT_LOADS_DIVIDED
from integration.conftest import (
    QUIET,
    exact_pca,
    layer_inputs,
    lora,
    lost,
    make_llama,
    text_batches,
)

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo"),
]
Seen = dict[str, Any]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Seen, Seen]:
    """Run all scenarios in two processes; returns what each of them saw."""
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


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    return bool(one == other)


def union(count: int = 4) -> list[dict[str, Tensor]]:
    """Return the batches of both processes, step by step, as one process would see them."""
    parts = [text_batches(count, padded=False, seed=10 + rank) for rank in (0, 1)]
    return [{k: torch.cat([a[k], b[k]]) for k in a} for a, b in zip(*parts, strict=True)]


ANSWERS = [
    "sketch",
    "gram",
    "given_group",
    "budgets_differ",
    "loaders_of_other_lengths",
    "leader_goes_on_alone",
    "converged_and_frozen",
    "experts",
    "inputs_shared_in_one_process_only",
    "initialised",
    "one_layer_is_new",
]


@pytest.mark.parametrize("name", ANSWERS)
def test_all_processes_have_the_same_answer(name: str, seen: tuple[Seen, Seen]) -> None:
    assert not isinstance(seen[0][name], tuple), seen[0][name]
    assert same(seen[0][name], seen[1][name])


@pytest.mark.parametrize("method", ["sketch", "gram"])
def test_the_answer_is_that_of_all_tokens(method: str, seen: tuple[Seen, Seen]) -> None:
    found, model, data = seen[0][method], make_llama(), union()
    alone = eva_kernels.calibrate(model, data, lora(), max_steps=4, method=method, **QUIET)
    assert found["tokens"] == alone.tokens == 4 * 2 * 4 * 24
    assert (found["steps"], found["forwards"]) == (alone.steps, alone.forwards) == (4, 4)
    assert found["shared_inputs"] == alone.shared_inputs
    inputs = layer_inputs(model, data, list(found["components"]))
    for name, rows in found["components"].items():
        # A sketch is as good as that of one process; an exact answer is exact.
        allowed = 1e-6 if method == "gram" else lost(alone.components[name], inputs[name]) + 0.003
        assert lost(rows, inputs[name]) <= allowed
        if method == "gram":
            values = exact_pca(inputs[name])[0][: len(rows)].sqrt()
            error = (found["singular_values"][name] - values).abs() / values[0]
            assert float(error.max()) <= 1e-5
    if method == "gram":
        assert found["ranks"] == alone.ranks


def test_streams_are_merged_once_and_frozen_everywhere(seen: tuple[Seen, Seen]) -> None:
    inputs = 4 * 2  # of two layers: attention, its output, gate and up, down
    assert [found["counted"]["merged"] for found in seen] == [inputs, 0]
    one, other = (found["counted"]["added"] for found in seen)
    assert one == other < 8 * inputs


def test_the_leaders_plan_is_the_plan(seen: tuple[Seen, Seen]) -> None:
    assert set(seen[1]["budgets_differ"]["method"].values()) == {"gram"}


def test_a_group_that_is_given_is_the_group(seen: tuple[Seen, Seen]) -> None:
    assert same(seen[0]["given_group"], seen[0]["sketch"])


def test_a_process_outside_the_group_is_told(seen: tuple[Seen, Seen]) -> None:
    assert seen[0]["group_of_one"]["tokens"] == 4 * 4 * 24
    kind, message = seen[1]["group_of_one"]
    assert kind == "EvaTypeError"
    assert "must be a torch.distributed process group that this process is in" in message


def test_without_a_group_each_process_is_alone(seen: tuple[Seen, Seen]) -> None:
    for rank in (0, 1):
        batches = text_batches(4, padded=False, seed=10 + rank)
        alone = eva_kernels.calibrate(make_llama(), batches, lora(), max_steps=4, **QUIET)
        assert same(seen[rank]["alone"]["components"], alone.components)
        assert seen[rank]["alone"]["tokens"] == alone.tokens


@pytest.mark.parametrize("name", ["loaders_of_other_lengths", "leader_goes_on_alone"])
def test_every_batch_of_an_uneven_split_counts(name: str, seen: tuple[Seen, Seen]) -> None:
    found = seen[0][name]
    assert found["tokens"] == (2 + 5) * 4 * 24
    assert (found["steps"], found["forwards"]) == (5, 5)


def test_convergence_is_decided_for_all(seen: tuple[Seen, Seen]) -> None:
    found = seen[1]["converged_and_frozen"]
    assert all(found["converged"].values())
    assert found["steps"] < 30


def test_layers_that_one_process_never_calls(seen: tuple[Seen, Seen]) -> None:
    from distributed.data_parallel import routed_tokens

    found = seen[1]["experts"]
    assert found["uncalled"] == []
    tokens = torch.cat([routed_tokens(rank, step) for step in range(4) for rank in (0, 1)])
    for i in range(4):
        own = tokens[tokens[:, 0] == i].double()
        assert lost(found["components"][f"expert.{i}"], own) <= 0.02


def test_tokens_that_any_process_skips_are_counted(seen: tuple[Seen, Seen]) -> None:
    from distributed.data_parallel import BAD

    assert [found["skipped"] for found in seen] == [[sum(map(sum, BAD))] * 2] * 2


def test_inputs_that_one_process_does_not_share_are_apart(seen: tuple[Seen, Seen]) -> None:
    found = seen[0]["inputs_shared_in_one_process_only"]
    assert found["shared_inputs"] == []
    a, b = found["components"].values()
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert found["tokens"] == 2 * 3 * 80


def test_adapters_are_written_everywhere(seen: tuple[Seen, Seen]) -> None:
    for rank in (0, 1):
        rows = [p for n, p in seen[rank]["initialised"].items() if "lora_A" in n]
        assert len(rows) == 14
        for matrix in rows:
            gram = matrix @ matrix.mT
            torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "where", "error", "message"),
    [
        ("follower_fails", 1, "OSError", "the disk is gone"),
        ("leader_fails", 0, "OSError", "the report is gone"),
        ("callback_fails_at_the_end", 0, "OSError", "the report is gone"),
        ("merging_fails", 0, "OSError", "the memory is gone"),
        ("writing_fails_at_the_end", 0, "ValueError", "no such state"),
        ("loader_fails_in_shards", 1, "OSError", "the disk is gone"),
    ],
)
def test_an_error_of_one_ends_all(
    name: str, where: int, error: str, message: str, seen: tuple[Seen, Seen]
) -> None:
    assert seen[where][name] == (error, message)
    told = f"process {where} failed: {error}: {message}"
    assert seen[1 - where][name] == ("EvaRuntimeError", told)


def test_a_pass_that_failed_keeps_no_memory(seen: tuple[Seen, Seen]) -> None:
    causes = ["callback", "loader", "not converged", "layer in shards"]
    for found in seen:
        assert found["kept_by_errors"] == {cause: [False] for cause in causes}


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("not_converged", "NotConvergedError", "14 of 14 layers have not converged"),
        ("other_models", "EvaValueError", "different models, with [2, 4] target layers"),
        (
            "other_ranks",
            "EvaValueError",
            "different passes: r: 8 in process 0, 4 in process 1; lay",
        ),
        (
            "other_options",
            "EvaValueError",
            "passes: tokens_per_step: 40 in process 0, 80 in process 1",
        ),
        ("other_weights", "EvaValueError", "processes 0 and 1 have different weights in model.lay"),
        (
            "batches_are_missing",
            "EvaValueError",
            "pass.safetensors was written after 3 batches, but all loaders ended after 2",
        ),
        ("shards_without_a_group", "EvaValueError", "sharded by FSDP, whose processes wait for"),
        ("no_group", "EvaTypeError", "group='all' must be a torch.distributed process group"),
    ],
)
def test_errors_of_all(name: str, error: str, message: str, seen: tuple[Seen, Seen]) -> None:
    for rank in (0, 1):
        assert seen[rank][name][0] == error
        assert message in seen[rank][name][1]


@pytest.mark.parametrize(
    ("name", "where", "kind", "message"),
    [
        ("fails_before", 1, "EvaValueError", "memory_budget=1 bytes is too small"),
        (
            "other_dtypes",
            0,
            "EvaValueError",
            "accumulated in torch.float64 in one process and in torch.float32 in another; load",
        ),
        ("leader_finds_no_layer", 0, "EvaValueError", "no layer to initialise"),
        ("checkpoint_cannot_be_written", 0, "EvaValueError", "cannot be written"),
        ("step_of_a_follower", 1, "NonFiniteError", "self_attn.q_proj, step 3: 96 of 96 tokens"),
        ("leader_begins_with_nan", 0, "NonFiniteError", "layer 0, step 1: 5 of 40 tokens hold"),
        ("follower_begins_with_nan", 1, "NonFiniteError", "layer 0, step 1: 5 of 40 tokens hold"),
        ("follower_goes_on_with_nan", 0, "NonFiniteError", "layer 0, step 2: 5 of 80 tokens hold"),
        # before the others run theirs
        ("prepare_fails_in_shards", 1, "KeyError", "'nothing'"),
        (
            "batch_fails_in_shards",
            1,
            "EvaValueError",
            "the samples of 'input_ids' in a batch have different lengths",
        ),
        # when the others have run theirs
        (
            "layer_fails_in_shards",
            1,
            "NonFiniteError",
            "layer model.layers.0.mlp.down_proj, step 1: 96 of 96 tokens",
        ),
    ],
)
def test_what_goes_wrong_in_one_is_told_in_the_other(
    name: str, where: int, kind: str, message: str, seen: tuple[Seen, Seen]
) -> None:
    found, told = seen[where][name]
    assert found == kind
    assert message in told
    expected = f"process {where} failed: {kind}: {told}"
    assert seen[1 - where][name] == ("EvaRuntimeError", expected)


def test_an_interrupt_of_one_ends_all(seen: tuple[Seen, Seen]) -> None:
    places = {"forward of 1": 1, "forward of 0": 0, "loader of 1": 1, "callback of 0": 0}
    for place, where in places.items():
        assert seen[where]["interrupted"][place] == ("KeyboardInterrupt", "Ctrl-C")
        expected = f"process {where} was interrupted (KeyboardInterrupt)"
        assert seen[1 - where]["interrupted"][place] == ("EvaRuntimeError", expected)
    assert seen[1]["interrupted"]["exit of 1"] == ("SystemExit", "3")
    expected = "process 1 was interrupted (SystemExit)"
    assert seen[0]["interrupted"]["exit of 1"] == ("EvaRuntimeError", expected)
    # when the leader has the result
    assert seen[1]["interrupted"]["end of 1"] == ("KeyboardInterrupt", "Ctrl-C")
    assert seen[0]["interrupted"]["end of 1"] is None


def test_ctrl_c_is_heard_when_the_process_no_longer_waits(seen: tuple[Seen, Seen]) -> None:
    (error, _), handler_is_back = seen[1]["signalled_while_it_waits"]
    assert (error, handler_is_back) == ("KeyboardInterrupt", True)
    told, handler_is_back = seen[0]["signalled_while_it_waits"]
    assert told == ("EvaRuntimeError", "process 1 was interrupted (KeyboardInterrupt)")
    assert handler_is_back


@pytest.mark.parametrize("place", ["before", "within"])
def test_ctrl_c_is_heard_behind_a_forward_pass_of_shards(
    place: str, seen: tuple[Seen, Seen]
) -> None:
    one, other = (found["signalled_in_shards"][place] for found in seen)
    assert other == ("KeyboardInterrupt", "")
    assert one == ("EvaRuntimeError", "process 1 was interrupted (KeyboardInterrupt)")


def test_ctrl_c_is_heard_before_the_others_come(seen: tuple[Seen, Seen]) -> None:
    (error, _), seconds = seen[0]["signalled_before_the_other_comes"]
    assert error == "KeyboardInterrupt"
    assert seconds < 0.9  # the other comes after one
    told, _ = seen[1]["signalled_before_the_other_comes"]
    assert told == ("EvaRuntimeError", "process 0 was interrupted")


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
def test_what_is_wrong_in_one_before_the_pass_is_told(
    place: str, error: str, message: str, seen: tuple[Seen, Seen]
) -> None:
    kind, text = seen[1]["fails_in_one_before"][place]
    assert kind == error
    assert message in text
    expected = f"process 1 failed: {error}: {text}"
    assert seen[0]["fails_in_one_before"][place] == ("EvaRuntimeError", expected)


def test_a_pass_begins_where_no_store_is_shown(seen: tuple[Seen, Seen]) -> None:
    assert [found["fails_in_one_before"]["no store, well"] for found in seen] == [None, None]


def test_processes_that_all_failed_begin_the_next_pass_together(seen: tuple[Seen, Seen]) -> None:
    for rank, found in enumerate(seen):
        error, steps = found["fails_twice"]
        assert error == ("EvaValueError", f"max_steps={-rank} must be at least 1")
        assert steps == 1


def test_a_batch_is_run_again_in_all_shards_or_none(seen: tuple[Seen, Seen]) -> None:
    plain, found = seen[0]["run_again_in_one"], seen[0]["run_again_in_one_in_shards"]
    assert not isinstance(found, tuple), found
    assert found["tokens"] == plain["tokens"] == 2 * 3 * 80
    assert found["ranks"] == plain["ranks"]
    for name, values in plain["singular_values"].items():
        torch.testing.assert_close(found["singular_values"][name], values, rtol=1e-4, atol=1e-4)
    assert same(found, seen[1]["run_again_in_one_in_shards"])


def test_who_fails_inside_of_a_sharded_model_raises_its_own_error(seen: tuple[Seen, Seen]) -> None:
    error, seconds, said = seen[1]["fails_inside_of_shards"]
    assert error == ("KeyError", "'field'")
    assert seconds < 1.5  # the other waits for two, in the model
    [message] = said
    assert "process 1 failed: KeyError: 'field', in forward pass 2 of a sharded model" in message
    assert seen[0]["fails_inside_of_shards"][0][0] == "RuntimeError"


def test_loaders_may_ask_the_others(seen: tuple[Seen, Seen]) -> None:
    for found in seen:
        given, own = found["dispatched"]
        assert same(given, own)


def test_who_waits_for_the_others_says_so(seen: tuple[Seen, Seen]) -> None:
    [message] = seen[0]["one_comes_late"]
    assert "process 0 of 2 has been waiting for 0.2 seconds for the others to begin" in message
    assert "every process of the group must make the same call" in message
    assert seen[1]["one_comes_late"] == []


def test_data_without_a_token_end_after_an_epoch(seen: tuple[Seen, Seen]) -> None:
    assert "no token reached any of the 14 target layers in 2 forward" in seen[0]["no_tokens"][1]
    assert seen[1]["no_tokens"][0] == "EvaRuntimeError"


def test_adapters_in_shards_are_looked_at_whole(seen: tuple[Seen, Seen]) -> None:
    for rank in (0, 1):
        assert seen[rank]["trained_in_shards"] == {
            "initialised": [True, None, None],
            "not initialised": [False, *["NotInitializedError"] * 2],
            "trained": True,
            "dora": [False, True],
            "flattened": [["EvaRuntimeError", None, "EvaRuntimeError"]] * 2,
        }


def test_what_is_sharded_is_calibrated_but_not_initialised(seen: tuple[Seen, Seen]) -> None:
    for rank in (0, 1):
        found = seen[rank]["initialised_in_shards"]
        kinds = {name: kind for name, (kind, _) in found.items()}
        assert kinds == dict.fromkeys(("adapters", "base"), "EvaRuntimeError")
        assert all("Initialise before sharding" in message for _, message in found.values())
    gram = seen[0]["gram"]
    assert same(seen[0]["calibrated_in_shards"], {"in shards": gram, "flattened": gram})


def test_shards_run_as_many_forward_passes_where_lengths_differ(seen: tuple[Seen, Seen]) -> None:
    plain, found = seen[0]["lengths_differ"], seen[0]["lengths_differ_in_shards"]
    assert found["tokens"] == plain["tokens"] == 3 * (12 * 60 + 60 + 11 * 4)
    assert found["ranks"] == plain["ranks"]
    for name, values in plain["singular_values"].items():
        torch.testing.assert_close(found["singular_values"][name], values, rtol=1e-4, atol=1e-4)


def test_shards_stop_where_the_first_loader_ends(seen: tuple[Seen, Seen]) -> None:
    found = seen[0]["shards_have_other_numbers_of_batches"]
    assert found["tokens"] == 2 * 3 * 4 * 24
    assert same(found, seen[1]["shards_have_other_numbers_of_batches"])


def test_models_with_divided_layers_are_refused_everywhere(seen: tuple[Seen, Seen]) -> None:
    assert seen[0]["divided"] == seen[1]["divided"]
    assert len(seen[0]["divided"]) == 2 * 5
    first = seen[0]["first_divided_by_transformers"]
    assert first in ("model.embed_tokens", "model.layers.0.self_attn.q_proj")
    for call, message in seen[0]["divided"].items():
        layer = "model.layers.0.mlp.gate_proj" if "torch" in call else first
        assert f"layer {layer} is divided among processes" in message, call
        assert "load it into the divided model by PeftModel.from_pretrained" in message


@pytest.mark.skipif(not PEFT_LOADS_DIVIDED, reason="needs PEFT 0.21.1")
def test_adapters_are_loaded_where_layers_are_divided(seen: tuple[Seen, Seen]) -> None:
    initialised, whole, divided = seen[1]["loaded_where_it_is_divided"]
    assert initialised
    torch.testing.assert_close(divided, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("leader_is_stopped", ("Stopped", "EvaRuntimeError")),
        ("follower_is_stopped", ("EvaRuntimeError", "Stopped")),
        ("limit_is_raised", (None, None)),
    ],
)
def test_a_pass_of_several_processes_goes_on(
    name: str, told: tuple[str | None, ...], seen: tuple[Seen, Seen]
) -> None:
    assert tuple(found[name]["told"] for found in seen) == told
    assert seen[0][name]["files"] == ["pass.safetensors"]
    for found in seen:
        assert found[name]["whole"]["forwards"] == 6
        assert same(found[name]["resumed"], found[name]["whole"])


@pytest.mark.parametrize(
    ("name", "batches"),
    [
        ("one_loader_had_ended", 4 + 2),
        ("an_epoch_had_ended", 4 + 4),
        ("a_second_epoch_had_begun", 4 + 4),
    ],
)
def test_a_pass_goes_on_behind_the_end_of_a_loader(
    name: str, batches: int, seen: tuple[Seen, Seen]
) -> None:
    for found in seen:
        assert found[name]["whole"]["tokens"] == batches * 4 * 24
        assert same(*found[name].values())


def test_a_pass_goes_on_from_what_one_process_saw(seen: tuple[Seen, Seen]) -> None:
    for found in seen:
        assert "expert.3" in found["one_had_too_few_tokens"]["whole"]["components"]
        assert same(*found["one_had_too_few_tokens"].values())
        assert same(*found["one_called_a_layer_twice"].values())
        assert same(*found["one_would_call_a_layer_twice"].values())


def test_a_pass_that_has_ended_ends_the_same_again(seen: tuple[Seen, Seen]) -> None:
    for found in seen:
        first, again = found["asked_for_again"]["whole"], found["asked_for_again"]["resumed"]
        assert first["steps"] == 2  # the last one of what is no whole step
        assert same(first, again)
        assert same(*found["asked_for_again"]["history"])


def test_as_many_processes_must_go_on(seen: tuple[Seen, Seen]) -> None:
    kind, message = seen[0]["goes_on_alone"]
    assert kind == "EvaValueError"
    assert "belongs to another pass: processes: 2 in the file, 1 now. To continue" in message
