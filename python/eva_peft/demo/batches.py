"""Turn the source text into blocks of token ids, and blocks into calibration batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from eva_peft.assets.texts import source_texts, token_stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, torch.Tensor]


def source_blocks(
    tokenizer: PreTrainedTokenizerBase,
    length: int = 256,
    held_out: int = 24,
    limit_bytes: int = 600_000,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut Python source code into blocks, some of them for evaluation.

    Args:
        tokenizer: of the embedded model.
        length: tokens per block.
        held_out: maximum number of blocks for the evaluation.
        limit_bytes: of source text.

    Returns:
        Blocks to train on and blocks to evaluate on, (count, length) each, from different files.
    """
    texts = source_texts(limit_bytes)
    training_texts = [text for i, text in enumerate(texts) if i % 5]
    evaluation = _cut_into_blocks(token_stream(tokenizer, texts[::5]), length)
    train = _cut_into_blocks(token_stream(tokenizer, training_texts), length)
    # Neighbouring blocks come from one file: without shuffling a batch would have a single style.
    train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))]
    picked = torch.linspace(0, len(evaluation) - 1, min(held_out, len(evaluation))).long()
    return train, evaluation[picked]


def calibration_batches(
    blocks: torch.Tensor,
    pad_token_id: int,
    count: int,
    rows: int = 8,
    ragged: int = 2,
    seed: int = 0,
) -> list[Batch]:
    """Draw batches in which most rows are full and some are cut short and padded on the right.

    Args:
        blocks: token ids (blocks, length).
        pad_token_id: fills the end of the short rows.
        count: maximum number of batches; the last one may have fewer rows.
        rows: rows per batch.
        ragged: how many of them are short.
        seed: of the draw.

    Returns:
        Batches with `input_ids` and `attention_mask`, int64 (rows, length).
    """
    generator = torch.Generator().manual_seed(seed)
    length = blocks.shape[1]
    order = torch.randperm(len(blocks), generator=generator)[: count * rows]
    batches = []
    for ids in blocks[order].split(rows):
        lengths = torch.full((len(ids),), length)
        short = min(ragged, len(ids))
        lengths[:short] = torch.randint(
            length // 8, length - length // 8, (short,), generator=generator
        )
        mask = torch.arange(length) < lengths[:, None]
        ids = ids.masked_fill(~mask, pad_token_id)
        batches.append({"input_ids": ids, "attention_mask": mask.long()})
    return batches


def _cut_into_blocks(ids: list[int], length: int) -> torch.Tensor:
    count = len(ids) // length
    return torch.tensor(ids[: count * length]).view(count, length)
