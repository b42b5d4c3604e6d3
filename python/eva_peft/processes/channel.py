"""What travels between the processes of a group: plain objects, and tensors in buckets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed

from ..errors import EvaRuntimeError, HeldError, first_line
from ..surroundings.memory import is_out_of_memory

__all__ = ["Channel"]

# Tensors travel together up to this many bytes, which are copied once.
BUCKET_BYTES = 32 << 20


class Channel:
    """The processes of a group, the first of which leads; every call is one that all make.

    Any of them raises EvaRuntimeError where another process cannot be reached, or in its place what
    this one holds.

    Args:
        group: a ``torch.distributed`` process group that this process is in.
        held: what has gone wrong in this process, of which the others are to be told.

    Attributes:
        rank, size: of this process in the group, and of the group.
        leads: whether this is the leader.
    """

    def __init__(self, group: Any, held: HeldError) -> None:
        self._group, self._held = group, held
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)
        self.leads = self.rank == 0
        self._leader = distributed.get_global_rank(group, 0)

    def from_leader(self, thing: Any) -> Any:
        """Return what the leader gives."""
        box = [thing]
        with self._reaching():
            distributed.broadcast_object_list(box, src=self._leader, group=self._group)
        return box[0]

    def of_all(self, own: Any) -> list[Any]:
        """Return what each process gives, by rank."""
        every: list[Any] = [None] * self.size
        with self._reaching():
            distributed.all_gather_object(every, own, group=self._group)
        return every

    def send(self, thing: Any) -> None:
        """Give the leader an object; only it and this process make a call."""
        with self._reaching():
            distributed.send_object_list([thing], dst=self._leader, group=self._group)

    def receive(self, rank: int) -> Any:
        """Return what a process has sent to this one, the leader."""
        box: list[Any] = [None]
        source = distributed.get_global_rank(self._group, rank)
        with self._reaching():
            distributed.recv_object_list(box, src=source, group=self._group)
        return box[0]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Add tensors of the same shapes over all processes; only the leader has the sums."""
        for bucket in _buckets(tensors):
            flat = _packed(bucket)
            with self._reaching():
                distributed.reduce(flat, dst=self._leader, group=self._group)
            if self.leads:
                _unpack(flat, bucket)

    def send_out(self, tensors: Sequence[Tensor]) -> None:
        """Write the leader's tensors into those of all."""
        for bucket in _buckets(tensors):
            flat = _packed(bucket)
            with self._reaching():
                distributed.broadcast(flat, src=self._leader, group=self._group)
            if not self.leads:
                _unpack(flat, bucket)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Say what it means that the backend fails, which tells of addresses."""
        try:
            yield
        except RuntimeError as error:
            self._held.release()  # nobody else can tell of that any more
            if is_out_of_memory(error):
                raise
            raise EvaRuntimeError(
                f"process {self.rank} cannot reach the others of its process group "
                f"({first_line(error)}): mostly one has ended, and its output says why, or has "
                "kept them waiting beyond the time limit of the group (timeout= of "
                "init_process_group or new_group). A pass that was given "
                "checkpoint= goes on from its last file"
            ) from error


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors of one dtype, together no larger than a bucket, in order.

    Not by device: the layers of another process may lie elsewhere.
    """
    kinds: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        kinds[tensor.dtype].append(tensor)
    for group in kinds.values():
        bucket: list[Tensor] = []
        size = 0
        for tensor in group:
            size += tensor.nbytes
            if bucket and size > BUCKET_BYTES:
                yield bucket
                bucket, size = [], tensor.nbytes
            bucket.append(tensor)
        yield bucket


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1).to(tensors[0].device) for t in tensors])


def _unpack(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
