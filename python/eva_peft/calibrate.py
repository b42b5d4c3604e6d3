"""The calibration pass: run the frozen model until every layer's components have converged."""

from __future__ import annotations

import functools
import logging
import math
import sys
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from eva_kernels.streaming import (
    InputStream,
    NonFiniteStepError,
    Options,
    begin_fold,
    compare_streams,
    leading_similar,
)

from . import arguments, batches
from ._peft_compat import LoraConfig, eva_of
from .architecture import architecture_of
from .called_with import CalledWith
from .checkpoint import CheckpointKeeper
from .checks import check_loaded
from .collect import collect_result
from .data_parallel import Processes, beginning, processes_of
from .divided import is_sharded, may_stop_early
from .hooks import InputCollector, StopForward
from .interrupts import completed
from .memory import PeakMemory
from .options import AUTO, CalibrateOptions
from .out_of_memory import explained, is_out_of_memory
from .planning import components_of, log_plan, plan_targets
from .prepare import Ahead, Prepared, Preparer
from .ranks import Budget, allocate
from .result import EvaResult
from .selectors import selectors_of
from .targets import Target, find_targets
from .token_mask import TokenMask
from .verdict import check_answer
from .world import claimed, quiet_model, random_state_kept

__all__ = ["CalibrationPass", "run_pass"]

_LOGGER = logging.getLogger("eva_kernels")

# A part of a batch on the device, which tokens count, and what users' functions get of it.
Ready = tuple[Any, TokenMask, Any]


def run_pass(
    model: nn.Module, loader: Iterable[Any], config: LoraConfig, options: CalibrateOptions
) -> EvaResult:
    """Compute EVA's components and ranks for a model; touches no weight.

    Args:
        model: a PeftModel or a base model, without DDP or compile wrappers.
        loader: any iterable of batches.
        config: the LoRA config; its ``eva_config`` gives rho, tau and the label mask.
        options: see :class:`CalibrateOptions`.

    Raises:
        EvaValueError: no layer found, no batch, a layer input of another width.
        NonFiniteError: a layer input holds NaN or infinity.
        NotConvergedError: with ``on_not_converged="raise"``.
        OutOfMemoryError: memory ran out.
        EvaRuntimeError: another process of the group failed; it has the error. Or another pass is
            running on the model.
    """
    processes = processes_of(model, options.group)
    # Shared inputs are told apart by tensor versions, which inference mode does not count.
    no_grad = torch.inference_mode(False), torch.no_grad()
    with beginning(processes):
        check_loaded(model)
        targets = find_targets(model, config, options.adapter_name)
        with claimed(model), random_state_kept(), no_grad[0], no_grad[1], quiet_model(model):
            run = CalibrationPass(model, config, options, targets, processes)
            try:
                return run.run(loader)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise explained(run, error) from error


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
        processes: Processes | None = None,
    ) -> None:
        self.processes = processes
        self.model, self.config, self.options, self.targets = model, config, options, targets
        self.eva = eva_of(config)
        self.plan = plan_targets(model, targets, self.eva.rho, options)
        self.device = batches.model_device(model)
        self.sharded = is_sharded(model)
        self._may_stop_early = may_stop_early(model, options.early_exit, self.sharded)
        self.architecture = architecture_of(model)
        self.forwards = self.steps = self.tokens = 0
        self.phase = "forward"
        self.inside = False  # the model is running, or has failed
        self.again: set[int] = set()  # layers for which the batch is to be run again
        self.batch_shape: tuple[int, int] | None = None
        self.seconds = dict.fromkeys(("forward", "accumulate", "fold", "check", "total"), 0.0)
        self.ranks: dict[int, int] = {}
        self.budget: Budget | None = None
        self.budget_of: tuple[int, ...] = ()  # the layers that share it
        self.history: dict[str, list[Any]] = {
            key: [] for key in ("step", "forwards", "tokens", "seconds", "converged", "similarity")
        }
        self._default_forward = options.forward_fn is None
        self.skipped = 0  # tokens, most of any layer; known at the end
        # the processes of a sharded model run as many parts, whatever the lengths of samples
        self.preparer = Preparer(
            model, options, config, self.architecture, self.device, divide=not self.sharded
        )
        selectors = selectors_of(targets, options)
        # Its parts know the pass weakly: in a cycle its state would stay on the device until Python
        # looks for cycles, maybe long after the adapters are written and training has begun.
        itself = weakref.proxy(self)
        make_stream = functools.partial(CalibrationPass.make_stream, itself)
        self.collector = InputCollector(targets, make_stream, selectors, self.sharded)
        self.keeper = CheckpointKeeper(itself)

    def run(self, loader: Iterable[Any]) -> EvaResult:
        """Run until converged or at a limit, and return the result."""
        self.keeper.open(time.perf_counter())
        together = self.processes
        with nullcontext() if together is None else together.interrupts:
            return self._run(loader, together)

    def _run(self, loader: Iterable[Any], together: Processes | None) -> EvaResult:
        begin = time.perf_counter() - self.keeper.elapsed
        memory = PeakMemory(self.device)
        leads = together is None or together.leads
        bar = tqdm(
            total=len(self.targets),
            desc="EVA" if together is None else f"EVA, {together.size} processes",
            unit="layer",
            leave=False,
            disable=not (self.options.progress and leads),
            file=sys.stderr,
        )
        if leads:
            log_plan(self.model, self.targets, self.eva.rho, self.options, self.device)
        try:
            with self.collector, memory:
                if together is not None:
                    done = together.loop(self, loader, begin, bar)
                else:
                    with self.keeper:
                        done = self._loop(loader, begin, bar)
                    self.fold_rest(begin, bar)
        finally:
            completed(self.collector.remove)  # again: Ctrl-C may come right as the block is left
            bar.close()
        if together is not None:
            return together.result(lambda: self._result(done, begin, memory))
        return self._result(done, begin, memory)

    def fold_rest(self, begin: float, bar: Any) -> None:
        """Fold what is pending at the end of the pass, however little."""
        if self.close_step(final=True):
            self.call_back(self.record(begin, bar))

    def _result(self, done: bool, begin: float, memory: PeakMemory) -> EvaResult:
        self.skipped = max((s.stream.skipped for s in self.collector.slots), default=0)
        self.collector.drop_empty()
        self.seconds["total"] = time.perf_counter() - begin
        self.seconds["forward"] -= self.seconds["accumulate"]
        _LOGGER.info(
            "calibration pass ends: %d steps, %d forward passes, %d tokens, %.2f s, %d of %d "
            "layers converged",
            self.steps,
            self.forwards,
            self.tokens,
            self.seconds["total"],
            sum(slot.stream.converged for slot in self.collector.slot_of.values()),
            len(self.targets),
        )
        check_answer(self, done)
        return collect_result(self, memory.peak_bytes)

    def _loop(self, loader: Iterable[Any], begin: float, bar: Any) -> bool:
        keeper = self.keeper
        if keeper.done or (self.forwards and self.limit_reached(keeper.elapsed)):
            return keeper.done  # resumed where the pass had ended
        every = batches.iterate(loader, lambda: self.tokens > 0)
        # closed at once, so that the workers of a loader do not wait for a traceback to go
        with (
            closing(keeper.remaining(every)) as stream,
            closing(Ahead(map(self.prepare, stream))) as ahead,
        ):
            for prepared in ahead:
                keeper.begin_forward()
                self.forward(self.ready(prepared))
                del prepared
                over = self.limit_reached(time.perf_counter() - begin)
                folded = self.close_step(ahead=None if over else ahead)
                numbers = self.record(begin, bar) if folded else None
                self.phase = "forward"  # of the next batch, which may fail as it is made ready
                done = numbers is not None and self.converged()
                keeper.end_forward(time.perf_counter(), done)
                self.call_back(numbers)
                if done:
                    return True
                if self.limit_reached(time.perf_counter() - begin):
                    return False
        return False

    def limit_reached(self, elapsed: float) -> bool:
        """Tell whether a limit of the options was reached, ``elapsed`` seconds after the begin."""
        options = self.options
        return (
            self.forwards >= options.max_steps
            or (options.max_tokens is not None and self.tokens >= options.max_tokens)
            or (options.max_seconds is not None and elapsed >= options.max_seconds)
        )

    def fetch(self, ahead: Ahead[Prepared]) -> None:
        """Make the next batch ready, while the device is at work.

        Not with a checkpoint, which keeps the random state from which a loader makes that batch.
        """
        if self.options.checkpoint is None:
            begin = time.perf_counter()
            ahead.fetch()
            self.seconds["fold"] -= time.perf_counter() - begin

    def prepare(self, batch: Any) -> Prepared:
        """Make a batch ready for the model."""
        begin = time.perf_counter()
        prepared = self.preparer.prepare(batch, self.forwards)
        self.seconds["forward"] += time.perf_counter() - begin
        return prepared

    def ready(self, prepared: Prepared) -> Iterator[Ready]:
        """Bring the parts of a batch to the device, each when it is asked for."""
        for part, mask in zip(prepared.parts, prepared.masks, strict=True):
            self.batch_shape = batches.shape_of(part)
            if self._default_forward and batches.is_empty(part) and not self.sharded:
                continue  # many a model would fail; the processes of a sharded one wait for it
            yield self._on_device(part, mask)  # without a name, which would keep it

    def _on_device(self, part: Any, mask: TokenMask) -> Ready:
        batch = batches.to_device(part, self.device)
        return batch, mask, self._model_input(batch, mask)

    def forward(self, ready: Iterable[Ready]) -> None:
        """Run a batch through the model, whose hooks accumulate."""
        begin = time.perf_counter()
        self.phase = "forward"
        before = self.collector.seconds
        for part in ready:
            self.collector.tokens, self.collector.step = 0, self.steps
            self._run_model(*part)
            self.again = self.collector.end_forward()
            self.tokens += self.collector.tokens
            if self.again and (self.processes is None or not self.sharded):
                self.forward_again(part)
            del part  # none is kept while the next one is brought
        self.forwards += 1
        self.seconds["forward"] += time.perf_counter() - begin
        self.seconds["accumulate"] += self.collector.seconds - before

    def forward_again(self, part: Ready) -> None:
        """Run a part of a batch for the layers alone that the forward pass has left open, if any.

        The processes of a sharded model do so together.
        """
        before = self.collector.tokens
        self.collector.only(self.again)
        self._run_model(*part)
        self.collector.end_forward()
        self.tokens += self.collector.tokens - before

    def _model_input(self, batch: Any, mask: TokenMask) -> Any:
        prepare = self.options.prepare_model_inputs_fn
        if prepare == AUTO and mask.main is not None and any(self.collector.selectors):
            # what PEFT's default hands to users' functions: (tokens, 2) of (sample, position)
            return mask.main.nonzero().to(self.device)
        if prepare == AUTO:
            return batch
        return batch if prepare is None else prepare(deepcopy(batch), self.config)

    def _run_model(self, batch: Any, mask: TokenMask, model_input: Any) -> None:
        self.collector.begin_forward(mask, model_input, self._may_stop_early, self.batch_shape)
        self.inside = True  # and still so where it fails
        routed = self.collector.routed if self.collector.routed.needed else nullcontext()
        with suppress(StopForward), routed:
            if self.options.forward_fn is not None:
                with self._called_with(batch, mask):
                    self.options.forward_fn(self.model, batch)
            else:
                self._call_model(batch)
        self.inside = False

    def _call_model(self, batch: Any) -> None:
        args, kwargs = arguments.model_arguments(batch)
        kwargs = arguments.without_text(kwargs, self.model)
        kwargs = arguments.without_labels(kwargs, self.architecture)
        try:
            self.model(*args, **kwargs)
        except TypeError:  # looked into now, since signatures take long
            if arguments.can_be_called(args, kwargs, self.model):
                raise
            self.model(arguments.as_one_argument(batch, self.model))
        except Exception as error:
            arguments.check_known(kwargs, self.model, error)
            raise

    def _called_with(self, batch: Any, mask: TokenMask) -> AbstractContextManager[object]:
        if not self.preparer.plain_masks:
            return nullcontext()

        def make_mask(named: Mapping[str, Any]) -> TokenMask:
            return self.preparer.drawn_mask_of(named, self.forwards)

        use_mask = self.collector.use_mask
        return CalledWith(self.model, batch, mask, make_mask, use_mask).looking()

    def make_stream(self, target: Target, x: Tensor) -> InputStream:
        """Return a new stream for a layer whose input is like ``x``."""
        plan = self.plan[target.in_features]
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        options = Options(
            plan.method,
            self.options.seed,
            self.options.backend,
            self.options.precision,
            self.options.on_nonfinite == "skip",
        )
        size = (target.in_features, plan.components, plan.width)
        return InputStream(*size, device=x.device, dtype=dtype, options=options)

    def close_step(
        self,
        final: bool = False,
        merged: Sequence[InputStream] = (),
        ahead: Ahead[Prepared] | None = None,
    ) -> list[InputStream]:
        """Fold what is due, compare, and allocate ranks; returns the streams that were renewed.

        Args:
            final: fold whatever is pending; what is less than a step makes no layer converge.
            merged: streams that were renewed already, by those of other processes.
            ahead: the batches to come, if one will be needed.
        """
        begin = time.perf_counter()
        self.phase = "fold"
        slots = self.collector.slots
        streams = [slot.stream for slot in slots]
        # A step of few tokens turns little, however far the components are from settled.
        short = [(s, s.settled) for s in streams if final and s.pending < s.width]
        try:
            fold = begin_fold(streams, final=final)
            if fold.queued and ahead is not None:
                self.fetch(ahead)
            folded = [*merged, *fold.finish()]
        except NonFiniteStepError as error:
            raise self.collector.explained(error) from None
        middle = time.perf_counter()
        self.seconds["fold"] += middle - begin
        if not folded:
            return folded
        self.ranks = allocate(self)
        needed = {id(s.stream): max(self.ranks[i] for i in s.members) for s in slots}
        compare_streams(
            folded,
            [needed[id(stream)] for stream in folded],
            tau=self.eva.tau,
            criterion=self.options.criterion,
        )
        for stream, settled in short:
            stream.settled = settled
        self._recheck(needed)
        self.steps += 1
        self.seconds["check"] += time.perf_counter() - middle
        return folded

    def _recheck(self, needed: dict[int, int]) -> None:
        """Decide which layers have converged: those whose needed components did, at some step.

        A layer that is given more rank than had converged is open again. As in PEFT, a layer need
        not pass again at the step at which the last one does; unlike there, it goes on learning.
        """
        for stream in (slot.stream for slot in self.collector.slots):
            stream.converged = stream.folds > 1 and needed[id(stream)] <= stream.settled
        if self.options.freeze_converged:
            slots = self.collector.slots
            self.collector.frozen = {i for s in slots if s.stream.converged for i in s.members}

    def converged(self) -> bool:
        """Tell whether every layer has converged."""
        return all(s.stream.converged for s in self.collector.slots)

    def judge_again(self) -> bool:
        """Tell whether every layer has converged under a ``tau`` that was not used before."""
        if not self.ranks:
            return False
        slots = self.collector.slots
        needed = {id(s.stream): max(self.ranks[i] for i in s.members) for s in slots}
        for stream in (s.stream for s in slots):
            passed = stream.similarity is not None and stream.similarity >= self.eva.tau
            stream.settled = needed[id(stream)] if passed else 0
            if stream.cosines is not None:
                stream.settled = leading_similar(stream.cosines, self.eva.tau)
        self._recheck(needed)
        return self.converged()

    def record(self, begin: float, bar: Any) -> dict[str, Any]:
        """Keep the numbers of a step in the history, and show them.

        Returns:
            What the user's callback gets.
        """
        streams = {i: slot.stream for i, slot in self.collector.slot_of.items()}
        similarity = [
            streams[i].similarity if i in streams else None for i in range(len(self.targets))
        ]
        converged = sum(s.converged for s in streams.values())
        numbers = {
            "step": self.steps,
            "forwards": self.forwards,
            "tokens": self.tokens,
            "seconds": time.perf_counter() - begin,
            "converged": converged,
            "similarity": similarity,
        }
        for key, value in numbers.items():
            self.history[key].append(value)
        bar.n = converged
        least = min(
            ((v, i) for i, v in enumerate(similarity) if v is not None and not math.isnan(v)),
            default=None,
        )
        slowest = None if least is None else self.names[least[1]]
        progress = f"step {self.steps}"
        if least is not None:
            progress += f", slowest {slowest} at {least[0]:.3f}"
            bar.set_postfix_str(progress)
        bar.refresh()
        _LOGGER.debug(
            "%s: %d forward passes, %d tokens, %.2f s, %d of %d layers converged",
            progress,
            self.forwards,
            self.tokens,
            numbers["seconds"],
            converged,
            len(self.targets),
        )
        return {
            **numbers,
            "layers": len(self.targets),
            "names": self.names,
            "slowest": slowest,
        }

    def call_back(self, numbers: dict[str, Any] | None) -> None:
        """Hand the numbers of a step to the user's function."""
        if numbers is not None and self.options.callback is not None:
            self.options.callback(numbers)

    @property
    def uncalled(self) -> list[str]:
        """Return the names of the layers without an input so far."""
        return [t.name for i, t in enumerate(self.targets) if i not in self.collector.slot_of]

    @functools.cached_property
    def names(self) -> list[str]:
        """Return the names of the layers, in the order of the similarities of a step."""
        return [target.name for target in self.targets]

    @functools.cached_property
    def limits(self) -> list[int]:
        """Return the most components that each layer may be given."""
        return [components_of(target, self.eva.rho) for target in self.targets]
