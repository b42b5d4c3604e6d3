"""The state of a calibration pass, saved so that a killed pass can resume.

It is the state between two forward passes: the contents of the streams, including the tokens of an
unfinished step, and all counters. With several processes the first has and writes all of this; of
the others only the random states are saved.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from eva_kernels.streaming import export_stream, restore_stream

from ..errors import EvaValueError, counted, warn
from ..surroundings.random_state import read_random_state, set_random_state
from .batch_digest import digest_of_batch
from .checkpoint_file import REMEDY, check_path, read_checkpoint, write_checkpoint
from .fingerprint import differences, fingerprint_of, join_differences

if TYPE_CHECKING:
    from ..calibrate import CalibrationPass

__all__ = ["CheckpointKeeper", "LoaderState"]

_LOGGER = logging.getLogger("eva_kernels")
_COUNTS = ("forwards", "steps", "tokens", "seconds", "history")


class LoaderState(NamedTuple):
    """What a process must know to continue with the next batch of its loader.

    Attributes:
        random: the global random state now.
        new_epochs: those in which epochs began, since the last forward pass.
        batch_digest: digest of the last batch; empty if there was none.
    """

    random: Tensor
    new_epochs: tuple[Tensor, ...]
    batch_digest: str


class CheckpointKeeper(AbstractContextManager["CheckpointKeeper"]):
    """Resume a pass from its checkpoint, and write the next ones; a context around the loop.

    Without a path it does nothing. Leaving the context, also by an exception, writes the state
    unless a forward pass was in progress: then the file is left unchanged.

    Args:
        run: a pass that has not begun.

    Attributes:
        all_converged: every layer had converged when the checkpoint was written.
        elapsed_seconds: seconds that the pass took up to the last forward pass.
        is_enabled: a checkpoint is written, by this process or by the first of several.
        latest_random, epoch_random: the global random states of each process, now and when each
            epoch began.
        batch_digests: digest of the last batch of each process.
        leader_basis_layers: layers that all processes accumulate about the leader's basis.
    """

    def __init__(self, run: CalibrationPass) -> None:
        self.run, self.all_converged, self.elapsed_seconds = run, False, 0.0
        path = run.options.checkpoint if run.is_leader else None
        # Links are followed, so that the file is replaced and not the link.
        self.path = None if path is None else Path(os.path.realpath(path))
        self._state_complete = True  # no forward pass is under way
        self._forwards_at_write = 0  # forward passes at the last write, or attempt to write
        self._fingerprint: dict[str, Any] = {}
        self.is_enabled = self.path is not None
        self.latest_random: list[Tensor] = []
        self.epoch_random: list[list[Tensor]] = []
        self.batch_digests: list[str] = []
        # Random states at epoch starts in this process: those of the checkpoint that are still to
        # be replayed, and new ones that are not in ``epoch_random`` yet.
        self._epochs_to_replay: list[Tensor] = []
        self._new_epochs: list[Tensor] = []
        self._batch_digest = ""
        self.leader_basis_layers: set[int] = set()

    def open(self) -> None:
        """Check that the path can be written, and restore the state from the file, if any.

        Raises:
            EvaValueError: the path cannot be written, or the file is damaged, of another kind, or
                the checkpoint of another pass.
        """
        if self.path is None:
            return
        check_path(self.path)
        self._fingerprint = fingerprint_of(self.run)
        self.epoch_random = [[] for _ in range(self._num_processes)]
        if self.path.exists():
            self._resume(self.path)

    def skip_seen(self, batches: Iterator[Any]) -> Generator[Any]:
        """Yield the batches after those that the checkpoint has seen.

        Raises:
            EvaValueError: there are fewer batches than were seen.
            EvaWarning: as a warning, if the last of these is another one.
        """
        for number in range(self.run.forwards):
            if next(batches, self) is self:
                seen = counted(self.run.forwards, "batch", "batches")
                raise EvaValueError(
                    f"the checkpoint {self.path} was written after {seen}, but the loader ended "
                    f"after {number}: to resume, it must yield the same batches again"
                )
        if self.run.forwards:
            self.end_skipping(self.latest_random[0], self.batch_digests[0], self.path)
        yield from batches

    def on_batch(self, batch: Any) -> None:
        """Note a batch of the loader, before it is used or skipped."""
        if self.is_enabled:
            self._batch_digest = digest_of_batch(batch)

    def end_skipping(self, random: Tensor, digest: str, path: object, place: str = "") -> None:
        """Restore the random state of the checkpoint, after its batches have been skipped.

        Warn if the last of them is another than in the first run. Batches that are made with random
        numbers may be, if forward passes drew some, too: the random state after them then differs.

        Args:
            random, digest: random state and last batch of this process, in the checkpoint.
            path: of the checkpoint.
            place: " of process 1", if there are several.
        """
        same_random = torch.equal(random, read_random_state(self.run.device))
        set_random_state(random, self.run.device)
        if same_random and digest != self._batch_digest:
            warn(
                f"the loader{place} does not yield the batches again that the checkpoint {path} "
                f"has counted: batch {self.run.forwards} differs. The pass continues after it, but "
                "may count some samples twice and others not at all. To resume exactly, use the "
                "same data in the same order (a generator with a seed of its own must be seeded "
                f"again); or {REMEDY}"
            )

    def begin_epoch(self) -> None:
        """Record the random state in which the loader starts an epoch, or restore a recorded one.

        A shuffled order depends on it. Forward passes may draw random numbers, too, and are not
        run for the batches that are skipped.
        """
        if not self.is_enabled:
            return
        if self._epochs_to_replay:
            set_random_state(self._epochs_to_replay.pop(0), self.run.device)
        else:
            self._new_epochs.append(read_random_state(self.run.device))

    def replay_epochs(self, epoch_random: Sequence[Tensor]) -> None:
        """Replay the epochs of the checkpoint, which this process began in these random states."""
        self._epochs_to_replay = list(epoch_random)

    def take_loader_state(self) -> LoaderState:
        """Return the state of the loader, with the epochs that began since the last call."""
        new_epochs, self._new_epochs = tuple(self._new_epochs), []
        return LoaderState(read_random_state(self.run.device), new_epochs, self._batch_digest)

    def begin_forward(self) -> None:
        """Mark the state as incomplete."""
        self._state_complete = False

    def end_forward(
        self,
        elapsed_seconds: float,
        all_converged: bool,
        loader_states: Sequence[LoaderState] = (),
    ) -> None:
        """Mark the state as complete again, and write it if it is due.

        Args:
            elapsed_seconds: seconds that the pass has taken.
            all_converged: every layer has converged.
            loader_states: with several processes, the :meth:`take_loader_state` of each.
        """
        self.all_converged, self.elapsed_seconds = all_converged, elapsed_seconds
        if self.path is None:
            return
        states = loader_states or [self.take_loader_state()]
        self.latest_random = [state.random for state in states]
        self.batch_digests = [state.batch_digest for state in states]
        for epoch_random, state in zip(self.epoch_random, states, strict=True):
            epoch_random += state.new_epochs
        self._state_complete = True
        if self.run.forwards - self._forwards_at_write >= self.run.options.checkpoint_every:
            self._write(self.path)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if (
            self.path is not None
            and self._state_complete
            and self.run.forwards > self._forwards_at_write
        ):
            self._write(self.path)

    def _write(self, path: Path) -> None:
        state, tensors = self._collect_state()
        try:
            write_checkpoint(path, state, tensors)
        except (OSError, SafetensorError) as error:
            # A full disk must not abort the pass.
            passes = counted(self.run.forwards, "forward pass", "forward passes")
            warn(
                f"the checkpoint {path} could not be written after {passes} ({error}); the pass "
                "continues, and the file keeps its earlier contents",
            )
        self._forwards_at_write = self.run.forwards

    def _collect_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        run, names = self.run, [t.name for t in self.run.targets]
        collector = run.collector
        tensors: dict[str, Tensor] = {}
        for rank, (epoch_random, now) in enumerate(
            zip(self.epoch_random, self.latest_random, strict=True)
        ):
            states = torch.stack(epoch_random), now
            tensors |= dict(zip(_random_keys(rank), states, strict=True))
        slots = []
        for i, slot in enumerate(collector.slots):
            record, parts = export_stream(slot.stream)
            slots.append({"members": [names[m] for m in slot.members], "stream": record})
            tensors |= {f"slots.{i}.{key}": tensor for key, tensor in parts.items()}
        state = {
            "fingerprint": self._fingerprint,
            "tau": run.eva.tau,
            "done": self.all_converged,
            "elapsed": self.elapsed_seconds,
            "counts": {name: getattr(run, name) for name in _COUNTS},
            "ranks": {names[i]: rank for i, rank in run.ranks.items()},
            "slots": slots,
            "most_calls": {names[i]: calls for i, calls in collector.max_calls.items()},
            "largest": collector.largest_batch,
            "alone": sorted(names[i] for i in collector.unshared),
            "frozen": sorted(names[i] for i in collector.frozen),
            "known": sorted(names[i] for i in self.leader_basis_layers),
            "batch_digests": self.batch_digests,
        }
        return state, tensors

    def _resume(self, path: Path) -> None:
        state, tensors = read_checkpoint(path)
        try:
            changes = differences(state["fingerprint"], self._fingerprint)
            if not changes:
                self._restore(state, tensors)
        except EvaValueError as error:
            raise EvaValueError(f"the checkpoint {path} is unusable: {error}; {REMEDY}") from error
        except KeyError as error:
            raise EvaValueError(
                f"the checkpoint {path} is incomplete, without {error}; {REMEDY}"
            ) from error
        except (AttributeError, TypeError) as error:
            raise EvaValueError(
                f"the checkpoint {path} does not hold what this version writes ({error}); {REMEDY}"
            ) from error
        if changes:
            raise EvaValueError(
                f"the checkpoint {path} belongs to another pass: {join_differences(changes)}. To "
                f"continue, {REMEDY}"
            )
        _LOGGER.info("resumed %s after %d forward passes", path, self.run.forwards)

    def _restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        run, collector = self.run, self.run.collector
        index = {t.name: i for i, t in enumerate(run.targets)}
        for i, record in enumerate(state["slots"]):
            members = [index[name] for name in record["members"]]
            target, dtype = run.targets[members[0]], getattr(torch, record["stream"]["dtype"])
            prefix = f"slots.{i}."
            parts = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            slot = collector.add_slot(run.make_stream(target, dtype), members)
            restore_stream(slot.stream, record["stream"], parts)
        calls = {index[n]: calls for n, calls in state["most_calls"].items()}
        collector.record_passes(calls, state["largest"])
        collector.unshared = {index[n] for n in state["alone"]}
        collector.frozen = {index[n] for n in state["frozen"]}
        self.leader_basis_layers = {index[n] for n in state["known"]}
        run.ranks = {index[n]: rank for n, rank in state["ranks"].items()}
        for name in _COUNTS:
            setattr(run, name, state["counts"][name])
        self.all_converged, self.elapsed_seconds = state["done"], state["elapsed"]
        self._forwards_at_write = run.forwards
        if state["tau"] != run.eva.tau:
            self.all_converged = run.recheck_with_tau()
        keys = [_random_keys(rank) for rank in range(self._num_processes)]
        self.epoch_random = [
            [state.clone() for state in tensors[epoch_random]] for epoch_random, _ in keys
        ]
        self.latest_random = [tensors[now] for _, now in keys]
        self.batch_digests = state["batch_digests"]
        self.replay_epochs(self.epoch_random[0])

    @property
    def _num_processes(self) -> int:
        return 1 if self.run.processes is None else self.run.processes.size


def _random_keys(rank: int) -> tuple[str, str]:
    return f"random_states.{rank}.begun", f"random_states.{rank}.now"
