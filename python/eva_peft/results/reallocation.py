"""Compute other ranks from the spectra of a finished pass, without data or model."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from numbers import Real
from typing import Any

from torch import nn

from .._peft_compat import LoraConfig, anchored_pattern, eva_of, pattern_value
from ..errors import EvaTypeError, EvaValueError
from ..model.checks import checked_number
from ..model.targets import Target
from ..options import CalibrateOptions
from ..passes.planning import num_components_of
from ..passes.ranks import Budget, scaled_alpha
from .result import EvaResult

__all__ = ["check_allocation", "reallocate"]

ALLOCATION = ("r", "rho", "budget", "min_rank")


def check_allocation(names: Iterable[str]) -> None:
    """Refuse names that are not options of :func:`reallocate`.

    Raises:
        EvaTypeError: an unknown name; the message lists the options.
    """
    for name in names:
        if name not in ALLOCATION:
            raise EvaTypeError(f"unknown option {name!r}; the options are {', '.join(ALLOCATION)}")


def reallocate(
    result: EvaResult, r: int | None, rho: float | None, budget: str, min_rank: int
) -> EvaResult:
    """Implement :meth:`EvaResult.reallocated`."""
    CalibrateOptions(budget=budget, min_rank=min_rank)  # checks both
    config = result.config
    r = None if r is None else checked_number("r", r)
    if rho is None:
        rho = eva_of(config).rho
    rho = float(checked_number("rho", rho, Real))
    targets = [_target(result, name, r) for name in result.ranks]
    ratios = []
    for target in targets:
        name = target.name
        wanted, have = num_components_of(target, rho), len(result.singular_values[name])
        if wanted > have:
            raise EvaValueError(
                f"layer {name}: r={target.rank} and rho={rho} may need {wanted} components, but "
                f"this result has {have}; calibrate again with a larger r or rho"
            )
        ratios.append(result.explained_variance_ratio[name][:wanted])
    other = copy(result)  # shallow: tensors are shared, never changed
    ranks = Budget(targets, budget, min_rank).ranks_for(ratios)
    other.ranks = dict(zip(result.ranks, ranks, strict=True))
    other.base_ranks = {t.name: t.rank for t in targets}
    if r is not None:
        other.alphas = {
            t.name: _scaled(config, t.alpha, result.base_ranks[t.name], r) for t in targets
        }
        lora = {**result.metadata["lora_config"], **_sizes(other, config, r)}
        other.metadata = {**result.metadata, "lora_config": lora}
    return other


def _target(result: EvaResult, name: str, r: int | None) -> Target:
    rank = result.base_ranks[name] if r is None else r
    step = result.rank_steps.get(name, 1)
    if rank % step:
        raise EvaValueError(
            f"layer {name}: r={rank} is no multiple of its convolution's {step} groups"
        )
    owner, parts = result.owners.get(name, ("", 1))
    features, out, alpha = result.in_features[name], result.out_features[name], result.alphas[name]
    module = nn.Identity()  # it is not run
    return Target(name, module, features, out, rank, alpha, step=step, owner=owner, parts=parts)


def _scaled(config: LoraConfig, alpha: float, rank: int, new_rank: int) -> float:
    if not eva_of(config).adjust_scaling_factors:
        return alpha
    return scaled_alpha(config, alpha, rank, new_rank)


def _of_pattern(config: LoraConfig, name: str, r: int) -> float:
    """Return the alpha at rank r of a layer, or of a key of the patterns."""
    alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
    return _scaled(config, alpha, pattern_value(config.rank_pattern, name, config.r), r)


def _sizes(result: EvaResult, config: LoraConfig, r: int) -> dict[str, Any]:
    """Return the config fields that set the adapters' sizes, with rank r for every layer."""
    default = _scaled(config, config.lora_alpha, config.r, r)
    known = config.alpha_pattern
    closer = [
        key
        for key in config.rank_pattern
        if key not in known and pattern_value(known, key, None) is not None
    ]
    # these apply to layers that no pass reads, such as embeddings; the first matching key counts
    keys = [*closer, *known, *config.rank_pattern]
    before = {key: _of_pattern(config, key, r) for key in keys}
    alphas = {result.owners.get(name, [name])[0]: alpha for name, alpha in result.alphas.items()}
    for name in result.uncalled:
        alphas[name] = _of_pattern(config, name, r)
    own = {
        anchored_pattern(name): alpha
        for name, alpha in alphas.items()
        if pattern_value(before, name, default) != alpha
    }
    pattern = {**own, **{key: alpha for key, alpha in before.items() if key not in own}}
    return {"r": r, "rank_pattern": {}, "lora_alpha": default, "alpha_pattern": pattern}
