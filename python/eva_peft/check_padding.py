"""``check_padding``: which tokens of a batch count, checked by a second forward pass."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Mapping
from copy import copy
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._peft_compat import LoraConfig
from .calibrate import CalibrationPass, with_pass
from .errors import EvaValueError
from .initialize import chosen_config
from .inputs.other_padding import with_other_padding
from .model.divided import check_undivided
from .model.targets import Target, unwrap
from .options import CalibrateOptions
from .results.layer_names import kinds_of

__all__ = ["LayerRows", "PaddingCheck", "check_padding"]

CPU = torch.device("cpu")
# What tells one row from another: its products with so many random directions.
_DIRECTIONS = 8
# Rows are alike up to this part of their length: what rounding does, where the order of sums is
# another. Of tokens of 16 bits it is more.
_ALIKE, _ALIKE_IN_HALF = 1e-5, 1e-2
_FORCED = {
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
        rows: all of them.
        counted: those that EVA counts.
        padding: those that change with the values in padding.
        padding_counted: those that are both. There should be none, except where tokens see padding,
            as after a convolution over the end of a sound.
        left_out: those that are neither: tokens that labels leave out (``use_label_mask``), and
            padding whose values have no effect, as where a model overwrites them with zeros.
        change: largest relative change of a row that counts, at most 1. Near 1 the row is padding,
            far below it is a token that sees some.
    """

    rows: int
    counted: int
    padding: int
    padding_counted: int
    left_out: int
    change: float


@dataclass(frozen=True)
class PaddingCheck:
    """What :func:`check_padding` has found.

    Attributes:
        layers: by name, of those that were called.
        changed: the parts of the batch whose padding got other values.
    """

    layers: Mapping[str, LayerRows]
    changed: tuple[str, ...]

    @property
    def suspicious(self) -> tuple[str, ...]:
        """The layers of which a row counts that changes with the contents of padding."""
        return tuple(name for name, found in self.layers.items() if found.padding_counted)

    def summary(self) -> str:
        """Return a table as text: a line for layers of one kind with equal numbers of rows."""
        lines: dict[tuple[Any, ...], list[float]] = defaultdict(list)
        for name, kind in kinds_of(self.layers).items():
            *numbers, change = astuple(self.layers[name])
            key = (kind, *numbers)
            lines[key].append(change)
        heads = ("count", "rows", "counted", "padding", "padding counted", "left out", "change")
        table = [("layers", *heads)]
        for (kind, *numbers), changes in lines.items():
            most = f"{max(changes):.2g}" if max(changes) else ""
            table.append((kind, str(len(changes)), *map(str, numbers), most))
        column = max(len(kind) for kind, *_ in table)
        return "\n".join(
            f"{kind:<{column}}"
            + "".join(f"{cell:>{len(head) + 3}}" for cell, head in zip(cells, heads, strict=True))
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
        Numbers of rows for each layer; nothing of the model is changed.

    Raises:
        EvaValueError: the masks of the batch tell of no padding, and ``changed`` is not given.
        EvaError: as :func:`eva_kernels.calibrate`.
    """
    inner, parsed = unwrap(model), CalibrateOptions.from_kwargs({**options, **_FORCED})
    check_undivided(inner)
    chosen = chosen_config(inner, config, parsed)
    names: list[str] = []
    if changed is None:
        changed, names = with_other_padding(batch, inner)
        if not names:
            raise EvaValueError(
                "no mask of the batch says where padding is; pass a batch with padding, or as "
                "changed= the same batch with other values in its padding"
            )
    before, after = (_rows(inner, each, chosen, parsed) for each in (batch, changed))
    none = _Rows(1)  # of a layer that is not called where padding has other contents
    compared = functools.cache(_compared)  # layers that share an input have the same rows
    layers = {name: compared(seen, after.get(name, none)) for name, seen in before.items()}
    return PaddingCheck(layers, tuple(names))


def _rows(
    model: nn.Module, batch: Any, config: LoraConfig, options: CalibrateOptions
) -> dict[str, _Rows]:
    """Run the model on a batch; return what each layer has read, by its name."""

    def look(run: _Look) -> dict[str, _Rows]:
        with run.collector:
            run.forward(run.ready(run.prepare(batch)))
        slots: list[Any] = run.collector.slots  # of what _Look makes in place of streams
        return {run.targets[i].name: slot.stream for slot in slots for i in slot.members}

    return with_pass(_Look, model, config, options, None, look)


class _Look(CalibrationPass):
    """A pass that keeps which rows its layers were given, in place of their sums."""

    def make_stream(
        self, target: Target, dtype: torch.dtype, device: torch.device | None = None
    ) -> Any:
        """Return what takes the place of a stream."""
        return _Rows(target.in_features)


class _Rows:
    """Stands in for a stream: what tells the rows apart, and which of them count.

    Args:
        features: D.
    """

    def __init__(self, features: int) -> None:
        generator = torch.Generator(CPU).manual_seed(features)
        self.tokens = 0
        self._directions = torch.randn(features, _DIRECTIONS, generator=generator, device=CPU)
        self.marks: list[Tensor] = []  # (N, directions) each
        self.counted: list[Tensor] = []  # bool (N,) each
        self.alike = 0.0

    def add(self, x: Tensor, rows: Tensor | None = None) -> int:
        """Keep a call of the layer; returns how many rows count."""
        self._directions = self._directions.to(x.device)
        self.marks.append((x.float() @ self._directions).cpu())
        counted = torch.zeros(len(x), dtype=torch.bool, device=CPU)
        counted[slice(None) if rows is None else rows.cpu()] = True
        self.counted.append(counted)
        self.alike = max(self.alike, _ALIKE if x.element_size() >= 4 else _ALIKE_IN_HALF)
        used = int(counted.sum())
        self.tokens += used
        return used

    def clone(self) -> _Rows:
        """Return a copy, for a layer that shares its input no more."""
        new = copy(self)
        new.marks, new.counted = list(self.marks), list(self.counted)
        return new


def _compared(before: _Rows, after: _Rows) -> LayerRows:
    """Return how many rows of a layer are what."""
    none = torch.empty(0, _DIRECTIONS, device=CPU)
    marks, others = (torch.cat([*rows.marks, none]) for rows in (before, after))
    counted = torch.cat(before.counted)
    length = marks.norm(dim=1)
    if marks.shape == others.shape:
        padding = (marks - others).norm(dim=1) > before.alike * length
        others = others[padding]  # what is where it was is no other row
    else:
        padding = torch.ones_like(counted)
    change = 0.0
    # Experts read tokens in another order, and as many others, once padding goes elsewhere.
    others = others if len(others) else torch.full_like(marks[:1], math.inf)
    for i in (padding & counted).nonzero().flatten().tolist():
        apart = (others - marks[i]).norm(dim=1).min()
        padding[i] = apart > before.alike * length[i]
        if padding[i]:
            change = max(change, float((apart / length[i]).clamp_max(1)))
    return LayerRows(
        len(marks),
        int(counted.sum()),
        int(padding.sum()),
        int((padding & counted).sum()),
        int((~padding & ~counted).sum()),
        change,
    )
