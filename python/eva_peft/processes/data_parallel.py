"""One pass over the batches of several processes, led by the first.

Each process runs its own copy of the model on its own batches. After every forward pass:

1. All report the number of pending tokens of each layer, and any error.
2. The leader receives the accumulated sums and streams (see :mod:`.exchange`), folds, compares, and
   decides, as in a single process.
3. All receive the decision, and the new bases and means.

Activations are not exchanged. At the end all get the leader's result, bit for bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import Tensor, distributed, nn

from eva_kernels.streaming import InputStream

from ..errors import EvaTypeError, EvaValueError, NotConvergedError, counted, listed, warn
from ..inputs import batches
from ..inputs.prepare import PreparedBatch
from ..model.divided import sharded_by, sharding_ranks
from ..options import AUTO
from ..passes.progress import record_step
from ..resume.fingerprint import check_requests, check_weights, request_of, sample_weights
from .cells import (
    ForwardReport,
    PendingSlot,
    RenewedCell,
    common_cells,
    renewed_cell,
    split_into_cells,
)
from .exchange import Exchange
from .peers import Peers, describe_error

if TYPE_CHECKING:
    from ..calibrate import CalibrationPass
    from ..passes.model_call import ReadyPart
    from ..results.result import EvaResult

__all__ = ["Processes", "processes_of", "reporting_start_failures"]

_LOGGER = logging.getLogger("eva_kernels")


def processes_of(model: nn.Module, group: Any) -> Processes | None:
    """Return the processes of a pass; ``None`` if there is only one, or each runs by itself.

    Args:
        model: without wrappers.
        group: the option of that name.

    Raises:
        EvaTypeError: ``group`` is not a process group.
        EvaValueError: the model is sharded over processes outside the group.
    """
    running = distributed.is_available() and distributed.is_initialized()
    if group == AUTO:
        group = distributed.group.WORLD if running else None
    if group is not None and not (running and isinstance(group, distributed.ProcessGroup)):
        raise EvaTypeError(
            f"group={group!r} must be a torch.distributed process group that this process is in "
            "(of a DeviceMesh: mesh.get_group(name)), or None"
        )
    alone = group is None or distributed.get_world_size(group) < 2
    processes = None if alone else Processes(group)
    if running:
        with reporting_start_failures(processes):
            _check_includes_shards(model, group)
    return processes


def _check_includes_shards(model: nn.Module, group: Any) -> None:
    """Refuse a model that is sharded over processes outside the group, or over any if it is None.

    Raises:
        EvaValueError: it is such a model.
    """
    kind = sharded_by(model)
    if kind is None:
        return
    sharding = sharding_ranks(model)
    if group is None:
        ranks = [distributed.get_rank()]
        sharding = sharding or set(range(distributed.get_world_size()))
    else:
        ranks = distributed.get_process_group_ranks(group)
    if not sharding <= set(ranks):
        given = "None" if group is None else f"a group of the ranks {listed(map(str, ranks))}"
        raise EvaValueError(
            f"group={given}: the model is sharded by {kind} over the ranks "
            f"{listed(map(str, sorted(sharding)))}, which wait for each other in every forward "
            "pass, so all of them must take part. Leave group out, or pass the group over which "
            "the model is sharded"
        )


@contextmanager
def reporting_start_failures(processes: Processes | None) -> Iterator[None]:
    """Report an error of this process before the pass to the others, if there are any.

    Interrupts count as errors. The pass itself may be in the block.
    """
    try:
        yield
    except BaseException as error:
        if processes is not None and not processes.peers.barrier.has_arrived:
            with suppress(RuntimeError):  # they may be gone
                processes.peers.barrier.report_failure(describe_error(error))
        raise


@dataclass(frozen=True)
class _Decision:
    """What the leader tells the others after a step.

    Attributes:
        converged, stop: every layer has converged; no further step.
        frozen: layers that are no longer accumulated.
        renewed_cells: layers with a new basis, the dtype of their streams, and whether they are
            exact.
        steps: of the pass so far.
        error: what went wrong.
    """

    converged: bool = False
    stop: bool = True
    frozen: frozenset[int] = frozenset()
    renewed_cells: tuple[RenewedCell, ...] = ()
    steps: int = 0
    error: str | None = None


@dataclass(frozen=True)
class _ResumeState:
    """The state in the leader's checkpoint; of a new pass if the file does not exist yet.

    Attributes:
        path: of the file, which the other processes need not know.
        forwards, tokens: of the pass so far.
        max_calls, largest_batch: see :class:`.cells.ForwardReport`.
        epoch_random, latest_random, batch_digests: see
            :class:`eva_peft.resume.checkpoint.CheckpointKeeper`.
        decision: that of the last step.
    """

    path: str
    forwards: int
    tokens: int
    max_calls: dict[int, int]
    largest_batch: tuple[int, int]
    epoch_random: Sequence[Sequence[Tensor]]
    latest_random: Sequence[Tensor]
    batch_digests: Sequence[str]
    decision: _Decision


class Processes:
    """The processes of a group, seen from one of them.

    Args:
        group: of at least two processes.

    Attributes:
        peers: the processes, and the handling of their errors.
        size, is_leader: of the group, and whether this process leads.
    """

    def __init__(self, group: Any) -> None:
        self.peers = Peers(group)
        self._channel = self.peers.channel
        self.size, self.is_leader = self._channel.size, self._channel.is_leader
        self._exchange = Exchange(self.peers)
        self._total_tokens = 0  # tokens of all processes

    def run_batches(self, run: CalibrationPass, loader: Iterable[Any]) -> bool:
        """Run batches until the leader says stop; returns whether every layer has converged.

        If a loader ends early, its process waits for the others.

        Raises:
            Exception: that of this process; EvaRuntimeError if another one failed.
        """
        self._check_same_pass(run)
        # The choice of "auto" depends on the memory of each device.
        run.plan = self._channel.broadcast_object(run.plan)
        with ExitStack() as stack:
            keeper = run.checkpoint_keeper
            all_batches = batches.iterate(
                loader, lambda: self._total_tokens > 0, keeper.begin_epoch, keeper.on_batch
            )
            stream = stack.enter_context(closing(all_batches))
            prepared_batches = map(run.prepare, stream)
            stack.enter_context(keeper)
            decision = self._start_or_resume(run, stream)
            while not decision.stop:
                keeper.begin_forward()
                decision = self._step(run, prepared_batches)
            self.peers.attempt(stack.close)  # the others are told with the result
        if self.is_leader:
            # after the checkpoint keeper, whose file has what is pending between forward passes
            self.peers.attempt_unless_failed(run.fold_pending)
        return decision.converged

    def _start_or_resume(self, run: CalibrationPass, stream: Iterator[Any]) -> _Decision:
        """Bring all processes to the state of the leader's checkpoint, if there is one."""
        keeper, resume = run.checkpoint_keeper, None
        if keeper.path is not None:
            stop = keeper.all_converged or (run.forwards > 0 and run.limit_reached())
            slots = [
                slot
                for slot in run.collector.slots
                if keeper.leader_basis_layers.issuperset(slot.members)
            ]
            renewed = tuple(map(renewed_cell, slots))
            frozen = frozenset(run.collector.frozen)
            decision = _Decision(keeper.all_converged, stop, frozen, renewed, run.steps)
            passes = run.forwards, run.tokens, run.collector.max_calls, run.collector.largest_batch
            loaders = keeper.epoch_random, keeper.latest_random, keeper.batch_digests
            resume = _ResumeState(str(keeper.path), *passes, *loaders, decision)
        resume = self._channel.broadcast_object(resume)
        if resume is None:
            if run.options.checkpoint is not None:
                self.peers.attempt(
                    warn,
                    f"checkpoint={str(run.options.checkpoint)!r} has no effect in process "
                    f"{self._channel.rank}: process 0 writes the checkpoint for all, and was given "
                    "none. Give it to process 0, too",
                )
            return _Decision(stop=False)
        keeper.is_enabled = True
        run.collector.record_passes(resume.max_calls, resume.largest_batch)
        self._total_tokens = resume.tokens  # if 0, a loader is not restarted at its end
        if resume.forwards and not resume.decision.stop:
            self._skip_seen_batches(run, stream, resume)
        return self._apply(run, resume.decision)

    def _skip_seen_batches(
        self, run: CalibrationPass, stream: Iterator[Any], resume: _ResumeState
    ) -> None:
        """Skip the batches that the checkpoint has seen."""
        rank, keeper = self._channel.rank, run.checkpoint_keeper
        keeper.replay_epochs(resume.epoch_random[rank])
        skipped = self.peers.attempt(lambda: sum(1 for _ in islice(stream, resume.forwards))) or 0
        if not self.is_leader:
            run.forwards = skipped
        most_skipped = max(self.peers.gather(skipped))
        if most_skipped < resume.forwards:
            seen = counted(resume.forwards, "batch", "batches")
            raise EvaValueError(
                f"the checkpoint {resume.path} was written after {seen}, but all loaders ended "
                f"after {most_skipped}; to resume, they must yield the same batches again"
            )
        saved = resume.latest_random[rank], resume.batch_digests[rank]
        # where warnings are errors, the others are told after the next forward pass
        self.peers.attempt(keeper.end_skipping, *saved, resume.path, f" of process {rank}")

    def _step(self, run: CalibrationPass, prepared_batches: Iterator[PreparedBatch]) -> _Decision:
        reports = self.peers.gather(self._forward(run, prepared_batches))
        self._total_tokens += sum(report.tokens for report in reports)
        for report in reports:
            run.collector.record_passes(report.max_calls, report.largest_batch)
        cells = common_cells(reports)
        split_into_cells(run.collector, cells)
        merged = self._exchange.collect(run, reports, cells)
        decision = None
        if self.is_leader:
            decision = self._decide(run, merged, reports)
        return self._apply(run, self._channel.broadcast_object(decision))

    def leader_result(self, make: Callable[[], EvaResult]) -> EvaResult:
        """Return the leader's result, on every process.

        Raises:
            NotConvergedError: on all processes.
            Exception: any other error, on the leader; EvaRuntimeError on the others.
        """
        found: Any = None
        if self.is_leader:
            found = self.peers.attempt_unless_failed(make)
            raised = self.peers.held_error.error
            if raised is not None:
                found = raised if isinstance(raised, NotConvergedError) else describe_error(raised)
            del raised  # else a reference cycle: its traceback refers to this frame
        found = self._channel.broadcast_object(found)
        if isinstance(found, NotConvergedError):  # every process raises it as its own
            self.peers.held_error.error, found = self.peers.held_error.error or found, str(found)
        self.peers.raise_if_failed(found if isinstance(found, str) else None, 0)
        self.peers.held_error.reraise()  # the error of a process other than the leader
        result: EvaResult = found
        return result

    def _check_same_pass(self, run: CalibrationPass) -> None:
        """Raise EvaValueError, on every process, unless all are asked for the same pass.

        EvaRuntimeError if another process could not begin it.
        """
        request = {name: part for name, part in request_of(run).items() if name != "seed"}
        weights = sample_weights(run)
        failure = self.peers.barrier.arrive(self.peers.is_interrupted)
        if failure is not None:
            self.peers.raise_if_failed(failure[1], failure[0])
        all_requests = self.peers.gather((request, weights))
        check_requests([each for each, _ in all_requests])
        check_weights([each_weights for _, each_weights in all_requests])

    def _forward(
        self, run: CalibrationPass, prepared_batches: Iterator[PreparedBatch]
    ) -> ForwardReport:
        tokens_before = run.tokens
        run.phase = "forward"
        ready = self.peers.attempt_unless_failed(lambda: self._next_ready(run, prepared_batches))
        # The processes of a sharded model wait for each other in the forward pass: either all begin
        # it or none, and an interrupt is handled at its end.
        if run.sharded and not all(self.peers.gather(ready is not None)):
            ready = None
        if ready is not None and run.sharded:
            self._forward_sharded(run, ready)
        elif ready is not None:
            self.peers.attempt(run.forward, ready)
        slots = tuple(
            PendingSlot(tuple(s.members), s.stream.pending, s.stream.skipped, s.stream.dtype)
            for s in run.collector.slots
        )
        keeper = run.checkpoint_keeper
        loader_state = keeper.take_loader_state() if keeper.is_enabled else None
        passes = dict(run.collector.max_calls), run.collector.largest_batch
        tokens = run.tokens - tokens_before
        return ForwardReport(ready is not None, tokens, slots, *passes, loader_state)

    def _next_ready(
        self, run: CalibrationPass, prepared_batches: Iterator[PreparedBatch]
    ) -> Iterable[ReadyPart] | None:
        prepared = next(prepared_batches, None)
        if prepared is None:
            return None
        ready = run.parts_on_device(prepared)
        return list(ready) if run.sharded else ready

    def _forward_sharded(self, run: CalibrationPass, ready: Iterable[ReadyPart]) -> None:
        self._run_sharded(run, partial(run.forward, ready))
        if any(self.peers.gather(bool(run.layers_to_rerun))):  # all or none, as before
            for part in ready:
                self._run_sharded(run, partial(run.rerun_part, part))

    def _run_sharded(self, run: CalibrationPass, step: Callable[[], None]) -> None:
        """Run a sharded model, during which the others wait for this process.

        An error inside the model is raised at once, without telling the others: they would take
        any communication for a collective of the model.
        """
        self.peers.held_error.catch(step)
        if not run.model_call.in_forward:
            return
        _LOGGER.error(
            "process %d %s, in forward pass %d of a sharded model. The others are waiting for it "
            "there, cannot be informed, and will wait until this process ends",
            self._channel.rank,
            self.peers.failure_report(),
            run.forwards + 1,
        )
        self.peers.held_error.reraise()

    def _apply(self, run: CalibrationPass, decision: _Decision) -> _Decision:
        """Apply the leader's decision, on every process."""
        self.peers.raise_if_failed(decision.error, 0)
        run.steps = decision.steps  # errors name it
        if decision.stop:
            return decision
        run.collector.frozen = set(decision.frozen)
        self._exchange.broadcast_bases(run, decision.renewed_cells)
        return decision

    def _decide(
        self,
        run: CalibrationPass,
        merged: Sequence[InputStream],
        reports: Sequence[ForwardReport],
    ) -> _Decision:
        """End the step on the leader, and return its decision."""
        had_batch = any(report.had_batch for report in reports)
        run.tokens += sum(report.tokens for report in reports[1:])
        run.forwards += had_batch and not reports[0].had_batch

        def end_step() -> _Decision:
            # fetch no batch in here: a loader may communicate for it (accelerate's do)
            folded = run.close_step(merged=merged)
            numbers = record_step(run) if folded else None
            done = bool(folded) and run.all_converged()
            renewed = self._exchange.renewed_cells(run, folded)
            run.checkpoint_keeper.leader_basis_layers = self._exchange.in_sync.union(
                *(cell for cell, _, _ in renewed)
            )
            states = [r.loader_state for r in reports if r.loader_state is not None]
            run.checkpoint_keeper.end_forward(run.elapsed(), done, states)
            run.run_callback(numbers)
            stop = not had_batch or done or run.limit_reached()
            return _Decision(done, stop, frozenset(run.collector.frozen), renewed, run.steps)

        decision = self.peers.attempt_unless_failed(end_step)
        return decision or _Decision(error=self.peers.failure_report())
