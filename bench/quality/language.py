"""Language generation: the embedded Llama, trained on documentation, adapted to source code."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from eva_peft.assets import (
    documentation_texts,
    is_held_out,
    load_tiny_llama,
    source_texts,
    token_stream,
)

from ..methods import Batch
from . import hub
from .domain import Domain, Recipe, Task, linear_layers, samples_task

LENGTH = 96
RECIPE = Recipe(
    title="Language generation",
    what=(
        "The embedded Llama-architecture model (2.5 million parameters), trained on the "
        "documentation of Python, adapted to source code of the standard library without "
        "docstrings; splits by file. Old task: documentation held out from the pre-training."
    ),
    loss="loss, nats a token",
    score="next-token accuracy",
    old="loss and next-token accuracy on held-out documentation",
    steps=40,
    every=8,
    batch=4,
    r=8,
    calibration=16,
)


def build(data: str = "embedded", seed: int = 0) -> Domain:
    """Build the domain; with ``data="hub"`` the texts are those of ``hub.GENERATION``."""
    model, tokenizer = load_tiny_llama()
    if data == "hub":
        train, validation, test = hub.split_7_1_2(hub.generation_texts())
    else:
        texts = source_texts(500_000, seed)
        validation, test = texts[::5], texts[1::5]
        train = [text for i, text in enumerate(texts) if i % 5 > 1]
    old = [text for name, text in documentation().items() if is_held_out(name)]
    return Domain(
        recipe=RECIPE,
        base=model,
        targets=linear_layers(model, without=["lm_head"]),
        train=blocks(token_stream(tokenizer, train)),
        validation=next_token(blocks(token_stream(tokenizer, validation), 12)),
        test=next_token(blocks(token_stream(tokenizer, test), 24)),
        old=next_token(blocks(token_stream(tokenizer, old), 16)),
        text=True,
    )


@functools.cache
def documentation() -> dict[str, str]:
    """Return ``documentation_texts()``, which takes seconds."""
    return documentation_texts()


def blocks(ids: list[int], max_rows: int | None = None, length: int = LENGTH) -> Batch:
    """Cut token ids into full rows, int64 (rows, length); keep ``max_rows``, evenly spaced."""
    count = len(ids) // length
    rows = torch.tensor(ids[: count * length]).view(count, length)
    if max_rows is not None:
        rows = rows[torch.linspace(0, count - 1, min(max_rows, count)).long()]
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows.clone()}


def next_token(batch: Batch) -> Task:
    """Return the task to predict the next token: nats per token, and accuracy."""

    def loss(output: Any, part: Batch) -> Tensor:
        logits = output.logits[:, :-1].float().transpose(1, 2)
        token_losses = nn.functional.cross_entropy(logits, part["labels"][:, 1:], reduction="none")
        return token_losses.mean(1)

    def correct(output: Any, part: Batch) -> Tensor:
        return (output.logits[:, :-1].argmax(-1) == part["labels"][:, 1:]).float().mean(1)

    return samples_task(batch, 8, loss, correct)
