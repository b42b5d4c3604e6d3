"""Which parts of a batch are passed to a model's ``forward``, and by which names."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .._peft_compat import base_model_of
from ..errors import EvaError, EvaTypeError, EvaValueError
from ..model.architecture import (
    Architecture,
    forward_signature,
    is_defined_in_transformers,
    is_transformers_model,
)
from ..surroundings.memory import is_out_of_memory
from .batches import is_tensor_dict
from .mask_contents import hides_where_true
from .roles import (
    PADDING_MASKS,
    has_decoder_inputs,
    is_decoder_input,
    may_be_mask,
    token_labels_of,
)

__all__ = [
    "accepts_arguments",
    "as_one_argument",
    "model_arguments",
    "positional_to_named",
    "raise_if_mapping_refused",
    "raise_if_misread",
    "raise_if_nested",
    "raise_if_not_taken",
    "takes_whole_mapping",
    "takes_whole_object",
    "without_labels",
    "without_string_columns",
]

# Arguments of transformers models that no tensor can be, and those with three or more dimensions.
_NO_TENSORS = re.compile(
    r"past_key_values|cache|cache_params|mems|use_cache|return_dict|output_(attentions|hidden_states)"
)
_FEATURES = ("inputs_embeds", "encoder_hidden_states", "pixel_values", "input_features")
_PER_TOKEN = ("token_type_ids", "position_ids")
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def positional_to_named(batch: Any, model: nn.Module) -> Any:
    """Return positional arguments of a model as a mapping, if a mask or labels are among them.

    Targets, as in (input, target), are dropped, or become labels if the model takes those, or if
    they tell which tokens have no label. They are the parts beyond the parameters of ``forward``,
    or from the first part on that cannot be the value of its parameter.

    Raises:
        EvaTypeError: the parts are samples or images, of which all but the first would be dropped.
        EvaValueError: a tokenizer's ``token_type_ids`` and ``attention_mask``, in its order.
    """
    if not isinstance(batch, (tuple, list)) or any(isinstance(v, Mapping) for v in batch):
        return batch
    if isinstance(batch, PackedSequence):  # a tuple, but one argument
        return batch
    first = batch[0] if batch else None
    if isinstance(first, (list, tuple)) and first and isinstance(first[0], int):
        return batch  # each part holds the ids of a sample
    base = base_model_of(model)
    parameters, config = _parameters(base), getattr(base, "config", None)
    if parameters is None or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return batch
    pairs = _positional_pairs(parameters, batch)
    num_inputs = _num_inputs(pairs, config)
    targets = batch[num_inputs:]
    if not num_inputs or not all(_is_target(part, batch[0]) for part in targets):
        return batch
    if targets and isinstance(batch[0], Tensor) and _are_samples(batch[0], targets, config):
        raise _samples_error()
    if targets and all(_is_single_image(part, base) for part in batch):
        raise EvaTypeError(
            "a batch is a list of images of different sizes, of which the model would take the "
            "first; let the loader bring them to one size and stack them, or pass forward_fn to "
            "run the model on each"
        )
    named = {p.name: part for p, part in pairs[:num_inputs]}
    _raise_if_mask_misplaced(pairs[num_inputs:], named, base)
    _raise_if_types_are_mask(named.get("attention_mask"), named.get("token_type_ids"))
    takes_labels = any(p.name == "labels" for p in parameters)
    if targets and takes_labels and not targets[0].is_floating_point():
        named.setdefault("labels", targets[0])
    elif (labels := token_labels_of(batch)) is not None:
        named.setdefault("labels", labels)  # for the mask; a model that takes none gets none
    selecting = {"attention_mask", "labels", *PADDING_MASKS}
    return named if named.keys() & selecting else tuple(batch[:num_inputs])


def _raise_if_mask_misplaced(
    misfits: Sequence[tuple[inspect.Parameter, Any]], named: Mapping[str, Any], base: nn.Module
) -> None:
    """Refuse what seems to be the mask of the tokens, in place of an argument that it cannot be."""
    if not misfits or "attention_mask" in named:
        return
    parameter, part = misfits[0]
    if parameter.name in _PER_TOKEN:
        return  # positions and types may be ones and zeros, too
    ids = next(iter(named.values()))
    if isinstance(ids, Tensor) and part.shape == ids.shape and may_be_mask(part):
        raise _refusal_error(f"a mask in place of {parameter.name}", base)


def _raise_if_types_are_mask(mask: Any, types: Any) -> None:
    """Refuse types that are a mask, and hence a mask of types: no padding has a type."""
    if not isinstance(mask, Tensor) or not isinstance(types, Tensor) or not may_be_mask(types):
        return
    if not mask.is_floating_point() and bool(((types != 0) & (mask == 0)).any()):
        raise EvaValueError(
            "a batch seems to be (input_ids, token_type_ids, attention_mask), as a tokenizer orders"
            " them, but the model takes the mask first; let the loader yield a mapping"
        )


def _positional_pairs(
    parameters: Sequence[inspect.Parameter], batch: Sequence[Any]
) -> list[tuple[inspect.Parameter, Any]]:
    return list(zip((p for p in parameters if p.kind in _POSITIONAL), batch, strict=False))


def _num_inputs(pairs: Sequence[tuple[inspect.Parameter, Any]], config: Any) -> int:
    """Return the number of first parts of a batch that can be the values of their parameters."""
    misfits = (i for i, pair in enumerate(pairs) if _cannot_be_value(*pair, pairs[0][1], config))
    return next(misfits, len(pairs))


def _parameters(module: nn.Module) -> list[inspect.Parameter] | None:
    signature = forward_signature(module)
    return None if signature is None else list(signature.parameters.values())


def _is_target(part: Any, inputs: Any) -> bool:
    """Tell whether a tensor is a target for the samples of another, and not another sample."""
    if isinstance(inputs, PackedSequence):
        return isinstance(part, Tensor)  # another sample would be packed, too
    both_tensors = isinstance(part, Tensor) and isinstance(inputs, Tensor)
    if not both_tensors or part.shape[:1] != inputs.shape[:1]:
        return False
    if inputs.dim() > 1 and not inputs.is_floating_point():
        return True  # the first holds a batch's token ids, the part their labels
    return (part.shape, part.dtype) != (inputs.shape, inputs.dtype)


def _are_samples(inputs: Any, targets: Sequence[Any], config: Any) -> bool:
    """Tell whether tensors hold token ids of a sample each, not of one sample and its targets."""
    for part in (inputs, *targets):
        if part.is_floating_point() or part.dim() != 2 or len(part) != 1 or part.numel() == 1:
            return False
        if may_be_mask(part) or bool((part < 0).any()):
            return False
    # a decoder's token labels are as many as its tokens
    decoder = getattr(config, "is_encoder_decoder", None) is False
    unequal = any(part.shape != inputs.shape for part in targets)
    return len(targets) > 1 or (decoder and unequal)


def _is_single_image(part: Any, base: nn.Module) -> bool:
    """Tell whether a part may be an image, (C, H, W), for a convolutional network, not several."""
    if not isinstance(part, Tensor) or part.dim() != 3 or len(part) == 1:
        return False
    first = next((module for module in base.modules() if isinstance(module, nn.Conv2d)), None)
    return first is not None and first.in_channels == len(part)


def _samples_error() -> EvaTypeError:
    return EvaTypeError(
        "a batch is a list of samples; give the loader a collator that makes one mapping of them, "
        "such as transformers' DataCollatorWithPadding, or pass forward_fn to tokenise them and "
        "run the model"
    )


def _cannot_be_value(parameter: inspect.Parameter, part: Any, inputs: Any, config: Any) -> bool:
    """Tell whether a part of a batch cannot be the value of an optional parameter."""
    if part is inputs or parameter.default is parameter.empty or not isinstance(part, Tensor):
        return False
    if "mask" in parameter.name:
        return not may_be_mask(part)
    if config is not None and _is_misfit_of_transformers(parameter.name, part):
        return True
    if not isinstance(inputs, Tensor) or parameter.name not in _PER_TOKEN:
        return False
    if part.shape != inputs.shape or part.is_floating_point():
        return True
    if parameter.name == "position_ids" and (may_be_mask(part) or bool((part.diff() > 1).any())):
        return True  # a mask of the loss, or ids, as of the next tokens: positions rise by one
    num_types = getattr(config, "type_vocab_size", None)
    if (
        parameter.name == "token_type_ids"
        and isinstance(num_types, int)
        and bool((part >= num_types).any())
    ):
        return True
    return bool((part < 0).any()) or torch.equal(part, inputs)


def _is_misfit_of_transformers(name: str, part: Tensor) -> bool:
    """Tell whether a tensor cannot be the argument of that name of a model of transformers."""
    if name in _FEATURES:  # a module of the user's with a config may take (B, D)
        rows = part.dim() == 2 and part.is_floating_point()
        return part.dim() < 3 and (not rows or name == "inputs_embeds")
    if is_decoder_input(name):  # it has no negative token, as labels of tokens have
        return part.dim() < 2 or (not part.is_floating_point() and bool((part < 0).any()))
    return _NO_TENSORS.fullmatch(name) is not None


def model_arguments(batch: Any, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments of the model for a batch.

    Raises:
        EvaTypeError: the batch is of a kind that no model takes.
    """
    if isinstance(batch, Mapping) and not is_tensor_dict(batch):  # such one is kept only whole
        return (), dict(batch)
    if isinstance(batch, (Tensor, PackedSequence, Mapping)):
        return (batch,), {}
    if isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        samples = [isinstance(part, Mapping) for part in batch]
        own = not is_defined_in_transformers(base_model_of(model)) and all(samples)
        if own and accepts_arguments(tuple(batch), {}, model):
            return tuple(batch), {}  # such as a query and passages, each with a mask
        if samples and all(samples):
            raise _samples_error()
        if any(samples):
            raise EvaTypeError(
                "a batch is a sequence with a mapping among other things, such as (inputs, "
                "targets); let the loader yield the mapping alone, or pass forward_fn to run the "
                "model on such a batch"
            )
        return tuple(batch), {}
    movable = callable(getattr(batch, "to", None)) or is_dataclass(batch)
    if movable and not isinstance(batch, (type, nn.Module)):
        return (batch,), {}  # objects that can be moved to a device, such as graphs
    raise EvaTypeError(
        f"a batch must be a mapping, a tuple, a list or a tensor, got {type(batch)}; pass "
        "forward_fn to run the model on other batches"
    )


def accepts_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any], model: nn.Module) -> bool:
    """Tell whether ``forward`` takes these arguments, by its signature if there is one."""
    signature = forward_signature(base_model_of(model))
    if signature is None:
        return True
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def as_one_argument(batch: Any, model: nn.Module, error: Exception | None = None) -> Any:
    """Return a mapping if the model takes it whole as its one argument, not by name.

    Args:
        batch, model: of the call.
        error: why it failed by name.

    Raises:
        EvaTypeError: the model does not; an argument is missing or unknown.
    """
    if isinstance(batch, Mapping) and takes_whole_mapping(batch, model):
        return batch
    why = "" if error is None else f" (it failed with {error!r})"
    raise _refusal_error(_contents(batch), base_model_of(model), why)


def raise_if_not_taken(
    batch: Any, kwargs: Mapping[str, Any], model: nn.Module, error: Exception
) -> None:
    """Explain the error of a transformers model that was not given what it takes.

    It may know none of the argument names: most accept any name, and only report that they got no
    input. So do they for a batch of which nothing is passed on, such as strings only. Or a part of
    a tuple cannot be the value of its parameter, or the first is no tensor, or a decoder got no
    inputs, or the mask does not have the shape of the token ids.

    Raises:
        EvaTypeError: this is the case.
    """
    base = base_model_of(model)
    if isinstance(error, EvaError) or is_out_of_memory(error) or not is_transformers_model(base):
        return
    parameters = _parameters(base) or []
    known = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    takes_varargs = any(p.kind is p.VAR_POSITIONAL for p in parameters)  # as by a decorator
    has_names = isinstance(batch, Mapping) and bool(batch)
    unknown = has_names and bool(known) and not takes_varargs and not kwargs.keys() & known
    parts = batch if isinstance(batch, (tuple, list)) else [batch]
    pairs = _positional_pairs(parameters, [] if isinstance(batch, Mapping) else parts)
    misplaced = _num_inputs(pairs, getattr(base, "config", None)) < len(pairs)
    name = parameters[0].name if parameters else ""
    first = pairs[0][1] if pairs else kwargs.get(name)
    # it may pass on **kwargs, so the error may have another cause: quote it
    why = f" (it failed with {error!r})"
    if first is not None and not isinstance(first, Tensor):
        raise _refusal_error(f"{name} of type {type(first).__name__}", base, why) from error
    if unknown or misplaced:
        raise _refusal_error(_contents(batch), base, why) from error
    given_inputs = {p.name: part for p, part in pairs} | dict(kwargs)
    if _lacks_decoder_inputs(given_inputs, base, error):
        raise _refusal_error("no labels or decoder inputs", base, why) from error
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    if isinstance(ids, Tensor) and (misfit := _misfit_of(mask, ids)):
        given = f"{misfit}, for input_ids of shape {tuple(ids.shape)}"
        raise _refusal_error(f"an attention_mask of {given}", base, why) from error


def _lacks_decoder_inputs(
    given_inputs: Mapping[str, Any], base: nn.Module, error: Exception
) -> bool:
    """Tell whether an encoder-decoder asked for inputs as its decoder got none.

    Most do so by the names of the encoder's, or say that there are two of the decoder's.
    """
    decoder = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
    asks = isinstance(error, ValueError) and "input_ids" in str(error)
    has_labels = given_inputs.get("labels") is not None
    return decoder and asks and not has_labels and not has_decoder_inputs(given_inputs)


def _misfit_of(mask: Any, ids: Tensor) -> str:
    """Return the type or shape of a mask that is not of the tokens; of 4 axes it is of pairs."""
    if isinstance(mask, (list, tuple)):
        return f"type {type(mask).__name__}"
    if not isinstance(mask, Tensor) or mask.dim() > 3:
        return ""
    fits = mask.shape in (ids.shape, ids.shape[:2])  # a token may have an id in each codebook
    return "" if fits else f"shape {tuple(mask.shape)}"


def raise_if_nested(batch: Any, model: nn.Module) -> None:
    """Refuse nested tensors for a model of transformers: none takes them.

    Raises:
        EvaTypeError: this is the case.
    """
    parts = batch.values() if isinstance(batch, Mapping) else batch
    parts = parts if isinstance(batch, (Mapping, tuple, list)) else [batch]
    nested = any(isinstance(part, Tensor) and part.is_nested for part in parts)
    if nested and is_defined_in_transformers(base := base_model_of(model)):
        raise EvaTypeError(
            f"{type(base).__name__} does not take nested tensors. Let the loader pad them, by "
            "torch.nested.to_padded_tensor for example, and yield an attention_mask, too"
        )


def raise_if_misread(batch: Any, model: nn.Module) -> None:
    """Refuse what a model of transformers may run on, but reads as something else.

    Raises:
        EvaValueError: samples of token ids that are batches of one each, or one number for each
            sample in place of them, or a mask that is true, or negative, at what it hides.
    """
    base = base_model_of(model)
    if not is_defined_in_transformers(base):
        return
    named = isinstance(batch, Mapping)
    parts = batch if isinstance(batch, (tuple, list)) else [batch]
    pairs = [] if named else _positional_pairs(_parameters(base) or [], parts)
    batch = batch if named else {parameter.name: part for parameter, part in pairs}
    ids = batch.get("input_ids")
    if not named and isinstance(ids, Tensor) and ids.dim() == 1:  # an index, its label, its length
        raise EvaValueError(
            f"a batch has input_ids of shape {tuple(ids.shape)}, not of (samples, tokens); let the "
            f"loader yield a mapping, or parts in the order of {type(base).__name__}.forward"
        )
    for key in ("input_ids", "labels") if ids is not None else ():
        value = batch.get(key)
        if isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == 1:
            raise EvaValueError(
                f"a batch has {key} of shape {tuple(value.shape)}: every sample is a batch of one, "
                "as a tokenizer makes it with return_tensors; let the dataset yield its first row"
            )
    mask = batch.get("attention_mask")
    if not named or not isinstance(mask, Tensor):  # without names it may be something else
        return
    additive = mask.is_floating_point() and mask.dim() == 2 and bool((mask < 0).any())
    if additive or hides_where_true(mask):
        raise EvaValueError(
            f"the attention_mask of a batch is {'negative' if additive else 'true'} where it hides "
            f"a token, but {type(base).__name__} reads it the other way round; let the loader "
            "yield mask == 0"
        )


def raise_if_mapping_refused(batch: Any, model: nn.Module, error: Exception) -> None:
    """Explain the error of a model whose one argument must be a tensor, not a mapping.

    Raises:
        EvaTypeError: this is the case.
    """
    names_type = re.search(rf"\b{type(batch).__name__}\b", str(error))  # not as in "return_dict"
    wrong = names_type and isinstance(error, (AttributeError, TypeError))
    if wrong and not isinstance(error, EvaError):
        why = f" (it failed with {error!r})"
        raise _refusal_error(_contents(batch), base_model_of(model), why) from error


def _contents(batch: Any) -> str:
    return f"the names {sorted(batch)}" if isinstance(batch, Mapping) else "its values"


def _refusal_error(given: str, base: nn.Module, why: str = "") -> EvaTypeError:
    names = [p.name for p in _parameters(base) or []]
    return EvaTypeError(
        f"{type(base).__name__}.forward({', '.join(names)}) does not take a batch with {given}{why}"
        ". Let the loader yield what the model takes, or pass forward_fn to run it on such a batch"
    )


def takes_whole_mapping(batch: Mapping[str, Any], model: nn.Module) -> bool:
    """Tell whether a model takes one argument, and none named as a part of the batch."""
    base = base_model_of(model)
    parameters = _parameters(base) or []
    if type(base).forward is nn.Sequential.forward:  # its first layer takes no mapping
        return False
    needed = [p for p in parameters if p.kind in _POSITIONAL and p.default is p.empty]
    return len(needed) == 1 and not batch.keys() & {p.name for p in parameters}


def takes_whole_object(batch: Any, named: Mapping[str, Any], model: nn.Module) -> bool:
    """Tell whether a model takes a TensorDict or a dataclass object as it is, not by name.

    It does if that is its one argument, or if its first one is named after the type, as
    ``tensordict``, whatever else it takes.

    Args:
        batch: the object.
        named: what is in it.
    """
    if takes_whole_mapping(named, model):
        return True
    parameters = _parameters(base_model_of(model)) or []
    if not parameters or parameters[0].kind not in _POSITIONAL:
        return False
    first = parameters[0].name.lower()
    after_type = len(first) > 3 and first in type(batch).__name__.lower()
    return after_type and not named.keys() & {p.name for p in parameters}


def without_string_columns(arguments: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Drop string columns that ``forward`` does not name, as transformers' ``Trainer`` does."""
    columns = {k for k, v in arguments.items() if _is_strings(v)}
    if not columns:
        return arguments
    named = {p.name for p in _parameters(base_model_of(model)) or []}
    return {k: v for k, v in arguments.items() if k not in columns or k in named}


def _is_strings(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(v, str) for v in value)
    return isinstance(value, str)


def without_labels(arguments: dict[str, Any], architecture: Architecture) -> dict[str, Any]:
    """Drop ``labels``, to save the loss, unless the model needs them or makes inputs from them."""
    from_labels = architecture.makes_decoder_ids and not has_decoder_inputs(arguments)
    if from_labels or architecture.needs_labels:
        return arguments
    return {k: v for k, v in arguments.items() if k != "labels"}
