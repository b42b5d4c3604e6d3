"""The tokens of a layer's input: a matrix, and the rows of it that count."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import EvaValueError
from ..inputs.selectors import Selector
from ..inputs.token_mask import TokenMask
from ..model.layers import Patches
from ..model.routing import RoutedInputs
from ..model.targets import Target

__all__ = ["LayerTokens"]


class LayerTokens:
    """The tokens of the target layers' inputs in a forward pass.

    Args:
        targets: the layers.
        selectors: per layer, a user's function that selects rows, or ``None`` to use the mask.
        routed: which tokens the inputs of experts are.

    Attributes:
        mask: which tokens of the batch count.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        selectors: Sequence[Selector | None],
        routed: RoutedInputs,
    ) -> None:
        self._targets, self._selectors, self._routed = targets, selectors, routed
        self.mask = TokenMask(None)
        self._model_input: Any = None
        self._step = 0
        # whether inputs are selected tokens; None: unknown yet
        self._inputs_are_routed: bool | None = None

    def begin_forward(self, mask: TokenMask, model_input: Any, step: int) -> None:
        """Prepare for a forward pass.

        Args:
            mask: which tokens of the batch count.
            model_input: passed to the users' selectors.
            step: the current one, from 0; errors name it.
        """
        self.mask, self._model_input, self._step = mask, model_input, step
        self._routed.tracks_tokens = mask.excludes_tokens and self._inputs_are_routed is not False

    def end_forward(self) -> None:
        """Finish a forward pass in which every needed layer was called; forgets the batch."""
        if self._routed.tracks_tokens:
            self._inputs_are_routed = bool(self._inputs_are_routed)
        self._routed.clear_tokens()
        self.mask, self._model_input = TokenMask(None), None

    def matrices(
        self, i: int, x: Tensor, args: tuple[Any, ...]
    ) -> Iterable[tuple[Tensor, Tensor | None]]:
        """Return the tokens of a layer's input as (N, D) matrices, each with the rows to use.

        Rows are indices; ``None`` means all. There is one matrix, or several of patches, which are
        large and are made one at a time.

        Args:
            i: index of the layer.
            x: its input.
            args: of its call, for a user's selector.

        Raises:
            EvaValueError: the input is not what the layer or the mask expects.
        """
        target, selector = self._targets[i], self._selectors[i]
        if selector is not None:
            x = selector(args or (x,), self._model_input, target.name)
            return ((self._as_matrix(target, x), None),)
        if target.patches is not None:
            return self._patch_matrices(target, target.patches, x)
        rows = self._masked_rows(x, target.name)
        return ((self._as_matrix(target, x), rows),)

    def _as_matrix(self, target: Target, x: Tensor) -> Tensor:
        self._check_tokens(target, x, not x.is_nested and x.shape[-1:] == (target.in_features,))
        x = x.detach() if x.requires_grad else x
        return x if x.dim() == 2 else x.reshape(-1, target.in_features)

    def _patch_matrices(
        self, target: Target, patches: Patches, x: Tensor
    ) -> Iterator[tuple[Tensor, None]]:
        self._check_tokens(target, x, x.dim() - len(patches.kernel) in (1, 2))
        windows = patches.windows(x.detach())
        shape = torch.Size([*windows.shape[: windows.dim() // 2], target.in_features])
        rows = self.mask.rows(shape, x.device, target.name)
        for part in patches.token_chunks(windows, rows):
            yield part, None

    def _masked_rows(self, x: Tensor, name: str) -> Tensor | None:
        routed = self._routed.token_indices(x)
        if routed is not None:
            has_mask, rows = self.mask.rows_of_selected(*routed, name)
            if has_mask:
                self._inputs_are_routed = True
                return rows
        return self.mask.for_input(x).rows(x.shape, x.device, name, x)

    def _check_tokens(self, target: Target, x: Tensor, has_expected_shape: bool) -> None:
        if x.is_nested or x.layout != torch.strided:
            kind = "a nested tensor" if x.is_nested else f"a tensor of layout {x.layout}"
            raise EvaValueError(
                f"layer {target.name}, step {self._step + 1}: expected a dense tensor, got {kind}; "
                "pass prepare_layer_inputs_fn to convert the layer's input"
            )
        if x.is_floating_point() and has_expected_shape:
            return
        expected = f"floating-point tokens of {target.in_features} features"
        if target.patches is not None and not has_expected_shape:
            sizes = ", ".join("space" for _ in target.patches.kernel)
            expected += f", or an input of shape (samples, {target.patches.channels}, {sizes})"
        raise EvaValueError(
            f"layer {target.name}, step {self._step + 1}: expected {expected}, got "
            f"a tensor of shape {tuple(x.shape)} and dtype {x.dtype}; pass "
            "prepare_layer_inputs_fn to convert the layer's input"
        )
