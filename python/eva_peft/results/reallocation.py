"""Compute other ranks from the spectra of a finished pass, without data or model."""

from __future__ import annotations

from copy import copy
from numbers import Real
from typing import Any

from torch import nn

from .._peft_compat import LoraConfig, anchored_pattern, eva_config_of, pattern_value
from ..errors import EvaValueError
from ..model.checks import checked_number
from ..model.targets import Target
from ..options import CalibrateOptions
from ..passes.planning import num_components_of
from ..passes.ranks import Budget, scaled_alpha
from .result import EvaResult

__all__ = ["ALLOCATION_OPTIONS", "reallocate"]

ALLOCATION_OPTIONS = ("r", "rho", "budget", "min_rank")


def reallocate(
    result: EvaResult, r: int | None, rho: float | None, budget: str, min_rank: int
) -> EvaResult:
    """Implement :meth:`EvaResult.reallocated`."""
    CalibrateOptions(budget=budget, min_rank=min_rank)  # checks both
    config = result.config
    r = None if r is None else checked_number("r", r)
    if rho is None:
        rho = eva_config_of(config).rho
    rho = float(checked_number("rho", rho, Real))
    targets = [_make_target(result, name, r) for name in result.ranks]
    ratios = []
    for target in targets:
        name = target.name
        num_needed, num_tracked = num_components_of(target, rho), len(result.singular_values[name])
        if num_needed > num_tracked:
            raise EvaValueError(
                f"layer {name}: r={target.rank} and rho={rho} may need {num_needed} components, "
                f"but this result has {num_tracked}; calibrate again with a larger r or rho"
            )
        ratios.append(result.explained_variance_ratio[name][:num_needed])
    reallocated = copy(result)  # shallow: tensors are shared, never changed
    ranks = Budget(targets, budget, min_rank).ranks_for(ratios)
    reallocated.ranks = dict(zip(result.ranks, ranks, strict=True))
    reallocated.base_ranks = {t.name: t.rank for t in targets}
    if r is not None:
        reallocated.alphas = {
            t.name: _scaled_alpha(config, t.alpha, result.base_ranks[t.name], r) for t in targets
        }
        lora_config = {**result.metadata["lora_config"], **_size_fields(reallocated, config, r)}
        reallocated.metadata = {**result.metadata, "lora_config": lora_config}
    return reallocated


def _make_target(result: EvaResult, name: str, r: int | None) -> Target:
    rank = result.base_ranks[name] if r is None else r
    rank_multiple = result.rank_steps.get(name, 1)
    if rank % rank_multiple:
        raise EvaValueError(
            f"layer {name}: r={rank} is not a multiple of the {rank_multiple} groups of its "
            "convolution"
        )
    owner, owner_parts = result.owners.get(name, ("", 1))
    features, out, alpha = result.in_features[name], result.out_features[name], result.alphas[name]
    module = nn.Identity()  # it is not run
    return Target(
        name,
        module,
        features,
        out,
        rank,
        alpha,
        rank_multiple=rank_multiple,
        owner=owner,
        owner_parts=owner_parts,
    )


def _scaled_alpha(config: LoraConfig, alpha: float, rank: int, new_rank: int) -> float:
    if not eva_config_of(config).adjust_scaling_factors:
        return alpha
    return scaled_alpha(config, alpha, rank, new_rank)


def _alpha_from_pattern(config: LoraConfig, name: str, r: int) -> float:
    """Return the alpha at rank r of a layer, or of a key of the patterns."""
    alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
    return _scaled_alpha(config, alpha, pattern_value(config.rank_pattern, name, config.r), r)


def _size_fields(result: EvaResult, config: LoraConfig, r: int) -> dict[str, Any]:
    """Return the config fields that set the adapters' sizes, with rank r for every layer."""
    default = _scaled_alpha(config, config.lora_alpha, config.r, r)
    old_alphas = config.alpha_pattern
    rank_only_keys = [
        key
        for key in config.rank_pattern
        if key not in old_alphas and pattern_value(old_alphas, key, None) is not None
    ]
    # these apply to layers that no pass reads, such as embeddings; the first matching key counts
    keys = [*rank_only_keys, *old_alphas, *config.rank_pattern]
    pattern_alphas = {key: _alpha_from_pattern(config, key, r) for key in keys}
    alphas = {result.owners.get(name, [name])[0]: alpha for name, alpha in result.alphas.items()}
    for name in result.uncalled:
        alphas[name] = _alpha_from_pattern(config, name, r)
    anchored_alphas = {
        anchored_pattern(name): alpha
        for name, alpha in alphas.items()
        if pattern_value(pattern_alphas, name, default) != alpha
    }
    pattern = anchored_alphas | pattern_alphas | anchored_alphas  # in this order, with these values
    return {"r": r, "rank_pattern": {}, "lora_alpha": default, "alpha_pattern": pattern}
