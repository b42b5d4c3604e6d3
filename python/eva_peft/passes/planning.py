"""Planning before anything runs: how each layer input is tracked, and the memory needed."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import nn

from eva_kernels.streaming import (
    StreamPlan,
    answer_bytes,
    fold_bytes,
    plan_streams,
    stream_bytes,
)

from ..errors import EvaTypeError, EvaValueError
from ..model.architecture import architecture_of
from ..model.targets import Target
from ..options import AUTO, CalibrateOptions
from ..surroundings.devices import device_of

__all__ = ["Estimate", "estimate_targets", "log_plan", "num_components_of", "plan_targets"]

_LOGGER = logging.getLogger("eva_kernels")

# Share of the model's own bytes that "auto" may spend on exactness.
AUTO_BUDGET = 0.03


@dataclass(frozen=True)
class Estimate:
    """Estimated memory of a calibration pass.

    Attributes:
        state_bytes: the streaming state if no two layers share an input, so an upper bound.
        workspace_bytes: the largest temporaries of a step, or of the answer; those of a fold and of
            the answer only beyond the memory of the forward pass, which is free again by then.
        activation_bytes: rough size of the forward pass's own live activations.
        peak_bytes: their sum: expected peak above the weights.
        method: ``"sketch"`` or ``"gram"`` by layer.
    """

    state_bytes: int
    workspace_bytes: int
    activation_bytes: int
    peak_bytes: int
    method: dict[str, str]


def num_components_of(target: Target, rho: float) -> int:
    """Return K, the most components that a layer may be given: ``round(r * rho)``, at most D.

    It is a multiple of the layer's ``rank_multiple``.

    Raises:
        EvaValueError: ``rho`` is not finite.
    """
    if not math.isfinite(rho):
        raise EvaValueError(f"rho={rho} must be finite")
    limit = min(round(target.rank * rho), target.in_features)
    return max(1, limit // target.rank_multiple * target.rank_multiple)


def plan_targets(
    model: nn.Module, targets: Sequence[Target], rho: float, options: CalibrateOptions
) -> dict[int, StreamPlan]:
    """Plan the streams, with one plan for all layer inputs of equal width.

    Layers of equal width get the same shapes, so that their folds are batched.

    Raises:
        EvaValueError: an explicit memory budget is too small.
    """
    widest: dict[int, int] = {}
    for target in targets:
        k = num_components_of(target, rho)
        widest[target.in_features] = max(k, widest.get(target.in_features, 0))
    features = [t.in_features for t in targets]
    itemsize = _state_itemsize(model)
    budget: int | None
    if options.memory_budget == AUTO:
        model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        floor_plans = plan_streams(
            features, [widest[d] for d in features], method="sketch", oversample=options.oversample
        )
        floor_bytes = sum(stream_bytes(p, itemsize) for p in floor_plans)
        share = int(AUTO_BUDGET * model_bytes)
        budget = None if options.method == "gram" else max(share, floor_bytes)
    else:
        budget = int(options.memory_budget)
    plans = plan_streams(
        features,
        [widest[d] for d in features],
        method=options.method,
        oversample=options.oversample,
        memory_budget=budget,
        itemsize=itemsize,
    )
    # If the budget runs out among layers of one width, the last is sketched, and so are all then.
    return {plan.features: plan for plan in plans}


def estimate_targets(
    model: nn.Module,
    targets: Sequence[Target],
    rho: float,
    options: CalibrateOptions,
    batch_shape: Sequence[int],
) -> Estimate:
    """Estimate a pass over batches of ``batch_shape`` = (samples, tokens).

    Raises:
        EvaTypeError, EvaValueError: ``batch_shape`` is not such a pair.
    """
    if not isinstance(batch_shape, Sequence) or not all(
        isinstance(n, Integral) for n in batch_shape
    ):
        raise EvaTypeError(f"batch_shape={batch_shape!r} must be (samples, tokens)")
    if len(batch_shape) != 2 or min(batch_shape) < 1:
        raise EvaValueError(
            f"batch_shape={batch_shape!r} must be (samples, tokens), both at least 1"
        )
    plan = plan_targets(model, targets, rho, options)
    tokens = math.prod(map(int, batch_shape))
    plans, state_itemsize = [plan[t.in_features] for t in targets], _state_itemsize(model)
    state = sum(stream_bytes(each, state_itemsize) for each in plans)
    device = device_of(model)  # unknown for a model on the meta device
    on_cpu = device is not None and device.type == "cpu"
    fold = sum(fold_bytes(each, state_itemsize, on_cpu) for each in plans)
    answer = max(map(answer_bytes, plans))
    widest = max(targets, key=lambda t: t.in_features)
    itemsize = next((p.element_size() for p in model.parameters()), 4)
    step = plan[widest.in_features]
    # float64 copies of a chunk in the fold, or the centred tile in the accumulation
    workspace = max(6 * 8 * step.width * step.features, 4 * min(tokens, 512) * step.features)
    # residual stream, the widest layer's input and output, and their two operands
    activation = itemsize * tokens * (3 * widest.in_features + 2 * widest.out_features)
    # or the logits, computed in the first pass, when the last needed layer is not known yet
    activation = max(activation, itemsize * tokens * _logits_per_token(model))
    workspace = max(workspace, fold - activation, answer - activation)
    return Estimate(
        state_bytes=state,
        workspace_bytes=workspace,
        activation_bytes=activation,
        peak_bytes=state + workspace + activation,
        method={t.name: plan[t.in_features].method for t in targets},
    )


def log_plan(
    model: nn.Module,
    targets: Sequence[Target],
    rho: float,
    options: CalibrateOptions,
    device: torch.device,
) -> None:
    """Log at the start of a pass how its layers will be tracked."""
    if not _LOGGER.isEnabledFor(logging.INFO):
        return
    plan = estimate_targets(model, targets, rho, options, (1, 1))
    methods = list(plan.method.values())
    _LOGGER.info(
        "calibration pass begins on %s: %d layers (%d exact, %d sketched), at most %d bytes of "
        "state",
        device,
        len(targets),
        methods.count("gram"),
        methods.count("sketch"),
        plan.state_bytes,
    )


def _state_itemsize(model: nn.Module) -> int:
    """Return the bytes per number of the state, which is float64 if any parameter is."""
    return 8 if any(p.dtype == torch.float64 for p in model.parameters()) else 4


def _logits_per_token(model: nn.Module) -> int:
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    width = int(getattr(head, "out_features", 0))
    # Capping (Gemma 2) makes a second tensor of logits.
    capped = getattr(architecture_of(model).config, "final_logit_softcapping", None)
    return 2 * width if capped else width
