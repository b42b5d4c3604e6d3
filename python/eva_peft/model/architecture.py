"""How a model reads a batch: a transformers model, or one inside a user's module."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .._peft_compat import base_model_of
from .parts import outermost_modules

__all__ = [
    "Architecture",
    "FrameLengthFunction",
    "architecture_of",
    "configs_of",
    "forward_signature",
    "is_defined_in_transformers",
    "is_transformers_model",
    "modules_of_transformers",
]

FrameLengthFunction = Callable[..., Any]  # f(samples, (1,)) -> frames; some take add_adapter

# Models in which tokens depend on padding: the last position represents the sentence, or
# neighbouring or all positions are mixed without a mask.
_PADDING_DEPENDENT_TYPES = frozenset(
    [
        "siglip", "siglip_text_model", "siglip2", "siglip2_text_model",
        "canine", "convbert", "fnet", "nystromformer", "yoso", "funnel", "mobilebert",
        "big_bird", "bigbird_pegasus", "fastspeech2_conformer",
    ]
)  # fmt: skip
# Models that read text and images (or entities) as one sequence; the batch has a mask of the text.
_TEXT_FIRST_TYPES = frozenset(["layoutlmv3", "luke", "mluke", "udop", "vilt", "visual_bert"])
_TEXT_LAST_TYPES = frozenset(["cpmant", "flava", "git"])  # CPM-Ant puts learnt prompts first
_ENCODER_AND_DECODER = ("encoder", "decoder")
# Methods that compute how many frames a speech model makes from samples or spectra.
_FRAME_LENGTH_METHODS = ("_get_feat_extract_output_lengths", "_get_subsampling_output_length")
# The same for SeamlessM4T's adapter, from a mask.
_FRAMES_FROM_MASK_METHOD = "_compute_sub_sample_lengths_from_attention_mask"


# Cache of signatures: those of a model's parts are needed in every forward pass.
_SIGNATURES: WeakKeyDictionary[Any, inspect.Signature] = WeakKeyDictionary()


@dataclass(frozen=True)
class Architecture:
    """How a model reads a batch.

    Attributes:
        config: of the outermost part that is a transformers model; ``None`` if there is none.
        model_types: ``model_type`` of every config in the model.
        name_prefixes: successive prefixes of layer names, which say nothing about what a layer
            reads.
        patch_sizes: side lengths, in pixels, of the patches that images are cut into, if the model
            has no backbone in front.
        needs_labels: ``forward`` requires them, or skips a part without them.
        separate_loss_prefixes: prefixes of the names of parts that have their own loss and tokens.
        takes_decoder_ids: it can be given the decoder's tokens (or spectra), or make them from
            labels.
        decoder_follows_text_encoder: as in question answering; the config does not say so.
        frame_length_functions: functions that may compute how many frames are made from sound.
        has_own_layers: there are layers around, between, or in place of, models defined in
            transformers; those between two may have no weights.
    """

    config: Any = None
    model_types: frozenset[str] = frozenset()
    name_prefixes: tuple[str, ...] = ()
    patch_sizes: tuple[int, ...] = ()
    needs_labels: bool = False
    separate_loss_prefixes: tuple[str, ...] = ()
    takes_decoder_ids: bool = False
    decoder_follows_text_encoder: bool = False
    frame_length_functions: tuple[FrameLengthFunction, ...] = ()
    has_own_layers: bool = False

    @property
    def encoder_decoder(self) -> bool:
        """Whether encoder and decoder each have a stream of tokens.

        A model of images and text may say so only in its text config.
        """
        configs = (self.config, getattr(self.config, "text_config", None))
        return self.decoder_follows_text_encoder or any(
            bool(getattr(config, "is_encoder_decoder", False)) for config in configs
        )

    @property
    def qformer_reads_text(self) -> bool:
        """Whether a Q-Former reads the model's own text after its queries."""
        qformer = getattr(self.config, "qformer_config", None)
        return bool(getattr(qformer, "use_qformer_text_input", False))

    @property
    def makes_decoder_ids(self) -> bool:
        """Whether the decoder's tokens are made from labels if they are not given."""
        return self.encoder_decoder and self.takes_decoder_ids

    @property
    def tokens_depend_on_padding(self) -> bool:
        """Whether tokens depend on the amount of padding."""
        is_reformer_encoder = "reformer" in self.model_types and not getattr(
            self.config, "is_decoder", False
        )
        # BLIP's decoder attends to the padding of the question: it adds a boolean mask
        return (
            is_reformer_encoder
            or self.decoder_follows_text_encoder
            or bool(self.model_types & _PADDING_DEPENDENT_TYPES)
        )

    @property
    def text_precedes_images(self) -> bool | None:
        """Whether text precedes images in one sequence; ``None`` if unknown."""
        known = bool(self.model_types & (_TEXT_FIRST_TYPES | _TEXT_LAST_TYPES))
        return bool(self.model_types & _TEXT_FIRST_TYPES) if known else None

    @property
    def padding_multiple(self) -> int:
        """The multiple to which the model pads texts, or frames, on the right; 1 if it does not."""
        kind = getattr(self.config, "model_type", None)
        if kind in ("longformer", "led"):
            windows = self.config.attention_window
            return max(windows) if isinstance(windows, (list, tuple)) else int(windows)
        blocks = kind in ("big_bird", "bigbird_pegasus")
        if kind == "pegasus_x" or (blocks and self.config.attention_type == "block_sparse"):
            return int(self.config.block_size)
        if kind == "reformer":
            layers = set(self.config.attn_layers)
            return math.lcm(*(int(getattr(self.config, f"{n}_attn_chunk_length")) for n in layers))
        if kind in ("granite_speech5_ctc", "granite_speech5_encoder"):
            return int(getattr(self.config, "encoder_config", self.config).context_size)
        return 1


def architecture_of(model: nn.Module) -> Architecture:
    """Return how a model, with or without adapters, reads a batch."""
    configs = configs_of(model)
    named = [config for config in configs if isinstance(_model_type(config), str)]
    base = base_model_of(model)
    inner_models = {name: m for name, m in base.named_modules() if is_transformers_model(m)}
    loss_prefixes = tuple(_parts_with_own_loss(inner_models))
    return Architecture(
        config=next(iter([*named, *configs]), None),
        model_types=frozenset(kind for config in named for kind in _model_types(config)),
        name_prefixes=_name_prefixes(inner_models),
        patch_sizes=_patch_sizes(configs),
        needs_labels=bool(loss_prefixes)
        or _forward_default(base, "labels") is inspect.Parameter.empty,
        separate_loss_prefixes=loss_prefixes,
        takes_decoder_ids=not inner_models or any(map(_takes_decoder_ids, inner_models.values())),
        decoder_follows_text_encoder=any(map(_is_question_answering, inner_models.values())),
        frame_length_functions=tuple(_find_frame_lengths(model)),
        has_own_layers=_has_own_layers(base),
    )


def configs_of(model: nn.Module) -> list[Any]:
    """Return the configs of all modules that have one, the outermost first, each once."""
    found: list[Any] = []
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and all(config is not other for other in found):
            found.append(config)
    return found


def _model_type(config: Any) -> Any:
    return getattr(config, "model_type", None)


def _model_types(config: Any) -> list[str]:
    model_types = (_model_type(config), _model_type(getattr(config, "text_config", None)))
    return [kind for kind in model_types if isinstance(kind, str)]


def is_transformers_model(module: nn.Module) -> bool:
    """Tell whether a module is a transformers model, or a wrapper that acts as one."""
    return isinstance(_base_prefix(module), str)


def is_defined_in_transformers(module: nn.Module) -> bool:
    """Tell whether a model's class is defined in transformers, not merely derived from one."""
    modules = (cls.__module__ for cls in type(module).__mro__)  # FSDP puts its own class first
    defining_module = next(name for name in modules if not name.startswith("torch.distributed."))
    return is_transformers_model(module) and defining_module.startswith("transformers.")


def modules_of_transformers(base: nn.Module) -> set[nn.Module]:
    """Return the modules of a model that are within models defined in transformers."""
    models = outermost_modules(base, is_defined_in_transformers)
    return {part for _, model in models for part in model.modules()}


def _has_own_layers(base: nn.Module) -> bool:
    parts = {part for _, part in outermost_modules(base, is_defined_in_transformers)}
    covered = {id(parameter) for part in parts for parameter in part.parameters()}
    return len(parts) > 1 or any(id(parameter) not in covered for parameter in base.parameters())


def _base_prefix(module: nn.Module) -> Any:
    """Return the attribute that only transformers models, and their wrappers, have."""
    return getattr(module, "base_model_prefix", None)


def _name_prefixes(inner_models: dict[str, nn.Module]) -> tuple[str, ...]:
    """Return the names of the outermost model and its body; none if two are side by side."""
    outer_name, model = next(iter(inner_models.items()), ("", None))
    outer_prefix = f"{outer_name}." if outer_name else ""
    if model is None or not all(f"{name}.".startswith(outer_prefix) for name in inner_models):
        return ()
    body_attribute = _base_prefix(model)
    parts = [
        outer_prefix,
        f"{body_attribute}." if isinstance(getattr(model, body_attribute, None), nn.Module) else "",
    ]
    return tuple(part for part in parts if part)


def _takes_decoder_ids(model: nn.Module) -> bool:
    makes_ids = hasattr(model, "prepare_decoder_input_ids_from_labels")
    argument_names = ("decoder_input_ids", "decoder_input_values")  # tokens, or spectra
    return makes_ids or any(_forward_default(model, name) is not ... for name in argument_names)


def _is_question_answering(model: nn.Module) -> bool:
    """Tell whether a text decoder follows a text encoder, as in BLIP for question answering."""
    has_both = all(
        isinstance(getattr(model, f"text_{part}", None), nn.Module) for part in _ENCODER_AND_DECODER
    )
    return has_both and _forward_default(model, "decoder_input_ids") is not ...


def _parts_with_own_loss(inner_models: dict[str, nn.Module]) -> Iterator[str]:
    """Yield the names of inner models that take labels, besides the outermost one's head.

    They may be run for their loss only, like CSM's decoder over the codes of a frame. The part
    that holds the outermost model's embeddings is its body, which may take labels, too.
    """
    outer_name, model = next(iter(inner_models.items()), ("", None))
    embeddings = _input_embeddings(model)
    if embeddings is None or not isinstance(getattr(model, "lm_head", None), nn.Module):
        return
    outer_prefix = f"{outer_name}." if outer_name else ""
    for name, part in inner_models.items():
        is_separate = not name.startswith(outer_prefix)  # a separate model in a user's module
        if is_separate or _forward_default(part, "labels") is ...:
            continue
        if all(module is not embeddings for module in part.modules()):
            yield f"{name}."


def _input_embeddings(model: nn.Module | None) -> Any:
    try:
        return getattr(model, "get_input_embeddings", lambda: None)()
    except (NotImplementedError, AttributeError):  # it has none
        return None


def _patch_sizes(configs: list[Any]) -> tuple[int, ...]:
    sizes = [getattr(config, "patch_size", None) for config in configs]
    has_backbone = any(getattr(config, "backbone_config", None) is not None for config in configs)
    return () if has_backbone else tuple(sorted({n for n in sizes if isinstance(n, int) and n > 0}))


def _forward_default(module: nn.Module, name: str) -> Any:
    """Return the default of an argument of ``forward``; ``Ellipsis`` if there is none such."""
    signature = forward_signature(module)
    parameter = None if signature is None else signature.parameters.get(name)
    return ... if parameter is None else parameter.default


def forward_signature(module: nn.Module) -> inspect.Signature | None:
    """Return the signature of ``forward``, if it has one."""
    method = getattr(module.forward, "__func__", None)
    cached = None if method is None else _SIGNATURES.get(method)
    if cached is not None:
        return cached
    try:
        signature = inspect.signature(module.forward)
    except (TypeError, ValueError):
        return None
    if method is not None:
        _SIGNATURES[method] = signature
    return signature


def _find_frame_lengths(model: nn.Module) -> Iterator[FrameLengthFunction]:
    seen_methods = set()  # inner parts mostly have the same method
    for module in model.modules():
        candidates = (
            (name, getattr(module, name, None))
            for name in (*_FRAME_LENGTH_METHODS, _FRAMES_FROM_MASK_METHOD)
        )
        name, found = next(
            (candidate for candidate in candidates if callable(candidate[1])), ("", None)
        )
        config = getattr(module, "config", None)
        method = getattr(found, "__func__", found), id(config)
        if found is None or method in seen_methods:
            continue
        seen_methods.add(method)
        frame_lengths = _frames_from_mask(found) if name == _FRAMES_FROM_MASK_METHOD else found
        yield frame_lengths
        factor = getattr(config, "squeeze_factor", None)
        if factor:  # SEW merges this many frames into one
            yield _squeeze_frames(frame_lengths, int(factor))
        halving_layers = getattr(config, "subsample_layers", None)
        if halving_layers:  # of Granite Speech 5, which has layers between them
            yield _halve_frames(len(halving_layers))


def _frames_from_mask(lengths_from_mask: Callable[[Tensor], Any]) -> FrameLengthFunction:
    def frames(num_samples: Tensor) -> Any:
        return lengths_from_mask(torch.ones(1, int(num_samples), dtype=torch.long, device="cpu"))

    return frames


def _squeeze_frames(frame_lengths: FrameLengthFunction, factor: int) -> FrameLengthFunction:
    def frames(num_samples: Any, **options: Any) -> Any:
        return frame_lengths(num_samples, **options) // factor

    return frames


def _halve_frames(times: int) -> FrameLengthFunction:
    def frames(num_samples: Any) -> Any:
        return tuple(num_samples // 2**i for i in range(1, times + 1))

    return frames
