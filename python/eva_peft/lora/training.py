"""Check whether adapters made for EVA have been initialised, and whether they were trained."""

from __future__ import annotations

from collections import defaultdict
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from .._peft_compat import (
    LoraLayer,
    adapter_configs,
    dora_magnitude,
    eva_config_of,
    has_adapters,
    is_lora,
    peft_type_of,
    tied_modules,
    untrained_dora_magnitude,
)
from ..errors import (
    EvaRuntimeError,
    EvaTypeError,
    EvaValueError,
    EvaWarning,
    NotInitializedError,
    counted,
    listed,
    warn,
)
from ..model.checks import config_of
from ..model.names import adapter_layers, name_in_base_model
from ..model.parts import outermost_modules
from ..model.wrappers import unwrap

__all__ = [
    "EvaCallback",
    "NotInitializedWarning",
    "check_not_trained",
    "is_initialized",
    "mark_initialized",
    "mark_left_at_default",
    "watch",
]

_EVA_MARK = "_eva_initialized"
_DEFAULT_MARK = "_eva_left"
# Rows of a random lora_A have norms of about 0.58, and cosines of 0.01 even in 28,672 dimensions.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_LOW_PRECISION = 1e-2
# Relative; above the rounding error of norms computed in bfloat16 (2**-8).
_MAGNITUDE_TOLERANCE = 5e-3


class NotInitializedWarning(EvaWarning):
    """Training starts on an adapter made for EVA that is not, or only partly, initialised."""


def mark_initialized(weight: Tensor) -> None:
    """Mark a ``lora_A`` as written by EVA; the mark is in no state dict."""
    setattr(weight, _EVA_MARK, True)


def mark_left_at_default(weight: Tensor) -> None:
    """Mark a ``lora_A`` as left at its default by EVA on purpose."""
    setattr(weight, _DEFAULT_MARK, True)


def is_initialized(model: nn.Module, adapter_name: str = "default") -> bool:
    """Tell whether the adapters of a model carry an EVA initialisation, or have been trained.

    Judged by the weights, so it also works for adapters that PEFT initialised or that were loaded:
    some ``lora_B`` is not zero, some DoRA magnitude has changed, or the rows of some ``lora_A``
    are orthonormal (orthogonal, with ``whiten``), which random rows are not. Adapters on the meta
    device count as not initialised. If FSDP or ZeRO-3 has sharded the model, every process must
    make the call.

    Args:
        model: a PeftModel or a model with its own adapters; may be compiled or in
            DistributedDataParallel.
        adapter_name: which adapter.

    Raises:
        EvaTypeError: not a PeftModel. EvaValueError: no such LoRA adapter.
        EvaRuntimeError: FullyShardedDataParallel has flattened the weights, and EVA did not write
            them in this process.
    """
    layers = _lora_layers(model, adapter_name)
    weights = [layer.lora_A[adapter_name].weight for layer in layers.values()]
    if any(weight.is_meta for weight in weights):
        return False
    if any(getattr(weight, _EVA_MARK, False) for weight in weights):
        return True
    if any(map(_is_flattened, weights)):
        raise EvaRuntimeError(
            f"whether adapter {adapter_name!r} is initialised cannot be determined, since "
            "FullyShardedDataParallel has flattened its weights; check before the model is wrapped"
        )
    whitened = eva_config_of(adapter_configs(unwrap(model))[adapter_name]).whiten
    return bool(_trained_layers(layers, adapter_name)) or any(
        _has_eva_rows(layer, adapter_name, whitened) for layer in layers.values()
    )


def _uninitialized_layers(model: nn.Module, adapter_name: str) -> list[str]:
    """Return the layers that lack EVA's rows, of an adapter that EVA wrote in this process.

    Trained layers, and those left at the default on purpose, are not included; which the latter
    are is unknown for a loaded adapter.
    """
    layers, config = _lora_layers(model, adapter_name), adapter_configs(model)[adapter_name]
    whitened = eva_config_of(config).whiten
    weights = {name: layer.lora_A[adapter_name].weight for name, layer in layers.items()}
    if not any(getattr(weight, _EVA_MARK, False) for weight in weights.values()):
        return []
    excluded = {name_in_base_model(path) for path in tied_modules(model, config)}
    excluded |= {
        n
        for n, w in weights.items()
        if getattr(w, _EVA_MARK, False) or getattr(w, _DEFAULT_MARK, False)
    }
    excluded |= {name for name, w in weights.items() if w.is_meta or _is_flattened(w)}
    candidates = {name: layer for name, layer in layers.items() if name not in excluded}
    excluded.update(_trained_layers(candidates, adapter_name))
    return [
        name
        for name, layer in candidates.items()
        if name not in excluded and not _has_eva_rows(layer, adapter_name, whitened)
    ]


def check_not_trained(model: nn.Module, adapter_name: str) -> None:
    """Refuse trained adapters, whose weights would be lost.

    Raises:
        EvaValueError: some ``lora_B`` is not zero, or DoRA's magnitudes are not the norms of the
            weights.
    """
    if not has_adapters(unwrap(model)):
        return
    trained = _trained_layers(_lora_layers(model, adapter_name), adapter_name)
    if trained:
        raise EvaValueError(
            f"adapter {adapter_name!r} has been trained, or was not made with lora_B = 0: layers "
            f"{listed(trained)}. EVA would overwrite it; pass overwrite_trained=True "
            "if that is meant, or initialise another adapter"
        )


def _lora_layers(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """Return the layers of an adapter by name; none if it adapts only embeddings."""
    inner = unwrap(model)
    if not has_adapters(inner):
        raise EvaTypeError(
            f"expected a PeftModel, got {type(model)}; eva_kernels.initialize returns one"
        )
    config = config_of(inner, adapter_name)
    if not is_lora(config):
        raise EvaValueError(
            f"adapter {adapter_name!r} is not a LoRA adapter: its type is {peft_type_of(config)}"
        )
    return {name: layer for name, (_, layer) in adapter_layers(inner, adapter_name).items()}


def _is_flattened(weight: Tensor) -> bool:
    """Tell whether only a one-dimensional part of a weight is here, or only its shape.

    So FullyShardedDataParallel stores weights: one can be gathered only with all others of its
    wrapper.
    """
    if hasattr(weight, "ds_id") or hasattr(weight, "full_tensor"):
        return False  # it can be gathered by itself
    return weight.dim() < 2 or not weight.untyped_storage().size()


def _gathered(tensor: Tensor) -> Tensor:
    """Return a sharded tensor, gathered; all processes must make the call."""
    if hasattr(tensor, "ds_id"):  # by ZeRO-3
        with import_module("deepspeed").zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    gather = getattr(tensor, "full_tensor", None)  # by FSDP
    return tensor if gather is None else gather()


@torch.no_grad()
def _trained_layers(layers: dict[str, LoraLayer], adapter_name: str) -> list[str]:
    """Return the names of the layers that have been trained, with one host read per device.

    Their ``lora_B`` is not zero, or DoRA's magnitudes differ from the norms of the weight.
    """
    by_device: dict[torch.device, dict[str, Tensor]] = defaultdict(dict)
    for name, layer in layers.items():
        weight = _gathered(layer.lora_B[adapter_name].weight)
        if not weight.is_meta:
            by_device[weight.device][name] = weight.any() | _magnitude_moved(layer, adapter_name)
    trained = set()
    for flags in by_device.values():
        moved = torch.stack(list(flags.values())).tolist()
        trained |= {name for name, flag in zip(flags, moved, strict=True) if flag}
    return [name for name in layers if name in trained]


def _magnitude_moved(layer: LoraLayer, adapter_name: str) -> Tensor | bool:
    vector = dora_magnitude(layer, adapter_name)
    weight = getattr(layer.get_base_layer(), "weight", None)
    # a quantised or sharded weight has no norms to rely on
    if vector is None or vector.is_meta or type(weight) is not nn.Parameter or weight.dim() < 2:
        return False
    if weight.is_meta or not weight.is_floating_point():
        return False
    magnitude = _gathered(vector)
    norms = untrained_dora_magnitude(layer, adapter_name).reshape(magnitude.shape).to(magnitude)
    moved = ((magnitude - norms).abs() > _MAGNITUDE_TOLERANCE * norms).any()
    return moved.to(layer.lora_B[adapter_name].weight.device)


@torch.no_grad()
def _has_eva_rows(layer: LoraLayer, adapter_name: str, whitened: bool) -> bool:
    weight = layer.lora_A[adapter_name].weight
    tolerance = _TOLERANCE.get(weight.dtype, _LOW_PRECISION)
    rows = _gathered(weight).float().flatten(1)
    norms = rows.norm(dim=1)
    if whitened:
        norms, rows = norms / norms.clamp_min(1e-30), rows / norms.clamp_min(1e-30)[:, None]
        if len(rows) == 1:
            return False  # a single row is always orthogonal
    if (norms - 1).abs().max() > tolerance:
        return False
    # each expert has its own rows
    stacks = rows.reshape(getattr(layer, "num_experts", 1), -1, rows.shape[1])
    cosines = stacks @ stacks.mT - torch.eye(stacks.shape[1], device=rows.device)
    return bool(cosines.abs().max() < tolerance)


def _report_uninitialized(model: nn.Module, action: str) -> None:
    # the adapters may be on a submodule of the trained model
    parts = [part for _, part in outermost_modules(unwrap(model), has_adapters)]
    adapters = [(part, name) for part in parts for name in adapter_configs(part)]
    for part, name in adapters:
        config = adapter_configs(part)[name]
        made_for_eva = getattr(config, "init_lora_weights", None) == "eva"
        if not made_for_eva or config.inference_mode or not _is_trainable(part, name):
            continue
        try:
            initialized = is_initialized(part, name)
        except EvaRuntimeError:  # cannot be determined
            continue
        if initialized:
            _report_partly_initialized(part, name)
            continue
        message = (
            f'adapter {name!r} was made with init_lora_weights="eva", but never initialised: it '
            f"trains as plain LoRA. {_advice(name)}"
        )
        if action == "raise":
            raise NotInitializedError(message)
        warn(message, NotInitializedWarning)


def _is_trainable(model: nn.Module, adapter_name: str) -> bool:
    """Tell whether an adapter is trainable, and not a frozen reference as in DPO."""
    layers = _lora_layers(model, adapter_name).values()
    return any(layer.lora_A[adapter_name].weight.requires_grad for layer in layers)


def _report_partly_initialized(model: nn.Module, adapter_name: str) -> None:
    layers = _uninitialized_layers(model, adapter_name)
    if layers:
        warn(
            f'adapter {adapter_name!r} was made with init_lora_weights="eva", but EVA initialised '
            f"only a part of it: {counted(len(layers), 'layer trains', 'layers train')} as plain "
            f"LoRA ({listed(layers)}). {_advice(adapter_name)}",
            NotInitializedWarning,
        )


def _advice(adapter_name: str) -> str:
    argument = "" if adapter_name == "default" else f"(adapter_name={adapter_name!r}) "
    return (
        f"Call eva_kernels.initialize(model, loader) before training {argument}and before the "
        "optimizer is made"
    )


def _check_action(action: str) -> None:
    if action not in ("warn", "raise"):
        raise EvaValueError(f'action={action!r} is unknown; choose "warn" or "raise"')


class EvaCallback(TrainerCallback):
    """Report, when a ``Trainer`` starts, an adapter made for EVA that was never initialised.

    Args:
        action: ``"warn"``, or ``"raise"`` to stop before the first step. If EVA has initialised
            only some of the layers in this process, it warns in either case. If the state is
            unknown, since FullyShardedDataParallel has flattened the weights, it does neither.
    """

    def __init__(self, action: Literal["warn", "raise"] = "warn") -> None:
        _check_action(action)
        self.action = action

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Check the model that is about to be trained."""
        # SetFit's trainer passes an object that is not a module but holds those that it trains
        attributes = () if isinstance(model, nn.Module) else getattr(model, "__dict__", {}).values()
        for part in (model, *attributes):
            if isinstance(part, nn.Module):
                _report_uninitialized(part, self.action)


class _WatchHook:
    """A forward pre-hook that checks the model at the first forward pass with gradients.

    If it raises it stays active, so that training cannot continue past the error.
    """

    def __init__(self, action: str) -> None:
        self.action = action
        self.handle: Any = None

    def __call__(self, model: nn.Module, args: Any) -> None:
        if not model.training or not torch.is_grad_enabled():
            return
        if self.action == "warn":  # once, even if warnings are turned into errors
            self._remove()
        _report_uninitialized(model, self.action)
        self._remove()

    def _remove(self) -> None:
        if self.handle is not None:
            self.handle.remove()


def watch(model: nn.Module, action: Literal["warn", "raise"] = "warn") -> nn.Module:
    """Report at the first training step an adapter made for EVA that was never initialised.

    For training loops without a ``Trainer``. Registers a forward pre-hook, which removes itself
    after it has warned, or found nothing to raise.

    Args:
        model: a PeftModel; for a model without adapters nothing is reported.
        action: ``"warn"``, or ``"raise"`` at every step until it is initialised. If EVA has
            initialised only some layers, it warns in either case.

    Returns:
        The model.
    """
    _check_action(action)
    hook = _WatchHook(action)
    hook.handle = unwrap(model).register_forward_pre_hook(hook)
    return model
