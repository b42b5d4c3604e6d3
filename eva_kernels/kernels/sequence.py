"""A fixed sequence of kernels, launched again and again on other tensors of the same kind.

Triton binds the arguments of every launch: it asks each for its type and alignment, looks up the
compiled kernel and the options, tens of microseconds a launch. For hundreds of layer inputs a step
the host would spend more on that than a GPU on the model. Here the first launch is Triton's; it
returns the compiled kernel, and the next ones pass addresses straight to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

__all__ = ["Call", "LaunchSequence"]

# What Triton specialises an address on.
ALIGNMENT = 16


@dataclass(frozen=True)
class Call:
    """One kernel of a sequence, without its tensors.

    Attributes:
        kernel: a ``triton.jit`` function whose arguments are pointers, numbers, constants.
        grid: programs along one or two axes.
        pointers: names of the tensors, in the kernel's order.
        numbers: integers that follow them.
        constants: by name, all of its constexpr arguments; what it has not is left out.
        options: of the compiler, ``num_warps`` and such.
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

    @property
    def values(self) -> tuple[Any, ...]:
        """Everything that follows the pointers, in the kernel's order."""
        return (*self.numbers, *self.own_constants.values())


class LaunchSequence:
    """Kernels whose tensors are given by name, or are parts of a workspace.

    Args:
        calls: in order.
        given: names of the tensors that :meth:`run` is given.
        parts: byte offset and dtype of every part of the workspace.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        given: Sequence[str],
        parts: Mapping[str, tuple[int, torch.dtype]],
    ) -> None:
        self.calls, self.given, self.parts = tuple(calls), tuple(given), dict(parts)
        self._offsets = [offset for offset, _ in self.parts.values()]
        place = {name: i for i, name in enumerate((*self.given, *self.parts))}
        # Two at least, or the getter would not return a tuple.
        assert all(len(call.pointers) > 1 for call in self.calls)
        self._pick = [itemgetter(*(place[name] for name in c.pointers)) for c in self.calls]
        self._ready: dict[Any, list[tuple[Any, Any, tuple[Any, ...]]]] = {}

    def run(self, tensors: Sequence[Tensor | None], workspace: Tensor) -> None:
        """Launch all kernels on the current device and stream.

        Args:
            tensors: in the order of ``given``, of equal dtypes, and ``None`` for the same ones, at
                every call. A sequence is for one set of shapes and strides.
            workspace: uint8, at least as large as its parts; on the device of the tensors.
        """
        base = workspace.data_ptr()
        spots: list[int | None] = [None if t is None else t.data_ptr() for t in tensors]
        aligned = [spot is None or spot % ALIGNMENT == 0 for spot in spots]
        key = (workspace.device, base % ALIGNMENT == 0, *aligned)
        ready = self._ready.get(key)
        if ready is None:
            self._run_by_triton(tensors, workspace, key)
            return
        spots += [base + offset for offset in self._offsets]
        stream = _stream_of(workspace.device)
        for pick, (compiled, grid, values) in zip(self._pick, ready, strict=True):
            compiled[grid](*pick(spots), *values, stream=stream)

    def _run_by_triton(
        self, tensors: Sequence[Tensor | None], workspace: Tensor, key: tuple[Any, ...]
    ) -> None:
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
        if _can_be_kept(workspace.device):
            self._ready[key] = [
                (kernel, (*call.grid, 1, 1)[:3], call.values)
                for kernel, call in zip(compiled, self.calls, strict=True)
            ]


def _can_be_kept(device: torch.device) -> bool:
    # An interpreter compiles nothing. On ROCm Triton also specialises on the size of a tensor.
    return device.type == "cuda" and torch.version.hip is None


def _stream_of(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream
