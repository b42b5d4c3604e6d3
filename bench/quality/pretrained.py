"""Language generation at a size for a GPU: pre-trained here on Python, adapted to C++.

The text is that of installed packages: Python sources of torch and transformers, headers of torch.
On a CPU everything is small, and the numbers are meaningless.
"""

from __future__ import annotations

import math
import os
import random
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from eva_peft.assets import load_tiny_llama

from ..common import default_device
from ..methods import Batch
from .descent import DivergedError, descend
from .domain import Domain, Recipe, linear_layers
from .language import blocks, next_token

RECIPE = Recipe(
    title="Language generation, pre-trained here",
    what=(
        "A Llama-architecture model (on a GPU 88 million parameters), trained "
        "on the Python sources of torch and transformers, adapted to the C++ headers of torch; "
        "splits by file, so that what is copied between files lies on both sides. Old task: "
        "Python held out from the pre-training."
    ),
    loss="loss, nats a token",
    score="next-token accuracy",
    old="loss and next-token accuracy on held-out Python",
    steps=200,
    every=50,
    batch=16,
    r=16,
    calibration=16,
)


@dataclass(frozen=True)
class Scale:
    """Size of the base and length of its training.

    Attributes:
        width, inner, layers, heads: of the model.
        length: tokens of a sample.
        steps, batch, rate: of the pre-training.
        source_bytes: of Python; a quarter as much of C++.
        num_held_out: number of samples in a held-out split.
        by_file: hold out whole files of Python, or samples from all of them.
    """

    width: int
    inner: int
    layers: int
    heads: int
    length: int
    steps: int
    batch: int
    rate: float
    source_bytes: int
    num_held_out: int
    by_file: bool


MAX_LOSS_SHARE = 0.75  # a base must reach a loss below this fraction of that of a uniform guess
SCALES = {
    # On an H200 that ran the test suite at the same time, 1500 steps took most of five minutes.
    "cuda": Scale(768, 2048, 12, 12, 512, 800, 64, 6e-4, 40_000_000, 64, by_file=True),
    "cpu": Scale(48, 128, 2, 4, 64, 150, 8, 3e-3, 400_000, 32, by_file=False),
}


def build(data: str = "embedded", seed: int = 0) -> Domain:
    """Build the domain, which takes minutes, on a GPU if there is one; ``data`` is ignored."""
    return build_on(default_device(), seed)


def build_on(device: torch.device, seed: int = 0) -> Domain:
    """Build the domain on a device, at the scale for that device.

    Raises:
        DivergedError: the base has not learnt, so that fine-tuning it would be meaningless.
    """
    scale, begin = SCALES[device.type], time.perf_counter()
    _, tokenizer = load_tiny_llama()

    def rows(texts: Sequence[str], max_rows: int | None = None) -> Batch:
        found = blocks(tokens_of(tokenizer, texts), max_rows, scale.length)
        return {key: value.to(device) for key, value in found.items()}

    python = read_package_files(("torch", "transformers"), "*.py", scale.source_bytes, seed)
    headers = read_package_files(("torch",), "include/**/*.h", scale.source_bytes // 4, seed)
    if scale.by_file:
        num_files = -(-len(python) // 20)
        train, held_out = rows(python[num_files:]), rows(python[:num_files], scale.num_held_out)
    else:
        train, held_out = split_rows(rows(python), scale.num_held_out)
    log_progress(f"{train['input_ids'].numel()} tokens to learn from", begin)
    base = pretrain(train, tokenizer, scale, seed)
    log_progress(f"pre-trained, {scale.steps} steps", begin)
    old = next_token(held_out)
    loss, uniform_loss = old.loss(base), math.log(len(tokenizer))
    if not loss < MAX_LOSS_SHARE * uniform_loss:
        raise DivergedError(
            f"the base has not learnt: its loss is {loss:.2f} nats a token, a uniform guess's is "
            f"{uniform_loss:.2f}"
        )
    return Domain(
        recipe=RECIPE,
        base=base,
        targets=linear_layers(base, without=["lm_head"]),
        train=rows([text for i, text in enumerate(headers) if i % 5 > 1]),
        validation=next_token(rows(headers[::5], scale.num_held_out)),
        test=next_token(rows(headers[1::5], scale.num_held_out)),
        old=old,
        text=True,
    )


def read_package_files(
    packages: Iterable[str], pattern: str, limit_bytes: int, seed: int
) -> list[str]:
    """Return files of installed packages, in random order, until there are enough.

    Args:
        packages: top-level packages; they are not imported.
        pattern: glob of the files for ``Path.rglob``, relative to the package.
        limit_bytes: in fact characters, which are nearly bytes of UTF-8.
        seed: of the order.
    """
    paths: list[Path] = []
    for name in packages:
        spec = find_spec(name)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            found = sorted(Path(folder).rglob(pattern))
            paths += [path for path in found if path.stat().st_size < 200_000]
    # thousands of headers of operators, all written by a code generator
    paths = [path for path in paths if not path.match("ATen/ops/*")]
    random.Random(seed).shuffle(paths)
    texts: list[str] = []
    for path in paths:
        if limit_bytes <= 0:
            break
        text = path.read_text(encoding="utf-8", errors="ignore")
        if len(text) >= 200 and "@generated" not in text:
            texts.append(text)
            limit_bytes -= len(text)
    return texts


def tokens_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    """Return the ids of ``token_stream``, on all cores, 64 texts at a time to limit memory."""
    ids: list[int] = []
    with mock.patch.dict(os.environ, {"TOKENIZERS_PARALLELISM": "true"}):
        for i in range(0, len(texts), 64):
            for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts[i : i + 64]):
                ids.append(tokenizer.bos_token_id)
                ids.extend(encoding.ids)
    return ids


def log_progress(message: str, begin: float) -> None:
    """Log the progress, so that the log of an interrupted run shows how far it got."""
    print(
        f"pretrained: {message}, {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True
    )


def split_rows(rows: Batch, max_held_out: int) -> tuple[Batch, Batch]:
    """Split into training and held-out rows; hold out every 20th, at most ``max_held_out``.

    For a scale with a few dozen files. A twentieth of them would be two, and how similar these are
    to the others would affect the loss more than what was learnt. So both parts contain rows of
    every file; text repeated within a file leaks, but these numbers are meaningless anyway.
    """
    count = len(rows["input_ids"])
    held_out = torch.zeros(count, dtype=torch.bool)
    held_out[torch.linspace(0, count - 1, min(max_held_out, -(-count // 20))).long()] = True
    held_out = held_out.to(rows["input_ids"].device)
    return {k: v[~held_out] for k, v in rows.items()}, {k: v[held_out] for k, v in rows.items()}


def pretrain(
    train: Batch, tokenizer: PreTrainedTokenizerBase, scale: Scale, seed: int
) -> nn.Module:
    """Return a model trained in mixed precision, in eval mode; on a GPU in bfloat16."""
    device = train["input_ids"].device
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=scale.width,
        intermediate_size=scale.inner,
        num_hidden_layers=scale.layers,
        num_attention_heads=scale.heads,
        num_key_value_heads=scale.heads,
        max_position_embeddings=max(256, scale.length),
    )
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.manual_seed(seed)
        model: nn.Module = LlamaForCausalLM(config).to(device)
    # Autocast's cache would keep the weights of the first step to the end.
    with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
        descend(model, train, steps=scale.steps, batch=scale.batch, rate=scale.rate, seed=seed)
    return (model.to(torch.bfloat16) if on_gpu else model).eval()
