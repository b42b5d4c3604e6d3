"""Which tokens a layer reads, inferred from its name."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

__all__ = ["LayerKind", "kind_of_layer"]

# Keys and values of cross attention are encoder tokens, although the layer is in the decoder.
_READS_ENCODER = re.compile(
    r"(EncDecAttention|encoder_attn|encoder_decoder_attention|cross_?att(ention|n)|attn2).*"
    r"\b(k|v|k_proj|v_proj|key|value|key_proj|value_proj|to_k(ey)?|to_v(alue)?|k_content_proj|k_pos_proj|c_attn)$"
    r"|\bcross_attn_(key_\w+|value)_proj$|\benc_to_dec_proj$"
)
# Layers of diffusers models that read the prompt.
_READS_PROMPT = re.compile(
    r"caption|context|(^|[._])txt_|(^|[._])text_(proj|embed|transformer|fusion)|encoder_(hid|proj)"
    r"|\b(add_[qkv]_proj|to_add_out|pooler\.to_kv)$|\bcross_attention_proj\b|\bff_t\b|\bllm_cond_"
)
# Layers that read images or sound, in a model that may also take text.
_READS_NO_TEXT = re.compile(
    r"vision|visual|visn|(^|\.)r_layers\.|image|img|video|pixel|patch|audio|speech|sound"
    r"|multi_modal|(^|\.)mm_proj|(^|\.)projector\b|connector|perceiver|resampler|qformer|acoustic|semantic_tokenizer"
)
# Of these, layers that do read text in a batch without sound and images.
_PROJECTOR = re.compile(r"(^|\.)projector\b")
# Exception: keys and values of images that attend to text are text.
_READS_TEXT = re.compile(r"\bcross_modal_image_layers\..*\bcrossattention\.self\.(key|value)$")
# Layers that read a fixed number of learnt queries, or several levels of patches concatenated.
_READS_QUERIES = re.compile(
    r"perceiver|resampler|pixel_decoder|pixel_level_module\.decoder"
    r"|qformer.*(crossattention\.(attention\.query|output)|(intermediate|output)_query)"
)
# Layers that read relative positions of frames, the same for every sample, as in Conformers.
_READS_DISTANCES = re.compile(r"\b(linear_pos|pos_proj|relative_k_proj)$")
# Parts that read text, so that their cross attention attends to something else.
_IN_TEXT = re.compile(r"text_(model|encoder|decoder|layers)|language_model|gated_cross_attn")
_IN_ENCODER = re.compile(r"encoder|(^|\.)enc(\.|$)")
_IN_DECODER = re.compile(r"decoder|(^|\.)dec(\.|$)")
_READS_AUDIO = re.compile(r"audio|speech|sound|acoustic|semantic_tokenizer")


class LayerKind(NamedTuple):
    """Which tokens a layer reads, and in which part of the model, by its name."""

    reads_encoder: bool
    reads_prompt: bool
    reads_no_text: bool
    reads_audio: bool
    reads_queries: bool
    reads_distances: bool
    in_encoder: bool
    in_decoder: bool
    in_qformer: bool
    in_text: bool
    in_projector: bool

    @property
    def in_encoder_only(self) -> bool:
        """Whether it is in an encoder, and not in a decoder whose name says "encoder", too."""
        return self.in_encoder and not self.in_decoder


@functools.cache
def kind_of_layer(name: str, prefixes: tuple[str, ...]) -> LayerKind:
    """Classify a layer by its name; cached, as it is needed for every layer in every batch.

    Args:
        name: of the layer.
        prefixes: successive prefixes to remove from it first, which are not informative.
    """
    for prefix in prefixes:
        name = name.removeprefix(prefix)
    return LayerKind(
        reads_encoder=bool(_READS_ENCODER.search(name)),
        reads_prompt=bool(_READS_PROMPT.search(name)),
        reads_no_text=bool(_READS_NO_TEXT.search(name)) and not _READS_TEXT.search(name),
        reads_audio=bool(_READS_AUDIO.search(name)),
        reads_queries=bool(_READS_QUERIES.search(name)),
        reads_distances=bool(_READS_DISTANCES.search(name)),
        in_encoder=bool(_IN_ENCODER.search(name)),
        in_decoder=bool(_IN_DECODER.search(name)),
        in_qformer="qformer" in name,
        in_text=bool(_IN_TEXT.search(name)),
        in_projector=bool(_PROJECTOR.search(name)),
    )
