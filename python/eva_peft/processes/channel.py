"""Communication between the processes of a group: Python objects, and tensors in buckets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed

from ..errors import DeferredError, EvaRuntimeError, first_line
from ..surroundings.memory import is_out_of_memory

__all__ = ["Channel"]

# Tensors are sent together up to this many bytes, which are copied once.
BUCKET_BYTES = 32 << 20


class Channel:
    """The processes of a group, led by the first; calls are collective unless stated otherwise.

    A call raises EvaRuntimeError if another process cannot be reached, or, instead, the error that
    this one holds.

    Args:
        group: a ``torch.distributed`` process group that this process is in.
        held_error: the error of this process, if any, that is still to be reported to the others.

    Attributes:
        rank, size: of this process in the group, and of the group.
        is_leader: whether this is the leader.
    """

    def __init__(self, group: Any, held_error: DeferredError) -> None:
        self._group, self._held_error = group, held_error
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)
        self.is_leader = self.rank == 0
        self._leader = distributed.get_global_rank(group, 0)

    def broadcast_object(self, value: Any) -> Any:
        """Broadcast an object from the leader."""
        box = [value]
        with self._explaining_failures():
            distributed.broadcast_object_list(box, src=self._leader, group=self._group)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Gather an object from each process, by rank."""
        values: list[Any] = [None] * self.size
        with self._explaining_failures():
            distributed.all_gather_object(values, value, group=self._group)
        return values

    def send(self, value: Any) -> None:
        """Send an object to the leader, which calls :meth:`receive`; not collective."""
        with self._explaining_failures():
            distributed.send_object_list([value], dst=self._leader, group=self._group)

    def receive(self, rank: int) -> Any:
        """Receive, on the leader, an object that a process has sent; not collective."""
        box: list[Any] = [None]
        source = distributed.get_global_rank(self._group, rank)
        with self._explaining_failures():
            distributed.recv_object_list(box, src=source, group=self._group)
        return box[0]

    def sum_on_leader(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors of the same shapes over all processes; only the leader gets the sums."""
        for bucket in _buckets(tensors):
            flat = _flattened(bucket)
            with self._explaining_failures():
                distributed.reduce(flat, dst=self._leader, group=self._group)
            if self.is_leader:
                _copy_back(flat, bucket)

    def broadcast_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Broadcast the leader's tensors into those of all processes."""
        for bucket in _buckets(tensors):
            flat = _flattened(bucket)
            with self._explaining_failures():
                distributed.broadcast(flat, src=self._leader, group=self._group)
            if not self.is_leader:
                _copy_back(flat, bucket)

    @contextmanager
    def _explaining_failures(self) -> Iterator[None]:
        """Explain a failure of the backend, whose own message only names addresses."""
        try:
            yield
        except RuntimeError as error:
            self._held_error.reraise()  # no other process can report it any more
            if is_out_of_memory(error):
                raise
            raise EvaRuntimeError(
                f"process {self.rank} cannot reach the others of its process group "
                f"({first_line(error)}). Usually one of them has ended, and its output says why, "
                "or has kept the others waiting beyond the time limit of the group (timeout= of "
                "init_process_group or new_group). A pass that was given checkpoint= can be "
                "resumed from its last file"
            ) from error


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors of one dtype, together no larger than a bucket, in order.

    Devices are mixed: in another process the same layers may be on different ones.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_dtype[tensor.dtype].append(tensor)
    for group in by_dtype.values():
        bucket: list[Tensor] = []
        size = 0
        for tensor in group:
            size += tensor.nbytes
            if bucket and size > BUCKET_BYTES:
                yield bucket
                bucket, size = [], tensor.nbytes
            bucket.append(tensor)
        yield bucket


def _flattened(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1).to(tensors[0].device) for t in tensors])


def _copy_back(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
