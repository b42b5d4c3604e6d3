"""Build the result of a finished pass: each layer's part of the answers of the streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import eva_kernels
from eva_kernels.streaming import Array, InputStream, Spectrum, spectra

from .._peft_compat import library_versions
from ..model.targets import Target
from ..passes.ranks import Budget
from .config_json import config_to_dict
from .result import EvaResult

if TYPE_CHECKING:
    from ..calibrate import CalibrationPass

__all__ = ["collect_result"]


class _Layer(NamedTuple):
    """A layer that was called, its stream, and its part of the stream's answer."""

    target: Target
    stream: InputStream
    spectrum: Spectrum
    components: Tensor  # (K, in_features); K is at most the layer's largest rank
    singular_values: Tensor  # (K,), float32
    ratios: Tensor  # (K,), float32

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def precise_ratios(self) -> Array:
        """The ratios, rounded as in the result, so that ``reallocated`` decides the same."""
        limit = len(self.ratios)
        return self.spectrum.ratios[:limit].astype(np.float32).astype(np.float64)


def collect_result(run: CalibrationPass, peak_bytes: int) -> EvaResult:
    """Build the result of a finished pass."""
    layers = _called_layers(run)
    # An exact stream answers by eigen-decomposition, so the ranks come from the final spectra.
    budget = Budget([x.target for x in layers], run.options.budget, run.options.min_rank)
    ranks = budget.ranks_for([x.precise_ratios for x in layers])
    slots = run.collector.slots
    return EvaResult(
        ranks={x.name: rank for x, rank in zip(layers, ranks, strict=True)},
        components={x.name: x.components for x in layers},
        singular_values={x.name: x.singular_values for x in layers},
        explained_variance_ratio={x.name: x.ratios for x in layers},
        converged={x.name: x.stream.converged for x in layers},
        numerical_rank={x.name: x.spectrum.rank for x in layers},
        lost_variance={x.name: x.spectrum.lost for x in layers},
        method={x.name: x.stream.options.method for x in layers},
        in_features={x.name: x.target.in_features for x in layers},
        out_features={x.name: x.target.out_features for x in layers},
        base_ranks={x.name: x.target.rank for x in layers},
        alphas={x.name: x.target.alpha for x in layers},
        shared_inputs=_shared_inputs(run),
        tokens=run.tokens,
        skipped_tokens=run.skipped_tokens,
        steps=run.steps,
        forwards=run.forwards,
        seconds=run.seconds,
        peak_memory_bytes=max(peak_bytes, sum(slot.stream.nbytes for slot in slots)),
        history=run.history,
        metadata=_metadata(run),
        uncalled=run.uncalled,
        rank_steps={x.name: x.target.rank_multiple for x in layers if x.target.rank_multiple > 1},
        owners={x.name: [x.target.owner, x.target.owner_parts] for x in layers if x.target.owner},
    )


def _called_layers(run: CalibrationPass) -> list[_Layer]:
    """Return the layers that were called, in module order."""
    slots = run.collector.slots
    answers = spectra([slot.stream for slot in slots], torch.device("cpu"))
    components = [answer.components.float() for answer in answers]
    values = _as_float32([answer.values for answer in answers])
    ratios = _as_float32([answer.ratios for answer in answers])
    row_of = {id(slot): row for row, slot in enumerate(slots)}
    layers = []
    for index, target in enumerate(run.targets):
        slot = run.collector.slot_of.get(index)
        if slot is None:
            continue
        row, limit = row_of[id(slot)], run.max_components[index]
        parts = [_first_entries(part[row], limit) for part in (components, values, ratios)]
        layers.append(_Layer(target, slot.stream, answers[row], *parts))
    return layers


def _as_float32(arrays: Sequence[Array]) -> Sequence[Tensor]:
    """Return float64 arrays as float32 tensors, each with its own memory."""
    joined = torch.from_numpy(np.concatenate(arrays)).float()
    # one call for all layers
    parts: Sequence[Tensor] = torch.ops.aten.split_with_sizes_copy(joined, list(map(len, arrays)))
    return parts


def _first_entries(part: Tensor, count: int) -> Tensor:
    """Return the first entries; if these are all, the tensor itself, which layers share."""
    return part if len(part) == count else part[:count]


def _shared_inputs(run: CalibrationPass) -> list[list[str]]:
    shared = [sorted(slot.members) for slot in run.collector.slots if len(slot.members) > 1]
    return [[run.targets[i].name for i in members] for members in shared]


def _metadata(run: CalibrationPass) -> dict[str, Any]:
    config = run.architecture.config
    parameter = next(iter(run.model.parameters()), None)
    names = ("method", "oversample", "criterion", "budget", "min_rank", "precision", "seed")
    return {
        "eva_kernels": eva_kernels.__version__,
        "versions": library_versions(),
        "model": getattr(config, "_name_or_path", "") or type(run.model).__name__,
        "model_type": getattr(config, "model_type", None),
        "dtype": str(None if parameter is None else parameter.dtype).removeprefix("torch."),
        "device": str(run.device),
        "lora_config": config_to_dict(run.config),
        "options": {name: getattr(run.options, name) for name in names},
    }
