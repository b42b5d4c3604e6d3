"""One pass over the batches of several processes, of which the first leads.

Each process runs its own copy of the model on its own batches. After every forward pass:

1. All report how many tokens wait in which layer, and whether something went wrong.
2. Sums are additive about one basis and mean, so those of layers that all know are added up by the
   leader. Layers that are new were begun by each process from its own tokens: such streams are
   folded where they are, sent to the leader, and merged (once a layer).
3. The leader folds, compares, and decides, as if it were alone.
4. All get the decision, and the new bases and means.

No activation travels. At the end all get the leader's result, bit for bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor, distributed, nn

from eva_kernels.streaming import InputStream, _host, export_stream, fold_streams
from eva_kernels.streaming.parallel import absorb, follow, hand_over, pending_sums

from . import batches
from .cells import (
    Cell,
    Renewal,
    Report,
    Waiting,
    anchors,
    common_cells,
    divide_slots,
    merge_stream,
    renewal,
    slot_for,
)
from .channel import Channel
from .divided import sharded_by
from .errors import (
    EvaRuntimeError,
    EvaTypeError,
    EvaValueError,
    HeldError,
    NotConvergedError,
)
from .fingerprint import check_requests, check_weights, request_of, weights_of
from .interrupts import Interrupts
from .meeting import Meeting
from .options import AUTO
from .prepare import Ahead, Prepared
from .progress import record_step
from .shared_inputs import Slot

if TYPE_CHECKING:
    from .calibrate import CalibrationPass
    from .model_call import Ready
    from .result import EvaResult

__all__ = ["Processes", "beginning", "processes_of"]

P = ParamSpec("P")
T = TypeVar("T")
_LOGGER = logging.getLogger("eva_kernels")


def processes_of(model: nn.Module, group: Any) -> Processes | None:
    """Return the processes of a pass; ``None`` where there is one, or each is for itself.

    Args:
        model: without wrappers.
        group: the option.

    Raises:
        EvaTypeError: ``group`` is no process group.
        EvaValueError: a sharded model in each by itself.
    """
    running = distributed.is_available() and distributed.is_initialized()
    if group is None and running and distributed.get_world_size() > 1:
        kind = sharded_by(model)
        if kind is not None:
            raise EvaValueError(
                f"group=None: the model is sharded by {kind}, whose processes wait for each other "
                "in every forward pass, and each would stop by itself. Leave group out, or give "
                "the group over which the model is sharded"
            )
    if group is None or (group == AUTO and not running):
        return None
    if group == AUTO:
        group = distributed.group.WORLD
    if not (running and isinstance(group, distributed.ProcessGroup)):
        raise EvaTypeError(
            f"group={group!r} must be a torch.distributed process group that this process is in "
            "(of a DeviceMesh: mesh.get_group(name)), or None"
        )
    if distributed.get_world_size(group) < 2:
        return None
    return Processes(group)


@contextmanager
def beginning(processes: Processes | None) -> Iterator[None]:
    """Tell the other processes, if there are any, of what goes wrong in this one before the pass.

    An interrupt goes wrong, too. The pass itself may be in the block.
    """
    try:
        yield
    except BaseException as error:
        if processes is not None and not processes.meeting.over:
            with suppress(RuntimeError):  # they may be gone
                processes.meeting.fail(_told(error))
        raise


@dataclass(frozen=True)
class _Decision:
    """What the leader tells the others after a step.

    Attributes:
        done, stop: every layer has converged; no further step.
        frozen: layers that are no longer accumulated.
        renewed: layers with a new basis, the dtype of their streams, and whether they are exact.
        steps: of the pass so far.
        error: what went wrong.
    """

    done: bool = False
    stop: bool = True
    frozen: frozenset[int] = frozenset()
    renewed: tuple[Renewal, ...] = ()
    steps: int = 0
    error: str | None = None


@dataclass(frozen=True)
class _Position:
    """Where the leader's checkpoint stands, or where one is to be kept.

    Attributes:
        path: of the file; the other processes need not have been told.
        forwards, tokens: of the pass so far.
        first_random, random: see :class:`.checkpoint.CheckpointKeeper`.
        decision: what the last step had come to.
    """

    path: str
    forwards: int
    tokens: int
    first_random: Sequence[Tensor]
    random: Sequence[Tensor]
    decision: _Decision


class Processes:
    """The processes of a group, seen from one of them.

    Args:
        group: of at least two processes.
    """

    def __init__(self, group: Any) -> None:
        self.channel, self.meeting = Channel(group), Meeting(group)
        self.interrupts = Interrupts()  # around the pass; it is told of them between its steps
        self.size, self.leads = self.channel.size, self.channel.leads
        self._known: set[int] = set()  # layers whose basis is the leader's, everywhere
        self._seen = 0  # tokens of all processes
        self._keeps = False  # there is a checkpoint
        self._held = HeldError()  # of this process

    def loop(self, run: CalibrationPass, loader: Iterable[Any]) -> bool:
        """Run batches until the leader says stop; returns whether every layer has converged.

        A loader that ends early leaves its process waiting for the others.

        Raises:
            Exception: the process's own; EvaRuntimeError where another one failed.
        """
        self._agree(run)
        # What "auto" decides depends on the memory of each device.
        run.plan = self.channel.from_leader(run.plan)
        with ExitStack() as stack:
            stream = stack.enter_context(closing(batches.iterate(loader, lambda: self._seen > 0)))
            ahead = stack.enter_context(closing(Ahead(map(run.prepare, stream))))
            stack.enter_context(run.keeper)
            decision = self._begin(run, stream)
            while not decision.stop:
                run.keeper.begin_forward()
                decision = self._step(run, ahead)
            self._try(stack.close)  # the others are told with the result
        if self.leads:  # behind the keeper, whose file is of what waits between two forward passes
            self._try(self._unless_held, run.fold_rest)
        return decision.done

    def _try(self, do: Callable[P, T], *of: P.args, **named: P.kwargs) -> T | None:
        """Do what may fail, or be interrupted, and hold that until the others are told."""

        def interruptible() -> T:
            with self.interrupts.let_through():
                return do(*of, **named)

        return self._held.catch(interruptible)

    def _begin(self, run: CalibrationPass, stream: Iterator[Any]) -> _Decision:
        """Bring all processes to where the leader's checkpoint stands, if there is one."""
        keeper, position = run.keeper, None
        if keeper.path is not None:
            stop = keeper.done or (run.forwards > 0 and run.limit_reached())
            slots = [slot for slot in run.collector.slots if keeper.known.issuperset(slot.members)]
            renewed = tuple(map(renewal, slots))
            frozen = frozenset(run.collector.frozen)
            decision = _Decision(keeper.done, stop, frozen, renewed, run.steps)
            states = keeper.first_random, keeper.random
            position = _Position(str(keeper.path), run.forwards, run.tokens, *states, decision)
        position = self.channel.from_leader(position)
        self._keeps = position is not None
        if position is None:
            return _Decision(stop=False)
        self._seen = position.tokens  # without any, a loader is not begun anew at its end
        if not position.forwards:
            keeper.first_random = self._of_all(torch.get_rng_state())
        elif not position.decision.stop:
            self._skip(run, stream, position)
        return self._follow(run, position.decision)

    def _interrupted(self) -> bool:
        self._try(lambda: None)  # whoever handles interrupts may not raise anything
        return self._held.error is not None

    def _unless_held(self, do: Callable[[], T]) -> T:
        self._held.release()  # to be held again by who tries this
        return do()

    def _skip(self, run: CalibrationPass, stream: Iterator[Any], position: _Position) -> None:
        """Pass over the batches that the checkpoint has seen."""
        rank = self.channel.rank
        torch.set_rng_state(position.first_random[rank])
        skipped = self._try(lambda: sum(1 for _ in islice(stream, position.forwards))) or 0
        torch.set_rng_state(position.random[rank])
        if not self.leads:
            run.forwards = skipped
        most = max(self._of_all(skipped))
        if most < position.forwards:
            raise EvaValueError(
                f"the checkpoint {position.path} has seen {position.forwards} batches, "
                f"but all loaders ended after {most}: they must yield the same batches again"
            )

    def _step(self, run: CalibrationPass, ahead: Ahead[Prepared]) -> _Decision:
        reports = self._of_all(self._forward(run, ahead))
        self._seen += sum(report.tokens for report in reports)
        cells = common_cells(reports)
        divide_slots(run.collector, cells)
        merged = self._collect(run, reports, cells)
        own = None
        if self.leads:
            own = self._lead(run, merged, reports, ahead)
        elif not (run.limit_reached() or _host.reads_are_free(run.device)):
            self._try(run.fetch, ahead)  # while the leader's device is at work
        return self._follow(run, self.channel.from_leader(own))

    def result(self, make: Callable[[], EvaResult]) -> EvaResult:
        """Return what the leader makes, on every process.

        Raises:
            NotConvergedError: on all processes.
            Exception: another one of the leader's; EvaRuntimeError on the others.
        """
        found: Any = None
        if self.leads:
            found = self._try(self._unless_held, make)
            raised = self._held.error
            if raised is not None:
                found = raised if isinstance(raised, NotConvergedError) else _told(raised)
            del raised  # or this frame, which the error knows, would know it
        found = self.channel.from_leader(found)
        if isinstance(found, NotConvergedError):  # every process raises it as its own
            self._held.error, found = self._held.error or found, str(found)
        self._raise_if(found if isinstance(found, str) else None, 0)
        self._held.release()  # of one that does not lead, at its end
        result: EvaResult = found
        return result

    def _agree(self, run: CalibrationPass) -> None:
        """Raise EvaValueError, on every process, unless all are asked for the same pass.

        EvaRuntimeError where another process could not begin it.
        """
        own = {name: part for name, part in request_of(run).items() if name != "seed"}
        failed = self.meeting.come(self._interrupted)
        if failed is not None:
            self._raise_if(failed[1], failed[0])
        asked = self._of_all(own)
        check_requests(asked)
        check_weights(self._of_all(weights_of(run)))

    def _forward(self, run: CalibrationPass, ahead: Iterator[Prepared]) -> Report:
        before, ran = run.tokens, False
        run.phase = "forward"
        ready = self._try(self._unless_held, lambda: self._next_ready(run, ahead))
        # The processes of a sharded model wait for each other in the forward pass: all begin it, or
        # none, and an interrupt is heard at its end.
        if run.sharded and not all(self._of_all(ready is not None)):
            ready = None
        if ready is not None:
            attempt = self._held.catch if run.sharded else self._try
            attempt(partial(run.forward, ready))
            ran = self._held.error is None
            if run.sharded:
                self._end_in_shards(run, ready)
        slots = tuple(
            Waiting(tuple(s.members), s.stream.pending, s.stream.skipped, s.stream.dtype)
            for s in run.collector.slots
            if s.members
        )
        random = torch.get_rng_state() if self._keeps else None
        return Report(ran, run.tokens - before, slots, random)

    def _next_ready(
        self, run: CalibrationPass, ahead: Iterator[Prepared]
    ) -> Iterable[Ready] | None:
        prepared = next(ahead, None)
        if prepared is None:
            return None
        ready = run.ready(prepared)
        return list(ready) if run.sharded else ready

    def _end_in_shards(self, run: CalibrationPass, ready: Iterable[Ready]) -> None:
        if run.call.inside:
            self._leave(run)
        if any(self._of_all(bool(run.again))):  # all or none, as before
            for part in ready:
                self._held.catch(partial(run.forward_again, part))
            if run.call.inside:
                self._leave(run)

    def _leave(self, run: CalibrationPass) -> None:
        """Raise what a sharded model has raised, without the others: they wait for it in there.

        What is exchanged with them now would be taken for a part of the model.
        """
        error = self._held.error
        assert error is not None
        _LOGGER.error(
            "process %d %s, in forward pass %d of a sharded model, in which the others wait for "
            "it: they cannot be told, and go on waiting until it ends",
            self.channel.rank,
            _told(error),
            run.forwards + 1,
        )
        del error
        self._held.release()

    def _of_all(self, own: T) -> list[T]:
        """Return what each process gives, by rank; raise if something has gone wrong in one."""
        error = self._held.error
        every = self.channel.of_all((own, None if error is None else _told(error)))
        del error  # or this frame, which the error knows, would know it
        for rank, (_, told) in enumerate(every):
            self._raise_if(told, rank)
        return [thing for thing, _ in every]

    def _raise_if(self, error: str | None, rank: int) -> None:
        if error is None:
            return
        self._held.release()
        raise EvaRuntimeError(f"process {rank} {error}")

    def _collect(
        self, run: CalibrationPass, reports: Sequence[Report], cells: Sequence[Cell]
    ) -> list[InputStream]:
        """Bring all that waits to the leader; returns the streams that were merged there."""
        slot_of = run.collector.slot_of
        waiting = [cell for cell in cells if any(report.pending(cell) for report in reports)]
        known = [cell for cell in waiting if cell[0] in self._known]
        streams = [slot_of[cell[0]].stream for cell in known]
        self.channel.add_up([part for stream in streams for part in pending_sums(stream)])
        for cell, stream in zip(known, streams, strict=True):
            if not self.leads:
                hand_over(stream)
                continue
            others = [r.of_layer[cell[0]] for r in reports[1:] if cell[0] in r.of_layer]
            absorb(stream, sum(w.pending for w in others), sum(w.skipped for w in others))
        fresh = [cell for cell in waiting if cell[0] not in self._known]
        return self._merge(run, reports, fresh) if fresh else []

    def _merge(
        self, run: CalibrationPass, reports: Sequence[Report], fresh: Sequence[Cell]
    ) -> list[InputStream]:
        merged: dict[int, InputStream] = {}
        for rank in range(1, self.size):
            own = [cell for cell in fresh if reports[rank].pending(cell)]
            if not own:
                continue
            if self.channel.rank == rank:
                slots = [run.collector.slot_of[cell[0]] for cell in own]
                self.channel.send(self._folded(run, slots))
            elif self.leads:
                parcel = self.channel.receive(rank)
                # the others wait for the decision, which tells them
                streams = self._try(self._unpacked, run, rank, own, parcel) or []
                merged |= {id(stream): stream for stream in streams}
        return list(merged.values())

    def _unpacked(
        self, run: CalibrationPass, rank: int, cells: Sequence[Cell], parcel: Any
    ) -> list[InputStream]:
        """Take the streams that another process has sent into those of this one, the leader."""
        self._raise_if(parcel if isinstance(parcel, str) else None, rank)
        pairs = zip(cells, parcel, strict=True)
        return [merge_stream(run, cell, *state) for cell, state in pairs]

    def _folded(self, run: CalibrationPass, slots: Sequence[Slot]) -> Any:
        """Return the streams of slots, folded, as plain data on the host; or what went wrong."""

        def make() -> list[Any]:
            fold_streams([slot.stream for slot in slots], final=True)
            states = [export_stream(slot.stream) for slot in slots]
            return [(record, {k: t.cpu() for k, t in parts.items()}) for record, parts in states]

        found = self._try(make)
        return found if self._held.error is None else _told(self._held.error)

    def _follow(self, run: CalibrationPass, decision: _Decision) -> _Decision:
        """Do what the leader has decided, on every process."""
        self._raise_if(decision.error, 0)
        run.steps = decision.steps  # which errors name
        if decision.stop:
            return decision
        run.collector.frozen = set(decision.frozen)
        self._share(run, decision)
        return decision

    def _lead(
        self,
        run: CalibrationPass,
        merged: Sequence[InputStream],
        reports: Sequence[Report],
        ahead: Ahead[Prepared],
    ) -> _Decision:
        """End the step, and say what came of it."""
        ran = any(report.ran for report in reports)
        run.tokens += sum(report.tokens for report in reports[1:])
        run.forwards += ran and not reports[0].ran
        over = run.limit_reached()

        def decide() -> _Decision:
            folded = run.close_step(merged=merged, ahead=None if over else ahead)
            numbers = record_step(run) if folded else None
            done = bool(folded) and run.converged()
            renewed = self._renewed(run, folded)
            run.keeper.known = self._known.union(*(cell for cell, _, _ in renewed))
            random = [report.random for report in reports if report.random is not None]
            run.keeper.end_forward(run.elapsed(), done, random)
            run.call_back(numbers)
            stop = not ran or done or run.limit_reached()
            return _Decision(done, stop, frozenset(run.collector.frozen), renewed, run.steps)

        decision = self._try(self._unless_held, decide)
        if decision is None:
            assert self._held.error is not None
            return _Decision(error=_told(self._held.error))
        return decision

    def _renewed(self, run: CalibrationPass, folded: Sequence[InputStream]) -> tuple[Renewal, ...]:
        new = {id(stream) for stream in folded}
        renewals = [renewal(slot) for slot in run.collector.slots if id(slot.stream) in new]
        # The pivot of an exact stream, about which others accumulate, never changes.
        return tuple(r for r in renewals if not (r[2] and r[0][0] in self._known))

    def _share(self, run: CalibrationPass, decision: _Decision) -> None:
        """Bring the new bases and means from the leader to all."""
        slots = [slot_for(run, cell, dtype) for cell, dtype, _ in decision.renewed]
        exact = [gram for _, _, gram in decision.renewed]
        parts = [anchors(s.stream, gram) for s, gram in zip(slots, exact, strict=True)]
        self.channel.send_out([part for own in parts for part in own])
        for (cell, _, _), slot, own in zip(decision.renewed, slots, parts, strict=True):
            self._known |= set(cell)
            if not self.leads:
                basis, mean, *pivot = own
                follow(slot.stream, basis, mean, pivot[0] if pivot else None)


def _told(error: BaseException) -> str:
    if isinstance(error, Exception):
        return f"failed: {type(error).__name__}: {error}"
    return f"was interrupted ({type(error).__name__})"
