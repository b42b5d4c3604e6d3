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
    adapters_not_moved,
    carries_adapters,
    eva_of,
    exclude_layers,
    given_eva,
    keep_dilation,
    magnitude,
    pattern_of,
    pattern_value,
    tied_modules,
    untrained_magnitude,
    update_layer,
)
from ..errors import EvaRuntimeError, warn
from ..model.attention import OUT_PROJ
from ..model.checks import check_base_model, config_of
from ..model.layers import CONVOLUTIONS, dealt_to_groups
from ..model.targets import (
    check_may_resize,
    check_not_merged,
    check_not_replicated,
    peft_key,
    unwrap,
)
from ..passes.ranks import scaled_alpha
from ..surroundings.devices import device_of
from ..surroundings.interrupts import undone_on_failure
from ..surroundings.random_state import preserved_random_state
from ..surroundings.snapshot import restored_on_failure
from .fit import fit, parts_of
from .training import mark_initialized, mark_left
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
    carrier: Any = model
    with restored_on_failure(inner):
        if not carries_adapters(inner):
            check_base_model(inner, adapter_name)
            check_not_replicated(model)
            if any(result.ranks[name] != rank for name, rank in result.base_ranks.items()):
                check_may_resize(model, chosen)
            inner = carrier = wrap_model(inner, chosen, adapter_name)
        eva = given_eva(chosen)
        rows = result.state_dict(None if eva is None else eva.whiten)
        inner.eva_result = result  # type: ignore[assignment]
        write_state_dict(carrier, rows, adapter_name, strict, result.uncalled, eva)
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
    own = config_of(model, adapter_name)
    check_not_merged(model)
    fitted = fit(model, state_dict, adapter_name, strict, default_layers or ())
    if fitted.resizes(adapter_name):
        check_may_resize(outer, own)
    with restored_on_failure(model), _values_restored() as undo, preserved_random_state():
        writer = _Writer(model, copy(own), adapter_name, undo, eva)
        for name, (path, layer) in fitted.layers.items():
            parts = parts_of(name, layer)
            rows = [fitted.rows.get(part) for part in parts]
            writer.write(name, path, layer, rows, fitted.follows(name))
            if fitted.left.issuperset(parts) and fitted.rows.keys().isdisjoint(parts):
                writer.mark(mark_left, layer)
        writer.draw_others()
        writer.finish()


def _is_embedding(layer: LoraLayer) -> bool:
    return len(layer.lora_embedding_A) > 0


def _rebuilt_with(layer: LoraLayer) -> list[LoraLayer]:
    """Return a layer and, of an attention, its output projection, which PEFT rebuilds with it."""
    base = layer.get_base_layer()
    inner = getattr(base, OUT_PROJ) if isinstance(base, nn.MultiheadAttention) else None
    return [layer, inner] if isinstance(inner, LoraLayer) else [layer]


@contextmanager
def _values_restored() -> Iterator[list[Callable[[], Any]]]:
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


def _put_back(parameter: nn.Parameter, data: Tensor, grad: Tensor | None) -> None:
    parameter.data, parameter.grad = data, grad


def _put_marks_back(parameter: nn.Parameter, before: dict[str, Any]) -> None:
    vars(parameter).clear()
    vars(parameter).update(before)


class _Writer:
    """Writes the layers one by one, and updates the config to match."""

    def __init__(
        self,
        model: Any,
        config: LoraConfig,
        adapter_name: str,
        undo: list[Callable[[], Any]],
        eva: EvaConfig | None,
    ) -> None:
        self.model, self.config, self.adapter, self.undo = model, config, adapter_name, undo
        self.eva = eva or eva_of(config)
        self.removed: list[str] = []
        self.dilated: list[str] = []
        self.ranks: dict[str, int] = {}
        self.alphas: dict[str, float] = {}

    def write(
        self,
        name: str,
        path: str,
        layer: LoraLayer,
        parts: Sequence[Tensor | None],
        follows: bool,
    ) -> None:
        """Write one layer.

        Args:
            name, path, layer: its name in the base model, its path in this model, and the layer.
            parts: the rows of ``lora_A``, one entry per expert; ``None`` leaves them as they are.
            follows: PEFT takes its rank from another layer, so it gets no entry in the patterns.
        """
        rank, alpha = layer.r[self.adapter], layer.lora_alpha[self.adapter]
        new_rank = next((len(rows) for rows in parts if rows is not None), rank)
        default = all(rows is None for rows in parts)
        if new_rank == 0:
            self._remove(path, layer)
            return
        if self.eva.adjust_scaling_factors:
            alpha = scaled_alpha(self.config, alpha, rank, new_rank)
        weight = layer.lora_A[self.adapter].weight
        if new_rank != rank or weight.is_meta or weight.is_inference():
            self._rebuild(path, layer, new_rank, alpha)
        base = layer.get_base_layer()
        if isinstance(base, CONVOLUTIONS):
            self._keep_dilation(name, layer, base)
            parts = [None if rows is None else dealt_to_groups(rows, base.groups) for rows in parts]
        if not default:
            self._fill(layer, parts)
            self.mark(mark_initialized, layer)
        if not follows:
            key = peft_key(path, layer)
            self.ranks[key], self.alphas[key] = new_rank, alpha

    def mark(self, mark: Callable[[Tensor], None], layer: LoraLayer) -> None:
        """Set a mark on a ``lora_A``, undoable: no snapshot covers its attributes."""
        weight = layer.lora_A[self.adapter].weight
        self.undo.append(functools.partial(_put_marks_back, weight, dict(vars(weight))))
        mark(weight)

    def _keep_dilation(self, name: str, layer: LoraLayer, base: Any) -> None:
        dilation = adapter_dilation(base)
        if all(gap == 1 for gap in dilation):
            return
        self.dilated.append(name)
        layer.lora_A[self.adapter].dilation = dilation

    def _rebuild(self, path: str, layer: LoraLayer, rank: int, alpha: float) -> None:
        dtype, mode = self._kind_of(layer)
        parameters_before = dict(layer.named_parameters())
        trainable = {name: p.requires_grad for name, p in parameters_before.items()}
        config = copy(self.config)
        # tensors of the layer that EVA does not write are initialised as in plain LoRA
        config.init_lora_weights = True
        base = layer.get_base_layer()
        parameters = list(base.parameters())
        offloaded = bool(parameters) and all(p.is_meta for p in parameters)
        # PEFT would move the adapter to the device of the layer's weights, here meta
        with ExitStack() as stack:
            for each in _rebuilt_with(layer) if offloaded else ():
                stack.enter_context(adapters_not_moved(each))
            update_layer(layer, path, self.adapter, rank, alpha, config)
        device = device_of(base) if offloaded else None
        for each in _rebuilt_with(layer):
            self._settle(each, device, dtype, mode)
        self._keep_parameters(layer, parameters_before)
        for name, parameter in layer.named_parameters():  # PEFT changes other adapters' flags too
            parameter.requires_grad_(trainable.get(name, parameter.requires_grad))

    def _kind_of(self, layer: LoraLayer) -> tuple[torch.dtype, bool]:
        if _is_embedding(layer):
            return layer.lora_embedding_A[self.adapter].dtype, layer.training
        before = layer.lora_A[self.adapter]
        return before.weight.dtype, before.training

    def _settle(
        self, layer: LoraLayer, device: torch.device | None, dtype: torch.dtype, mode: bool
    ) -> None:
        for name in (*layer.adapter_layer_names, "lora_dropout"):
            parts = getattr(layer, name)
            if self.adapter not in parts:
                continue
            own = parts[self.adapter]
            if isinstance(own, nn.Module):
                own.to(device, dtype).train(mode)
            else:
                parts[self.adapter] = nn.Parameter(own.detach().to(device, dtype))

    def _keep_parameters(self, layer: LoraLayer, before: Mapping[str, nn.Parameter]) -> None:
        """Keep the parameter objects, with their new sizes: an optimizer may hold them."""
        for name, new in list(layer.named_parameters()):
            old = before.get(name)
            if old is None or old is new or old.is_inference():
                continue
            if (old.dtype, old.device) != (new.dtype, new.device):
                continue
            self.undo.append(functools.partial(_put_back, old, old.data, old.grad))
            old.grad = None
            # If an earlier output is still alive, its graph holds this parameter's gradient
            # accumulator with the old shape; another dtype in between makes torch drop it.
            other = torch.float32 if old.dtype == torch.float16 else torch.float16
            old.data = old.data.to(other)
            old.data = new.data
            owner, _, attribute = name.rpartition(".")
            setattr(layer.get_submodule(owner), attribute, old)

    def _fill(self, layer: LoraLayer, parts: Sequence[Tensor | None]) -> None:
        first, second = layer.lora_A[self.adapter].weight, layer.lora_B[self.adapter]
        bias = getattr(second, "bias", None)  # a block-diagonal lora_B has none
        zeroed = [second.weight] if bias is None else [second.weight, bias]
        dora = magnitude(layer, self.adapter)
        for weight in (first, *zeroed, *([] if dora is None else [dora])):
            before = weight.detach().clone()
            self.undo.append(functools.partial(weight.data.copy_, before))
        for weight in zeroed:
            weight.zero_()
        if dora is not None:  # may have been trained; the output must be that of the base model
            dora.copy_(untrained_magnitude(layer, self.adapter).reshape(dora.shape))
        for rows, own in zip(parts, first.chunk(len(parts)), strict=True):
            if rows is not None:
                own.copy_(rows.reshape(own.shape))  # (r, C, *kernel) of a convolution

    def _remove(self, path: str, layer: LoraLayer) -> None:
        for attribute in (*layer.adapter_layer_names, *layer.other_param_names, "lora_variant"):
            entries = getattr(layer, attribute, None)
            if entries is not None and self.adapter in entries:
                del entries[self.adapter]
        self.removed.append(peft_key(path, layer))
        if layer.lora_A or layer.lora_embedding_A:
            return  # another adapter uses this layer
        parent = self.model.get_submodule(path.rpartition(".")[0])
        attribute = path.rpartition(".")[2]
        setattr(parent, attribute, layer.get_base_layer())

    def draw_others(self) -> None:
        """Initialise as plain LoRA what EVA does not write: embeddings on meta, tied adapters."""
        tied = [layer for layer in self._others.values() if not _is_embedding(layer)]
        for path, layer in self._others.items():
            weight = layer.lora_embedding_A[self.adapter] if _is_embedding(layer) else None
            if weight is None or not (weight.is_meta or weight.is_inference()):
                continue
            rank, alpha = layer.r[self.adapter], layer.lora_alpha[self.adapter]
            self._rebuild(path, layer, rank, alpha)
            if tied and layer is self.model.get_input_embeddings():
                for each in tied:
                    self._tie(each, layer)
        for layer in tied:
            self._draw_tied(layer)

    def _draw_tied(self, layer: LoraLayer) -> None:
        """Draw a tied ``lora_A`` at random, which PEFT does for plain LoRA but not for "eva".

        Otherwise it keeps the embeddings' values, some ten times larger, and training diverges.
        """
        first, second = (getattr(layer, n)[self.adapter].weight for n in ("lora_A", "lora_B"))
        if first.is_meta or second.any():
            return
        self.undo.append(functools.partial(first.data.copy_, first.detach().clone()))
        nn.init.kaiming_uniform_(first, a=math.sqrt(5))

    def _tie(self, layer: LoraLayer, embedding: LoraLayer) -> None:
        """Tie the adapter of a layer to that of the embeddings, transposed, as PEFT does."""
        for own, its in (("lora_A", "lora_embedding_B"), ("lora_B", "lora_embedding_A")):
            weight = getattr(embedding, its)[self.adapter]
            getattr(layer, own)[self.adapter].weight = nn.Parameter(
                weight.detach().t(), weight.requires_grad
            )

    def finish(self) -> None:
        """Update the config, so that a saved adapter loads with the same layers and ranks.

        Raises:
            EvaRuntimeError: it would not; nothing is changed then.
        """
        config = self.config
        old_ranks, old_alphas = config.rank_pattern, config.alpha_pattern
        for key in self._others:
            self.ranks[key] = pattern_value(old_ranks, key, config.r)
            self.alphas[key] = pattern_value(old_alphas, key, config.lora_alpha)
        config.rank_pattern = pattern_of(self.ranks, config.r)
        config.alpha_pattern = pattern_of(self.alphas, config.lora_alpha)
        if self.removed:
            config.exclude_modules = exclude_layers(config, self.removed)
        for key, rank in self.ranks.items():
            if pattern_value(config.rank_pattern, key, config.r) != rank:
                raise EvaRuntimeError(
                    f"layer {key}: PEFT would not read its rank from rank_pattern, so that the "
                    "saved adapter could not be loaded"
                )
        adapter_configs(self.model)[self.adapter] = config
        tuner = getattr(self.model, "base_model", None)
        names = getattr(tuner, "targeted_module_names", None)
        if names is not None and self.removed:
            gone = set(self.removed)
            names[:] = [n for n in names if n not in gone]
        if self.dilated:
            keep_dilation()
            warn(
                f"PEFT's LoRA leaves out the dilation of a convolution ({', '.join(self.dilated)}) "
                "and fails when it runs. This process is patched; in others, call "
                "eva_kernels.patch_peft() before the adapter is loaded",
            )

    @functools.cached_property
    def _others(self) -> dict[str, LoraLayer]:
        # layers of this adapter that EVA does not write: embeddings, and what is tied to them
        tied = tied_modules(self.model, self.config)
        return {
            peft_key(path): module
            for path, module in self.model.named_modules()
            if isinstance(module, LoraLayer)
            and (self.adapter in module.lora_embedding_A or peft_key(path, module) in tied)
        }
