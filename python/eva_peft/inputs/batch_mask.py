"""The token mask of a batch, from its masks of several kinds and its labels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional

from .._peft_compat import LoraConfig, eva_config_of
from ..errors import EvaValueError, warn
from ..model.architecture import Architecture
from .batches import as_mapping
from .mask_contents import FEW, hides_where_true, is_right_padded
from .media_masks import (
    audio_mask_of,
    has_audio,
    has_images,
    pixel_masks_of,
    silent_frames,
    tile_mask_of,
)
from .roles import (
    PADDING_MASKS,
    has_decoder_inputs,
    has_ids_like,
    is_decoder_input,
    token_labels_of,
)
from .token_mask import TokenMask

__all__ = ["mask_of_batch", "split_joint_mask", "token_mask", "warn_of_counted_padding"]

# A Decision Transformer interleaves return, state and action: three tokens a time step.
_DECISION_TOKENS_PER_STEP = 3
# Masks of tokens other than text: boxes of images, entities.
_NON_TEXT_MASKS = ("visual_attention_mask", "entity_attention_mask")
# The patch mask of timm's models for images of any size; a class token precedes the patches.
_PATCH_MASK = "patch_valid"
# Masks of hidden states that condition a model, possibly one per encoder.
_CROSS_MASK = re.compile(r"(^|_)encoder_(\w+_)?mask|^text_embedding_mask")
# Masks of units made of tokens, such as words or spans, if their shape differs.
_UNIT_MASK = re.compile(r"(?<!attention)(?<!padding)_mask$")
# The mask of own and conditioning tokens in one sequence, see split_joint_mask.
_JOINT_MASK = "both_mask"
_DEFAULT_ARCHITECTURE = Architecture()


def mask_of_batch(
    batch: Any,
    config: LoraConfig,
    architecture: Architecture = _DEFAULT_ARCHITECTURE,
    warned: set[str] | None = None,
) -> TokenMask:
    """Build the mask of a batch from ``attention_mask`` and ``labels``, as PEFT does.

    Labels are used only if they label tokens, that is if their shape is that of the tokens; the
    labels of an encoder-decoder model mask its decoder. Without a mask, labels of tokens are used
    under any name. None is negative, unless ``label_mask_value`` is a class.

    Args:
        batch: a mapping; anything else has no mask.
        config: its ``eva_config`` says whether labels mask tokens, and which value is ignored.
        architecture: of the model.
        warned: names of warnings already given; updated.
    """
    warned = set() if warned is None else warned
    if not isinstance(batch, Mapping):
        mask = TokenMask(None)
        mask.warned = warned
        return mask
    batch = _with_prompt_mask(_with_token_masks(batch))
    # for custom models, only the batch shows whether there is a decoder
    has_decoder = "decoder_attention_mask" in batch or has_decoder_inputs(batch)
    has_decoder = has_decoder or architecture.encoder_decoder
    main, decoder, unpadded = _text_masks(batch, config, architecture, has_decoder, warned)
    candidates = (token_mask(v) for k, v in batch.items() if _CROSS_MASK.search(str(k)))
    cross_masks = [mask for mask in candidates if mask is not None]
    decision = getattr(architecture.config, "model_type", "") == "decision_transformer"
    qformer = token_mask(batch.get("qformer_attention_mask"))
    mask = TokenMask(
        main,
        decoder,
        tokens_per_position=_DECISION_TOKENS_PER_STEP if decision else 1,
        multimodal=_is_multimodal(batch),
        encoder_decoder=has_decoder,
        cross_masks=cross_masks,
        padding_multiple=architecture.padding_multiple,
        frame_length_functions=architecture.frame_length_functions,
        text_first=False if _PATCH_MASK in batch else architecture.text_precedes_images,
        non_text_mask=next((token_mask(batch[k]) for k in _NON_TEXT_MASKS if k in batch), None),
        qformer_mask=main if qformer is None and architecture.qformer_reads_text else qformer,
        audio_mask=audio_mask_of(batch),
        pixel_masks=pixel_masks_of(batch),
        tile_mask=tile_mask_of(batch),
        audio_only=has_audio(batch) and not has_images(batch),
        has_media=has_audio(batch) or has_images(batch),
        patch_sizes=architecture.patch_sizes,
        ignored_prefixes=architecture.name_prefixes,
        unmasked_prefixes=architecture.separate_loss_prefixes,
        unpadded=unpadded,
        unit_masks=_unit_masks(batch, [mask for mask in (main, *cross_masks) if mask is not None]),
    )
    mask.warned = warned
    return mask


def warn_of_counted_padding(
    batch: Any, mask: TokenMask, model_config: Any, warned: set[str]
) -> None:
    """Warn of what seems to be padding, but counts: without a mask, or if that is of ones.

    Args:
        batch: a mapping, token ids, or a sequence that begins with them.
        mask: of the batch.
        model_config: names the token that pads, or the one that ends a text and often pads, too.
        warned: warnings already given; updated.
    """
    if "counted padding" in warned:
        return
    silent = silent_frames(batch) if isinstance(batch, Mapping) else None
    if silent is not None and _num_at_ends(silent) > FEW * silent.numel():
        warned.add("counted padding")
        warn(
            "many sounds begin or end in silence, which counts, since no attention_mask hides it. "
            "If it is padding, let the loader of this pass yield an attention_mask that is 0 "
            "there, as feature extractors do with return_attention_mask=True"
        )
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else first
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return
    ids = ids.cpu()
    kept = torch.ones_like(ids) > 0 if mask.main is None else mask.main
    if kept.shape != ids.shape:
        return
    for name in ("pad_token_id", "eos_token_id"):
        given = getattr(model_config, name, None)
        for token in given if isinstance(given, list) else [given]:
            if token is not None and _num_at_ends(kept & (ids == token)) > FEW * kept.sum():
                warned.add("counted padding")
                warn(
                    f"many texts begin or end with several tokens {token}, the model's {name}, "
                    "which count, since no attention_mask hides them. If they are padding, let the "
                    "loader yield an attention_mask that is 0 there"
                )
                return


def _num_at_ends(chosen: Tensor) -> int:
    """Return how many tokens at both ends of samples are chosen, one an end aside."""
    chosen = chosen[~chosen.all(1)]
    runs = (tokens.cumprod(1).sum(1) for tokens in (chosen, chosen.flip(1)))
    return sum(int((run - 1).clamp(min=0).sum()) for run in runs)


def _with_token_masks(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Add a token mask to a batch for each padding mask, which is true or -inf at padding."""
    given = {usual: batch.get(name) for name, usual in PADDING_MASKS.items() if name in batch}
    found = {usual: mask == 0 for usual, mask in given.items() if isinstance(mask, Tensor)}
    return {**found, **batch} if found else batch


def _with_prompt_mask(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rename a batch's ``attention_mask`` if it is the mask of ``encoder_hidden_states``.

    Some diffusers models, which have no text of their own, take it by that name; in others it
    covers both sequences, see :func:`split_joint_mask`.
    """
    states, mask = batch.get("hidden_states"), batch.get("attention_mask")
    prompt, kept = batch.get("encoder_hidden_states"), token_mask(mask)
    if kept is None or not isinstance(states, Tensor) or not isinstance(prompt, Tensor):
        return batch
    split = split_joint_mask(kept, tuple(states.shape[:2]), tuple(prompt.shape[:2]))
    if split:
        return {**batch, "attention_mask": None, **split}
    if kept.shape != prompt.shape[:2] or kept.shape == states.shape[:2]:
        return batch
    return {**batch, "attention_mask": None, "encoder_attention_mask": mask}


def split_joint_mask(
    joint: Tensor, own_shape: tuple[int, ...], prompt_shape: tuple[int, ...] | None
) -> dict[str, Tensor]:
    """Split a mask of own and conditioning tokens in one sequence; returns masks as in a batch.

    The order is inferred from the mask: own tokens have no padding, or both are padded on the
    right. The whole mask is returned, too, under a name that ``_UNIT_MASK`` matches.

    Args:
        joint: bool (B, S + T) or, in the other order, (B, T + S); otherwise the result is empty.
        own_shape: (B, S).
        prompt_shape: (B, T), of the conditioning tokens.
    """
    if prompt_shape is None or len(prompt_shape) != 2 or len(own_shape) != 2:
        return {}
    if joint.all():
        return {}
    sizes = own_shape[1], prompt_shape[-1]
    if tuple(joint.shape) != (own_shape[0], sum(sizes)):
        return {}
    orders = joint.split(sizes, 1), joint.split(sizes[::-1], 1)[::-1]
    for own_mask, prompt_mask in orders:
        one_sided = is_right_padded(prompt_mask) or is_right_padded(prompt_mask.flip(1))
        if own_mask.all() and one_sided:
            named = {} if own_mask.shape == prompt_mask.shape else {"attention_mask": own_mask}
            return {**named, "encoder_attention_mask": prompt_mask, _JOINT_MASK: joint}
    for own_mask, prompt_mask in orders:
        if is_right_padded(own_mask) and is_right_padded(prompt_mask):
            named = {"attention_mask": own_mask, "encoder_attention_mask": prompt_mask}
            return {**named, _JOINT_MASK: joint}
    return {}


def _unit_masks(batch: Mapping[str, Any], token_masks: Sequence[Tensor]) -> list[Tensor]:
    """Return the masks, (B, W), of units other than tokens, such as spans.

    Only masks that keep the first entry of every sample, since in others true may mean padding;
    the one from :func:`split_joint_mask` is exempt.

    Args:
        token_masks: the token masks; without any, nothing is returned.
    """
    found = []
    for key, value in batch.items():
        named = bool(token_masks) and _UNIT_MASK.search(str(key)) is not None
        if not named or not isinstance(value, Tensor) or value.dim() != 2:  # else a pixel mask
            continue
        mask = token_mask(value)
        alike = any(value.shape == other.shape for other in token_masks)
        if mask is not None and not alike and (key == _JOINT_MASK or bool(mask[:, :1].all())):
            found.append(mask)
    return found


def _text_masks(
    batch: Mapping[str, Any],
    config: LoraConfig,
    architecture: Architecture,
    has_decoder: bool,
    warned: set[str],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the masks of the only or the encoder's stream, of the decoder's, and a third.

    The third is the first before labels were applied, or ``None`` if they were not.

    Args:
        has_decoder: there is an encoder and a decoder.
    """
    main = _attention_mask(batch, warned)
    decoder = token_mask(batch.get("decoder_attention_mask", batch.get("decoder_mask")))
    if has_decoder:
        num_samples = next((len(mask) for mask in (main, decoder) if mask is not None), 0)
        labelled = _labelled_step_mask(batch.get("labels"), config, architecture, num_samples)
        if decoder is None and labelled is None and main is not None:
            decoder = _all_steps_mask(batch, num_samples)  # else main would be used if as long
        return main, _decoder_mask(batch, decoder, labelled, architecture), None
    eva, label_mask = eva_config_of(config), None
    labels = token_labels_of(batch)
    if eva.use_label_mask and _are_token_labels(labels, architecture.config):
        label_mask = _are_labelled(labels, eva.label_mask_value)
        if main is None and label_mask.all():
            label_mask = None  # the model may still tell its parts of padding
    shape = _token_shape(batch, main)
    if main is not None and shape is not None:
        main = _without_cached_prefix(main, shape)
    shape = _shape_of_unnamed_ids(batch) if shape is None else shape
    unpadded = None
    if label_mask is not None and tuple(label_mask.shape) == shape:
        unpadded = main
        main = label_mask if main is None else _with_labels(main, label_mask)
    return main, decoder, unpadded


def _are_labelled(labels: Tensor, ignored: float) -> Tensor:
    """Return which tokens have a label; as no class is negative, such a value means all."""
    labels = labels.cpu()
    return labels >= 0 if ignored < 0 else labels != ignored


def _with_labels(main: Tensor, label_mask: Tensor) -> Tensor:
    try:
        return main & label_mask
    except RuntimeError as error:
        raise EvaValueError(
            f"a batch has labels for tokens of shape {tuple(label_mask.shape)}, but its "
            f"attention_mask is for {tuple(main.shape)}; give both one shape"
        ) from error


def _labelled_step_mask(
    labels: Any, config: LoraConfig, architecture: Architecture, num_samples: int
) -> Tensor | None:
    """Return which decoder steps have a label, bool (B, T), if labels are used as a mask.

    A step may have several labels, (B, T, codes) or (B * codes, T), or be a spectrum,
    (B, T, bands).
    """
    eva = eva_config_of(config)
    if not eva.use_label_mask:
        return None
    if isinstance(labels, Tensor) and labels.dim() == 3 and architecture.makes_decoder_ids:
        return (labels.cpu() != eva.label_mask_value).any(-1)
    if not _are_token_labels(labels, architecture.config):
        return None
    given, labelled = labels.cpu(), _are_labelled(labels, eva.label_mask_value)
    for token in _label_padding(architecture):
        labelled &= given != token
    if not _has_rows_of_codes(labelled, num_samples):
        return labelled
    return labelled.view(num_samples, -1, labelled.shape[1]).any(1)


def _decoder_mask(
    batch: Mapping[str, Any],
    own_mask: Tensor | None,
    label_mask: Tensor | None,
    architecture: Architecture,
) -> Tensor | None:
    """Return which tokens of a decoder count.

    Args:
        own_mask: the decoder's own mask in the batch.
        label_mask: see :func:`_labelled_step_mask`. Tokens made from labels have the labels' shape.
    """
    labels, made = batch.get("labels"), not has_decoder_inputs(batch)
    if label_mask is not None and _label_padding(architecture):
        with_first = functional.pad(label_mask, (1, 0), value=True)
        given = (value for key, value in batch.items() if is_decoder_input(key))
        if any(isinstance(value, Tensor) and value.shape == with_first.shape for value in given):
            label_mask = with_first  # a transducer's blank comes before all labels
    if own_mask is None or label_mask is None:
        mask = label_mask if own_mask is None else own_mask
    elif own_mask.shape == label_mask.shape:
        mask = own_mask & label_mask
    else:
        mask = label_mask if made else own_mask
    spectra = isinstance(labels, Tensor) and labels.dim() == 3 and labels.is_floating_point()
    if mask is not None and spectra and made:  # the model may take only every n-th frame
        reduction = int(getattr(architecture.config, "reduction_factor", 1))
        mask = mask[:, reduction - 1 :: reduction]
    return mask


def _label_padding(architecture: Architecture) -> list[int]:
    """Return the tokens that pad the labels of a transducer, an RNN-T or a TDT; none for others."""
    names = ("blank_token_id", "pad_token_id")
    blank, pad = (getattr(architecture.config, name, None) for name in names)
    return [] if blank is None else [token for token in (blank, pad) if token is not None]


def _all_steps_mask(batch: Mapping[str, Any], num_samples: int) -> Tensor | None:
    """Return an all-true mask of a decoder's steps, bool (B, T), for batches without one.

    Each step may have several codes, (B, T, codes) or (B * codes, T).
    """
    inputs = (value for key, value in batch.items() if is_decoder_input(key) and value is not None)
    steps = next(inputs, batch.get("labels"))
    if not isinstance(steps, Tensor) or steps.dim() < 2:
        return None
    every = torch.ones(steps.shape[:2], dtype=torch.bool, device="cpu")
    sequence_first = every.shape[1] == num_samples
    has_codes = _has_rows_of_codes(every, num_samples) and not sequence_first
    return every[:num_samples] if has_codes else every


def _has_rows_of_codes(steps: Tensor, num_samples: int) -> bool:
    """Tell whether there are several rows of steps per sample, (B * codes, T)."""
    return 0 < num_samples < len(steps) and len(steps) % num_samples == 0


def _attention_mask(batch: Mapping[str, Any], warned: set[str]) -> Tensor | None:
    given, ids = batch.get("attention_mask", batch.get(_PATCH_MASK)), batch.get("input_ids")
    given = as_mapping(given)  # a dataclass around a mask, as in curated-transformers
    if isinstance(given, Mapping):  # one for each kind of attention
        masks = [given.get("full_attention"), *given.values()]
        given = next((mask for mask in masks if isinstance(mask, Tensor)), None)
    if not isinstance(given, Tensor):
        return None
    if isinstance(ids, Tensor) and ids.dim() == 3 and given.shape == ids.shape:
        given = given.flatten(0, 1)  # multiple choice: the model runs each choice as a sample
    shape = _token_shape(batch, None) or (0, 0)
    mask = token_mask(given, _num_cached_tokens(batch), shape[-1])
    if mask is None and "attention_mask" not in warned:
        warned.add("attention_mask")
        warn(
            f"an attention_mask of shape {tuple(given.shape)} is not understood; every token "
            "counts, padding too. Pass one of shape (samples, tokens), or prepare_layer_inputs_fn",
        )
    return mask


def _num_cached_tokens(batch: Mapping[str, Any]) -> int:
    """Return the number of cached tokens that precede those of the batch."""
    for name in ("past_key_values", "cache"):  # the latter since transformers 5.24
        if (length := getattr(batch.get(name), "get_seq_length", None)) is not None:
            return int(length())
    return 0


def _is_multimodal(batch: Mapping[str, Any]) -> bool:
    """Tell whether a batch with text also holds other modalities.

    Beside ids under a name of the user's, which have the shape of the mask, (B, D) may be targets.
    """
    given = (batch.get(key) for key in ("input_ids", "inputs_embeds"))
    text = next((value for value in given if isinstance(value, Tensor)), None)
    least_dims = 2 if text is not None else 3
    if text is None and isinstance(mask := batch.get("attention_mask"), Tensor):
        inputs = {k: v for k, v in batch.items() if k != "attention_mask"}
        text = mask if has_ids_like(mask, inputs) else None
    return text is not None and any(
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dim() >= least_dims
        and value.shape not in (text.shape, text.shape[:2])  # such as token weights
        for key, value in batch.items()
        if key not in ("inputs_embeds", "decoder_inputs_embeds", "labels")
        and "mask" not in str(key)
    )


def _are_token_labels(labels: Any, model_config: Any) -> TypeGuard[Tensor]:
    if getattr(model_config, "problem_type", None) == "multi_label_classification":
        return False
    return isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point()


def token_mask(mask: Any, num_cached: int = 0, num_tokens: int = 0) -> Tensor | None:
    """Return the tokens that a mask keeps, bool (B, T).

    A pairwise mask, (B, T, T) or (B, heads or 1, T or 1, S), says which token attends to which. A
    token that does not attend even to itself is padding; padding that attends to itself cannot be
    recognised. Ones may mean either, see :func:`hides_where_true`.

    Args:
        mask: anything that is not such a mask gives ``None``.
        num_cached: how many of the S tokens precede the first of the T.
        num_tokens: T, if known.
    """
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 3 and mask.shape[1] == mask.shape[2]:
        mask = mask[:, None]
    if hides_where_true(mask):
        mask = mask == 0
    if mask.dim() == 4 and mask.shape[2] + num_cached <= mask.shape[3]:
        head = mask[:, 0]
        shared = mask.shape[2] == 1  # (B, 1, 1, T): the same for every token
        row = (head[:, 0] if shared else head.diagonal(num_cached, dim1=-2, dim2=-1)).cpu()
        row = row[:, num_cached : num_cached + num_tokens] if shared and num_tokens else row
        additive = row.is_floating_point() and bool((mask <= 0).all())
    elif mask.dim() == 2:
        row = mask.cpu()
        additive = bool((row < 0).any())  # a mask of zeros only is not additive: it keeps nothing
    else:
        return None
    return row > -1 if additive else row.bool()


def _without_cached_prefix(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Drop the cached prefix from a mask that covers more tokens than the batch."""
    has_prefix = len(shape) == 2 and mask.shape[0] == shape[0] and mask.shape[1] > shape[1]
    return mask[:, -shape[1] :] if has_prefix else mask


def _token_shape(batch: Mapping[str, Any], main: Tensor | None) -> tuple[int, ...] | None:
    ids, embeds = batch.get("input_ids"), batch.get("inputs_embeds")
    if isinstance(ids, Tensor):
        return tuple(ids.shape)
    if isinstance(embeds, Tensor):
        return tuple(embeds.shape[:2])
    return None if main is None else tuple(main.shape)


def _shape_of_unnamed_ids(batch: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return the shape of a batch's first tensor if it holds integers, taken for token ids."""
    first = next((v for k, v in batch.items() if isinstance(v, Tensor) and k != "labels"), None)
    return None if first is None or first.is_floating_point() else tuple(first.shape)
