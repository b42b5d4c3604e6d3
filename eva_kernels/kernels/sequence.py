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
MAX_COMPILED = 1024
# Where a parameter comes from, see csrc/launch.h.
GIVEN, WORKSPACE, NUMBER = range(3)
# Bytes of the parameters of compiled kernels, as reported by the driver.
_parameter_sizes: WeakKeyDictionary[Any, list[int]] = WeakKeyDictionary()
# f(addresses of the tensors, 0 for a missing one; address of the workspace)
Relaunch = Callable[[Sequence[int], int], None]


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
    def kernel_constants(self) -> dict[str, Any]:
        """The constexpr arguments of the kernel, in its order."""
        names = self.kernel.arg_names[len(self.pointers) + len(self.numbers) :]
        return {name: self.constants[name] for name in names}

    def specialisation_key(self, tensor_kinds: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return what Triton's choice of a compiled kernel depends on, given each tensor's kind."""
        pointers = tuple(tensor_kinds[name] for name in self.pointers)
        names = self.kernel.arg_names[len(self.pointers) :]
        unspecialised = {p.name for p in getattr(self.kernel, "params", ()) if p.do_not_specialize}
        numbers = tuple(
            (_integer_width(n), name not in unspecialised and (n == 1, n % ALIGNMENT == 0))
            for name, n in zip(names, self.numbers, strict=False)
        )
        constants, options = tuple(self.kernel_constants.items()), tuple(self.options.items())
        return self.kernel, pointers, numbers, constants, options

    @property
    def numbers_and_constants(self) -> tuple[Any, ...]:
        """Everything that follows the pointers, in the kernel's order."""
        return (*self.numbers, *self.kernel_constants.values())


class LaunchSequence:
    """Kernels whose tensors are arguments of :meth:`run` or parts of a workspace.

    Args:
        calls: in order.
        tensor_names: names of the tensors that :meth:`run` takes.
        parts: byte offset and dtype of every part of the workspace.
        nbytes: of the workspace.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        tensor_names: Sequence[str],
        parts: Mapping[str, tuple[int, torch.dtype]],
        nbytes: int,
    ) -> None:
        self.nbytes = nbytes
        self.calls, self.tensor_names, self.parts = tuple(calls), tuple(tensor_names), dict(parts)
        self._relaunchers: dict[Any, Relaunch] = {}
        # Held, since Triton unloads a kernel's code when its object is freed.
        self._compiled_kernels: list[Any] = []

    def run(self, tensors: Sequence[Tensor | None], workspace: Tensor) -> None:
        """Launch all kernels on the tensors' device and its current stream.

        Args:
            tensors: in the order of ``tensor_names``; dtypes, and which ones are ``None``, must be
                the same at every call. A sequence is for one set of shapes and strides.
            workspace: uint8, at least ``nbytes``, overwritten; on the device of the tensors.
        """
        workspace_address, device = workspace.data_ptr(), workspace.device
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        address_bits = workspace_address
        for address in addresses:
            address_bits |= address
        misaligned: Sequence[bool] = ()
        if address_bits % ALIGNMENT:
            misaligned = [a % ALIGNMENT > 0 for a in (workspace_address, *addresses)]
        key = device.index, *misaligned
        relaunch = self._relaunchers.get(key)
        if relaunch is not None:
            relaunch(addresses, workspace_address)
            return
        with current_device(device):
            if torch.version.hip is not None:  # there Triton's choice depends on tensor sizes, too
                self._run_by_triton(tensors, workspace)
                return
            compiled_key = key, *self._specialisation_key(tensors)
            compiled, was_compiled = _compiled.get(compiled_key), True
            if compiled is None:
                compiled, was_compiled = self._run_by_triton(tensors, workspace), False
                if None in compiled:  # they were interpreted
                    return
                if len(_compiled) >= MAX_COMPILED:
                    _compiled.clear()
                _compiled[compiled_key] = compiled
            self._compiled_kernels += compiled
            self._relaunchers[key] = relaunch = self._make_relauncher(compiled, device)
        if was_compiled:
            relaunch(addresses, workspace_address)

    def _specialisation_key(self, tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """Return what Triton's choice of kernels depends on, besides device and alignment."""
        tensor_kinds: dict[str, Any] = {
            name: None if tensor is None else tensor.dtype
            for name, tensor in zip(self.tensor_names, tensors, strict=True)
        }
        tensor_kinds |= {name: (i % ALIGNMENT, dtype) for name, (i, dtype) in self.parts.items()}
        return tuple(call.specialisation_key(tensor_kinds) for call in self.calls)

    def relauncher(self, device: torch.device) -> Relaunch | None:
        """Return a function that launches all kernels again on aligned addresses; None before run.

        For callers who know the addresses: inspecting the tensors takes longer than the launch.
        """
        return self._relaunchers.get((device.index,))

    def _run_by_triton(self, tensors: Sequence[Tensor | None], workspace: Tensor) -> list[Any]:
        """Launch all kernels through Triton, and return the compiled kernels."""
        tensors_by_name: dict[str, Tensor | None] = dict(
            zip(self.tensor_names, tensors, strict=True)
        )
        for name, (offset, dtype) in self.parts.items():
            end = len(workspace) - (len(workspace) - offset) % dtype.itemsize
            tensors_by_name[name] = workspace[offset:end].view(dtype)
        compiled = []
        for call in self.calls:
            pointers = (tensors_by_name[name] for name in call.pointers)
            compiled.append(
                call.kernel[call.grid](
                    *pointers, *call.numbers, **call.kernel_constants, **call.options
                )
            )
        return compiled

    def _make_relauncher(self, compiled: Sequence[Any], device: torch.device) -> Relaunch:
        """Return a function that launches compiled kernels again, by native code if possible."""
        sources = {name: (GIVEN, i) for i, name in enumerate(self.tensor_names)}
        sources |= {name: (WORKSPACE, offset) for name, (offset, _) in self.parts.items()}
        module, index = _native.load_or_none(device), device.index
        launches = None
        if module is not None:
            launches = native_launches(module, self.calls, compiled, sources)
        if launches is not None:
            run, stream_of = launches.run, driver.active.get_current_stream
            return lambda addresses, workspace_address: run(
                addresses, workspace_address, index, stream_of(index)
            )
        prepared_launches = [
            (
                kernel[(*call.grid, 1, 1)[:3]],
                [sources[n] for n in call.pointers],
                _launcher_arguments(kernel, call),
            )
            for kernel, call in zip(compiled, self.calls, strict=True)
        ]

        def launch_by_triton(addresses: Sequence[int], workspace_address: int) -> None:
            with current_device(device):
                stream = driver.active.get_current_stream(index)
                for launch, pointers, values in prepared_launches:
                    pointers_of_call = [
                        addresses[i] or None if origin == GIVEN else workspace_address + i
                        for origin, i in pointers
                    ]
                    launch(*pointers_of_call, *values, stream=stream)

        return launch_by_triton


def _launcher_arguments(kernel: Any, call: Call) -> tuple[Any, ...]:
    """Return the arguments of Triton's launcher of a compiled kernel that follow the pointers."""
    names = call.kernel.arg_names[len(call.pointers) :]
    # the signature in Triton 3.2 has no constants, and its launcher rejects them
    accepted = kernel.src.signature
    return tuple(
        value
        for name, value in zip(names, call.numbers_and_constants, strict=True)
        if name in accepted
    )


def _integer_width(number: int) -> int:
    """Return the integer type that Triton gives a number: 32 bits, 64 bits, or unsigned."""
    return 32 if -(2**31) <= number < 2**31 else 64 if number < 2**63 else 65


def native_launches(
    module: Any,
    calls: Sequence[Call],
    compiled: Sequence[Any],
    sources: Mapping[str, tuple[int, int]],
) -> Any:
    """Return a ``LaunchList`` of compiled kernels, or ``None`` if one is not as expected (logged).

    A compiled Triton kernel should take its arguments in order, without the constants, then the
    addresses of scratch memory, which has size 0 here. The driver reports whether it does.

    Args:
        module: the native module, see csrc/README.md.
        calls: in order.
        compiled: the kernel of each, as Triton returned it.
        sources: origin, and index or offset, of every tensor by name.
    """
    launches = module.LaunchList()
    try:
        for call, kernel in zip(calls, compiled, strict=True):
            parameters = _native_parameters(module, call, kernel, sources)
            meta, grid = kernel.metadata, (*call.grid, 1, 1)[:3]
            early = bool(getattr(meta, "launch_pdl", False))
            threads = 32 * meta.num_warps
            launches.add(kernel.function, grid, threads, meta.shared, early, parameters)
    except (AttributeError, KeyError, RuntimeError, ValueError) as error:
        # another Triton release, or an older driver
        _log_triton_launches(f"{type(error).__name__}: {error}")
        return None
    return launches


@functools.cache
def _log_triton_launches(reason: str) -> None:
    logger.info("kernels are launched by Triton, which is slower on the host: %s", reason)


def _native_parameters(
    module: Any, call: Call, kernel: Any, sources: Mapping[str, tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return the parameters of a kernel, or raise an error if it is not as expected."""
    meta, types = kernel.metadata, kernel.src.signature
    # scratch memory, clusters or a cooperative launch; a property unknown to this Triton is off
    special = "global_scratch_size", "profile_scratch_size", "launch_cooperative_grid"
    if meta.num_ctas != 1 or any(getattr(meta, name, 0) for name in special):
        raise ValueError("a kernel needs scratch memory, a cluster or a cooperative launch")
    values = [*(sources[name] for name in call.pointers), *((NUMBER, n) for n in call.numbers)]
    values_by_name = dict(zip(call.kernel.arg_names, values, strict=False))
    # In Triton 3.2 arguments that are 1 or None have a type, too; their names are in the constants.
    fixed = {name for name in values_by_name if types[name] == "constexpr"}
    fixed |= {*kernel.src.constants}
    passed = {name: value for name, value in values_by_name.items() if name not in fixed}
    sizes = [8 if types[name].startswith("*") else int(types[name][1:]) // 8 for name in passed]
    expected_sizes = _parameter_sizes.get(kernel)
    if expected_sizes is None:
        expected_sizes = _parameter_sizes[kernel] = module.parameter_sizes(kernel.function)
    scratch = len(expected_sizes) - len(sizes)
    if scratch not in range(3) or expected_sizes != sizes + [8] * scratch:
        raise ValueError(
            f"a kernel takes parameters of {expected_sizes} bytes where {sizes} were expected"
        )
    return [*passed.values(), *[(NUMBER, 0)] * scratch]


def current_device(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which Triton launches on a device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
