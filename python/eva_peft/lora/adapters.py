"""Write a result into LoRA adapters: all of it, or nothing."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._peft_compat import (
    EvaConfig,
    LoraConfig,
    LoraLayer,
    adapter_configs,
    adapter_dilation,
    dora_magnitude,
    eva_config_of,
    eva_config_or_none,
    exclude_pattern,
    has_adapters,
    new_adapters_on_cpu,
    patch_convolution_dilation,
    pattern_from_values,
    pattern_value,
    tied_modules,
    untrained_dora_magnitude,
    update_layer,
)
from ..errors import EvaRuntimeError, warn
from ..model.attention import OUT_PROJ
from ..model.checks import check_base_model, config_of
from ..model.layers import CONVOLUTIONS, distribute_over_groups
from ..model.names import peft_key
from ..model.targets import check_not_merged
from ..model.wrappers import check_may_resize, check_not_replicated, unwrap
from ..passes.ranks import scaled_alpha
from ..surroundings.devices import device_of
from ..surroundings.interrupts import undone_on_failure
from ..surroundings.random_state import preserved_random_state
from ..surroundings.snapshot import restored_on_failure
from .fit import fit_state_dict, state_dict_names
from .training import mark_initialized, mark_left_at_default
from .wrapping import wrap_model

if TYPE_CHECKING:
    from ..results.result import EvaResult

__all__ = ["write_result", "write_state_dict"]


def write_result(
    model: nn.Module,
    result: EvaResult,
    config: LoraConfig | None,
    adapter_name: str,
    strict: bool = True,
) -> Any:
    """Write a result into a model, wrapping it first if it has no adapters.

    Raises:
        EvaValueError: layers of the model and of the result differ (with ``strict``).
        EvaRuntimeError: see :func:`write_state_dict`.
    """
    inner, chosen = unwrap(model), config or result.config
    outer: Any = model
    with restored_on_failure(inner):
        if not has_adapters(inner):
            check_base_model(inner, adapter_name)
            check_not_replicated(model)
            if any(result.ranks[name] != rank for name, rank in result.base_ranks.items()):
                check_may_resize(model, chosen)
            inner = outer = wrap_model(inner, chosen, adapter_name)
        eva = eva_config_or_none(chosen)
        rows = result.state_dict(None if eva is None else eva.whiten)
        inner.eva_result = result  # type: ignore[assignment]
        write_state_dict(outer, rows, adapter_name, strict, result.uncalled, eva)
    return inner


@torch.inference_mode(False)  # parameters made in inference mode could never be trained
@torch.no_grad()
def write_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    strict: bool = True,
    default_layers: list[str] | None = None,
    eva: EvaConfig | None = None,
) -> None:
    """Set the ranks, scaling and ``lora_A`` of one adapter; ``lora_B`` becomes zero.

    Other adapters are not touched. On any exception, Ctrl-C included, every layer and the config
    are as before. The mapping is not changed.

    Args:
        model: has a LoRA adapter of this name; may be wrapped.
        state_dict: layer name -> (rank, in_features), with or without the prefixes of PEFT, DDP
            and compile; rank 0 removes the adapter from that layer.
        strict: raise on layers that only the model or only the mapping has; otherwise warn, and
            leave them with the default initialisation.
        default_layers: layers that are known to be missing and get the default initialisation.
        eva: sets ``adjust_scaling_factors``; that of the adapter's config if ``None``.

    Raises:
        EvaValueError: no such adapter; unknown, missing or duplicate layers; a width that does not
            fit; rows that are not finite. EvaTypeError: not a mapping of tensors.
        EvaRuntimeError: adapters are merged into the weights; or an adapter would change its size
            although the model is in DistributedDataParallel, or the adapter uses KaSA or
            block-diagonal ``lora_B`` (BD-LoRA).
    """
    outer, model = model, unwrap(model)
    adapter_config = config_of(model, adapter_name)
    check_not_merged(model)
    fitted = fit_state_dict(model, state_dict, adapter_name, strict, default_layers or ())
    if fitted.changes_ranks(adapter_name):
        check_may_resize(outer, adapter_config)
    with (
        restored_on_failure(model),
        _values_restored_on_failure() as undo,
        preserved_random_state(),
    ):
        writer = _AdapterWriter(model, copy(adapter_config), adapter_name, undo, eva)
        for name, (path, layer) in fitted.layers.items():
            parts = state_dict_names(name, layer)
            rows = [fitted.rows.get(part) for part in parts]
            writer.write(name, path, layer, rows, fitted.takes_rank_from_owner(name))
            if fitted.may_be_missing.issuperset(parts) and fitted.rows.keys().isdisjoint(parts):
                writer.mark(mark_left_at_default, layer)
        writer.initialize_unwritten()
        writer.finish()


def _is_embedding(layer: LoraLayer) -> bool:
    return len(layer.lora_embedding_A) > 0


def _layers_rebuilt_with(layer: LoraLayer) -> list[LoraLayer]:
    """Return a layer and, of an attention, its output projection, which PEFT rebuilds with it."""
    base = layer.get_base_layer()
    inner = getattr(base, OUT_PROJ) if isinstance(base, nn.MultiheadAttention) else None
    return [layer, inner] if isinstance(inner, LoraLayer) else [layer]


@contextmanager
def _values_restored_on_failure() -> Iterator[list[Callable[[], Any]]]:
    """Run the registered undo steps, last first, if the block is left by an exception.

    The steps restore tensor values, and may be run twice; a snapshot of the model restores
    everything else.
    """
    undo: list[Callable[[], Any]] = []

    def undo_all() -> None:
        for step in reversed(undo):
            step()

    with undone_on_failure(undo_all):
        yield undo


def _restore_parameter(parameter: nn.Parameter, data: Tensor, grad: Tensor | None) -> None:
    parameter.data, parameter.grad = data, grad


def _restore_attributes(parameter: nn.Parameter, attributes: dict[str, Any]) -> None:
    vars(parameter).clear()
    vars(parameter).update(attributes)


class _AdapterWriter:
    """Writes the layers one by one, and updates the config to match."""

    def __init__(
        self,
        model: Any,
        config: LoraConfig,
        adapter_name: str,
        undo: list[Callable[[], Any]],
        eva: EvaConfig | None,
    ) -> None:
        self.model, self.config, self.adapter_name, self.undo = model, config, adapter_name, undo
        self.eva = eva or eva_config_of(config)
        self.removed: list[str] = []
        self.dilated: list[str] = []
        self.ranks: dict[str, int] = {}
        self.alphas: dict[str, float] = {}

    def write(
        self,
        name: str,
        path: str,
        layer: LoraLayer,
        rows_of_parts: Sequence[Tensor | None],
        rank_from_owner: bool,
    ) -> None:
        """Write one layer.

        Args:
            name, path, layer: its name in the base model, its path in this model, and the layer.
            rows_of_parts: the rows of ``lora_A``, one entry per expert; ``None`` leaves them
                unchanged.
            rank_from_owner: PEFT takes its rank from another layer, so it gets no entry in the
                patterns.
        """
        rank, alpha = layer.r[self.adapter_name], layer.lora_alpha[self.adapter_name]
        new_rank = next((len(rows) for rows in rows_of_parts if rows is not None), rank)
        keeps_default = all(rows is None for rows in rows_of_parts)
        if new_rank == 0:
            self._remove_adapter(path, layer)
            return
        if self.eva.adjust_scaling_factors:
            alpha = scaled_alpha(self.config, alpha, rank, new_rank)
        weight = layer.lora_A[self.adapter_name].weight
        if new_rank != rank or weight.is_meta or weight.is_inference():
            self._rebuild(path, layer, new_rank, alpha)
        base = layer.get_base_layer()
        if isinstance(base, CONVOLUTIONS):
            self._copy_dilation(name, layer, base)
            rows_of_parts = [
                None if rows is None else distribute_over_groups(rows, base.groups)
                for rows in rows_of_parts
            ]
        if not keeps_default:
            self._write_values(layer, rows_of_parts)
            self.mark(mark_initialized, layer)
        if not rank_from_owner:
            key = peft_key(path, layer)
            self.ranks[key], self.alphas[key] = new_rank, alpha

    def mark(self, mark: Callable[[Tensor], None], layer: LoraLayer) -> None:
        """Set a mark on a ``lora_A``, undoable: no snapshot covers its attributes."""
        weight = layer.lora_A[self.adapter_name].weight
        self.undo.append(functools.partial(_restore_attributes, weight, dict(vars(weight))))
        mark(weight)

    def _copy_dilation(self, name: str, layer: LoraLayer, base: Any) -> None:
        dilation = adapter_dilation(base)
        if all(gap == 1 for gap in dilation):
            return
        self.dilated.append(name)
        layer.lora_A[self.adapter_name].dilation = dilation

    def _rebuild(self, path: str, layer: LoraLayer, rank: int, alpha: float) -> None:
        dtype, mode = self._dtype_and_mode(layer)
        parameters_before = dict(layer.named_parameters())
        was_trainable = {name: p.requires_grad for name, p in parameters_before.items()}
        config = copy(self.config)
        # tensors of the layer that EVA does not write are initialised as in plain LoRA
        config.init_lora_weights = True
        base = layer.get_base_layer()
        base_parameters = list(base.parameters())
        offloaded = bool(base_parameters) and all(p.is_meta for p in base_parameters)
        # PEFT would move the adapter to the device of the layer's weights, here meta
        with ExitStack() as stack:
            for part in _layers_rebuilt_with(layer) if offloaded else ():
                stack.enter_context(new_adapters_on_cpu(part))
            update_layer(layer, path, self.adapter_name, rank, alpha, config)
        device = device_of(base) if offloaded else None
        for part in _layers_rebuilt_with(layer):
            self._move_adapter(part, device, dtype, mode)
        self._keep_parameter_objects(layer, parameters_before)
        for name, parameter in layer.named_parameters():  # PEFT changes other adapters' flags too
            parameter.requires_grad_(was_trainable.get(name, parameter.requires_grad))

    def _dtype_and_mode(self, layer: LoraLayer) -> tuple[torch.dtype, bool]:
        if _is_embedding(layer):
            return layer.lora_embedding_A[self.adapter_name].dtype, layer.training
        lora_a = layer.lora_A[self.adapter_name]
        return lora_a.weight.dtype, lora_a.training

    def _move_adapter(
        self, layer: LoraLayer, device: torch.device | None, dtype: torch.dtype, mode: bool
    ) -> None:
        for name in (*layer.adapter_layer_names, "lora_dropout"):
            parts = getattr(layer, name)
            if self.adapter_name not in parts:
                continue
            part = parts[self.adapter_name]
            if isinstance(part, nn.Module):
                part.to(device, dtype).train(mode)
            else:
                parts[self.adapter_name] = nn.Parameter(part.detach().to(device, dtype))

    def _keep_parameter_objects(
        self, layer: LoraLayer, old_parameters: Mapping[str, nn.Parameter]
    ) -> None:
        """Keep the parameter objects, with their new sizes: an optimizer may hold them."""
        for name, new in list(layer.named_parameters()):
            old = old_parameters.get(name)
            if old is None or old is new or old.is_inference():
                continue
            if (old.dtype, old.device) != (new.dtype, new.device):
                continue
            self.undo.append(functools.partial(_restore_parameter, old, old.data, old.grad))
            old.grad = None
            # If an earlier output is still alive, its graph holds this parameter's gradient
            # accumulator with the old shape; another dtype in between makes torch drop it.
            other_dtype = torch.float32 if old.dtype == torch.float16 else torch.float16
            old.data = old.data.to(other_dtype)
            old.data = new.data
            owner, _, attribute = name.rpartition(".")
            setattr(layer.get_submodule(owner), attribute, old)

    def _write_values(self, layer: LoraLayer, rows_of_parts: Sequence[Tensor | None]) -> None:
        lora_a, lora_b = layer.lora_A[self.adapter_name].weight, layer.lora_B[self.adapter_name]
        bias = getattr(lora_b, "bias", None)  # a block-diagonal lora_B has none
        zeroed = [lora_b.weight] if bias is None else [lora_b.weight, bias]
        magnitude = dora_magnitude(layer, self.adapter_name)
        for weight in (lora_a, *zeroed, *([] if magnitude is None else [magnitude])):
            old_values = weight.detach().clone()
            self.undo.append(functools.partial(weight.data.copy_, old_values))
        for weight in zeroed:
            weight.zero_()
        # may have been trained; the output must be that of the base model
        if magnitude is not None:
            magnitude.copy_(
                untrained_dora_magnitude(layer, self.adapter_name).reshape(magnitude.shape)
            )
        for rows, values in zip(rows_of_parts, lora_a.chunk(len(rows_of_parts)), strict=True):
            if rows is not None:
                values.copy_(rows.reshape(values.shape))  # (r, C, *kernel) of a convolution

    def _remove_adapter(self, path: str, layer: LoraLayer) -> None:
        for attribute in (*layer.adapter_layer_names, *layer.other_param_names, "lora_variant"):
            entries = getattr(layer, attribute, None)
            if entries is not None and self.adapter_name in entries:
                del entries[self.adapter_name]
        self.removed.append(peft_key(path, layer))
        if layer.lora_A or layer.lora_embedding_A:
            return  # another adapter uses this layer
        parent = self.model.get_submodule(path.rpartition(".")[0])
        attribute = path.rpartition(".")[2]
        setattr(parent, attribute, layer.get_base_layer())

    def initialize_unwritten(self) -> None:
        """Initialise as plain LoRA what EVA does not write: embeddings on meta, tied adapters."""
        tied_layers = [
            layer for layer in self._unwritten_layers.values() if not _is_embedding(layer)
        ]
        for path, layer in self._unwritten_layers.items():
            weight = layer.lora_embedding_A[self.adapter_name] if _is_embedding(layer) else None
            if weight is None or not (weight.is_meta or weight.is_inference()):
                continue
            rank, alpha = layer.r[self.adapter_name], layer.lora_alpha[self.adapter_name]
            self._rebuild(path, layer, rank, alpha)
            if tied_layers and layer is self.model.get_input_embeddings():
                for tied_layer in tied_layers:
                    self._tie_to_embedding(tied_layer, layer)
        for layer in tied_layers:
            self._randomize_tied(layer)

    def _randomize_tied(self, layer: LoraLayer) -> None:
        """Draw a tied ``lora_A`` at random, which PEFT does for plain LoRA but not for "eva".

        Otherwise it keeps the embeddings' values, some ten times larger, and training diverges.
        """
        lora_a, lora_b = (getattr(layer, n)[self.adapter_name].weight for n in ("lora_A", "lora_B"))
        if lora_a.is_meta or lora_b.any():
            return
        self.undo.append(functools.partial(lora_a.data.copy_, lora_a.detach().clone()))
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))

    def _tie_to_embedding(self, layer: LoraLayer, embedding: LoraLayer) -> None:
        """Tie the adapter of a layer to that of the embeddings, transposed, as PEFT does."""
        for attribute, embedding_attribute in (
            ("lora_A", "lora_embedding_B"),
            ("lora_B", "lora_embedding_A"),
        ):
            weight = getattr(embedding, embedding_attribute)[self.adapter_name]
            getattr(layer, attribute)[self.adapter_name].weight = nn.Parameter(
                weight.detach().t(), weight.requires_grad
            )

    def finish(self) -> None:
        """Update the config, so that a saved adapter loads with the same layers and ranks.

        Raises:
            EvaRuntimeError: it would not; nothing is changed then.
        """
        config = self.config
        old_ranks, old_alphas = config.rank_pattern, config.alpha_pattern
        for key in self._unwritten_layers:
            self.ranks[key] = pattern_value(old_ranks, key, config.r)
            self.alphas[key] = pattern_value(old_alphas, key, config.lora_alpha)
        config.rank_pattern = pattern_from_values(self.ranks, config.r)
        config.alpha_pattern = pattern_from_values(self.alphas, config.lora_alpha)
        if self.removed:
            config.exclude_modules = exclude_pattern(config, self.removed)
        for key, rank in self.ranks.items():
            if pattern_value(config.rank_pattern, key, config.r) != rank:
                raise EvaRuntimeError(
                    f"layer {key}: PEFT would not find its rank in rank_pattern, so that the "
                    "saved adapter could not be loaded; nothing was changed. Rename the layer, or "
                    "leave it out by exclude_modules"
                )
        adapter_configs(self.model)[self.adapter_name] = config
        tuner = getattr(self.model, "base_model", None)
        names = getattr(tuner, "targeted_module_names", None)
        if names is not None and self.removed:
            removed = set(self.removed)
            names[:] = [n for n in names if n not in removed]
        if self.dilated:
            patch_convolution_dilation()
            warn(
                f"PEFT's LoRA ignores the dilation of a convolution ({', '.join(self.dilated)}), "
                "so that its forward pass fails. This process is patched; in any other, call "
                "eva_kernels.patch_peft() before the adapter is loaded",
            )

    @functools.cached_property
    def _unwritten_layers(self) -> dict[str, LoraLayer]:
        # layers of this adapter that EVA does not write: embeddings, and what is tied to them
        tied_paths = tied_modules(self.model, self.config)
        return {
            peft_key(path): module
            for path, module in self.model.named_modules()
            if isinstance(module, LoraLayer)
            and (
                self.adapter_name in module.lora_embedding_A or peft_key(path, module) in tied_paths
            )
        }
