"""A fixed sequence of kernels, launched repeatedly on different tensors of the same kind.

Triton binds the arguments at every launch: it inspects the type and alignment of each and looks up
the compiled kernel and the options, which takes tens of microseconds. With hundreds of layer inputs
per step the host would spend more time on that than a GPU on the model. Here only the first launch
goes through Triton; it returns the compiled kernels, and from then on one call of native code
launches them all with new addresses. Without native code, Triton's launcher is called for each,
without binding. A sequence that differs only in numbers, such as the length of the batch, reuses
kernels compiled for the same specialisation. Triton's launch hooks do not see native launches.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from triton.runtime import driver

from .. import _native

__all__ = ["Call", "LaunchSequence", "native_launches"]

logger = logging.getLogger(__name__)

# Triton specialises on divisibility by this: addresses, and integers (besides type and being 1).
ALIGNMENT = 16
# Compiled kernels of sequences, by everything that Triton's choice depends on: sequences that
# differ only in numbers, as for batches with padding, skip Triton's lookup.
_compiled: dict[tuple[Any, ...], list[Any]] = {}
MOST_COMPILED = 1024
# Where a parameter comes from, see csrc/launch.h.
GIVEN, WORKSPACE, NUMBER = range(3)
# Bytes of the parameters of compiled kernels, as reported by the driver.
_known_sizes: WeakKeyDictionary[Any, list[int]] = WeakKeyDictionary()
# f(addresses of the tensors, 0 for a missing one; address of the workspace)
Again = Callable[[Sequence[int], int], None]


@dataclass(frozen=True)
class Call:
    """One kernel of a sequence, without its tensors.

    Attributes:
        kernel: a ``triton.jit`` function whose arguments are pointers, numbers, constants.
        grid: programs along one or two axes.
        pointers: names of the tensors, in the kernel's order.
        numbers: integers that follow them.
        constants: values of its constexpr arguments by name; other names are ignored.
        options: of the compiler, such as ``num_warps``.
    """

    kernel: Any
    grid: tuple[int, ...]
    pointers: tuple[str, ...]
    numbers: tuple[int, ...]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def own_constants(self) -> dict[str, Any]:
        """The constexpr arguments of the kernel, in its order."""
        names = self.kernel.arg_names[len(self.pointers) + len(self.numbers) :]
        return {name: self.constants[name] for name in names}

    def chosen_by(self, kinds: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return what Triton's choice of a compiled kernel depends on, given each tensor's kind."""
        pointers = tuple(kinds[name] for name in self.pointers)
        names = self.kernel.arg_names[len(self.pointers) :]
        plain = {p.name for p in getattr(self.kernel, "params", ()) if p.do_not_specialize}
        numbers = tuple(
            (_width(n), name not in plain and (n == 1, n % ALIGNMENT == 0))
            for name, n in zip(names, self.numbers, strict=False)
        )
        constants, options = tuple(self.own_constants.items()), tuple(self.options.items())
        return self.kernel, pointers, numbers, constants, options

    @property
    def values(self) -> tuple[Any, ...]:
        """Everything that follows the pointers, in the kernel's order."""
        return (*self.numbers, *self.own_constants.values())


class LaunchSequence:
    """Kernels whose tensors are arguments of :meth:`run` or parts of a workspace.

    Args:
        calls: in order.
        given: names of the tensors that :meth:`run` takes.
        parts: byte offset and dtype of every part of the workspace.
        nbytes: of the workspace.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        given: Sequence[str],
        parts: Mapping[str, tuple[int, torch.dtype]],
        nbytes: int,
    ) -> None:
        self.nbytes = nbytes
        self.calls, self.given, self.parts = tuple(calls), tuple(given), dict(parts)
        self._ready: dict[Any, Again] = {}
        self._kept: list[Any] = []  # Triton unloads a kernel's code when its object is freed

    def run(self, tensors: Sequence[Tensor | None], workspace: Tensor) -> None:
        """Launch all kernels on the tensors' device and its current stream.

        Args:
            tensors: in the order of ``given``; dtypes, and which ones are ``None``, must be the
                same at every call. A sequence is for one set of shapes and strides.
            workspace: uint8, at least ``nbytes``, overwritten; on the device of the tensors.
        """
        base, device = workspace.data_ptr(), workspace.device
        spots = [0 if t is None else t.data_ptr() for t in tensors]
        bits = base
        for spot in spots:
            bits |= spot
        odd = [spot % ALIGNMENT > 0 for spot in (base, *spots)] if bits % ALIGNMENT else ()
        key = device.index, *odd
        again = self._ready.get(key)
        if again is not None:
            again(spots, base)
            return
        with current_device(device):
            if torch.version.hip is not None:  # there Triton's choice depends on tensor sizes, too
                self._run_by_triton(tensors, workspace)
                return
            chosen = key, *self._chosen_by(tensors)
            compiled, known = _compiled.get(chosen), True
            if compiled is None:
                compiled, known = self._run_by_triton(tensors, workspace), False
                if None in compiled:  # they were interpreted
                    return
                if len(_compiled) >= MOST_COMPILED:
                    _compiled.clear()
                _compiled[chosen] = compiled
            self._kept += compiled
            self._ready[key] = again = self._again(compiled, device)
        if known:
            again(spots, base)

    def _chosen_by(self, tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """Return what Triton's choice of kernels depends on, besides device and alignment."""
        kinds: dict[str, Any] = {
            name: None if tensor is None else tensor.dtype
            for name, tensor in zip(self.given, tensors, strict=True)
        }
        kinds |= {name: (i % ALIGNMENT, dtype) for name, (i, dtype) in self.parts.items()}
        return tuple(call.chosen_by(kinds) for call in self.calls)

    def again(self, device: torch.device) -> Again | None:
        """Return a function that launches all kernels again on aligned addresses; None before run.

        For callers who know the addresses: inspecting the tensors takes longer than the launch.
        """
        return self._ready.get((device.index,))

    def _run_by_triton(self, tensors: Sequence[Tensor | None], workspace: Tensor) -> list[Any]:
        """Launch all kernels through Triton, and return the compiled kernels."""
        named: dict[str, Tensor | None] = dict(zip(self.given, tensors, strict=True))
        for name, (offset, dtype) in self.parts.items():
            end = len(workspace) - (len(workspace) - offset) % dtype.itemsize
            named[name] = workspace[offset:end].view(dtype)
        compiled = []
        for call in self.calls:
            pointers = (named[name] for name in call.pointers)
            compiled.append(
                call.kernel[call.grid](
                    *pointers, *call.numbers, **call.own_constants, **call.options
                )
            )
        return compiled

    def _again(self, compiled: Sequence[Any], device: torch.device) -> Again:
        """Return a function that launches compiled kernels again, by native code if possible."""
        places = {name: (GIVEN, i) for i, name in enumerate(self.given)}
        places |= {name: (WORKSPACE, offset) for name, (offset, _) in self.parts.items()}
        module, index = _native.load_or_none("cuda"), device.index
        launches = None
        if module is not None:
            launches = native_launches(module, self.calls, compiled, places)
        if launches is not None:
            run, stream_of = launches.run, driver.active.get_current_stream
            return lambda spots, base: run(spots, base, index, stream_of(index))
        ready = [
            (
                kernel[(*call.grid, 1, 1)[:3]],
                [places[n] for n in call.pointers],
                _launched_with(kernel, call),
            )
            for kernel, call in zip(compiled, self.calls, strict=True)
        ]

        def by_triton(spots: Sequence[int], base: int) -> None:
            with current_device(device):
                stream = driver.active.get_current_stream(index)
                for launch, pointers, values in ready:
                    found = [
                        spots[i] or None if origin == GIVEN else base + i for origin, i in pointers
                    ]
                    launch(*found, *values, stream=stream)

        return by_triton


def _launched_with(kernel: Any, call: Call) -> tuple[Any, ...]:
    """Return the arguments of Triton's launcher of a compiled kernel that follow the pointers."""
    names = call.kernel.arg_names[len(call.pointers) :]
    # the signature in Triton 3.2 has no constants, and its launcher rejects them
    taken = kernel.src.signature
    return tuple(v for name, v in zip(names, call.values, strict=True) if name in taken)


def _width(number: int) -> int:
    """Return the integer type that Triton gives a number: 32 bits, 64 bits, or unsigned."""
    return 32 if -(2**31) <= number < 2**31 else 64 if number < 2**63 else 65


def native_launches(
    module: Any,
    calls: Sequence[Call],
    compiled: Sequence[Any],
    places: Mapping[str, tuple[int, int]],
) -> Any:
    """Return a ``LaunchList`` of compiled kernels, or ``None`` if one is not as expected (logged).

    A compiled Triton kernel should take its arguments in order, without the constants, then the
    addresses of scratch memory, which has size 0 here. The driver reports whether it does.

    Args:
        module: the native module, see csrc/README.md.
        calls: in order.
        compiled: the kernel of each, as Triton returned it.
        places: origin, and index or offset, of every tensor by name.
    """
    launches = module.LaunchList()
    try:
        for call, kernel in zip(calls, compiled, strict=True):
            parameters = _parameters(module, call, kernel, places)
            meta, grid = kernel.metadata, (*call.grid, 1, 1)[:3]
            early = bool(getattr(meta, "launch_pdl", False))
            threads = 32 * meta.num_warps
            launches.add(kernel.function, grid, threads, meta.shared, early, parameters)
    except (AttributeError, KeyError, RuntimeError, ValueError) as error:
        _log_once(f"{type(error).__name__}: {error}")  # another Triton release, or an older driver
        return None
    return launches


@functools.cache
def _log_once(reason: str) -> None:
    logger.info("kernels are launched by Triton, which takes the host longer: %s", reason)


def _parameters(
    module: Any, call: Call, kernel: Any, places: Mapping[str, tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return the parameters of a kernel, or raise an error if it is not as expected."""
    meta, kinds = kernel.metadata, kernel.src.signature
    # scratch memory, clusters or a cooperative launch; a property unknown to this Triton is off
    special = "global_scratch_size", "profile_scratch_size", "launch_cooperative_grid"
    if meta.num_ctas != 1 or any(getattr(meta, name, 0) for name in special):
        raise ValueError("a kernel of a special kind")
    values = [*(places[name] for name in call.pointers), *((NUMBER, n) for n in call.numbers)]
    named = dict(zip(call.kernel.arg_names, values, strict=False))
    # In Triton 3.2 arguments that are 1 or None have a type, too; their names are in the constants.
    fixed = {name for name in named if kinds[name] == "constexpr"} | {*kernel.src.constants}
    taken = {name: value for name, value in named.items() if name not in fixed}
    sizes = [8 if kinds[name].startswith("*") else int(kinds[name][1:]) // 8 for name in taken]
    wanted = _known_sizes.get(kernel)
    if wanted is None:
        wanted = _known_sizes[kernel] = module.parameter_sizes(kernel.function)
    scratch = len(wanted) - len(sizes)
    if scratch not in range(3) or wanted != sizes + [8] * scratch:
        raise ValueError(f"a kernel that takes parameters of {wanted} bytes, not of {sizes}")
    return [*taken.values(), *[(NUMBER, 0)] * scratch]


def current_device(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which Triton launches on a device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
