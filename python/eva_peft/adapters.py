"""Write a result into LoRA adapters: all of it, or nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eva_kernels.streaming import _host

from ._peft_compat import (
    EvaConfig,
    LoraConfig,
    LoraLayer,
    ParamWrapper,
    adapters_not_moved,
    carries_adapters,
    configs_of,
    eva_of,
    exclude_layers,
    keep_dilation,
    magnitude,
    pattern_of,
    pattern_value,
    tied_modules,
    untrained_magnitude,
    update_layer,
)
from .checks import check_base_model, check_not_sharded, refuse_replicas
from .errors import EvaRuntimeError, EvaTypeError, EvaValueError, listed, warn
from .layers import CONVOLUTIONS, adapter_dilation, dealt_to_groups, widths
from .ranks import scaled_alpha
from .routing import expert_names
from .snapshot import restored_on_failure
from .targets import (
    base_name,
    check_not_merged,
    device_of,
    is_replicated,
    layer_name,
    peft_key,
    resolve_name,
    unwrap,
)
from .training import mark_initialized, mark_left
from .world import random_state_kept
from .wrapping import wrap_model

if TYPE_CHECKING:
    from .result import EvaResult

__all__ = ["wrap_model", "write_result", "write_state_dict"]


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
    check_not_sharded(inner)
    carrier: Any = model
    with ExitStack() as stack:
        if not carries_adapters(inner):
            check_base_model(inner, adapter_name)
            if is_replicated(model):
                refuse_replicas()
            stack.enter_context(restored_on_failure(inner))
            inner = carrier = wrap_model(inner, chosen, adapter_name)
        eva = chosen.eva_config
        rows = result.state_dict(None if eva is None else eva.whiten)
        write_state_dict(carrier, rows, adapter_name, strict, result.uncalled, eva)
    inner.eva_result = result  # type: ignore[assignment]
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
        model: with a LoRA adapter of this name; maybe in a wrapper.
        state_dict: layer name -> (rank, in_features), with or without the prefixes of PEFT, DDP
            and compile; rank 0 removes the adapter from that layer.
        strict: raise on layers that only one side has; otherwise warn, and leave them with the
            default initialisation.
        default_layers: layers that are known to be missing and get the default initialisation.
        eva: says whether scaling factors are adjusted; that of the adapter's config if ``None``.

    Raises:
        EvaValueError: no such adapter, layers that are unknown, missing or there twice, a width
            that does not fit, rows that are not finite. EvaTypeError: no mapping of tensors.
        EvaRuntimeError: adapters are merged into the weights; or DistributedDataParallel is around
            the model, and an adapter would get another size.
    """
    replicated, model = is_replicated(model), unwrap(model)
    if adapter_name not in configs_of(model):
        raise EvaValueError(f"the model has no adapter {adapter_name!r}")
    check_not_merged(model)
    layers = _layers_of(model, adapter_name)
    parts = {part: name for name, (_, layer) in layers.items() for part in _parts(name, layer)}
    rows = _check_keys(state_dict, parts)
    for name in _without_adapter(model, parts, rows):
        del rows[name]
    left = {part for part, name in parts.items() if _unreadable(name, layers)}
    left.update(default_layers or ())
    _check_names(parts, rows, strict, left)
    _check_shapes(layers, parts, rows)
    _check_finite({name: value for name, value in rows.items() if name in parts})
    _check_variance(parts, rows)
    sizes = {name: layer.r[adapter_name] for name, (_, layer) in layers.items()}
    if replicated and any(len(rows[p]) != sizes[name] for p, name in parts.items() if p in rows):
        refuse_replicas()
    with restored_on_failure(model), _values_restored() as undo, random_state_kept():
        config = copy(configs_of(model)[adapter_name])
        writer = _Writer(model, config, adapter_name, undo, eva)
        for name, (path, layer) in layers.items():
            own = _parts(name, layer)
            writer.write(name, path, layer, [rows.get(part) for part in own])
            if left.issuperset(own) and rows.keys().isdisjoint(own):
                mark_left(layer.lora_A[adapter_name].weight)
        writer.draw_others()
        writer.finish()


def _layers_of(model: nn.Module, adapter_name: str) -> dict[str, tuple[str, LoraLayer]]:
    """Return path and layer by the name in the base model, of a layer or of a parameter.

    Those whose adapter is tied to that of the embeddings are left out.
    """
    tied = tied_modules(model, configs_of(model)[adapter_name])
    return {
        layer_name(path, module): (path, module)
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer)
        and adapter_name in module.lora_A
        and peft_key(path, module) not in tied
    }


def _is_embedding(layer: LoraLayer) -> bool:
    return len(layer.lora_embedding_A) > 0


def _parts(name: str, layer: LoraLayer) -> list[str]:
    """Return the names that a state dict has for a layer: one, or one for each expert."""
    if not isinstance(layer, ParamWrapper):
        return [name]
    return expert_names(name, layer.get_param().dim() == 3, layer.num_experts)


def _features(layer: LoraLayer) -> int | None:
    if isinstance(layer, ParamWrapper):
        return int(layer.in_features)
    size = widths(layer.get_base_layer())
    return None if size is None else size[0]


def _unreadable(name: str, layers: Mapping[str, tuple[str, LoraLayer]]) -> bool:
    """Tell whether EVA cannot read a layer's input, or it is a part of such a layer.

    PEFT adapts the output projection of an attention together with it.
    """
    steps = name.split(".")
    owners = (".".join(steps[:i]) for i in range(1, len(steps) + 1))
    return any(owner in layers and _features(layers[owner][1]) is None for owner in owners)


def _without_adapter(
    model: nn.Module, parts: Mapping[str, str], rows: Mapping[str, Any]
) -> list[str]:
    """Return the layers that are given rank 0, and had been before: they have no adapter."""
    asked = [
        name
        for name, value in rows.items()
        if name not in parts and isinstance(value, Tensor) and value.dim() == 2 and not len(value)
    ]
    known = {base_name(path) for path, _ in model.named_modules()} if asked else set()
    return [name for name in asked if resolve_name(name, known) in known]


def _check_keys(state_dict: Mapping[str, Tensor], parts: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the rows of a state dict by the names that the layers have here."""
    if not isinstance(state_dict, Mapping):
        raise EvaTypeError(
            "the EVA state dict must map layer names to tensors, as get_eva_state_dict and "
            f"EvaResult.state_dict return it; got {type(state_dict)}"
        )
    keys: dict[str, str] = {}
    for key in state_dict:
        if not isinstance(key, str):
            raise EvaTypeError(f"the keys of an EVA state dict are names of layers, got {key!r}")
        name = resolve_name(key, parts)
        if name in keys:
            raise EvaValueError(
                f"layer {name}: the EVA state dict has it twice, as {keys[name]!r} and {key!r}; "
                "take one of them out"
            )
        keys[name] = key
    return {name: state_dict[key] for name, key in keys.items()}


def _check_names(
    layers: Mapping[str, Any], rows: Mapping[str, Any], strict: bool, default: set[str]
) -> None:
    unknown = [name for name in rows if name not in layers]
    missing = [name for name in layers if name not in rows and name not in default]
    if not unknown and not missing:
        return
    told = {"unknown layers": unknown, "layers of the adapter are missing": missing}
    parts = [f"{len(names)} {what} ({listed(names)})" for what, names in told.items() if names]
    message = f"the EVA state dict does not fit the model: {', and '.join(parts)}"
    if strict:
        raise EvaValueError(message + "; pass strict=False to use what fits")
    warn(f"{message}; missing layers keep the default initialisation")


def _check_shapes(
    layers: Mapping[str, tuple[str, LoraLayer]],
    parts: Mapping[str, str],
    rows: Mapping[str, Tensor],
) -> None:
    ranks: dict[str, int] = {}
    for name, value in rows.items():
        if not isinstance(value, Tensor) or value.dim() != 2 or value.is_meta:
            raise EvaTypeError(f"layer {name}: expected a (rank, in_features) tensor with values")
        if name not in parts:
            continue
        layer = layers[parts[name]][1]
        features = _features(layer)
        if features is not None and value.shape[1] != features:
            raise EvaValueError(
                f"layer {name}: the state dict has {value.shape[1]} features, the layer {features}"
            )
        base = layer.get_base_layer()
        groups = base.groups if isinstance(base, CONVOLUTIONS) else 1
        if len(value) % groups:
            raise EvaValueError(
                f"layer {name}: rank {len(value)} is no multiple of the {groups} groups of the "
                "convolution"
            )
        common = ranks.setdefault(parts[name], len(value))
        if isinstance(layer, ParamWrapper) and (len(value) != common or not common):
            raise EvaValueError(
                f"layer {name}: rank {len(value)}, but the experts of {parts[name]} have one rank "
                f"in common, at least 1 (another one has {common})"
            )


def _check_finite(rows: Mapping[str, Tensor]) -> None:
    flags = _host.read([value.isfinite().all() for value in rows.values()])
    bad = [name for name, finite in zip(rows, flags, strict=True) if not finite]
    if bad:
        raise EvaValueError(
            f"the EVA state dict holds NaN or infinity in layers {listed(bad)}; compute it anew"
        )


def _check_variance(parts: Mapping[str, str], rows: Mapping[str, Tensor]) -> None:
    ranks = [len(rows[part]) if part in rows else None for part in parts]
    if ranks and not any(rank is None or rank for rank in ranks):
        raise EvaValueError(
            f"none of the {len(ranks)} layers is given a rank: no layer's inputs differ from one "
            "another, so there is no variance to explain. Give more, and different, samples"
        )


@contextmanager
def _values_restored() -> Iterator[list[Callable[[], Any]]]:
    """Run the registered undo steps, last first, if the block is left by an exception.

    They put back what was written into tensors; all else is in a snapshot of the model.
    """
    undo: list[Callable[[], Any]] = []
    try:
        yield undo
    except BaseException:
        for step in reversed(undo):
            step()
        raise


def _put_back(parameter: nn.Parameter, data: Tensor, grad: Tensor | None) -> None:
    parameter.grad = None  # it may be of another size than the data now
    parameter.data = data
    parameter.grad = grad


class _Writer:
    """Writes layer after layer, and keeps the config in step with them."""

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

    def write(self, name: str, path: str, layer: LoraLayer, parts: Sequence[Tensor | None]) -> None:
        """Write one layer; ``parts`` are the rows of lora_A, those of each expert apart."""
        rank, alpha = layer.r[self.adapter], layer.lora_alpha[self.adapter]
        new_rank = next((len(rows) for rows in parts if rows is not None), rank)
        default = all(rows is None for rows in parts)
        if new_rank == 0:
            self._remove(path, layer)
            return
        if self.eva.adjust_scaling_factors:
            alpha = scaled_alpha(self.config, alpha, rank, new_rank)
        weight = layer.lora_A[self.adapter].weight
        fits = new_rank * len(parts) == weight.shape[0]
        if not fits or weight.is_meta or weight.is_inference():
            # what EVA does not write of a layer is drawn as plain LoRA would
            self._rebuild(layer, new_rank, alpha, drawn=any(rows is None for rows in parts))
        base = layer.get_base_layer()
        if isinstance(base, CONVOLUTIONS):
            self._keep_dilation(name, layer, base)
            parts = [None if rows is None else dealt_to_groups(rows, base.groups) for rows in parts]
        if not default:
            self._fill(layer, parts)
            mark_initialized(layer.lora_A[self.adapter].weight)
        key = peft_key(path, layer)
        self.ranks[key], self.alphas[key] = new_rank, alpha

    def _keep_dilation(self, name: str, layer: LoraLayer, base: Any) -> None:
        dilation = adapter_dilation(base)
        if all(gap == 1 for gap in dilation):
            return
        self.dilated.append(name)
        layer.lora_A[self.adapter].dilation = dilation

    def _rebuild(self, layer: LoraLayer, rank: int, alpha: float, drawn: bool) -> None:
        if _is_embedding(layer):
            dtype, mode = layer.lora_embedding_A[self.adapter].dtype, layer.training
        else:
            before = layer.lora_A[self.adapter]
            dtype, mode = before.weight.dtype, before.training
        parameters_before = dict(layer.named_parameters())
        trainable = {name: p.requires_grad for name, p in parameters_before.items()}
        config = copy(self.config)
        # PEFT knows no "eva" for convolutions; whatever it draws is overwritten
        drawn = drawn or isinstance(layer.get_base_layer(), CONVOLUTIONS)
        config.init_lora_weights = True if drawn else "eva"
        base = layer.get_base_layer()
        parameters = list(base.parameters())
        offloaded = bool(parameters) and all(p.is_meta for p in parameters)
        # PEFT would put it where the weights of the layer are, and so nowhere
        with adapters_not_moved(layer) if offloaded else nullcontext():
            update_layer(layer, self.adapter, rank, alpha, config)
        device = device_of(base) if offloaded else None
        for name in (*layer.adapter_layer_names, "lora_dropout"):
            parts = getattr(layer, name)
            if self.adapter not in parts:
                continue
            own = parts[self.adapter]
            if isinstance(own, nn.Module):
                own.to(device, dtype).train(mode)
            else:
                parts[self.adapter] = nn.Parameter(own.detach().to(device, dtype))
        self._keep_parameters(layer, parameters_before)
        for name, parameter in layer.named_parameters():  # PEFT sets those of other adapters too
            parameter.requires_grad_(trainable.get(name, parameter.requires_grad))

    def _keep_parameters(self, layer: LoraLayer, before: Mapping[str, nn.Parameter]) -> None:
        """Let parameters be those of before, with their new sizes: an optimizer may hold them."""
        for name, new in list(layer.named_parameters()):
            old = before.get(name)
            if old is None or old is new or old.is_inference() or old.is_meta:
                continue
            if (old.dtype, old.device) != (new.dtype, new.device):
                continue
            self.undo.append(functools.partial(_put_back, old, old.data, old.grad))
            old.data, old.grad = new.data, None
            owner, _, attribute = name.rpartition(".")
            setattr(layer.get_submodule(owner), attribute, old)

    def _fill(self, layer: LoraLayer, parts: Sequence[Tensor | None]) -> None:
        first, second = layer.lora_A[self.adapter].weight, layer.lora_B[self.adapter]
        zeroed = [second.weight] if second.bias is None else [second.weight, second.bias]
        dora = magnitude(layer, self.adapter)
        for weight in (first, *zeroed, *([] if dora is None else [dora])):
            before = weight.detach().clone()
            self.undo.append(functools.partial(weight.data.copy_, before))
        for weight in zeroed:
            weight.zero_()
        if dora is not None:  # maybe trained; the output is to be that of the base model
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
            return  # another adapter lives here
        parent = self.model.get_submodule(path.rpartition(".")[0])
        attribute = path.rpartition(".")[2]
        setattr(parent, attribute, layer.get_base_layer())

    def draw_others(self) -> None:
        """Draw, as plain LoRA would, what EVA does not write and PEFT has made without memory."""
        others = self._others.values()
        tied = [layer for layer in others if not _is_embedding(layer)]
        for layer in others:
            weight = layer.lora_embedding_A[self.adapter] if _is_embedding(layer) else None
            if weight is None or not (weight.is_meta or weight.is_inference()):
                continue
            rank, alpha = layer.r[self.adapter], layer.lora_alpha[self.adapter]
            self._rebuild(layer, rank, alpha, drawn=True)
            if tied and layer is self.model.get_input_embeddings():
                for each in tied:
                    self._tie(each, layer)

    def _tie(self, layer: LoraLayer, embedding: LoraLayer) -> None:
        """Make the adapter of a layer the transposed one of the embeddings, as PEFT does."""
        for own, its in (("lora_A", "lora_embedding_B"), ("lora_B", "lora_embedding_A")):
            weight = getattr(embedding, its)[self.adapter]
            getattr(layer, own)[self.adapter].weight = nn.Parameter(
                weight.detach().t(), weight.requires_grad
            )

    def finish(self) -> None:
        """Bring the config in line, so that a saved adapter loads with the same layers and ranks.

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
                raise EvaRuntimeError(f"layer {key}: the rank pattern does not give its rank")
        configs_of(self.model)[self.adapter] = config
        tuner = getattr(self.model, "base_model", None)
        names = getattr(tuner, "targeted_module_names", None)
        if names is not None and self.removed:
            gone = set(self.removed)
            names[:] = [n for n in names if n not in gone]
        if self.dilated:
            keep_dilation()
            warn(
                f"PEFT's LoRA leaves out the dilation of a convolution ({', '.join(self.dilated)}) "
                "and cannot run there. This is mended in this process; call "
                "eva_kernels.patch_peft() in others, before they load the adapter",
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
