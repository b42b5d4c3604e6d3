"""``check_padding``: verifies by a second forward pass which tokens of a batch count."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from copy import copy
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._peft_compat import LoraConfig
from .calibrate import CalibrationPass, call_with_pass
from .errors import EvaError, EvaValueError
from .initialize import config_for_pass
from .inputs.other_padding import with_other_padding
from .model.divided import check_not_partitioned
from .model.targets import Target
from .model.wrappers import unwrap
from .options import CalibrateOptions
from .results.layer_names import module_kinds

__all__ = ["LayerRows", "PaddingCheck", "check_padding"]

CPU = torch.device("cpu")
# Rows are identified by their products with this many random directions.
_NUM_DIRECTIONS = 8
# Rows are equal up to this fraction of their length, for rounding errors when sums are taken in
# another order. It is larger for 16-bit tokens.
_RELATIVE_TOLERANCE, _HALF_TOLERANCE = 1e-5, 1e-2
_FORCED_OPTIONS = {
    "progress": False,
    "callback": None,
    "checkpoint": None,
    "early_exit": False,
    "group": None,
    "trim_padding": False,
    "tokens_per_step": None,
}


@dataclass(frozen=True)
class LayerRows:
    """The rows of a layer's input in one batch.

    Attributes:
        rows: number of all rows.
        counted: those that EVA counts.
        padding: those that change with the values in padding.
        padding_counted: those that are both. There should be none, except where tokens see padding,
            as after a convolution over the end of a sound.
        left_out: those that are neither: tokens masked by labels (``use_label_mask``), and padding
            whose values have no effect, as in a model that overwrites them with zeros.
        change: largest relative change of a row that counts, at most 1. Near 1 the row is padding;
            far below 1 it is a token that sees some.
    """

    rows: int
    counted: int
    padding: int
    padding_counted: int
    left_out: int
    change: float


@dataclass(frozen=True)
class PaddingCheck:
    """The result of :func:`check_padding`.

    Attributes:
        layers: the rows of every layer that was called, by its name.
        changed: the parts of the batch whose padding got other values.
    """

    layers: Mapping[str, LayerRows]
    changed: tuple[str, ...]

    @property
    def suspicious(self) -> tuple[str, ...]:
        """The layers in which a row that counts changes with the contents of padding."""
        return tuple(name for name, rows in self.layers.items() if rows.padding_counted)

    def summary(self) -> str:
        """Return a table as text: one line for layers of one kind with equal numbers of rows."""
        changes_by_line: dict[tuple[Any, ...], list[float]] = defaultdict(list)
        for name, kind in module_kinds(self.layers).items():
            *numbers, change = astuple(self.layers[name])
            key = (kind, *numbers)
            changes_by_line[key].append(change)
        column_heads = (
            "count",
            "rows",
            "counted",
            "padding",
            "padding counted",
            "left out",
            "change",
        )
        table = [("layers", *column_heads)]
        for (kind, *numbers), changes in changes_by_line.items():
            largest_change = f"{max(changes):.2g}" if max(changes) else ""
            table.append((kind, str(len(changes)), *map(str, numbers), largest_change))
        column = max(len(kind) for kind, *_ in table)
        return "\n".join(
            f"{kind:<{column}}"
            + "".join(
                f"{cell:>{len(head) + 3}}" for cell, head in zip(cells, column_heads, strict=True)
            )
            for kind, *cells in table
        )


def check_padding(
    model: nn.Module,
    batch: Any,
    config: LoraConfig | None = None,
    *,
    changed: Any = None,
    **options: Any,
) -> PaddingCheck:
    """Tell which tokens of a batch count in each layer, and whether padding is among them.

    The model is run twice: on the batch, and on a copy whose padding holds other values. Rows of a
    layer's input that differ are padding, or attend to padding; they are compared with those that
    :func:`initialize` would count.

    Args:
        model, config, options: as :func:`eva_kernels.calibrate`.
        batch: one batch of the loader, with padding in it.
        changed: the batch with other values in its padding; by default made from its masks.

    Returns:
        Numbers of rows for each layer; the model is not changed.

    Raises:
        EvaValueError: the masks of the batch show no padding, and ``changed`` is not given.
        EvaError: as :func:`eva_kernels.calibrate`.
    """
    inner, parsed = unwrap(model), CalibrateOptions.from_kwargs({**options, **_FORCED_OPTIONS})
    check_not_partitioned(inner)
    chosen = config_for_pass(inner, config, parsed)
    names: list[str] = []
    if changed is None:
        # a function of the user's may take what the model does not
        refusals = () if parsed.forward_fn is None else (EvaError,)
        with suppress(*refusals):
            changed, names = with_other_padding(batch, inner)
        if not names:
            raise EvaValueError(
                "the batch has no mask that marks padding; pass a batch with padding and its "
                "attention_mask, or pass as changed= the same batch with other values in its "
                "padding"
            )
    original, repadded = (
        _record_rows(inner, version, chosen, parsed) for version in (batch, changed)
    )
    no_rows = _RowRecorder(1)  # for a layer that is not called if padding has other contents
    compare_cached = functools.cache(_compare_rows)  # layers that share an input have the same rows
    layers = {
        name: compare_cached(recorded, repadded.get(name, no_rows))
        for name, recorded in original.items()
    }
    return PaddingCheck(layers, tuple(names))


def _record_rows(
    model: nn.Module, batch: Any, config: LoraConfig, options: CalibrateOptions
) -> dict[str, _RowRecorder]:
    """Run the model on a batch; return the rows that each layer has read, by its name."""

    def record(run: _RowRecordingPass) -> dict[str, _RowRecorder]:
        with run.collector:
            run.forward(run.parts_on_device(run.prepare(batch)))
        slots: list[Any] = run.collector.slots  # whose streams are _RowRecorder
        return {run.targets[i].name: slot.stream for slot in slots for i in slot.members}

    return call_with_pass(_RowRecordingPass, model, config, options, None, record)


class _RowRecordingPass(CalibrationPass):
    """A pass that records the rows its layers were given, instead of their statistics."""

    def make_stream(
        self, target: Target, dtype: torch.dtype, device: torch.device | None = None
    ) -> Any:
        """Return an object that stands in for a stream."""
        return _RowRecorder(target.in_features)


class _RowRecorder:
    """Stands in for a stream: projections that identify the rows, and which of them count.

    Args:
        features: D.
    """

    def __init__(self, features: int) -> None:
        generator = torch.Generator(CPU).manual_seed(features)
        self.tokens = 0
        self._directions = torch.randn(features, _NUM_DIRECTIONS, generator=generator, device=CPU)
        self.projections: list[Tensor] = []  # (N, directions) each
        self.counted: list[Tensor] = []  # bool (N,) each
        self.tolerance = 0.0

    def add(self, x: Tensor, rows: Tensor | None = None) -> int:
        """Record a call of the layer; returns how many rows count."""
        self._directions = self._directions.to(x.device)
        self.projections.append((x.float() @ self._directions).cpu())
        counted = torch.zeros(len(x), dtype=torch.bool, device=CPU)
        counted[slice(None) if rows is None else rows.cpu()] = True
        self.counted.append(counted)
        self.tolerance = max(
            self.tolerance, _RELATIVE_TOLERANCE if x.element_size() >= 4 else _HALF_TOLERANCE
        )
        num_counted = int(counted.sum())
        self.tokens += num_counted
        return num_counted

    def clone(self) -> _RowRecorder:
        """Return a copy, for a layer that no longer shares its input."""
        new = copy(self)
        new.projections, new.counted = list(self.projections), list(self.counted)
        return new


def _compare_rows(original: _RowRecorder, repadded: _RowRecorder) -> LayerRows:
    """Classify the rows of a layer and count each class."""
    no_rows = torch.empty(0, _NUM_DIRECTIONS, device=CPU)
    projections, other_projections = (
        torch.cat([*rows.projections, no_rows]) for rows in (original, repadded)
    )
    counted = torch.cat(original.counted)
    norms = projections.norm(dim=1)
    if projections.shape == other_projections.shape:
        padding = (projections - other_projections).norm(dim=1) > original.tolerance * norms
        # unchanged rows cannot be where a moved row went
        other_projections = other_projections[padding]
    else:
        padding = torch.ones_like(counted)
    change = 0.0
    # If padding is routed to other experts, one reads its tokens in another order or number.
    other_projections = (
        other_projections if len(other_projections) else torch.full_like(projections[:1], math.inf)
    )
    for i in (padding & counted).nonzero().flatten().tolist():
        distance = (other_projections - projections[i]).norm(dim=1).min()
        padding[i] = distance > original.tolerance * norms[i]
        if padding[i]:
            change = max(change, float((distance / norms[i]).clamp_max(1)))
    return LayerRows(
        len(projections),
        int(counted.sum()),
        int(padding.sum()),
        int((padding & counted).sum()),
        int((~padding & ~counted).sum()),
        change,
    )
