"""``initialize`` and ``calibrate``: the public face of the PEFT layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from typing import Any

from torch import nn

from ._peft_compat import EvaConfig, LoraConfig, adapter_configs, eva_config_of, has_adapters
from .calibrate import run_pass
from .errors import EvaValueError, warnings_caught
from .lora.adapters import write_result
from .lora.training import check_not_trained
from .lora.wrapping import check_wrapping
from .model.checks import check_config, warn_if_inside_peft_model
from .model.divided import check_adapters_writable, check_no_sharded_experts, check_not_partitioned
from .model.targets import find_targets
from .model.wrappers import check_may_resize, check_not_replicated, unwrap
from .options import AUTO, CalibrateOptions
from .passes.planning import Estimate, estimate_targets
from .processes.data_parallel import processes_of, reporting_start_failures
from .results.result import EvaResult

__all__ = ["calibrate", "default_config", "estimate", "initialize"]


def default_config() -> LoraConfig:
    """Return the config used when none is given: r = 16, rho = 2, all linear layers."""
    return LoraConfig(
        r=16,
        lora_alpha=16,
        target_modules="all-linear",
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=2.0),
    )


def initialize(
    model: nn.Module,
    loader: Iterable[Any],
    config: LoraConfig | None = None,
    *,
    allow_any_init: bool = False,
    overwrite_trained: bool = False,
    **options: Any,
) -> Any:
    """Initialise the LoRA adapters of a model from data, ready to train.

    Args:
        model: a PeftModel made with ``init_lora_weights="eva"``, or a base model, which is
            wrapped; or a model with its own adapters, as after ``add_adapter`` of transformers or
            diffusers. It may be compiled, or in DistributedDataParallel if no adapter can change
            its size (``rho=1``).
        loader: any iterable of batches (mappings, tuples, tensors), with or without a length;
            iterated again for further epochs if possible. On an accelerator one batch more may be
            taken from it than is run.
        config: for a base model; by default r = 16, rho = 2 and all linear layers. For a PeftModel
            it sets the options of EVA (rho, tau, masks), and its ranks replace those of the
            adapter.
        allow_any_init: overwrite an adapter that was not made with ``"eva"``.
        overwrite_trained: accept an adapter that has been trained (whose ``lora_B`` is not zero, or
            whose DoRA magnitudes have moved).
        **options: the options of :class:`eva_peft.CalibrateOptions`, all with defaults.

    Returns:
        The PeftModel, or the model with its own adapters; its ``eva_result`` is the result.

    Raises:
        EvaError: also of the built-in class that PEFT raises in the same case; nothing is changed
            then. What PEFT would refuse in a base model or its config is found before the pass.

    Reference: arXiv 2410.07170; PEFT ``initialize_lora_eva_weights``.
    """
    inner = unwrap(model)
    with reporting_start_failures(processes_of(inner, options.get("group", AUTO))):
        parsed = CalibrateOptions.from_kwargs(options)
        check_adapters_writable(model)
        chosen = config_for_pass(inner, config, parsed)
        warn_if_inside_peft_model(inner, config)
        if has_adapters(inner):
            any_init = allow_any_init or config is not None
            _check_adapters(inner, parsed.adapter_name, any_init, allow_any_init, overwrite_trained)
        else:
            with warnings_caught(record=True):  # the pass repeats this, and warns
                find_targets(inner, chosen, parsed.adapter_name)
            check_wrapping(inner, chosen, parsed.adapter_name)
        if chosen.eva_config.rho > 1:  # a long pass would change some size
            configs = adapter_configs(inner) if has_adapters(inner) else {}
            check_may_resize(model, configs.get(parsed.adapter_name, chosen))
        elif not has_adapters(inner):
            check_not_replicated(model)
    result = run_pass(inner, loader, chosen, parsed)
    return write_result(model, result, chosen, parsed.adapter_name)


def _check_adapters(
    model: nn.Module,
    adapter_name: str,
    any_init: bool,
    random_lora_b: bool,
    overwrite_trained: bool,
) -> None:
    """Refuse adapters that were not made for EVA, or whose training would be lost.

    Args:
        model: has adapters.
        adapter_name: of the adapters to initialise.
        any_init: accept adapters that were not made for EVA.
        random_lora_b: accept a randomly initialised ``lora_B``, which does not mean training.
        overwrite_trained: accept trained ones.
    """
    init_method = getattr(adapter_configs(model).get(adapter_name), "init_lora_weights", None)
    if init_method != "eva" and not any_init:
        raise EvaValueError(
            "`initialize` can only be used with `init_lora_weights='eva'`, but adapter "
            f"{adapter_name!r} was made with {init_method!r}; pass allow_any_init=True to "
            "overwrite it"
        )
    if not (overwrite_trained or (random_lora_b and init_method is False)):
        check_not_trained(model, adapter_name)


def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    config: LoraConfig | None = None,
    **options: Any,
) -> EvaResult:
    """Compute what :func:`initialize` writes, without changing a weight.

    Args:
        model, loader, config, options: as for :func:`initialize`; any LoRA PeftModel is accepted.

    Returns:
        The result; ``result.apply(model)`` writes it.

    Raises:
        EvaError: also of the built-in class that PEFT raises in the same case; the model is
            unchanged.
    """
    inner = unwrap(model)
    with reporting_start_failures(processes_of(inner, options.get("group", AUTO))):
        parsed = CalibrateOptions.from_kwargs(options)
        check_not_partitioned(inner)
        chosen = config_for_pass(inner, config, parsed)
        check_no_sharded_experts(inner, chosen)
    return run_pass(inner, loader, chosen, parsed)


def estimate(
    model: nn.Module,
    config: LoraConfig | None = None,
    batch_shape: Sequence[int] = (1, 1),
    **options: Any,
) -> Estimate:
    """Estimate what a pass will need, without running anything.

    Args:
        model, config, options: as for :func:`calibrate`.
        batch_shape: (samples, tokens) of a batch.

    Returns:
        Bytes of the state, of the temporaries and in total above the weights, and the method of
        every layer. An upper bound if layers share an input.

    Raises:
        EvaError: the config, an option or ``batch_shape`` cannot be used.
    """
    inner, parsed = unwrap(model), CalibrateOptions.from_kwargs(options)
    chosen = config_for_pass(inner, config, parsed)
    targets = find_targets(inner, chosen, parsed.adapter_name)
    return estimate_targets(inner, targets, chosen.eva_config.rho, parsed, batch_shape)


def config_for_pass(
    model: nn.Module, config: LoraConfig | None, options: CalibrateOptions
) -> LoraConfig:
    """Return the config to use, checked, with its EVA part; the caller's is not changed."""
    if config is None and not has_adapters(model):
        config = default_config()
    chosen = copy(check_config(model, config, options.adapter_name))
    chosen.eva_config = eva_config_of(chosen)
    return chosen
