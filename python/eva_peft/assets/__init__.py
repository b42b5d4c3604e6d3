"""The embedded defaults: a small trained model, and text from the Python installation."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

from eva_peft.assets.texts import documentation_texts, is_held_out, source_texts, token_stream

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "documentation_texts",
    "is_held_out",
    "load_tiny_llama",
    "source_texts",
    "token_stream",
]


def load_tiny_llama(
    dtype: torch.dtype | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the embedded model and its tokenizer, without a network.

    Args:
        dtype: of the weights; default `torch.float32`. They are stored in bfloat16.

    Returns:
        The model in evaluation mode and its tokenizer, which pads on the right.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with resources.as_file(resources.files(__name__) / "tiny_llama") as folder:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or torch.float32, local_files_only=True
        )
    return model.eval(), tokenizer
