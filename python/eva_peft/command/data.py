"""Read calibration texts from a file or a dataset, and batch them for a model."""

from __future__ import annotations

import glob
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from ..errors import EvaError, EvaValueError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".jsonl", ".parquet", ".txt")
ROWS_TO_GUESS_COLUMNS = 100  # rows from which the columns are determined

_TEXT_COLUMNS = ("text", "content", "messages")
_TEXT_COLUMN_PAIRS = (("prompt", "response"), ("prompt", "completion"))
_MESSAGE_TEXT_KEYS = {"content", "tool_calls"}  # a message that calls tools need not have text
_log = logging.getLogger("eva_kernels")


class DataNotFoundError(EvaError, FileNotFoundError):
    """There is neither a file nor a dataset of the name given."""


def load_texts(
    data: str,
    *,
    text_column: str | None = None,
    split: str = "train",
    limit: int = 10_000,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[str]:
    """Read the first texts of a file or dataset.

    A `.txt` file holds one text per line. Without `text_column` the columns are guessed: `text`,
    `content`, `messages` (a chat), or `prompt` with `response` or `completion`. Blank rows are
    left out.

    Args:
        data: a `.jsonl`, `.parquet` or `.txt` file, or a dataset of the Hugging Face hub as
            `name` or `name:config`; the hub is streamed: only the rows taken are downloaded.
        text_column: the column to read; its values are strings or chats.
        split: the split of a hub dataset; a file has only `train`.
        limit: maximum number of texts.
        tokenizer: turns chats into text by its chat template; without a template the texts of a
            chat's messages are joined by line breaks.

    Returns:
        Between 1 and `limit` texts.

    Raises:
        DataNotFoundError: no such file or dataset.
        EvaValueError: a file that cannot be read as its suffix says, no usable column, or no text.
        ImportError: `datasets` is needed (parquet, hub) and not installed.
    """
    if not data.strip():
        raise EvaValueError(
            "no data given; pass the path of a .jsonl, .parquet or .txt file, or the name of a "
            "dataset on the Hugging Face Hub"
        )
    rows = iter(_open_rows(data, split))
    # a row may lack some of the keys
    sampled_rows = list(islice(rows, min(limit, ROWS_TO_GUESS_COLUMNS)))
    if not sampled_rows:
        raise EvaValueError(f"{data} is empty: it has no rows, so there is no text to calibrate on")
    columns = _choose_columns(data, list(dict.fromkeys(chain(*sampled_rows))), text_column)
    texts = (_row_text(data, row, columns, tokenizer) for row in chain(sampled_rows, rows))
    # tokenizers reject lone surrogates, such as half of an emoji in a text that was cut
    valid_texts = (text.encode("utf-8", "replace").decode() for text in texts)
    selected = list(islice((text for text in valid_texts if text.strip()), limit))
    if not selected:
        raise EvaValueError(
            f"{data} holds no text: {' and '.join(columns)} is blank in every row; name another "
            "column with --text-column"
        )
    return selected


def make_loader(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    max_length: int,
    seed: int,
    model: Any = None,
) -> DataLoader[str]:
    """Batch texts for a model, shuffled by a separate random generator.

    Rows are padded on the right to the longest of their batch, see :func:`padding_token`. The
    tokenizer is not changed.

    Args:
        texts: at least one.
        tokenizer: the model's.
        batch_size: texts per batch.
        max_length: maximum tokens per text; lowered to what the tokenizer and the model allow.
        seed: of the order.
        model: if known.

    Returns:
        A loader of dicts: `input_ids` and `attention_mask`, int64 of shape (batch, length).
    """
    length_limit = min(max_length, tokenizer.model_max_length, _max_positions(model))
    if length_limit < max_length:
        _log.info("max_length lowered to %d, the model's limit", length_limit)
    padding = padding_token(tokenizer, model)

    def collate(batch: list[str]) -> dict[str, torch.Tensor]:
        rows = tokenizer(batch, truncation=True, max_length=length_limit)["input_ids"]
        tokens = [torch.tensor(row, dtype=torch.long) for row in rows]
        ones = [torch.ones_like(row) for row in tokens]
        return {
            "input_ids": pad_sequence(tokens, batch_first=True, padding_value=padding),
            "attention_mask": pad_sequence(ones, batch_first=True),
        }

    generator = torch.Generator().manual_seed(seed)
    return DataLoader(
        list(texts),  # type: ignore[arg-type]  # a list serves as a Dataset
        batch_size=batch_size,
        shuffle=True,
        generator=generator,
        collate_fn=collate,
    )


def padding_token(tokenizer: PreTrainedTokenizerBase, model: Any = None) -> int:
    """Return the token that fills short rows: the pad token, or the end token, or 0.

    Args:
        tokenizer: the model's.
        model: if known; a token for which it has no embedding is not used.
    """
    embeddings = None if model is None else model.get_input_embeddings()
    num_embeddings = getattr(embeddings, "num_embeddings", math.inf)
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None and token < num_embeddings:
            return int(token)
    return 0  # any token will do: the mask leaves it out


def _max_positions(model: Any) -> float:
    """Return how many positions a model has, infinity if its config does not tell."""
    config: Any = getattr(model, "config", None)
    with suppress(AttributeError, ValueError):  # none, or several
        config = config.get_text_config()
    position_limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(position_limit, int) or position_limit < 1:
        return math.inf
    tables = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
    padding_indices = [getattr(table, "padding_idx", None) for table in tables]
    return position_limit - max([0, *(index + 1 for index in padding_indices if index is not None)])


class DecoderInputs:
    """Feed every text to both encoder and decoder of a model, shifted for the decoder.

    Args:
        batches: dicts with `input_ids` and `attention_mask`; may be iterated repeatedly.
        model: an encoder-decoder.
    """

    def __init__(self, batches: Iterable[dict[str, Any]], model: Any) -> None:
        self.batches = batches
        self.model = model

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.batches:
            shifted, mask = self._decoder_input_ids(batch["input_ids"]), batch["attention_mask"]
            yield {**batch, "decoder_input_ids": shifted, "decoder_attention_mask": mask}

    def _decoder_input_ids(self, tokens: torch.Tensor) -> torch.Tensor:
        shift = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        if shift is not None:
            return shift(labels=tokens)
        # a model without a head
        start = getattr(self.model.config, "decoder_start_token_id", None) or 0
        return torch.cat([torch.full_like(tokens[:, :1], start), tokens[:, :-1]], dim=1)


def _open_rows(data: str, split: str) -> Iterable[Mapping[str, Any]]:
    path = Path(data)
    suffix = path.suffix.lower()
    if not path.is_file():
        if suffix in SUFFIXES:
            raise DataNotFoundError(f"there is no file {data}")
        return _hub_rows(data, split)
    if suffix not in SUFFIXES:
        raise EvaValueError(
            f"cannot read {data}: the name of a file must end in one of {', '.join(SUFFIXES)}"
        )
    if split != "train":
        raise EvaValueError(f"{data} is a file and has no split {split!r}; leave --split out")
    if suffix == ".parquet":
        return _parquet_rows(path)
    return (
        _jsonl_rows(path)
        if suffix == ".jsonl"
        else ({"text": line} for _, line in _numbered_lines(path))
    )


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank with their numbers."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise EvaValueError(
                    f"{path}, line {number}: not UTF-8 ({error.reason}); convert the file to UTF-8"
                ) from error
            if line:
                yield number, line


def _jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in _numbered_lines(path):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise EvaValueError(
                f"{path}, line {number}: not JSON ({error}); every line of a .jsonl file must be "
                "a JSON object"
            ) from error
        if not isinstance(row, dict):
            raise EvaValueError(
                f"{path}, line {number}: expected a JSON object with named columns, got "
                f"{type(row).__name__}"
            )
        yield row


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    load_dataset = _require_datasets()
    try:
        from pyarrow.parquet import read_metadata

        if read_metadata(path).num_rows == 0:  # datasets fails on it
            return
        files = glob.escape(str(path.resolve()))
        yield from load_dataset("parquet", data_files=files, split="train", streaming=True)
    except Exception as error:
        # pyarrow and datasets wrap a cause in their own exception classes, which vary by version.
        raise EvaValueError(f"cannot read {path} as Parquet: {first_line(error)}") from error


def _hub_rows(data: str, split: str) -> Iterator[Mapping[str, Any]]:
    load_dataset = _require_datasets()
    name, _, config = data.partition(":")
    try:
        yield from load_dataset(name, config or None, split=split, streaming=True)
    except (FileNotFoundError, ConnectionError) as error:
        raise DataNotFoundError(
            f"{data!r} is neither a file nor a dataset that can be reached on the Hugging Face "
            f"Hub: {first_line(error)}; check the name, or pass the path of a file"
        ) from error
    except Exception as error:
        raise EvaValueError(
            f"cannot load the dataset {data!r}: {first_line(error)}; check its name, its "
            "configuration (NAME:CONFIG) and --split"
        ) from error


def _require_datasets() -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            "Parquet files and hub datasets need the datasets library: "
            "pip install eva-kernels[data]"
        ) from error
    return load_dataset


def _choose_columns(data: str, present: list[str], requested: str | None) -> tuple[str, ...]:
    present_text = f"the columns are {', '.join(map(repr, present)) or 'none'}"
    if requested is not None:
        if requested not in present:
            raise EvaValueError(f"{data} has no column {requested!r}; {present_text}")
        return (requested,)
    for columns in (*((column,) for column in _TEXT_COLUMNS), *_TEXT_COLUMN_PAIRS):
        if set(columns) <= set(present):
            return columns
    raise EvaValueError(
        f"cannot tell which column of {data} holds the text: {present_text}; name one with "
        "--text-column"
    )


def _row_text(
    data: str,
    row: Mapping[str, Any],
    columns: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase | None,
) -> str:
    values = [row.get(column) for column in columns]
    chats = [value for value in values if isinstance(value, list)]
    if chats and len(chats) == len(values):
        return _chat_text(data, columns, [message for chat in chats for message in chat], tokenizer)
    for column, value in zip(columns, values, strict=True):
        if value is not None and not isinstance(value, str):
            raise EvaValueError(
                f"column {column!r} of {data} holds {type(value).__name__}, not text or chats; "
                "name another column with --text-column"
            )
    return "\n".join(value for value in values if value)


def _chat_text(
    data: str,
    columns: tuple[str, ...],
    messages: list[Any],
    tokenizer: PreTrainedTokenizerBase | None,
) -> str:
    for message in messages:
        if (
            not isinstance(message, dict)
            or "role" not in message
            or not _MESSAGE_TEXT_KEYS & set(message)
        ):
            raise EvaValueError(
                f"column {' and '.join(map(repr, columns))} of {data} holds a list that is not a "
                "chat: every message needs 'role' and 'content'"
            )
    if not messages:
        return ""
    if tokenizer is not None and tokenizer.chat_template:
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # templates may raise any exception
            raise EvaValueError(
                f"the tokenizer's chat template rejects a chat of {data}: {first_line(error)}"
            ) from error
        # Most templates write the BOS token, which the tokenizer then adds once more.
        bos_token = tokenizer.bos_token
        adds_bos = bos_token and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        return text.removeprefix(bos_token) if adds_bos else text
    return "\n".join(_message_text(message.get("content")) for message in messages)


def _message_text(content: Any) -> str:
    """Return the text of a message, which may be a list of parts, some of them images."""
    if not isinstance(content, list):
        return str(content or "")
    parts = [part.get("text") if isinstance(part, dict) else part for part in content]
    return "\n".join(part for part in parts if isinstance(part, str))
