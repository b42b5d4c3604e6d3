"""Forward pre-hooks that stream the inputs of the target layers into their incremental SVDs."""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from eva_kernels.streaming import InputStream, NonFiniteStepError

from ..errors import DeferredError, EvaTypeError, NonFiniteError, warn
from ..inputs.selectors import Selector
from ..inputs.token_mask import TokenMask
from ..model.routing import EagerExperts, RoutedInputs
from ..model.targets import Target
from ..surroundings.interrupts import run_to_completion
from ..surroundings.snapshot import remove_hook
from .layer_tokens import LayerTokens
from .shared_inputs import SeenTensor, Slot

__all__ = ["InputCollector", "StopForward"]


class StopForward(BaseException):
    """Raised by a hook once the last needed layer was called, to end the forward pass.

    Not an ``Exception``: a model may catch those, and continue.
    """


class InputCollector(AbstractContextManager["InputCollector"]):
    """Hooks on all target layers; a context manager that removes them.

    Args:
        targets: the layers.
        make_stream: returns a new stream for a layer, an input dtype and a device.
        selectors: per layer, a user's function that selects rows, or ``None`` to use the mask.
        defer_errors: raise the errors of hooks only at the end of the forward pass, in which the
            processes of a sharded model wait for each other.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        make_stream: Callable[[Target, torch.dtype, torch.device], InputStream],
        selectors: Sequence[Selector | None],
        defer_errors: bool = False,
    ) -> None:
        self.targets, self.selectors, self._defer_errors = targets, selectors, defer_errors
        self._held_error = DeferredError()
        self.slots: list[Slot] = []
        self.slot_of: dict[int, Slot] = {}
        self.frozen: set[int] = set()  # layers that are no longer accumulated
        self.unshared: set[int] = set()  # layers that turned out not to share an input
        self.max_calls: dict[int, int] = {}  # by layer: most calls in one forward pass
        self.seconds = 0.0
        self.step = 0
        self.current_layer: str | None = None  # the layer that is being accumulated
        self.tokens = 0
        self._earlier_tokens = 0  # of these, the tokens of earlier calls of the model
        self._make_stream = make_stream
        self._new_slots: dict[Slot, None] = {}  # ordered set of slots created in this forward pass
        self._new_slots_by_id: dict[int, list[Slot]] = {}  # by the id of the tensor they began with
        self._num_uncalled = 0  # needed layers not called yet in this forward pass
        self._call_counts: dict[int, int] = {}
        self._stop_early = self.stopped = False
        self._size = self.largest_batch = (0, 0)  # of this batch; of all batches run to the end
        self._only_layers: set[int] | None = None
        self._hooks: list[tuple[nn.Module, Callable[..., None]]] = []
        weights = [(i, t.weight) for i, t in enumerate(targets) if t.weight is not None]
        # a weak reference: a cycle would keep all streams on the device until garbage collection
        on_multiplied = functools.partial(InputCollector._on_multiplied, weakref.proxy(self))
        self.routed = RoutedInputs(weights, on_multiplied)
        self._layer_tokens = LayerTokens(targets, selectors, self.routed)
        self._eager_experts = EagerExperts([t.module for t in targets if t.weight is not None])

    def __enter__(self) -> InputCollector:
        try:
            self._eager_experts.__enter__()
            for i, target in enumerate(self.targets):
                if target.weight is not None:
                    continue
                hook = self._make_hook(i)
                # recorded before it is registered, in case of an interrupt in between
                self._hooks.append((target.module, hook))
                target.module.register_forward_pre_hook(hook, with_kwargs=True)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        run_to_completion(self.remove)

    def remove(self) -> None:
        """Remove all hooks; may be interrupted, and run again."""
        for module, hook in self._hooks:
            remove_hook(module, hook)
        self._hooks.clear()
        self._eager_experts.__exit__(None, None, None)

    def _make_hook(self, i: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        is_part = self.targets[i].inputs_from_call is not None
        handler = self._on_part_call if is_part else self._on_call

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._timed_call(handler, i, args, kwargs)

        return hook

    def _on_multiplied(self, i: int, x: Tensor) -> None:
        self._timed_call(self._on_call, i, (x,), {})

    def _timed_call(
        self,
        handler: Callable[[int, tuple[Any, ...], dict[str, Any]], None],
        i: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        if not self.stopped and self._held_error.error is None:
            begin = time.perf_counter()
            try:
                if torch.is_inference_mode_enabled():  # by a forward_fn; the statistics outlive it
                    with torch.inference_mode(False), torch.no_grad():
                        handler(i, args, kwargs)
                else:
                    handler(i, args, kwargs)
            except Exception as error:
                if not self._defer_errors:
                    raise
                self._held_error.error = error
            finally:
                self.seconds += time.perf_counter() - begin
            self.stopped = self._stop_early and self._num_uncalled == 0
        if self.stopped:  # again at each call, if the model caught it and continued
            raise StopForward

    def begin_forward(
        self,
        mask: TokenMask,
        model_input: Any,
        stop_early: bool,
        size: tuple[int, int] = (0, 0),
    ) -> None:
        """Prepare for a forward pass over a batch.

        Args:
            mask: the tokens to use.
            model_input: passed to the users' selectors.
            stop_early: raise :class:`StopForward` once every needed layer was called. Not done as
                long as a layer was never called (a later batch may call it), nor if one is called
                several times (a later batch may call it more often), nor on a batch larger than
                all that were run to the end (a model may split it into parts).
            size: of the batch, see :func:`eva_peft.inputs.batches.samples_and_elements`.
        """
        self._layer_tokens.begin_forward(mask, model_input, self.step)
        self._call_counts, self.stopped = {}, False
        self.tokens = self._earlier_tokens = 0
        self._forget_new_slots()
        self._num_uncalled = len(self.targets) - len(self.frozen)
        all_called_once = all(self.max_calls.get(i) == 1 for i in range(len(self.targets)))
        self._size = size
        known_size = all(n <= most for n, most in zip(size, self.largest_batch, strict=True))
        self._stop_early = stop_early and all_called_once and known_size
        for slot in self.slots:
            slot.begin_forward()

    def begin_model_call(self) -> None:
        """Note another call of the model in a forward pass: its tokens add to those so far."""
        self._earlier_tokens = self.tokens

    def use_mask(self, mask: TokenMask | None = None) -> TokenMask:
        """Use another mask, if given, from here on in a forward pass; return the previous one."""
        previous = self._layer_tokens.mask
        if mask is not None:
            self._layer_tokens.mask = mask
        return previous

    def end_forward(self) -> set[int]:
        """Finish a forward pass: accumulate what is still held, and check shared inputs.

        Returns:
            Layers that turned out not to share an input after all, in their first forward pass;
            the batch must be run again for them alone (:meth:`restrict_to`).
        """
        self._held_error.reraise()
        begin = time.perf_counter()
        for slot in list(self.slots):
            if slot not in self._new_slots:
                self._accumulate_all_held(slot)
        unshared: set[int] = set()
        for slot in self._new_slots:
            if any(count != len(slot.calls) for count in slot.call_counts.values()):
                unshared |= set(slot.members)
                self._drop_slot(slot)
        self.record_passes(self._call_counts, self._size)
        self._only_layers = None
        self.unshared |= unshared
        self._forget_new_slots()
        self._layer_tokens.end_forward()
        for slot in self.slots:
            slot.calls.clear()  # which keep masks
        self.seconds += time.perf_counter() - begin
        return unshared

    def restrict_to(self, layers: set[int]) -> None:
        """Restrict the next forward pass to some layers."""
        self._only_layers = layers

    def _forget_new_slots(self) -> None:
        self._new_slots.clear()
        self._new_slots_by_id.clear()

    def _on_part_call(self, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Handle a call of the module that a layer is a part of: it may read several tensors."""
        target = self.targets[i]
        assert target.inputs_from_call is not None
        if i in self.frozen or (self._only_layers is not None and i not in self._only_layers):
            return  # finding its inputs may take another run of the module
        self.current_layer = target.name
        for x in target.inputs_from_call(target.module, args, kwargs):
            self._on_call(i, (x,), {})
        self.current_layer = None

    def _on_call(self, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._only_layers is not None and i not in self._only_layers:
            return
        call = self._call_counts.get(i, 0)
        self._call_counts[i] = call + 1
        if i in self.frozen:
            return
        self._num_uncalled -= 1
        self._stop_early &= call == 0  # otherwise it may be called again after the last one
        x = self._input_tensor(i, args, kwargs)
        slot = self.slot_of.get(i)
        if slot is None:
            slot = self._join_slot(i, x)
            if slot is None:
                self._open_slot(i, x, args)
                return
        if call < len(slot.calls):
            self._on_repeated_input(slot, i, call, x, args)
        else:
            self._on_new_input(slot, i, x, args)

    def _input_tensor(self, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if args and isinstance(args[0], Tensor):  # nearly always
            return args[0]
        for value in (*args, *kwargs.values()):
            x = value[0] if isinstance(value, (tuple, list)) and value else value
            if isinstance(x, Tensor):
                return x
        raise EvaTypeError(
            f"unsupported input type in layer {self.targets[i].name}, step {self.step + 1}: it was "
            "called without a tensor; please provide a custom prepare_layer_inputs_fn"
        )

    def _join_slot(self, i: int, x: Tensor) -> Slot | None:
        # A layer joins a slot only in the forward pass in which that slot began: from then on
        # both have seen the same data.
        if self.selectors[i] is not None or i in self.unshared:
            return None
        patches = self.targets[i].patches
        for slot in self._new_slots_by_id.get(id(x), ()):
            first = slot.members[0]
            if self.selectors[first] is not None or self.targets[first].patches != patches:
                continue
            if slot.calls[0].is_shared(x, self._layer_tokens.mask):
                slot.members.append(i)
                slot.call_counts[i] = 0
                self.slot_of[i] = slot
                return slot
        return None

    def _open_slot(self, i: int, x: Tensor, args: tuple[Any, ...]) -> None:
        stream = self._make_stream(self.targets[i], x.dtype, x.device)
        slot = Slot(stream, [i], call_counts={i: 0})
        self._accumulate(slot, i, x, args)
        slot.calls.append(SeenTensor(x, self._layer_tokens.mask))
        slot.call_counts[i] = 1
        self.slots.append(slot)
        self._new_slots[slot] = None
        # the id may be that of a deleted tensor
        same_tensor = [s for s in self._new_slots_by_id.get(id(x), ()) if s.calls[0].is_same(x)]
        self._new_slots_by_id[id(x)] = [*same_tensor, slot]
        self.slot_of[i] = slot

    def _on_new_input(self, slot: Slot, i: int, x: Tensor, args: tuple[Any, ...]) -> None:
        slot.call_counts[i] += 1
        shared = len(slot.members) > 1 and slot not in self._new_slots
        slot.calls.append(SeenTensor(x, self._layer_tokens.mask, held=shared))
        if not shared:
            self._accumulate(slot, i, x, args)

    def _on_repeated_input(
        self, slot: Slot, i: int, call: int, x: Tensor, args: tuple[Any, ...]
    ) -> None:
        if not slot.calls[call].is_shared(x, self._layer_tokens.mask):
            if slot in self._new_slots:
                return  # the counts now differ, so end_forward requests another run
            self._accumulate(self._split_off(slot, i, call), i, x, args)
            return
        slot.call_counts[i] += 1
        if slot.is_complete(call):
            self._accumulate_held(slot, call)

    def _accumulate_held(self, slot: Slot, call: int) -> None:
        seen = slot.calls[call]
        is_unchanged, held = seen.is_unchanged, seen.take_held()
        if held is None:
            return
        if is_unchanged:
            self._accumulate_with(slot, slot.members[0], *held)
            return
        names = ", ".join(self.targets[m].name for m in slot.members)
        warn(
            f"step {self.step + 1}: the model changed the input of {names} in place after it had "
            "been read; its tokens of this batch are left out",
        )

    def _accumulate_with(self, slot: Slot, i: int, x: Tensor, mask: TokenMask) -> None:
        """Accumulate a held input with the mask of its call, which may differ from the current."""
        current = self.use_mask(mask)
        self._accumulate(slot, i, x, (x,))
        self.use_mask(current)

    def _split_off(self, slot: Slot, i: int, num_shared: int) -> Slot:
        """Give a layer that no longer shares its input a copy of everything shared so far."""
        new = Slot(slot.stream.clone(), [i])
        for seen in slot.calls[:num_shared]:  # shared, but held until a third layer is called
            if seen.held is not None and seen.is_unchanged:
                self._accumulate_with(new, i, *seen.held)
        placeholder = SeenTensor(torch.empty(0, device="cpu"), self._layer_tokens.mask)
        new.calls = [placeholder] * (num_shared + 1)
        slot.members.remove(i)
        new.call_counts[i] = slot.call_counts.pop(i) + 1
        self.slot_of[i] = new
        self.slots.append(new)
        for call in range(num_shared, len(slot.calls)):
            if slot.is_complete(call):
                self._accumulate_held(slot, call)
        return new

    def _accumulate_all_held(self, slot: Slot) -> None:
        """Accumulate inputs held for layers that were not called again, which are split off."""
        fewest = min(slot.call_counts.values())
        while fewest < len(slot.calls):
            self.split_slot(slot, [i for i, count in slot.call_counts.items() if count == fewest])
            fewest = min(slot.call_counts.values())
            for call in range(fewest):  # now, so that the copy of the next split includes it
                self._accumulate_held(slot, call)

    def split_slot(self, slot: Slot, layers: Sequence[int]) -> None:
        """Move some layers of a slot to a new one, with a copy of everything shared so far."""
        new = self.add_slot(slot.stream.clone(), layers)
        for i in new.members:
            slot.members.remove(i)
            slot.call_counts.pop(i, None)

    def add_slot(self, stream: InputStream, layers: Sequence[int]) -> Slot:
        """Return a new slot for layers that will share an input from the next forward pass on."""
        slot = Slot(stream, list(layers))
        self.slots.append(slot)
        self.slot_of |= dict.fromkeys(layers, slot)
        return slot

    def drop_empty_slots(self) -> None:
        """Drop the slots of layers that were never called with a token that counts."""
        for slot in [s for s in self.slots if not s.stream.tokens]:
            self._drop_slot(slot)

    def release(self) -> None:
        """Release all state after a failed pass."""
        self.slots.clear()
        self.slot_of.clear()
        self._forget_new_slots()
        self.routed.clear_tokens()

    def _drop_slot(self, slot: Slot) -> None:
        self.slots.remove(slot)
        for i in slot.members:
            del self.slot_of[i]

    def _accumulate(self, slot: Slot, i: int, x: Tensor, args: tuple[Any, ...]) -> None:
        target = self.targets[i]
        self.current_layer, self.routed.paused = target.name, True
        try:
            matrices = self._layer_tokens.matrices(i, x, args)
            num_used = sum(slot.stream.add(part, rows) for part, rows in matrices)
        except NonFiniteError as error:
            raise self._with_location(target.name, error) from None
        finally:
            self.routed.paused = False
        self.tokens = max(self.tokens, self._earlier_tokens + num_used)
        self.current_layer = None

    def record_passes(self, call_counts: Mapping[int, int], largest_batch: tuple[int, int]) -> None:
        """Record calls and largest batch of forward passes, to decide when one may stop early."""
        for i, count in call_counts.items():
            self.max_calls[i] = max(count, self.max_calls.get(i, 0))
        samples, elements = self.largest_batch
        self.largest_batch = max(samples, largest_batch[0]), max(elements, largest_batch[1])

    @contextmanager
    def locating_errors(self) -> Iterator[None]:
        """Return a context that adds layer and step to the error of a fold."""
        try:
            yield
        except NonFiniteStepError as error:
            slot = next(slot for slot in self.slots if slot.stream is error.stream)
            raise self._with_location(self.targets[slot.members[0]].name, error) from None

    def _with_location(self, name: str, error: NonFiniteError) -> NonFiniteError:
        return NonFiniteError(
            f"layer {name}, step {self.step + 1}: {error}. Look for overflow (float16?) "
            'or broken samples, or pass on_nonfinite="skip" to leave such tokens out'
        )
