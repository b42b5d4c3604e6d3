"""Code for several processes, tested in one: groups of one, lost peers, and helper functions."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard

import eva_kernels
from distributed.scenarios import calibrate, own_batches
from eva_kernels.errors import EvaRuntimeError, EvaTypeError, EvaValueError
from eva_kernels.streaming import fold_streams
from eva_peft.errors import DeferredError
from eva_peft.model import divided
from eva_peft.processes import cells, channel
from eva_peft.processes.data_parallel import processes_of, reporting_start_failures
from eva_peft.processes.peers import Peers
from eva_peft.resume.fingerprint import check_weights
from helpers import make_stream
from integration.conftest import QUIET, lora, make_llama, wrapped

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="torch has no gloo"
)


@pytest.fixture
def group_of_one() -> Iterator[Any]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def test_object_that_is_no_group_raises() -> None:
    with pytest.raises(EvaTypeError, match="process group that this"):
        calibrate(make_llama(), own_batches(0), group=object())


def test_group_of_one_is_treated_as_a_single_process(group_of_one: Any) -> None:
    model = make_llama()
    assert processes_of(model, "auto") is processes_of(model, group_of_one) is None
    plain = calibrate(model, own_batches(0), max_steps=2, group=None)
    found = calibrate(fully_shard(model), own_batches(0), max_steps=2, group=None)
    assert found.ranks == plain.ranks
    for name, rows in plain.components.items():
        torch.testing.assert_close(found.components[name], rows)


def test_shards_over_ranks_that_parameters_do_not_tell_are_over_all(
    group_of_one: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_llama()
    model.lm_head.weight.ds_id = 0  # type: ignore[attr-defined]  # as ZeRO-3's
    assert processes_of(model, None) is None
    monkeypatch.setattr(distributed, "get_world_size", lambda group=None: 2)
    with pytest.raises(EvaValueError, match=r"sharded by DeepSpeed \(ZeRO-3\) over the ranks 0, 1"):
        processes_of(model, None)


def test_start_error_is_raised_if_the_store_is_lost() -> None:
    failing = mock.Mock(side_effect=distributed.DistNetworkError("Connection reset by peer"))
    lost_connection: Any = SimpleNamespace(peers=SimpleNamespace())
    lost_connection.peers.barrier = SimpleNamespace(has_arrived=False, report_failure=failing)
    with pytest.raises(KeyError, match="no such layer"), reporting_start_failures(lost_connection):
        raise KeyError("no such layer")
    failing.assert_called_once_with("failed: KeyError: 'no such layer'")


def test_channel_passes_global_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a mesh with replicas, since torch expects global ranks."""
    global_ranks: dict[str, tuple[Any, ...]] = {}
    replicas = object()

    def note(name: str) -> Any:
        return lambda things, group, **of: global_ranks.update({name: (*of.values(), group)})

    first = ("broadcast", "broadcast_object_list", "reduce", "send_object_list")
    for name in (*first, "recv_object_list"):
        monkeypatch.setattr(distributed, name, note(name))
    monkeypatch.setattr(distributed, "get_rank", lambda group: 0)
    monkeypatch.setattr(distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(distributed, "get_global_rank", lambda group, rank: 4 + rank)
    one, tensors = channel.Channel(replicas, DeferredError()), [torch.ones(2)]
    one.broadcast_object("plan")
    one.broadcast_tensors(tensors)
    one.sum_on_leader(tensors)
    one.send("parcel")
    one.receive(1)
    expected = {**dict.fromkeys(first, 4), "recv_object_list": 5}
    assert global_ranks == {name: (number, replicas) for name, number in expected.items()}


def test_lost_peers_raise_unless_this_process_failed_itself(
    group_of_one: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill or timeout of a peer, for which gloo names the closed connection."""
    lost_connection = RuntimeError("Connection closed by peer [127.0.0.1]:17835")
    peers = Peers(group_of_one)
    for name in ("all_gather_object", "broadcast"):
        monkeypatch.setattr(distributed, name, mock.Mock(side_effect=lost_connection))
    with pytest.raises(EvaRuntimeError, match=r"reach the others .* \(Connection closed by"):
        peers.gather(None)

    def fail() -> None:
        raise OSError("the disk is gone")

    peers.attempt(fail)
    with pytest.raises(OSError, match="the disk is gone"):
        peers.gather(None)
    lost_connection = torch.OutOfMemoryError("80 GB")
    monkeypatch.setattr(distributed, "broadcast", mock.Mock(side_effect=lost_connection))
    with pytest.raises(torch.OutOfMemoryError, match="80 GB"):
        peers.channel.broadcast_tensors([torch.ones(2)])


@pytest.mark.parametrize("adapted", [False, True])
def test_sharded_target_parameters_raise(adapted: bool, group_of_one: Any) -> None:
    """Their products use another tensor than the sharded parameter."""
    config = lora(target_modules=["q_proj"], target_parameters=["mlp.up_proj.weight"])
    model: Any = wrapped(make_llama(), config) if adapted else make_llama()
    sharded = fully_shard(model)
    with pytest.raises(
        EvaRuntimeError, match="target_parameters, or experts in one parameter, cannot be"
    ):
        eva_kernels.calibrate(sharded, own_batches(0), None if adapted else config, **QUIET)


@pytest.mark.parametrize(
    ("sizes", "placements", "expected"),
    [
        ((2, 2), (Replicate(), Shard(0)), 1),  # sharded, with replicas
        ((2, 2), (Shard(0), Shard(1)), 2),  # sharded, and the layer is divided
        ((2, 1), (Shard(0), Shard(1)), 1),  # divided along a dimension of size one
        ((2,), (Replicate(),), 0),
    ],
)
def test_replicas_do_not_count_as_partitions(
    sizes: tuple[int, ...], placements: tuple[Any, ...], expected: int
) -> None:
    mesh = SimpleNamespace(size=lambda i: sizes[i])
    parameter: Any = SimpleNamespace(device_mesh=mesh, placements=placements)
    assert divided._num_partitioned_dims(parameter) == expected


def test_layer_with_a_tensor_parallel_plan_counts_as_divided() -> None:
    """Also if its parameters do not show it, as in some versions of transformers."""
    model: Any = make_llama()
    divided.check_not_partitioned(model)
    model.model.layers[1].mlp.up_proj._hf_tp_plan = "colwise"
    for check in (divided.check_not_partitioned, divided.check_adapters_writable):
        with pytest.raises(EvaRuntimeError, match=r"layer model\.layers\.1\.mlp\.up_proj is div"):
            check(model)


def test_weights_may_differ_by_rounding() -> None:
    """Relative to the largest of their layer; other differences mean other weights."""
    check_weights([{"a": [100.0, 1.0]}, {"a": [100.5, 1.5]}])
    with pytest.raises(EvaValueError, match="processes 0 and 1 have different weights in a: load"):
        check_weights([{"a": [0.0, 0.001, 0.002]}, {"a": [0.0, 0.002, 0.001]}])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["sketch", "gram"])
def test_sent_basis_tensors_match_the_receivers_shapes(method: str, dtype: torch.dtype) -> None:
    first, other = (make_stream(16, 4, method=method, dtype=dtype) for _ in "ab")
    first.add(torch.randn(40, 16, dtype=dtype))
    fold_streams([first])
    sent, room = (cells.basis_tensors(stream, method == "gram") for stream in (first, other))
    assert [(part.shape, part.dtype) for part in sent] == [(p.shape, p.dtype) for p in room]


def test_tensors_are_sent_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """By dtype, each tensor once, and at most BUCKET_BYTES together."""
    monkeypatch.setattr(channel, "BUCKET_BYTES", 32)
    kinds = {torch.float32: [9, 3, 4, 1, 8], torch.float64: [2, 2, 3]}
    every = [torch.empty(n, dtype=kind) for kind, sizes in kinds.items() for n in sizes]
    mixed = [every[i] for i in (0, 5, 1, 6, 2, 3, 7, 4)]
    found = [[len(tensor) for tensor in bucket] for bucket in channel._buckets(mixed)]
    assert found == [[9], [3, 4, 1], [8], [2, 2], [3]]


class SizeCountingTensor(torch.Tensor):
    """Counts how often ``nbytes`` is read."""

    times = 0

    @property
    def nbytes(self) -> int:
        SizeCountingTensor.times += 1
        return 4


def test_bucketing_reads_tensor_sizes_in_linear_time() -> None:
    SizeCountingTensor.times = 0
    (bucket,) = channel._buckets(
        [torch.empty(1).as_subclass(SizeCountingTensor) for _ in range(50)]
    )
    assert len(bucket) == 50
    assert SizeCountingTensor.times <= 100
