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

from .._peft_compat import base_of
from .parts import outermost

__all__ = [
    "Architecture",
    "FrameLengths",
    "architecture_of",
    "configs_of",
    "is_defined_in_transformers",
    "is_of_transformers",
    "signature_of",
]

FrameLengths = Callable[..., Any]  # f(samples, (1,)) -> frames; some take add_adapter

# Models in which tokens depend on padding: the last position represents the sentence, or
# neighbouring or all positions are mixed without a mask.
_SEE_PADDING = frozenset(
    [
        "siglip", "siglip_text_model", "siglip2", "siglip2_text_model",
        "canine", "convbert", "fnet", "nystromformer", "yoso", "funnel", "mobilebert",
        "big_bird", "bigbird_pegasus", "fastspeech2_conformer",
    ]
)  # fmt: skip
# Models that read text and images (or entities) as one sequence; the batch has a mask of the text.
_TEXT_FIRST = frozenset(["layoutlmv3", "luke", "mluke", "udop", "vilt", "visual_bert"])
_TEXT_LAST = frozenset(["cpmant", "flava", "git"])  # CPM-Ant puts learnt prompts first
_BOTH = ("encoder", "decoder")
# Methods that compute how many frames a speech model makes from samples or spectra.
_FRAMES = ("_get_feat_extract_output_lengths", "_get_subsampling_output_length")
# The same for SeamlessM4T's adapter, from a mask.
_FRAMES_OF_MASK = "_compute_sub_sample_lengths_from_attention_mask"


# Cache of signatures: those of a model's parts are needed in every forward pass.
_SIGNATURES: WeakKeyDictionary[Any, inspect.Signature] = WeakKeyDictionary()


@dataclass(frozen=True)
class Architecture:
    """How a model reads a batch.

    Attributes:
        config: of the outermost part that is a transformers model; ``None`` if there is none.
        kinds: ``model_type`` of every config in the model.
        prefixes: successive prefixes of layer names, which say nothing about what a layer reads.
        patch_sizes: side lengths, in pixels, of the patches that images are cut into, if the model
            has no backbone in front.
        needs_labels: ``forward`` requires them, or skips a part without them.
        apart: prefixes of the names of parts that have their own loss and tokens.
        takes_decoder_ids: it can be given the decoder's tokens (or spectra), or make them from
            labels.
        answers: a text decoder follows a text encoder, which the config does not say.
        frame_lengths: functions that may compute how many frames are made from sound.
        has_own_layers: there are layers around, between, or in place of, models defined in
            transformers; those between two may have no weights.
    """

    config: Any = None
    kinds: frozenset[str] = frozenset()
    prefixes: tuple[str, ...] = ()
    patch_sizes: tuple[int, ...] = ()
    needs_labels: bool = False
    apart: tuple[str, ...] = ()
    takes_decoder_ids: bool = False
    answers: bool = False
    frame_lengths: tuple[FrameLengths, ...] = ()
    has_own_layers: bool = False

    @property
    def encoder_decoder(self) -> bool:
        """Whether encoder and decoder each have a stream of tokens.

        A model of images and text may say so only in its text config.
        """
        configs = (self.config, getattr(self.config, "text_config", None))
        return self.answers or any(
            bool(getattr(config, "is_encoder_decoder", False)) for config in configs
        )

    @property
    def text_in_qformer(self) -> bool:
        """Whether a Q-Former reads the model's own text after its queries."""
        qformer = getattr(self.config, "qformer_config", None)
        return bool(getattr(qformer, "use_qformer_text_input", False))

    @property
    def makes_decoder_ids(self) -> bool:
        """Whether the decoder's tokens are made from labels if they are not given."""
        return self.encoder_decoder and self.takes_decoder_ids

    @property
    def sees_padding(self) -> bool:
        """Whether tokens depend on the amount of padding."""
        wraps = "reformer" in self.kinds and not getattr(self.config, "is_decoder", False)
        # BLIP's decoder attends to the padding of the question: it adds a boolean mask
        return wraps or self.answers or bool(self.kinds & _SEE_PADDING)

    @property
    def text_first(self) -> bool | None:
        """Whether text precedes images in one sequence; ``None`` if unknown."""
        known = bool(self.kinds & (_TEXT_FIRST | _TEXT_LAST))
        return bool(self.kinds & _TEXT_FIRST) if known else None

    @property
    def window(self) -> int:
        """The multiple to which the model pads texts on the right; 1 if it does not."""
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
        return 1


def architecture_of(model: nn.Module) -> Architecture:
    """Return how a model, with or without adapters, reads a batch."""
    configs = configs_of(model)
    named = [config for config in configs if isinstance(_kind(config), str)]
    base = base_of(model)
    inner = {name: m for name, m in base.named_modules() if is_of_transformers(m)}
    apart = tuple(_taught_apart(inner))
    return Architecture(
        config=next(iter([*named, *configs]), None),
        kinds=frozenset(kind for config in named for kind in _kinds(config)),
        prefixes=_prefixes(inner),
        patch_sizes=_patch_sizes(configs),
        needs_labels=bool(apart) or _parameter(base, "labels") is inspect.Parameter.empty,
        apart=apart,
        takes_decoder_ids=not inner or any(map(_takes_decoder_ids, inner.values())),
        answers=any(map(_answers, inner.values())),
        frame_lengths=tuple(_frame_lengths(model)),
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


def _kind(config: Any) -> Any:
    return getattr(config, "model_type", None)


def _kinds(config: Any) -> list[str]:
    kinds = (_kind(config), _kind(getattr(config, "text_config", None)))
    return [kind for kind in kinds if isinstance(kind, str)]


def is_of_transformers(module: nn.Module) -> bool:
    """Tell whether a module is a transformers model, or a wrapper that acts as one."""
    return isinstance(_base_prefix(module), str)


def is_defined_in_transformers(module: nn.Module) -> bool:
    """Tell whether a model's class is defined in transformers, not merely derived from one."""
    kinds = (kind.__module__ for kind in type(module).__mro__)  # FSDP puts its own class first
    own = next(kind for kind in kinds if not kind.startswith("torch.distributed."))
    return is_of_transformers(module) and own.startswith("transformers.")


def _has_own_layers(base: nn.Module) -> bool:
    parts = {part for _, part in outermost(base, is_defined_in_transformers)}
    known = {id(parameter) for part in parts for parameter in part.parameters()}
    return len(parts) > 1 or any(id(parameter) not in known for parameter in base.parameters())


def _base_prefix(module: nn.Module) -> Any:
    """Return the attribute that only transformers models, and their wrappers, have."""
    return getattr(module, "base_model_prefix", None)


def _prefixes(inner: dict[str, nn.Module]) -> tuple[str, ...]:
    """Return the names of the outermost model and its body; none if two are side by side."""
    outer, model = next(iter(inner.items()), ("", None))
    within = f"{outer}." if outer else ""
    if model is None or not all(f"{name}.".startswith(within) for name in inner):
        return ()
    body = _base_prefix(model)
    parts = [within, f"{body}." if isinstance(getattr(model, body, None), nn.Module) else ""]
    return tuple(part for part in parts if part)


def _takes_decoder_ids(model: nn.Module) -> bool:
    made = hasattr(model, "prepare_decoder_input_ids_from_labels")
    taken = ("decoder_input_ids", "decoder_input_values")  # tokens, or spectra
    return made or any(_parameter(model, name) is not ... for name in taken)


def _answers(model: nn.Module) -> bool:
    """Tell whether a text decoder follows a text encoder, as in BLIP for question answering."""
    both = all(isinstance(getattr(model, f"text_{part}", None), nn.Module) for part in _BOTH)
    return both and _parameter(model, "decoder_input_ids") is not ...


def _taught_apart(inner: dict[str, nn.Module]) -> Iterator[str]:
    """Yield the names of inner models that take labels, besides the outermost one's head.

    They may be run for their loss only, like CSM's decoder over the codes of a frame. The part
    that holds the outermost model's embeddings is its body, which may take labels, too.
    """
    outer, model = next(iter(inner.items()), ("", None))
    embeddings = _embeddings_of(model)
    if embeddings is None or not isinstance(getattr(model, "lm_head", None), nn.Module):
        return
    within = f"{outer}." if outer else ""
    for name, part in inner.items():
        beside = not name.startswith(within)  # a separate model in a user's module
        if beside or _parameter(part, "labels") is ...:
            continue
        if all(module is not embeddings for module in part.modules()):
            yield f"{name}."


def _embeddings_of(model: nn.Module | None) -> Any:
    try:
        return getattr(model, "get_input_embeddings", lambda: None)()
    except (NotImplementedError, AttributeError):  # it has none
        return None


def _patch_sizes(configs: list[Any]) -> tuple[int, ...]:
    found = [getattr(config, "patch_size", None) for config in configs]
    strided = any(getattr(config, "backbone_config", None) is not None for config in configs)
    return () if strided else tuple(sorted({n for n in found if isinstance(n, int) and n > 0}))


def _parameter(module: nn.Module, name: str) -> Any:
    """Return the default of an argument of ``forward``; ``Ellipsis`` if there is none such."""
    signature = signature_of(module)
    found = None if signature is None else signature.parameters.get(name)
    return ... if found is None else found.default


def signature_of(module: nn.Module) -> inspect.Signature | None:
    """Return the signature of ``forward``, if it has one."""
    method = getattr(module.forward, "__func__", None)
    known = None if method is None else _SIGNATURES.get(method)
    if known is not None:
        return known
    try:
        found = inspect.signature(module.forward)
    except (TypeError, ValueError):
        return None
    if method is not None:
        _SIGNATURES[method] = found
    return found


def _frame_lengths(model: nn.Module) -> Iterator[FrameLengths]:
    known = set()  # inner parts mostly have the same method
    for module in model.modules():
        told = ((name, getattr(module, name, None)) for name in (*_FRAMES, _FRAMES_OF_MASK))
        name, found = next((each for each in told if callable(each[1])), ("", None))
        config = getattr(module, "config", None)
        method = getattr(found, "__func__", found), id(config)
        if found is None or method in known:
            continue
        known.add(method)
        lengths = _of_mask(found) if name == _FRAMES_OF_MASK else found
        yield lengths
        factor = getattr(config, "squeeze_factor", None)
        if factor:  # SEW merges this many frames into one
            yield _squeezed(lengths, int(factor))


def _of_mask(lengths: Callable[[Tensor], Any]) -> FrameLengths:
    def frames(samples: Tensor) -> Any:
        return lengths(torch.ones(1, int(samples), dtype=torch.long, device="cpu"))

    return frames


def _squeezed(lengths: FrameLengths, factor: int) -> FrameLengths:
    def frames(samples: Any, **options: Any) -> Any:
        return lengths(samples, **options) // factor

    return frames
