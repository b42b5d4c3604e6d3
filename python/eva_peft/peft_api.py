"""PEFT's two EVA functions, with PEFT's signatures, and a patch that makes PEFT use ours."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType, TracebackType
from typing import Any

import peft
import peft.mapping_func
import peft.tuners
import peft.tuners.lora
import peft.tuners.lora.eva
from torch import Tensor, nn

from ._peft_compat import (
    LoraConfig,
    PeftModel,
    adapter_configs,
    eva_config_of,
    forward_fn_dict,
    has_adapters,
    patch_convolution_dilation,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from .errors import EvaValueError
from .initialize import calibrate
from .lora.adapters import write_state_dict
from .lora.training import check_not_trained, watch
from .model.checks import config_of
from .model.divided import check_adapters_writable
from .model.names import resolve_name
from .model.wrappers import check_may_resize, unwrap
from .options import AUTO
from .processes.data_parallel import processes_of, reporting_start_failures

__all__ = ["get_eva_state_dict", "initialize_lora_eva_weights", "patch_peft"]

# PEFT's defaults are replaced by our own token selection, which does the same and more.
_PEFT_DEFAULTS = (
    (forward_fn_dict, None),
    (prepare_model_inputs_fn_language_modeling, AUTO),
    (prepare_layer_inputs_fn_language_modeling, AUTO),
)


def _with_group_option(options: dict[str, Any], gather: bool) -> dict[str, Any]:
    return options if gather or "group" in options else {**options, "group": None}


def _replace_peft_default(fn: Any) -> Any:
    return next(
        (own_default for peft_default, own_default in _PEFT_DEFAULTS if fn is peft_default), fn
    )


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[..., Any] | None = forward_fn_dict,
    prepare_model_inputs_fn: Callable[..., Any] | None = (
        prepare_model_inputs_fn_language_modeling
    ),
    prepare_layer_inputs_fn: Callable[..., Any] | Mapping[str, Callable[..., Any]] | None = (
        prepare_layer_inputs_fn_language_modeling
    ),
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
    **options: Any,
) -> dict[str, Tensor]:
    """Compute EVA's ``lora_A`` for every layer; drop-in for ``peft.get_eva_state_dict``.

    Args:
        model, dataloader, peft_config, forward_fn, prepare_model_inputs_fn,
        prepare_layer_inputs_fn, adapter_name, show_progress_bar: as in PEFT. No argument is
            changed.
        gather_distributed_inputs: as in PEFT, share the tokens of all processes; sums are
            exchanged, inputs are not.
        **options: further options of :func:`initialize`.

    Returns:
        Layer name, as in ``model.named_modules()``, to (rank, in_features), float32; separate
        contiguous tensors. Rank 0 for layers that get no adapter.
    """
    inner = unwrap(model)
    options = _with_group_option(options, gather_distributed_inputs)
    with reporting_start_failures(processes_of(inner, options.get("group", AUTO))):
        if peft_config is None and not has_adapters(inner):
            raise EvaValueError("peft_config is required if model is not a PeftModel")
    result = calibrate(
        model,
        dataloader,
        peft_config,
        forward_fn=_replace_peft_default(forward_fn),
        prepare_model_inputs_fn=_replace_peft_default(prepare_model_inputs_fn),
        prepare_layer_inputs_fn=_replace_peft_default(prepare_layer_inputs_fn),
        adapter_name=adapter_name,
        progress=show_progress_bar,
        **options,
    )
    state = result.state_dict()
    prefix = next(f"{n}." if n else "" for n, m in model.named_modules() if m is inner)
    paths = _module_paths(inner, state)
    return {f"{prefix}{paths[name]}": value for name, value in state.items()}


def _module_paths(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Map names of layers in the base model to their paths in a model, which may be wrapped.

    An expert of a fused parameter is not a module; its path is that of the module it belongs to,
    plus the rest of its name.
    """
    parts_of_name = {name: name.split(".") for name in names}
    name_prefixes = {
        ".".join(s[:i]): None for s in parts_of_name.values() for i in range(len(s) + 1)
    }
    path_of_name: dict[str, str] = {}
    for path, _ in model.named_modules():  # submodules of an adapted layer come after it
        path_of_name.setdefault(resolve_name(path, name_prefixes), path)
    paths = {}
    for name, parts in parts_of_name.items():
        depth = next(i for i in range(len(parts), -1, -1) if ".".join(parts[:i]) in path_of_name)
        owner = path_of_name[".".join(parts[:depth])]
        paths[name] = ".".join([*([owner] if owner else []), *parts[depth:]])
    return paths


def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[..., Any] | None = forward_fn_dict,
    prepare_model_inputs_fn: Callable[..., Any] | None = (
        prepare_model_inputs_fn_language_modeling
    ),
    prepare_layer_inputs_fn: Callable[..., Any] | Mapping[str, Callable[..., Any]] | None = (
        prepare_layer_inputs_fn_language_modeling
    ),
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
    *,
    strict: bool = True,
    overwrite_trained: bool = False,
    **options: Any,
) -> None:
    """Initialise the LoRA weights by EVA; drop-in for ``peft.initialize_lora_eva_weights``.

    Args:
        model: a PeftModel with ``init_lora_weights="eva"``.
        dataloader: needed unless ``eva_state_dict`` is given.
        eva_state_dict: from :func:`get_eva_state_dict` of this model, bare or wrapped; it is not
            changed.
        strict: raise if the state dict's layers are not the adapter's.
        overwrite_trained: accept an adapter that has been trained (whose ``lora_B`` is not zero).
        Others: as for :func:`get_eva_state_dict`.

    Raises:
        EvaValueError: not a PeftModel, several active adapters, another ``init_lora_weights``,
            neither data nor state dict, or layers that do not fit.
    """
    inner = unwrap(model)
    options = _with_group_option(options, gather_distributed_inputs)
    has_state_dict = eva_state_dict is not None  # there will be no pass
    processes = None if has_state_dict else processes_of(inner, options.get("group", AUTO))
    with reporting_start_failures(processes):
        check_adapters_writable(model)
        _check_made_for_eva(inner, adapter_name, overwrite_trained)
        if not has_state_dict and dataloader is None:
            raise EvaValueError("dataloader is required if eva_state_dict is not provided")
        if not has_state_dict and eva_config_of(adapter_configs(inner)[adapter_name]).rho > 1:
            check_may_resize(model, adapter_configs(inner)[adapter_name])
    if eva_state_dict is not None:
        write_state_dict(model, eva_state_dict, adapter_name, strict)
        return
    assert dataloader is not None
    result = calibrate(
        inner,
        dataloader,
        forward_fn=_replace_peft_default(forward_fn),
        prepare_model_inputs_fn=_replace_peft_default(prepare_model_inputs_fn),
        prepare_layer_inputs_fn=_replace_peft_default(prepare_layer_inputs_fn),
        adapter_name=adapter_name,
        progress=show_progress_bar,
        **options,
    )
    result.apply(model, adapter_name=adapter_name, overwrite_trained=True)


def _check_made_for_eva(model: nn.Module, adapter_name: str, overwrite_trained: bool) -> None:
    """Refuse anything but a PeftModel with one active adapter, which was made for EVA."""
    if not isinstance(model, PeftModel):
        raise EvaValueError("model must be a PeftModel")
    if len(model.active_adapters) > 1:
        raise EvaValueError(
            "`initialize_lora_eva_weights` currently only works with a single active adapter"
        )
    if getattr(config_of(model, adapter_name), "init_lora_weights", None) != "eva":
        raise EvaValueError(
            "`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`"
        )
    if not overwrite_trained:
        check_not_trained(model, adapter_name)


@functools.wraps(peft.get_peft_model)
def get_peft_model(*args: Any, **kwargs: Any) -> Any:
    """Call PEFT's function, and watch whether adapters made for EVA get initialised."""
    return watch(_get_peft_model(*args, **kwargs))


_get_peft_model = get_peft_model.__wrapped__

_PATCHED_MODULES = (peft, peft.tuners, peft.tuners.lora, peft.tuners.lora.eva, peft.mapping_func)
_REPLACEMENTS: dict[str, Callable[..., Any]] = {
    fn.__name__: fn for fn in (get_eva_state_dict, initialize_lora_eva_weights, get_peft_model)
}
# PEFT's functions from before the first active patch, and the active patches.
_originals: list[tuple[ModuleType, str, Any]] = []
_active_patches: list[patch_peft] = []


class patch_peft:
    """Replace PEFT's two EVA functions by ours: for the process, or for a ``with`` block.

    Models that ``peft.get_peft_model`` makes meanwhile are watched (:func:`eva_kernels.watch`).

    Blocks may overlap, and one object may be entered again: PEFT's own functions are restored when
    the last patch ends.

    Code that has already imported the functions by name keeps PEFT's. LoRA of dilated convolutions,
    which PEFT cannot run, works from then on in the whole process.
    """

    def __init__(self) -> None:
        self._entry_count = 0
        self._activate()

    def _activate(self) -> None:
        patch_convolution_dilation()
        if not _active_patches:
            _originals[:] = [
                (module, name, getattr(module, name))
                for module in _PATCHED_MODULES
                for name in _REPLACEMENTS
                if hasattr(module, name)
            ]
        if self not in _active_patches:
            _active_patches.append(self)
        for module, name, _ in _originals:
            setattr(module, name, _REPLACEMENTS[name])

    def __enter__(self) -> patch_peft:
        self._entry_count += 1
        self._activate()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._entry_count = max(self._entry_count - 1, 0)
        if self._entry_count or self not in _active_patches:
            return
        _active_patches.remove(self)
        if not _active_patches:
            for module, name, function in _originals:
                setattr(module, name, function)
