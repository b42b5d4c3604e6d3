"""Mixtures of experts: which tokens an expert is given, and what its fused weights multiply.

Two things cannot be observed by a hook on a module. Experts get only some tokens, selected by
indexing, so that a token mask no longer fits. And many models keep the weights of all experts in
one parameter and multiply with slices of it. Both are intercepted at the level of torch functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["EagerExperts", "ExpertWeight", "RoutedInputs", "expert_names", "expert_weights"]

_INDEXING = (Tensor.__getitem__, Tensor.index_select, torch.index_select)
_SPLITTING = (
    Tensor.split,
    torch.split,
    Tensor.chunk,
    torch.chunk,
    Tensor.tensor_split,
    torch.tensor_split,
)
_JOINING = (torch.cat, torch.concat, torch.concatenate, torch.vstack)
_REPEATING = (Tensor.repeat_interleave, torch.repeat_interleave)
# Functions whose result may have rows in another order than their arguments.
_GATHERING = ("embedding", "flip", "gather", "roll", "take_along_dim")
_PLACING = ("index_add", "index_copy", "index_put", "scatter", "scatter_add", "scatter_reduce")
_TURNING = ("moveaxis", "movedim", "permute", "swapaxes", "swapdims", "t", "transpose")
_REORDERING = (*_GATHERING, *_PLACING, *_TURNING)
# Returns samples, maybe sorted by length, so that their tokens are unknown.
_UNPACKING = "_pad_packed_sequence"
_BATCHED = (torch.bmm, Tensor.bmm)
_PRODUCTS = (
    functional.linear,
    torch.matmul,
    torch.mm,
    Tensor.matmul,
    Tensor.mm,
)


@dataclass(frozen=True, eq=False)
class ExpertWeight:
    """The part of a parameter that belongs to one expert.

    Attributes:
        parameter: (E, out, in) or (E, in, out), or (out, in) for one expert.
        index: of the expert.
        transposed: PEFT takes it for (E, in, out); ``lora_A`` is on the side of ``in``.
    """

    parameter: Tensor
    index: int
    transposed: bool = False


def expert_names(owner: str, stacked: bool, experts: int) -> list[str]:
    """Return the names that the layers in a parameter would have as separate modules.

    Args:
        owner: name of the parameter in the base model.
        stacked: it has a dimension for the experts.
        experts: their number.
    """
    module, _, name = owner.rpartition(".")
    return [f"{module}.{i}.{name}" for i in range(experts)] if stacked else [owner]


def expert_weights(
    module: nn.Module, name: str
) -> tuple[list[ExpertWeight], tuple[int, int]] | None:
    """Return the experts in a parameter and their (in_features, out_features), as PEFT sees them.

    ``None`` for a parameter that is neither two- nor three-dimensional.
    """
    parameter = getattr(module, name)
    if parameter.dim() not in (2, 3):
        return None
    rows, columns = parameter.shape[-2:]
    transposed = parameter.dim() == 3 and getattr(module, "is_transposed", False)
    count = len(parameter) if parameter.dim() == 3 else 1
    weights = [ExpertWeight(parameter, i, transposed) for i in range(count)]
    return weights, (rows, columns) if transposed else (columns, rows)


class RoutedInputs(TorchFunctionMode):
    """Intercepts products with experts' weights, and tracks tokens through indexing.

    Args:
        weights: the experts to watch, each with the index of its layer.
        called: ``f(layer, x)`` before a product of x, (..., D), with a layer's weight.

    Attributes:
        following: tokens are tracked.
        aside: the current computation is not part of the model, and is ignored.
    """

    def __init__(
        self, weights: Iterable[tuple[int, ExpertWeight]], called: Callable[[int, Tensor], None]
    ) -> None:
        super().__init__()
        self.following = self.aside = self._unpacked = False
        self.backwards: set[int] = set()  # layers with x @ W where lora_A is on W's output side
        self._called = called
        self._parameters: dict[int, list[tuple[ExpertWeight, dict[int, int]]]] = {}
        layers: dict[int, dict[int, int]] = {}
        for layer, weight in weights:
            known = layers.setdefault(id(weight.parameter), {})
            if not known:
                place = weight.parameter.untyped_storage().data_ptr()
                self._parameters.setdefault(place, []).append((weight, known))
            known[weight.index] = layer
        self._tokens: Any = WeakTensorKeyDictionary()

    @property
    def needed(self) -> bool:
        """Whether there is anything to observe that hooks cannot."""
        return bool(self._parameters) or self.following

    def tokens_of(self, x: Tensor) -> tuple[Tensor, int] | None:
        """Return the token index of each row of x and the number of tokens; ``None`` if unknown."""
        if not self.following:  # nothing is known then, and the lookup is slower than this check
            return None
        found: tuple[Tensor, int] | None = self._tokens.get(x)
        return found

    def forget(self) -> None:
        """Forget the tensors of a forward pass."""
        self._tokens.clear()
        self._unpacked = False

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.aside:
            return func(*args, **kwargs)
        given = (*args, *kwargs.values())
        if self._parameters and func in _PRODUCTS:
            x, weight = given[:2]
            self._multiplied(x, weight, summed=1 if func is functional.linear else 0)
        elif self._parameters and func in _BATCHED:
            self._multiplied_at_once(*given[:2])
        result = func(*args, **kwargs)
        if self.following and func is Tensor.__setitem__ and _puts_rows(*args[1:]):
            self._tokens.pop(args[0], None)
        if self.following and func in _SPLITTING:
            self._follow_parts(given[0], result)
        if self.following:
            for part in result if isinstance(result, tuple) else (result,):
                if isinstance(part, Tensor) and part.dim() >= 2:
                    self._follow(func, given, part)
        return result

    def _watched(self, weight: Any) -> Sequence[tuple[ExpertWeight, dict[int, int]]]:
        """Return an expert of each parameter that a weight is a view of, and all its layers."""
        if not isinstance(weight, Tensor) or weight.device.type == "meta":
            return ()
        return self._parameters.get(weight.untyped_storage().data_ptr(), ())

    def _multiplied_at_once(self, x: Tensor, weight: Any) -> None:
        """Report the batched product of all experts' tokens, (E, N, D), with their weights."""
        for expert, layers in self._watched(weight):
            forwards, backwards = expert.parameter, expert.parameter.mT
            if not expert.transposed:
                forwards, backwards = backwards, forwards
            if _are_one(weight, forwards):
                for index, layer in layers.items():
                    self._called(layer, x[index])
            elif _are_one(weight, backwards):
                self.backwards |= set(layers.values())

    def _multiplied(self, x: Tensor, weight: Any, summed: int) -> None:
        """Report the product of an expert's tokens, (..., D), with its weight.

        Args:
            x: the tokens.
            weight: 2-D, if it is a watched one.
            summed: the dimension of the weight that the product sums over.
        """
        for expert, layers in self._watched(weight):
            parameter = expert.parameter
            if weight.dim() != 2:
                return
            begin = int(weight.storage_offset() - parameter.storage_offset())
            index, rest = divmod(begin, parameter.stride(0)) if parameter.dim() == 3 else (0, 0)
            size = parameter.shape[-2:].numel()
            if rest or weight.numel() != size or index not in layers:
                continue
            if weight.stride(summed) == parameter.stride(-2 if expert.transposed else -1):
                self._called(layers[index], x)
            else:
                self.backwards.add(layers[index])
            return

    def _follow(self, func: Any, args: Sequence[Any], result: Tensor) -> None:
        rows = result.shape[:-1].numel()
        unpacking = getattr(func, "__name__", "") == _UNPACKING
        self._unpacked |= unpacking
        if unpacking or (self._unpacked and self._any_is_unknown(args)):
            self._tokens[result] = None
            return
        if func in _INDEXING or func in _REPEATING:
            picked = _repeated(args, result) if func in _REPEATING else _picked(args)
            if picked is not None and len(picked[1]) == rows:
                self._tokens[result] = self._composed(*picked)
            if func is not Tensor.__getitem__ or not _is_sliced(args[-1]):
                return
            self._follow_slice(*_of_the_first_dimension(args), result)
        if getattr(func, "__name__", "").removesuffix("_") in _REORDERING:
            self._tokens.pop(result, None)  # it may be an argument, changed in place
            return
        if func in _JOINING:
            args = next(arg for arg in args if isinstance(arg, (list, tuple)))
            if self._follow_joined(args, result):
                return
        # a product has the rows of its first factor
        for x in args[:1] if func in (*_PRODUCTS, *_BATCHED) else args:
            known = self._tokens.get(x) if isinstance(x, Tensor) else None
            if known is not None and len(known[0]) == rows:
                self._tokens[result] = known
                return

    def _follow_slice(self, x: Tensor, index: Any, result: Tensor) -> None:
        """Track a slice of tokens that were sorted by expert."""
        known = self._tokens.get(x)
        if known is not None and x.dim() == 2 and isinstance(index, slice):
            self._tokens[result] = (known[0][index], known[1])

    def _follow_parts(self, x: Tensor, parts: Sequence[Tensor]) -> None:
        """Track consecutive rows, split between experts."""
        known = self._tokens.get(x)
        lengths = [len(part) for part in parts]
        if known is None or sum(lengths) != len(known[0]) or x.dim() != 2:
            return
        for part, tokens in zip(parts, known[0].split(lengths), strict=True):
            self._tokens[part] = (tokens, known[1])

    def _follow_joined(self, parts: Sequence[Tensor], result: Tensor) -> bool:
        """Track rows that are concatenated again after experts had them in parts."""
        known = [found for found in map(self._tokens.get, parts) if found is not None]
        counts = {count for _, count in known}
        below = sum(map(len, parts)) == len(result)  # concatenated along the first dimension
        if len(known) < len(parts) or len(counts) != 1 or not below:
            return False
        self._tokens[result] = (torch.cat([tokens for tokens, _ in known]), counts.pop())
        return True

    def _composed(self, x: Tensor, index: Tensor, count: int) -> tuple[Tensor, int]:
        before = self._tokens.get(x)
        return (index, count) if before is None else (before[0][index], before[1])

    def _any_is_unknown(self, args: Sequence[Any]) -> bool:
        """Tell whether an argument of a function was computed from an unpacked tensor."""
        parts = (arg if isinstance(arg, (list, tuple)) else (arg,) for arg in args)
        given = (x for x in chain.from_iterable(parts) if isinstance(x, Tensor))
        return any(self._tokens.get(x, x) is None for x in given)


def _are_one(first: Tensor, second: Tensor) -> bool:
    """Tell whether two views of the same memory have the same layout."""
    begins = first.storage_offset() == second.storage_offset()
    return begins and first.shape == second.shape and first.stride() == second.stride()


def _picked(args: Sequence[Any]) -> tuple[Tensor, Tensor, int] | None:
    """Return the indexed tensor, the index over its tokens, (n,), and their number.

    Whole samples may be selected, too, for example by their language: with all their tokens.
    """
    x, index = _of_the_first_dimension(args)
    if isinstance(index, (Sequence, np.ndarray)):
        index = _as_tensor(index)
    if not isinstance(index, Tensor) or not x.is_floating_point():
        return None
    across = 1
    if index.dtype in (torch.bool, torch.uint8):
        index, across = index.flatten().nonzero().flatten(), index.dim()
    if index.dim() != 1:
        return None
    index = index.to(x.device)  # tokens on a GPU may be indexed from the CPU
    each = x.shape[across:-1].numel()
    if each != 1:
        index = (index[:, None] * each + torch.arange(each, device=index.device)).flatten()
    return x, index, x.shape[:-1].numel()


def _as_tensor(index: Any) -> Tensor | None:
    """Convert an index, a list or a NumPy array, to a tensor; ``None`` if that is impossible."""
    try:
        tensor = torch.as_tensor(index, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        return None
    return tensor if tensor.numel() else tensor.long()  # an empty list would give floats


def _repeated(args: Sequence[Any], result: Tensor) -> tuple[Tensor, Tensor, int] | None:
    """Return the same as :func:`_picked` if each row is repeated once per expert of a token."""
    x, *others = (arg for arg in args if isinstance(arg, Tensor))
    if others or x.dim() != 2 or result.shape[1:] != x.shape[1:] or not len(x):
        return None
    times = len(result) // len(x)
    return x, torch.arange(len(x), device=x.device).repeat_interleave(times), len(x)


def _of_the_first_dimension(args: Sequence[Any]) -> tuple[Tensor, Any]:
    """Return the indexed tensor and the index, ``None`` if it changes other dimensions, too."""
    if len(args) > 2:  # index_select, whose arguments may be named, in any order
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        x, index = sorted(tensors, key=lambda tensor: not tensor.is_floating_point())[:2]
        along = next((arg for arg in args if isinstance(arg, int)), None)  # None for NumPy numbers
        return x, index if along is not None and along % x.dim() == 0 else None
    x, index = args
    if not isinstance(index, tuple):
        return x, index
    parts = tuple(part for part in index if part is not None)
    return x, parts[0] if parts and _is_sliced(parts[1:]) else None


def _is_sliced(index: Any) -> bool:
    """Tell whether an index preserves order: with as many rows as before, they are the same."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is Ellipsis or part is None or isinstance(part, (slice, int)) for part in parts)


def _puts_rows(index: Any, value: Any) -> bool:
    """Tell whether an assignment may reorder rows: not one of a scalar or to a slice."""
    return isinstance(value, Tensor) and value.dim() > 1 and not _is_sliced(index)


class EagerExperts(AbstractContextManager[None]):
    """Make transformers multiply with experts one by one, where it would batch them.

    Args:
        modules: with experts; on every exit they get back the implementation that they have now.
    """

    _name = "_experts_implementation_internal"

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        configs = {id(c): c for c in (getattr(m, "config", None) for m in modules)}
        self._before = [
            (config, getattr(config, self._name))
            for config in configs.values()
            if hasattr(config, self._name)
        ]

    def __enter__(self) -> None:
        for config, _ in self._before:
            setattr(config, self._name, "eager")

    def __exit__(self, *exception: object) -> None:
        for config, value in self._before:
            setattr(config, self._name, value)
