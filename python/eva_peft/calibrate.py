"""The calibration pass: run the frozen model until every layer's components have converged."""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from eva_kernels.streaming import (
    InputStream,
    Options,
    begin_fold,
    compare_streams,
    leading_similar,
)

from ._peft_compat import LoraConfig, eva_config_of
from .inputs import batches
from .inputs.prepare import Prefetcher, PreparedBatch, Preparer
from .inputs.selectors import selectors_of
from .model.architecture import architecture_of
from .model.checks import check_weights_loaded
from .model.divided import is_sharded, may_stop_early
from .model.targets import Target, find_targets
from .options import CalibrateOptions
from .passes.hooks import InputCollector
from .passes.model_call import ModelCall, ReadyPart
from .passes.model_modes import calibration_mode, exclusive_use
from .passes.out_of_memory import out_of_memory_error
from .passes.planning import log_plan, num_components_of, plan_targets
from .passes.progress import empty_history, log_end, make_progress_bar, record_step
from .passes.ranks import Budget, allocate
from .passes.verdict import check_outcome
from .processes.data_parallel import Processes, processes_of, reporting_start_failures
from .results.collect import collect_result
from .results.result import EvaResult
from .resume.checkpoint import CheckpointKeeper
from .surroundings.devices import device_of
from .surroundings.interrupts import run_to_completion
from .surroundings.memory import PeakMemory, is_out_of_memory
from .surroundings.random_state import preserved_random_state

__all__ = ["CalibrationPass", "call_with_pass", "run_pass"]

P = TypeVar("P", bound="CalibrationPass")
T = TypeVar("T")


def run_pass(
    model: nn.Module, loader: Iterable[Any], config: LoraConfig, options: CalibrateOptions
) -> EvaResult:
    """Compute EVA's components and ranks for a model; changes no weights.

    Args:
        model: a PeftModel or a base model, without DDP or compile wrappers.
        loader: any iterable of batches.
        config: the LoRA config; its ``eva_config`` gives rho, tau and the label mask.
        options: see :class:`CalibrateOptions`.

    Raises:
        EvaValueError: no layer found, no batch, or a layer input of the wrong width.
        NonFiniteError: a layer input holds NaN or infinity.
        NotConvergedError: with ``on_not_converged="raise"``.
        OutOfMemoryError: memory ran out.
        EvaRuntimeError: another process of the group failed, and reports the error; or another pass
            is running on the model.
    """
    processes = processes_of(model, options.group)
    with reporting_start_failures(processes):
        return call_with_pass(
            CalibrationPass, model, config, options, processes, lambda run: run.run(loader)
        )


def call_with_pass(
    pass_class: type[P],
    model: nn.Module,
    config: LoraConfig,
    options: CalibrateOptions,
    processes: Processes | None,
    function: Callable[[P], T],
) -> T:
    """Call a function of a new pass, with the state of model and process set up and restored.

    Args:
        pass_class: class of the pass.
        model, config, options: see :func:`run_pass`.
        processes: those that share the pass, if there are several.
        function: function of the pass.
    """
    check_weights_loaded(model)
    targets = find_targets(model, config, options.adapter_name)
    with (
        exclusive_use(model),
        preserved_random_state(),
        # shared inputs are recognised by tensor versions, which inference mode does not count
        torch.inference_mode(False),
        torch.no_grad(),
        calibration_mode(model),
    ):
        run = pass_class(model, config, options, targets, processes)
        try:
            return function(run)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory_error(run, error) from error


class CalibrationPass:
    """One pass over the data.

    Args:
        model, config, options: see :func:`run_pass`.
        targets: the layers to initialise.
        processes: those that share the pass, if there are several.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoraConfig,
        options: CalibrateOptions,
        targets: list[Target],
        processes: Processes | None,
    ) -> None:
        self.processes = processes
        self.model, self.config, self.options, self.targets = model, config, options, targets
        self.eva = eva_config_of(config)
        self.plan = plan_targets(model, targets, self.eva.rho, options)
        self.device = device_of(model) or torch.device("cpu")  # inputs go there
        self.sharded = is_sharded(model)
        self.architecture = architecture_of(model)
        self.forwards = self.steps = self.tokens = 0
        self.phase = "forward"
        self.layers_to_rerun: set[int] = set()  # layers for which the batch must be run again
        self.batch_shape: tuple[int, int] | None = None
        self.seconds = dict.fromkeys(("forward", "accumulate", "fold", "check", "total"), 0.0)
        self.ranks: dict[int, int] = {}
        self.budget: Budget | None = None
        self.budget_layers: tuple[int, ...] = ()  # the layers that share it
        self.history = empty_history()
        self.skipped_tokens = 0  # skipped tokens, maximum over the layers; set at the end
        # all processes of a sharded model must run equally many parts, whatever their samples
        self.preparer = Preparer(
            model, options, config, self.architecture, self.device, split_by_length=not self.sharded
        )
        selectors = selectors_of(targets, options)
        # The parts hold weak references to the pass: a cycle would keep its state on the device
        # until garbage collection, maybe long after the adapters are written and training began.
        weak_self = weakref.proxy(self)
        make_stream = functools.partial(type(self).make_stream, weak_self)
        self.collector = InputCollector(targets, make_stream, selectors, self.sharded)
        stop_early = may_stop_early(model, options.early_exit, self.sharded)
        self.model_call = ModelCall(
            model, options, config, self.architecture, self.collector, self.preparer, stop_early
        )
        self.checkpoint_keeper = CheckpointKeeper(weak_self)

    def run(self, loader: Iterable[Any]) -> EvaResult:
        """Run until converged or at a limit, and return the result."""
        self.start_time = time.perf_counter()
        self.checkpoint_keeper.open()
        self.start_time -= self.checkpoint_keeper.elapsed_seconds
        processes = self.processes
        with nullcontext() if processes is None else processes.peers.interrupts:
            return self._run(loader)

    def _run(self, loader: Iterable[Any]) -> EvaResult:
        memory, processes = PeakMemory(self.device), self.processes
        self.bar = make_progress_bar(self)
        if self.is_leader:
            log_plan(self.model, self.targets, self.eva.rho, self.options, self.device)
        try:
            with self.collector, memory:
                if processes is not None:
                    all_converged = processes.run_batches(self, loader)
                else:
                    with self.checkpoint_keeper:
                        all_converged = self._run_batches(loader)
                    self.fold_pending()
        finally:
            # again: Ctrl-C may come just as the block is exited
            run_to_completion(self.collector.remove)
            self.bar.close()
        if processes is not None:
            return processes.leader_result(lambda: self._build_result(all_converged, memory))
        return self._build_result(all_converged, memory)

    def fold_pending(self) -> None:
        """Fold what is pending at the end of the pass, even less than a step."""
        if self.close_step(final=True):
            self.run_callback(record_step(self))

    def _build_result(self, all_converged: bool, memory: PeakMemory) -> EvaResult:
        self.skipped_tokens = max((s.stream.skipped for s in self.collector.slots), default=0)
        self.collector.drop_empty_slots()
        self.seconds["total"] = self.elapsed()
        self.seconds["forward"] -= self.seconds["accumulate"]
        log_end(self)
        check_outcome(self, all_converged)
        return collect_result(self, memory.peak_bytes)

    def _run_batches(self, loader: Iterable[Any]) -> bool:
        keeper = self.checkpoint_keeper
        if keeper.all_converged or (self.forwards and self.limit_reached()):
            return keeper.all_converged  # resumed from a checkpoint of a finished pass
        all_batches = batches.iterate(
            loader, lambda: self.tokens > 0, keeper.begin_epoch, keeper.on_batch
        )
        # closed immediately, so that a loader's workers end before a traceback is released
        with (
            closing(keeper.skip_seen(all_batches)) as stream,
            closing(Prefetcher(map(self.prepare, stream))) as ahead,
        ):
            for prepared in ahead:
                keeper.begin_forward()
                self.forward(self.parts_on_device(prepared))
                del prepared
                folded = self.close_step(ahead=None if self.limit_reached() else ahead)
                step_record = record_step(self) if folded else None
                self.phase = "forward"  # of the next batch, whose preparation may fail
                all_converged = step_record is not None and self.all_converged()
                keeper.end_forward(self.elapsed(), all_converged)
                self.run_callback(step_record)
                if all_converged:
                    return True
                if self.limit_reached():
                    return False
        return False

    @property
    def is_leader(self) -> bool:
        """Tell whether this process has the result, and reports on the pass."""
        return self.processes is None or self.processes.is_leader

    def elapsed(self) -> float:
        """Return the running time of the pass in seconds, without breaks before it was resumed."""
        return time.perf_counter() - self.start_time

    def limit_reached(self) -> bool:
        """Tell whether a limit of the options was reached."""
        options = self.options
        return (
            self.forwards >= options.max_steps
            or (options.max_tokens is not None and self.tokens >= options.max_tokens)
            or (options.max_seconds is not None and self.elapsed() >= options.max_seconds)
        )

    def prefetch(self, ahead: Prefetcher[PreparedBatch]) -> None:
        """Prepare the next batch, while the device is busy.

        Not with a checkpoint, which stores the random state before the loader makes that batch.
        """
        if self.options.checkpoint is None:
            begin = time.perf_counter()
            ahead.fetch()
            self.seconds["fold"] -= time.perf_counter() - begin

    def prepare(self, batch: Any) -> PreparedBatch:
        """Prepare a batch for the model."""
        begin = time.perf_counter()
        prepared = self.preparer.prepare(batch, self.forwards)
        self.seconds["forward"] += time.perf_counter() - begin
        return prepared

    def parts_on_device(self, prepared: PreparedBatch) -> Iterator[ReadyPart]:
        """Yield the parts of a batch, each moved to the device only when requested."""
        for part, mask in zip(prepared.parts, prepared.masks, strict=True):
            self.batch_shape = batches.shape_of(part)
            by_default = self.options.forward_fn is None
            if by_default and batches.is_empty(part) and not self.sharded:
                continue  # many models would fail; processes of a sharded one must stay in step
            # no variable, which would keep it alive
            yield self.model_call.move_to_device(part, mask, self.device)

    def forward(self, parts: Iterable[ReadyPart]) -> None:
        """Run a batch through the model, whose hooks accumulate."""
        begin = time.perf_counter()
        seconds_before = self.collector.seconds
        for part in parts:
            self.collector.step = self.steps
            self.model_call.run(part, self.forwards)
            self.layers_to_rerun = self.collector.end_forward()
            self.tokens += self.collector.tokens
            if self.layers_to_rerun and (self.processes is None or not self.sharded):
                self.rerun_part(part)
            del part  # not kept while the next one is moved
        self.forwards += 1
        self.seconds["forward"] += time.perf_counter() - begin
        self.seconds["accumulate"] += self.collector.seconds - seconds_before

    def rerun_part(self, part: ReadyPart) -> None:
        """Run a part of a batch again, for the layers in :attr:`layers_to_rerun` only, if any.

        All processes of a sharded model do so together.
        """
        tokens_before = self.collector.tokens
        self.collector.restrict_to(self.layers_to_rerun)
        self.model_call.run(part, self.forwards)
        self.collector.end_forward()
        self.tokens += max(self.collector.tokens - tokens_before, 0)

    def make_stream(
        self, target: Target, dtype: torch.dtype, device: torch.device | None = None
    ) -> InputStream:
        """Return a new stream for a layer and its input's dtype, by default on its own device."""
        plan = self.plan[target.in_features]
        device = device or device_of(target.module) or self.device
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        options = Options(
            plan.method,
            self.options.seed,
            self.options.backend,
            self.options.precision,
            self.options.on_nonfinite == "skip",
        )
        size = (target.in_features, plan.components, plan.width)
        return InputStream(*size, device=device, dtype=dtype, options=options)

    def close_step(
        self,
        final: bool = False,
        merged: Sequence[InputStream] = (),
        ahead: Prefetcher[PreparedBatch] | None = None,
    ) -> list[InputStream]:
        """Fold what is due, compare, and allocate ranks; returns the streams that were folded.

        Args:
            final: fold whatever is pending, which is less than a step and makes no layer converge.
            merged: streams that were folded already, by merging those of other processes.
            ahead: the following batches, if another will be needed.
        """
        begin = time.perf_counter()
        self.phase = "fold"
        streams = [slot.stream for slot in self.collector.slots]
        # A step of few tokens rotates components little, even if they are far from converged.
        short = [(s, s.settled) for s in streams] if final else []
        with self.collector.locating_errors():
            fold = begin_fold(streams, final=final)
            if fold.queued and ahead is not None:
                self.prefetch(ahead)
            folded = [*merged, *fold.finish()]
        middle = time.perf_counter()
        self.seconds["fold"] += middle - begin
        if not folded:
            return folded
        self.ranks = allocate(self)
        needed = self._needed_ranks()
        compare_streams(
            folded,
            [needed[id(stream)] for stream in folded],
            tau=self.eva.tau,
            criterion=self.options.criterion,
        )
        for stream, settled in short:
            stream.settled = settled
        self._update_converged(needed)
        self.steps += 1
        self.seconds["check"] += time.perf_counter() - middle
        return folded

    def _needed_ranks(self) -> dict[int, int]:
        """Return the largest rank among the layers of each stream, by the stream's id."""
        slots = self.collector.slots
        return {id(s.stream): max(self.ranks[i] for i in s.members) for s in slots}

    def _update_converged(self, needed: dict[int, int]) -> None:
        """Decide which layers have converged: those whose needed components did, at some step.

        A layer that is given more rank than has converged is reopened. As in PEFT, a layer need not
        pass again at the step at which the last one does; unlike there, it continues to be updated.
        """
        for stream in (slot.stream for slot in self.collector.slots):
            stream.converged = stream.folds > 1 and needed[id(stream)] <= stream.settled
        if self.options.freeze_converged:
            slots = self.collector.slots
            self.collector.frozen = {i for s in slots if s.stream.converged for i in s.members}

    def all_converged(self) -> bool:
        """Tell whether every layer has converged."""
        return all(s.stream.converged for s in self.collector.slots)

    def recheck_with_tau(self) -> bool:
        """Tell whether every layer has converged under another ``tau`` than used before."""
        if not self.ranks:
            return False
        needed = self._needed_ranks()
        for stream in (s.stream for s in self.collector.slots):
            passed = stream.similarity is not None and stream.similarity >= self.eva.tau
            stream.settled = needed[id(stream)] if passed else 0
            if stream.cosines is not None:
                stream.settled = leading_similar(stream.cosines, self.eva.tau)
        self._update_converged(needed)
        return self.all_converged()

    def run_callback(self, step_record: dict[str, Any] | None) -> None:
        """Pass the numbers of a step to the user's callback."""
        if step_record is not None and self.options.callback is not None:
            self.options.callback(step_record)

    @property
    def uncalled(self) -> list[str]:
        """Return the names of the layers without an input so far."""
        return [t.name for i, t in enumerate(self.targets) if i not in self.collector.slot_of]

    @functools.cached_property
    def layer_names(self) -> list[str]:
        """Return the names of the layers, in the order of the similarities of a step."""
        return [target.name for target in self.targets]

    @functools.cached_property
    def max_components(self) -> list[int]:
        """Return the maximum number of components for each layer."""
        return [num_components_of(target, self.eva.rho) for target in self.targets]
