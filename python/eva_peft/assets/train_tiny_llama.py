"""Train the small Llama-architecture model that ships with the package.

    python -m eva_peft.assets.train_tiny_llama --out python/eva_peft/assets/tiny_llama

The text is the documentation of the running Python (see `texts.py`). One seed fixes the split, the
initial weights and the order of the batches, so the same versions on the same kind of processor
give the same files. About 10 minutes on one core with bfloat16 products, 25 on one without.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tokenizers
import torch
import transformers
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eva_peft.assets.texts import documentation_texts, is_held_out, token_stream

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the result, besides the text and the versions."""

    vocab_size: int = 2048
    hidden_size: int = 192
    intermediate_size: int = 512
    layers: int = 5
    heads: int = 6
    context: int = 256
    batch: int = 16
    steps: int = 1200
    learning_rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 1.0
    seed: int = 0


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; any text can be encoded and decoded back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=Recipe.context,
        clean_up_tokenization_spaces=False,
    )


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make the untrained model."""
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, stream: torch.Tensor, recipe: Recipe) -> float:
    """Return the mean loss in nats per token over the whole blocks of a stream."""
    model.eval()
    count = len(stream) // recipe.context
    blocks = stream[: count * recipe.context].view(count, recipe.context)
    total = 0.0
    for block in blocks.split(recipe.batch):
        loss = model(input_ids=block, labels=block, use_cache=False).loss
        total += float(loss) * len(block)
    model.train()
    return total / count


def learning_rate(step: int, recipe: Recipe) -> float:
    """Return the rate of a step: linear warm-up, then half a cosine down to zero."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def train_step(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    block: torch.Tensor,
    rate: float,
) -> float:
    """Take one step of AdamW on a block of token ids (batch, context); return its loss."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=block, labels=block, use_cache=False).loss
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def save(
    out: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    record: dict[str, Any],
) -> None:
    """Write the folder that `from_pretrained` loads, weights in bfloat16, with its record."""
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.save_pretrained(out)
    tokenizer.save_pretrained(out)
    settings = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # a name that transformers 4 knows too
    write_json(out / "tokenizer_config.json", settings)
    (out / "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner alone
    record["parameters"] = model.num_parameters()
    record["model_sha256"] = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    write_json(out / "training.json", record)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a mapping to a file, keys in their order."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def make_optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """Make AdamW with weight decay on the matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))


def describe(recipe: Recipe, threads: int, train: list[str], held_out: list[str]) -> dict[str, Any]:
    """Return the record that is needed for a rerun."""
    joined = "\0".join(train + held_out).encode()
    return {
        "command": "python -m eva_peft.assets.train_tiny_llama "
        f"--seed {recipe.seed} --steps {recipe.steps} --threads {threads}",
        "recipe": asdict(recipe),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "text": {
            "source": "pydoc topics and docstrings of the standard library",
            "licence": "PSF-2.0",
            "sha256": hashlib.sha256(joined).hexdigest(),
            "train_documents": len(train),
            "held_out_documents": len(held_out),
            "train_bytes": sum(len(text.encode()) for text in train),
            "held_out_bytes": sum(len(text.encode()) for text in held_out),
        },
    }


def main(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path(__file__).parent
    / "tiny_llama",
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = Recipe.steps,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = Recipe.seed,
    threads: Annotated[int, typer.Option(help="Processor threads.")] = 1,
    every: Annotated[int, typer.Option(help="Steps between evaluations.")] = 100,
) -> None:
    """Train the embedded model and write it, its tokenizer and its loss curve to a folder."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    # Costs time and changes no result; torch has no types for this module.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(seed)
    recipe = Recipe(steps=steps, seed=seed)

    texts = documentation_texts()
    train = [text for name, text in texts.items() if not is_held_out(name)]
    held_out = [text for name, text in texts.items() if is_held_out(name)]
    tokenizer = train_tokenizer(train, recipe.vocab_size)
    stream = torch.tensor(token_stream(tokenizer, train))
    held_out_stream = torch.tensor(token_stream(tokenizer, held_out))
    record = describe(recipe, threads, train, held_out)
    record["text"] |= {
        "train_tokens": len(stream),
        "held_out_tokens": len(held_out_stream),
        "bytes_per_token": record["text"]["held_out_bytes"] / len(held_out_stream),
    }

    model = build_model(recipe, tokenizer)
    optimizer = make_optimizer(model, recipe)
    generator = torch.Generator().manual_seed(seed)
    curve: dict[str, list[float]] = {"step": [], "train": [], "held_out": [], "bits_per_byte": []}
    record["loss"] = curve
    losses: list[float] = []
    start = time.perf_counter()
    for step in range(recipe.steps + 1):
        if step % every == 0 or step == recipe.steps:
            held = mean_loss(model, held_out_stream, recipe)
            bits = held / math.log(2) / record["text"]["bytes_per_token"]
            curve["step"].append(step)
            curve["train"].append(sum(losses) / max(1, len(losses)) if losses else held)
            curve["held_out"].append(held)
            curve["bits_per_byte"].append(bits)
            losses.clear()
            record["seconds"] = round(time.perf_counter() - start)
            save(out, model, tokenizer, record)
            typer.echo(
                f"step {step:5d}  train {curve['train'][-1]:.3f}  held out {held:.3f} nats/token, "
                f"{bits:.3f} bits/byte  {record['seconds']} s"
            )
        if step < recipe.steps:
            offsets = torch.randint(
                len(stream) - recipe.context, (recipe.batch, 1), generator=generator
            )
            block = stream[offsets + torch.arange(recipe.context)]
            losses.append(train_step(model, optimizer, block, learning_rate(step, recipe)))


if __name__ == "__main__":
    typer.run(main)
