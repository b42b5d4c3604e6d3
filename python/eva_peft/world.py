"""Leave the world as it was: modes, caches, adapters and random state around a pass."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import nn

from ._peft_compat import SWITCHABLE, base_of
from .architecture import configs_of
from .errors import EvaRuntimeError

__all__ = ["claimed", "quiet_model", "random_state_kept"]


class _Process:
    """Switches of the whole process, which are off while any pass runs; passes may overlap."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._passes = 0
        self._undo = ExitStack()
        self._claimed: set[int] = set()  # ids of modules that are alive, as long as they are in it

    @contextmanager
    def claimed(self, model: nn.Module) -> Iterator[None]:
        """Keep other passes off a model; the hooks of each would hear the other's batches."""
        modules = {id(module) for module in model.modules() if not _is_activation(module)}
        with self._lock:
            if modules & self._claimed:
                raise EvaRuntimeError(
                    "another calibration pass is running on this model, or on a part of it, in a "
                    "thread or around this call; run one after the other"
                )
            self._claimed |= modules
        try:
            yield
        finally:
            with self._lock:
                self._claimed -= modules

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Switch them off for a pass, and on again after the last that runs."""
        with self._lock:
            if not self._passes:
                with ExitStack() as undo:
                    self._switch_off(undo)
                    self._undo = undo.pop_all()
            self._passes += 1
        try:
            yield
        finally:
            with self._lock:
                self._passes -= 1
                if not self._passes:
                    self._undo.close()

    def _switch_off(self, undo: ExitStack) -> None:
        # Compiled code does not call hooks that were added after it was compiled. Nothing is
        # compiled where the compiler was never loaded, which takes a second.
        if "torch._dynamo" in sys.modules:
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        # torch's own Transformer layers would hand their parts nested tensors, or not call them.
        undo.callback(
            torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
        )
        torch.backends.mha.set_fastpath_enabled(False)


def _is_activation(module: nn.Module) -> bool:
    """Tell whether models may share a module: it has no weights, and its mode means nothing."""
    places = ("torch.nn.modules.activation", "transformers.activations")
    return type(module).__module__ in places and not any(True for _ in module.parameters())


_PROCESS = _Process()


def claimed(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which no other pass may run on a model, with or without adapters.

    Raises:
        EvaRuntimeError: one is running.
    """
    return _PROCESS.claimed(base_of(model))


@contextmanager
def quiet_model(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode, with adapters off and without a generation cache.

    Every module's own mode, flag and config value is put back on leaving, however that happens.
    """
    training = [(m, m.training) for m in model.modules()]
    adapters = [(m, m._disable_adapters) for m in model.modules() if isinstance(m, SWITCHABLE)]
    caches: list[tuple[Any, Any]] = []
    try:
        model.eval()
        for module in filter(_repacks_in_eval, model.modules()):
            module.training = True
        for layer, _ in adapters:
            layer._disable_adapters = True
        for config in configs_of(model):
            with suppress(AttributeError, TypeError):  # it has none, or is frozen
                before, config.use_cache = config.use_cache, False
                caches.append((config, before))
        with _PROCESS.quiet():
            yield
    finally:
        for module, mode in training:
            module.training = mode
        for layer, flag in adapters:
            layer._disable_adapters = flag
        for config, value in caches:
            config.use_cache = value


def _repacks_in_eval(module: nn.Module) -> bool:
    """Tell whether a layer would rearrange its weight for good when it runs in eval mode.

    bitsandbytes does, in four bits on a CPU with AVX-512, and no gradient passes afterwards; its
    mode has no other meaning.
    """
    kind = type(module)
    return kind.__module__.startswith("bitsandbytes.") and kind.__name__.endswith("4bit")


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the global random states back on leaving: torch's of every device, Python's, numpy's."""
    plain, array = random.getstate(), np.random.get_state()
    cpu = torch.get_rng_state()
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    module: Any = torch.get_device_module(kind) if kind is not None else None
    states = module.get_rng_state_all() if hasattr(module, "get_rng_state_all") else None
    try:
        yield
    finally:
        random.setstate(plain)
        np.random.set_state(array)
        torch.set_rng_state(cpu)
        if states is not None:
            module.set_rng_state_all(states)
