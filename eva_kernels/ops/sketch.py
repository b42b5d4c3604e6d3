"""The ``sketch`` op: stream a batch once into the sums of a sketched layer input."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..errors import EvaRuntimeError
from ._dispatch import (
    check_contiguous,
    check_precision,
    check_sums,
    choose_backend,
    define_operator,
    is_observed,
    kernel_module,
    with_contiguous_columns,
)

__all__ = ["SketchInto", "device_arch", "sketch", "sketch_unchecked", "sketch_workspace_bytes"]


@torch.no_grad()
def sketch(
    x: Tensor,
    basis: Tensor,
    pivot: Tensor,
    products: Tensor,
    shift: Tensor,
    square: Tensor,
    rows: Tensor | None = None,
    *,
    backend: str = "auto",
    precision: str = "high",
) -> None:
    """Add the sums of one batch, in place; see :func:`eva_kernels.reference.sketch`.

    Args:
        x, basis, pivot, products, shift, square, rows: as the reference. ``rows`` are not checked
            on an accelerator. Tokens whose features are not contiguous in memory are copied.
        backend: ``"triton"``, ``"torch"``, or ``"auto"``: Triton on a GPU for bfloat16, float16
            and float32 tokens with D >= 16 and Q <= 256, else PyTorch, the reason logged once.
        precision: ``"high"`` keeps 16 bits of every factor in the tensor cores, ``"fast"`` the 8
            of one bfloat16; plain PyTorch computes both in the dtype of the state, with
            TensorFloat-32 if the user has allowed it.

    Raises:
        EvaValueError: shapes, dtypes, devices or strides that do not fit.
        EvaRuntimeError: an explicit backend that cannot run.

    Numerics: Triton's error relative to the norm of the products is below 1e-5 (``"high"``) and
        5e-3 (``"fast"``) with a pivot near the mean, however large outliers and mean are, and a few
        times that for few tokens of which the basis captures little. Bitwise reproducible.
    Cost: ``4 N D Q`` flops, on tensor cores twice that for bfloat16 tokens at ``"high"``, three
        times for float16 and float32; X is read once from memory and once from the L2 cache.
    """
    check_precision(precision)
    q, d = basis.shape
    check_sums(
        "sketch",
        x,
        rows,
        d,
        basis,
        basis=(basis, (q, d)),
        pivot=(pivot, (d,)),
        products=(products, (q, d)),
        shift=(shift, (d,)),
        square=(square, ()),
    )
    state = basis, pivot, products, shift, square
    sketch_unchecked(x, state, rows, backend, precision == "high")


def sketch_unchecked(
    x: Tensor,
    state: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    rows: Tensor | None,
    backend: str,
    high: bool,
) -> None:
    """Do what :func:`sketch` does without checks or gradients, for tensors that are known to fit.

    Checking the tensors of every layer input in every step would take as long as the launches.

    Args:
        x, rows: of the shapes, dtypes and device that :func:`sketch` asks for.
        state: basis, pivot, products, shift and square, the same.
        backend: as :func:`sketch`.
        high: ``precision="high"``.
    """
    basis, pivot, products, shift, square = state
    q = int(basis.shape[0])  # a plain int, even if the tensor is traced
    chosen = choose_backend("sketch", backend, x, basis.dtype, q)
    if (x if rows is None else rows).shape[0] == 0:
        return
    if chosen == "torch":
        with torch.no_grad():
            reference.sketch(x, *state, rows)
        return
    check_contiguous("sketch", products=products, shift=shift)
    x = with_contiguous_columns(x)
    sequence = _sequence(x, rows, q, high)
    basis, pivot = basis.contiguous(), pivot.contiguous()
    workspace = torch.empty(sequence.nbytes, dtype=torch.uint8, device=x.device)
    rows = None if rows is None else rows.contiguous()
    if is_observed(x):
        _launch(x, basis, pivot, products, shift, square, workspace, rows, high)
        return
    sequence.run((x, rows, basis, pivot, products, shift, square), workspace)
    run = sequence.relauncher(x.device)
    if run is not None:
        if len(_launchers) >= MAX_LAUNCHERS:
            _launchers.clear()
        # together with its sequence, which keeps the kernels alive
        _launchers[_launch_key(x, rows, _sums_key(state[0], backend, high))] = run, sequence


# By `_launch_key`: a function that launches on addresses, and its sequence.
_launchers: dict[tuple[Any, ...], tuple[Callable[[list[int], int], None], Any]] = {}
MAX_LAUNCHERS = 1024


def _sums_key(basis: Tensor, backend: str, high: bool) -> tuple[Any, ...]:
    return basis.shape, basis.dtype, basis.device, backend, high


def _launch_key(x: Tensor, rows: Tensor | None, sums_key: tuple[Any, ...]) -> tuple[Any, ...]:
    if rows is None:
        return x.shape, x.stride(), x.dtype, x.device, sums_key
    rows_key = rows.shape, rows.stride(), rows.dtype, rows.device
    return x.shape, x.stride(), x.dtype, x.device, sums_key, rows_key


class SketchInto:
    """Sketches successive batches into the same sums, whose tensors are checked only once.

    With a GPU, checking tensors takes the host longer than a launch.

    Args:
        state, backend, high: as for :func:`sketch_unchecked`.
    """

    __slots__ = ("_address_bits", "_addresses", "_key", "_state")

    def __init__(self, state: tuple[Tensor, ...], backend: str, high: bool) -> None:
        self._state, self._key = state, _sums_key(state[0], backend, high)
        self._addresses: list[int] | None = None  # addresses of tokens, rows and state, set by add

    def adds_to(self, state: tuple[Tensor, ...]) -> bool:
        """Tell whether ``state`` holds the very tensors that this object adds to."""
        return all(map(operator.is_, state, self._state))

    def add(self, x: Tensor, rows: Tensor | None) -> bool:
        """Add tokens as :func:`sketch_unchecked` does; or do nothing and return ``False``.

        It does nothing for shapes and alignments not sketched before, or if operators are traced.
        """
        # first, since traced shapes cannot be dictionary keys
        launcher = None if is_observed(x) else _launchers.get(_launch_key(x, rows, self._key))
        if launcher is None:
            return False
        if self._addresses is None:
            if not all(tensor.is_contiguous() for tensor in self._state):
                return False
            self._addresses = [0, 0, *(tensor.data_ptr() for tensor in self._state)]
            self._address_bits = functools.reduce(operator.or_, self._addresses)
        run, sequence = launcher
        workspace = torch.empty(sequence.nbytes, dtype=torch.uint8, device=x.device)
        addresses, workspace_address = self._addresses, workspace.data_ptr()
        addresses[0], addresses[1] = x.data_ptr(), 0 if rows is None else rows.data_ptr()
        if (addresses[0] | addresses[1] | workspace_address | self._address_bits) % 16:
            return False
        run(addresses, workspace_address)
        return True


def _sequence(x: Tensor, rows: Tensor | None, q: int, high: bool) -> Any:
    n, d = (x if rows is None else rows).shape[0], x.shape[1]
    key = int(n), q, int(d), int(x.stride(0)), x.dtype, rows is not None, high
    return kernel_module("sketch").sketch_sequence(*key, device_arch(x.device))


def sketch_workspace_bytes(n: int, q: int, d: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return the bytes of scratch memory that Triton needs for (n, d) tokens and a (q, d) basis."""
    plan = kernel_module("sketch_plan").plan_sketch(
        n, q, d, dtype != torch.bfloat16, device_arch(device)
    )
    return int(plan.nbytes)


def device_arch(device: torch.device) -> Any:
    """Return the architecture whose launch parameters are used on a device.

    Raises:
        EvaRuntimeError: there are none; the message says why.
    """
    arch = kernel_module("launch").arch_of(device)
    if isinstance(arch, str):
        raise EvaRuntimeError(arch)
    return arch


def _run(
    x: Tensor,
    basis: Tensor,
    pivot: Tensor,
    products: Tensor,
    shift: Tensor,
    square: Tensor,
    workspace: Tensor,
    rows: Tensor | None,
    high: bool,
) -> None:
    sequence = _sequence(x, rows, len(basis), high)
    sequence.run((x, rows, basis, pivot, products, shift, square), workspace)


_launch = define_operator(
    "sketch",
    "(Tensor x, Tensor basis, Tensor pivot, Tensor(a!) products, Tensor(b!) shift, "
    "Tensor(c!) square, Tensor(d!) workspace, Tensor? rows, bool high) -> ()",
    _run,
)
