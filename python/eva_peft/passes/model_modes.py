"""Set modes, caches and adapters for a pass, and restore them afterwards."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import nn

from .._peft_compat import SWITCHABLE_LAYERS
from ..errors import EvaRuntimeError
from ..model.architecture import configs_of
from ..surroundings.interrupts import temporarily
from ..surroundings.snapshot import requires_grad_restorer

__all__ = ["calibration_mode", "exclusive_use"]


class _ProcessSwitches:
    """Process-wide switches, which are off while any pass runs; passes may overlap.

    An interrupt may come anywhere, so every step of the restoration may run twice, or after a
    setup that was not completed.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._passes: set[object] = set()  # those that are running
        self._undo: list[Callable[..., object]] = []  # called like __exit__ to restore, last first
        # ids of the modules of each pass, which stay alive that long; in order of begin
        self._claims: dict[object, frozenset[int]] = {}

    def exclusive_use(self, model: nn.Module) -> AbstractContextManager[None]:
        """Keep other passes off a model; the hooks of each would see the other's batches."""
        modules = frozenset(id(m) for m in model.modules() if not _is_activation(m))
        claim = object()
        return temporarily(
            undo=lambda: self._claims.pop(claim, None),
            change=lambda: self._claim(claim, modules),
        )

    def _claim(self, claim: object, modules: frozenset[int]) -> None:
        # No lock, which an interrupt could leave locked: of two passes that begin at the same time,
        # the second finds the claim of the first.
        self._claims[claim] = modules
        for other, taken in self._claims.copy().items():
            if other is claim:
                return
            if modules & taken:
                raise EvaRuntimeError(
                    "another calibration pass is running on this model, or on a part of it, in "
                    "another thread or in a function that made this call; run one after the other"
                )

    def switch_off_for(self, pass_id: object) -> None:
        """Switch them off, for a pass that begins."""
        self._with_lock(lambda: self._begin_pass(pass_id))

    def restore_after(self, pass_id: object) -> None:
        """Restore them, if no other pass runs; may be repeated, or run without the other."""
        self._with_lock(lambda: self._end_pass(pass_id))

    def _with_lock(self, step: Callable[[], object]) -> None:
        """Run a step under the lock."""
        try:
            try:
                self._lock.acquire()
                step()
            finally:
                self._release()
        finally:
            self._release()  # an interrupt may have come right before the call above

    def _release(self) -> None:
        # As often as it was acquired: an interrupt may come before or after that.
        with suppress(RuntimeError):  # raised if this thread does not hold it, or no longer
            while True:
                self._lock.release()

    def _begin_pass(self, pass_id: object) -> None:
        if not self._passes:
            self._switch_off()
        self._passes.add(pass_id)

    def _end_pass(self, pass_id: object) -> None:
        self._passes.discard(pass_id)
        if not self._passes:
            self._switch_on()

    def _switch_on(self) -> None:
        while self._undo:
            self._undo[-1](None, None, None)
            self._undo.pop()

    def _switch_off(self) -> None:
        # Compiled code does not call hooks that were added after it was compiled. Loading the
        # compiler takes a second, and if it never was, nothing is compiled.
        if "torch._dynamo" in sys.modules:
            # in one line: it takes effect when created, and stores the previous stance
            self._undo.append(torch.compiler.set_stance("force_eager").__exit__)
        # torch's Transformer layers would pass nested tensors to their parts, or not call them.
        before = torch.backends.mha.get_fastpath_enabled()
        self._undo.append(lambda *_: torch.backends.mha.set_fastpath_enabled(before))
        torch.backends.mha.set_fastpath_enabled(False)


def _is_activation(module: nn.Module) -> bool:
    """Tell whether a module is an activation, which models may share: no weights, no modes."""
    places = ("torch.nn.modules.activation", "transformers.activations")
    return type(module).__module__ in places and not any(True for _ in module.parameters())


_SWITCHES = _ProcessSwitches()


def exclusive_use(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which no other pass may run on a model, with or without adapters.

    Raises:
        EvaRuntimeError: one is running.
    """
    return _SWITCHES.exclusive_use(model)


def calibration_mode(model: nn.Module) -> AbstractContextManager[None]:
    """Run a model in eval mode, with adapters off and without a generation cache.

    Every module's own mode, flag and config value is restored on any kind of exit, and so is
    ``requires_grad`` of every parameter.
    """
    mode = _CalibrationMode(model)
    return temporarily(mode.end, mode.begin)


class _CalibrationMode:
    """The changes to a model, and to the process, while a pass runs."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._training = [(m, m.training) for m in model.modules()]
        self._adapters = [
            (m, m._disable_adapters) for m in model.modules() if isinstance(m, SWITCHABLE_LAYERS)
        ]
        # PEFT's disable_adapter, which a user's function may enter, clears requires_grad, and does
        # not restore it if adapters were off before
        self._restore_requires_grad = requires_grad_restorer(model.parameters())
        self._caches: list[tuple[Any, Any]] = []
        self._pass_id = object()

    def begin(self) -> None:
        self._model.eval()
        for module in filter(_repacks_in_eval, self._model.modules()):
            module.training = True
        for layer, _ in self._adapters:
            layer._disable_adapters = True
        for config in configs_of(self._model):
            with suppress(AttributeError, TypeError):  # it has none, or is frozen
                self._caches.append((config, config.use_cache))
                config.use_cache = False
        _SWITCHES.switch_off_for(self._pass_id)

    def end(self) -> None:
        """Restore everything; may be interrupted, and run again."""
        try:
            for layer, flag in self._adapters:
                layer._disable_adapters = flag
            self._restore_requires_grad()
            for config, value in reversed(self._caches):  # one may delegate to another
                with suppress(AttributeError, TypeError):  # frozen, so unchanged
                    config.use_cache = value
            for module, mode in self._training:
                if module.training != mode and type(module).train is not nn.Module.train:
                    module.train(mode)  # it does more than set the flag: kernels, merged weights
        finally:
            for module, mode in self._training:
                module.training = mode
            _SWITCHES.restore_after(self._pass_id)


def _repacks_in_eval(module: nn.Module) -> bool:
    """Tell whether a layer would permanently repack its weight when it runs in eval mode.

    bitsandbytes does, with four bits on a CPU with AVX-512, and no gradient passes afterwards; the
    mode of its layers has no other effect.
    """
    kind = type(module)
    return kind.__module__.startswith("bitsandbytes.") and kind.__name__.endswith("4bit")
