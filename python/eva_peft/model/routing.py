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
_SCATTERING = ("index_add", "index_copy", "index_put", "scatter", "scatter_add", "scatter_reduce")
_TRANSPOSING = ("moveaxis", "movedim", "permute", "swapaxes", "swapdims", "t", "transpose")
_REORDERING = (*_GATHERING, *_SCATTERING, *_TRANSPOSING)
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
        on_input: ``f(layer, x)`` before a product of x, (..., D), with a layer's weight.

    Attributes:
        tracks_tokens: tokens are tracked.
        paused: the current computation is not part of the model, and is ignored.
    """

    def __init__(
        self, weights: Iterable[tuple[int, ExpertWeight]], on_input: Callable[[int, Tensor], None]
    ) -> None:
        super().__init__()
        self.tracks_tokens = self.paused = self._unpacked = False
        # layers with x @ W where lora_A is on W's output side
        self.transposed_layers: set[int] = set()
        self._on_input = on_input
        self._experts_by_address: dict[int, list[tuple[ExpertWeight, dict[int, int]]]] = {}
        layers_by_parameter: dict[int, dict[int, int]] = {}
        for layer, weight in weights:
            layer_of_expert = layers_by_parameter.setdefault(id(weight.parameter), {})
            if not layer_of_expert:
                address = weight.parameter.untyped_storage().data_ptr()
                self._experts_by_address.setdefault(address, []).append((weight, layer_of_expert))
            layer_of_expert[weight.index] = layer
        self._tokens: Any = WeakTensorKeyDictionary()

    @property
    def is_needed(self) -> bool:
        """Whether there is anything to observe that hooks cannot."""
        return bool(self._experts_by_address) or self.tracks_tokens

    def token_indices(self, x: Tensor) -> tuple[Tensor, int] | None:
        """Return the token index of each row of x and the number of tokens; ``None`` if unknown."""
        # nothing is known then, and the lookup is slower than this check
        if not self.tracks_tokens:
            return None
        found: tuple[Tensor, int] | None = self._tokens.get(x)
        return found

    def clear_tokens(self) -> None:
        """Forget the tensors of a forward pass."""
        self._tokens.clear()
        self._unpacked = False

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        arguments = (*args, *kwargs.values())
        if self._experts_by_address and func in _PRODUCTS:
            x, weight = arguments[:2]
            self._report_product(x, weight, summed_dim=1 if func is functional.linear else 0)
        elif self._experts_by_address and func in _BATCHED:
            self._report_batched_product(*arguments[:2])
        result = func(*args, **kwargs)
        if self.tracks_tokens and func is Tensor.__setitem__ and _may_reorder_rows(*args[1:]):
            self._tokens.pop(args[0], None)
        if self.tracks_tokens and func in _SPLITTING:
            self._track_split(arguments[0], result)
        if self.tracks_tokens:
            for part in result if isinstance(result, tuple) else (result,):
                if isinstance(part, Tensor) and part.dim() >= 2:
                    self._track_result(func, arguments, part)
        return result

    def _experts_sharing_memory(self, weight: Any) -> Sequence[tuple[ExpertWeight, dict[int, int]]]:
        """Return an expert of each parameter that a weight is a view of, and all its layers."""
        if not isinstance(weight, Tensor) or weight.device.type == "meta":
            return ()
        return self._experts_by_address.get(weight.untyped_storage().data_ptr(), ())

    def _report_batched_product(self, x: Tensor, weight: Any) -> None:
        """Report the batched product of all experts' tokens, (E, N, D), with their weights."""
        for expert, layer_of_expert in self._experts_sharing_memory(weight):
            as_multiplied, transposed = expert.parameter, expert.parameter.mT
            if not expert.transposed:
                as_multiplied, transposed = transposed, as_multiplied
            if _is_same_view(weight, as_multiplied):
                for index, layer in layer_of_expert.items():
                    self._on_input(layer, x[index])
            elif _is_same_view(weight, transposed):
                self.transposed_layers |= set(layer_of_expert.values())

    def _report_product(self, x: Tensor, weight: Any, summed_dim: int) -> None:
        """Report the product of an expert's tokens, (..., D), with its weight.

        Args:
            x: the tokens.
            weight: of one expert, or, like x with a dimension more, of all.
            summed_dim: the dimension of the weight that the product sums over.
        """
        for expert, layer_of_expert in self._experts_sharing_memory(weight):
            parameter = expert.parameter
            if weight.dim() != 2:
                if x.dim() == weight.dim() == 3 and len(x) == len(weight):
                    self._report_batched_product(x, weight)
                return
            offset = int(weight.storage_offset() - parameter.storage_offset())
            index, remainder = (
                divmod(offset, parameter.stride(0)) if parameter.dim() == 3 else (0, 0)
            )
            size = parameter.shape[-2:].numel()
            if remainder or weight.numel() != size or index not in layer_of_expert:
                continue
            if weight.stride(summed_dim) == parameter.stride(-2 if expert.transposed else -1):
                self._on_input(layer_of_expert[index], x)
            else:
                self.transposed_layers.add(layer_of_expert[index])
            return

    def _track_result(self, func: Any, args: Sequence[Any], result: Tensor) -> None:
        num_rows = result.shape[:-1].numel()
        unpacking = getattr(func, "__name__", "") == _UNPACKING
        self._unpacked |= unpacking
        if unpacking or (self._unpacked and self._has_unknown_tokens(args)):
            self._tokens[result] = None
            return
        if func in _INDEXING or func in _REPEATING:
            selection = _repeated_rows(args, result) if func in _REPEATING else _selected_rows(args)
            if selection is not None and len(selection[1]) == num_rows:
                self._tokens[result] = self._compose_indices(*selection)
            if func is not Tensor.__getitem__ or not _keeps_row_order(args[-1]):
                return
            self._track_slice(*_first_dimension_index(args), result)
        if getattr(func, "__name__", "").removesuffix("_") in _REORDERING:
            self._tokens.pop(result, None)  # it may be an argument, changed in place
            return
        if func in _JOINING:
            args = next(arg for arg in args if isinstance(arg, (list, tuple)))
            if self._track_concatenation(args, result):
                return
        # a product has the rows of its first factor
        for x in args[:1] if func in (*_PRODUCTS, *_BATCHED) else args:
            tracked = self._tokens.get(x) if isinstance(x, Tensor) else None
            if tracked is not None and len(tracked[0]) == num_rows:
                self._tokens[result] = tracked
                return

    def _track_slice(self, x: Tensor, index: Any, result: Tensor) -> None:
        """Track a slice of tokens that were sorted by expert."""
        tracked = self._tokens.get(x)
        if tracked is not None and x.dim() == 2 and isinstance(index, slice):
            self._tokens[result] = (tracked[0][index], tracked[1])

    def _track_split(self, x: Tensor, parts: Sequence[Tensor]) -> None:
        """Track consecutive rows, split between experts."""
        tracked = self._tokens.get(x)
        lengths = [len(part) for part in parts]
        if tracked is None or sum(lengths) != len(tracked[0]) or x.dim() != 2:
            return
        for part, tokens in zip(parts, tracked[0].split(lengths), strict=True):
            self._tokens[part] = (tokens, tracked[1])

    def _track_concatenation(self, parts: Sequence[Tensor], result: Tensor) -> bool:
        """Track rows that are concatenated again after experts had them in parts."""
        tracked = [found for found in map(self._tokens.get, parts) if found is not None]
        counts = {count for _, count in tracked}
        along_rows = sum(map(len, parts)) == len(result)  # concatenated along the first dimension
        if len(tracked) < len(parts) or len(counts) != 1 or not along_rows:
            return False
        self._tokens[result] = (torch.cat([tokens for tokens, _ in tracked]), counts.pop())
        return True

    def _compose_indices(self, x: Tensor, index: Tensor, count: int) -> tuple[Tensor, int]:
        earlier = self._tokens.get(x)
        return (index, count) if earlier is None else (earlier[0][index], earlier[1])

    def _has_unknown_tokens(self, args: Sequence[Any]) -> bool:
        """Tell whether an argument of a function was computed from an unpacked tensor."""
        items = (arg if isinstance(arg, (list, tuple)) else (arg,) for arg in args)
        tensors = (x for x in chain.from_iterable(items) if isinstance(x, Tensor))
        return any(self._tokens.get(x, x) is None for x in tensors)


def _is_same_view(first: Tensor, second: Tensor) -> bool:
    """Tell whether two views of the same memory have the same layout."""
    same_offset = first.storage_offset() == second.storage_offset()
    return same_offset and first.shape == second.shape and first.stride() == second.stride()


def _selected_rows(args: Sequence[Any]) -> tuple[Tensor, Tensor, int] | None:
    """Return the indexed tensor, the index over its tokens, (n,), and their number.

    Whole samples may be selected, too, for example by their language: with all their tokens.
    """
    x, index = _first_dimension_index(args)
    if isinstance(index, (Sequence, np.ndarray)):
        index = _as_tensor(index)
    if not isinstance(index, Tensor) or not x.is_floating_point():
        return None
    num_index_dims = 1
    if index.dtype in (torch.bool, torch.uint8):
        index, num_index_dims = index.flatten().nonzero().flatten(), index.dim()
    if index.dim() != 1:
        return None
    index = index.to(x.device)  # tokens on a GPU may be indexed from the CPU
    tokens_per_sample = x.shape[num_index_dims:-1].numel()
    if tokens_per_sample != 1:
        index = (
            index[:, None] * tokens_per_sample
            + torch.arange(tokens_per_sample, device=index.device)
        ).flatten()
    return x, index, x.shape[:-1].numel()


def _as_tensor(index: Any) -> Tensor | None:
    """Convert an index, a list or a NumPy array, to a tensor; ``None`` if that is impossible."""
    try:
        tensor = torch.as_tensor(index, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        return None
    return tensor if tensor.numel() else tensor.long()  # an empty list would give floats


def _repeated_rows(args: Sequence[Any], result: Tensor) -> tuple[Tensor, Tensor, int] | None:
    """Return the same as :func:`_selected_rows` if each row is repeated once per expert."""
    x, *others = (arg for arg in args if isinstance(arg, Tensor))
    if others or x.dim() != 2 or result.shape[1:] != x.shape[1:] or not len(x):
        return None
    times = len(result) // len(x)
    return x, torch.arange(len(x), device=x.device).repeat_interleave(times), len(x)


def _first_dimension_index(args: Sequence[Any]) -> tuple[Tensor, Any]:
    """Return the indexed tensor and the index, ``None`` if it changes other dimensions, too."""
    if len(args) > 2:  # index_select, whose arguments may be named, in any order
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        x, index = sorted(tensors, key=lambda tensor: not tensor.is_floating_point())[:2]
        dim = next((arg for arg in args if isinstance(arg, int)), None)  # None for NumPy numbers
        return x, index if dim is not None and dim % x.dim() == 0 else None
    x, index = args
    if not isinstance(index, tuple):
        return x, index
    parts = tuple(part for part in index if part is not None)
    return x, parts[0] if parts and _keeps_row_order(parts[1:]) else None


def _keeps_row_order(index: Any) -> bool:
    """Tell whether an index preserves order: with as many rows as before, they are the same."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is Ellipsis or part is None or isinstance(part, (slice, int)) for part in parts)


def _may_reorder_rows(index: Any, value: Any) -> bool:
    """Tell whether an assignment may reorder rows: not one of a scalar or to a slice."""
    return isinstance(value, Tensor) and value.dim() > 1 and not _keeps_row_order(index)


class EagerExperts(AbstractContextManager[None]):
    """Make transformers multiply with experts one by one, where it would batch them.

    Args:
        modules: with experts; on every exit they get back the implementation that they have now.
    """

    _config_field = "_experts_implementation_internal"

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        configs = {id(c): c for c in (getattr(m, "config", None) for m in modules)}
        self._original_values = [
            (config, getattr(config, self._config_field))
            for config in configs.values()
            if hasattr(config, self._config_field)
        ]

    def __enter__(self) -> None:
        for config, _ in self._original_values:
            setattr(config, self._config_field, "eager")

    def __exit__(self, *exception: object) -> None:
        for config, value in self._original_values:
            setattr(config, self._config_field, value)
