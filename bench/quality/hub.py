"""The paper's data sets, or similar ones, if the hub can be reached: ``--data hub``.

A name may also be a local folder with files ``train.*`` and ``test.*`` with the same columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

# name, config, split
GENERATION = (("openai/gsm8k", "main", "train"), ("meta-math/MetaMathQA", None, "train"))
UNDERSTANDING = ("nyu-mll/glue", "sst2", "train")
IMAGES = ("uoft-cs/cifar10", None, "train")
TRAJECTORIES = (
    ("edbeeching/decision_transformer_gym_replay", "hopper-medium-v2", "train"),
    ("edbeeching/decision_transformer_gym_replay", "hopper-expert-v2", "train"),
)
Source = tuple[str, str | None, str]
T = TypeVar("T")

_PAIRS = (("question", "answer"), ("query", "response"))
_SENTENCES = (
    ("sentence",),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
)
_IMAGES = ("image", "img")
_LABELS = ("label", "labels", "fine_label")


def rows(source: Source, limit: int) -> list[Mapping[str, Any]]:
    """Return the first rows of a split, streamed.

    Raises:
        ImportError: ``datasets`` is not installed.
    """
    from datasets import load_dataset

    name, config, split = source
    return list(islice(load_dataset(name, config, split=split, streaming=True), limit))


def split_7_1_2(samples: Any) -> tuple[Any, Any, Any]:
    """Split a list, or a mapping of tensors, into training, validation and test sets, 7 : 1 : 2."""
    if isinstance(samples, Mapping):
        parts = {key: split_7_1_2(value) for key, value in samples.items()}
        a, b, c = ({key: value[i] for key, value in parts.items()} for i in range(3))
        return a, b, c
    low, high = 7 * len(samples) // 10, 8 * len(samples) // 10
    return samples[:low], samples[low:high], samples[high:]


def generation_texts(sources: Sequence[Source] = GENERATION, limit: int = 1000) -> list[str]:
    """Return problems with their solutions, alternating between the sources."""
    texts_by_source = [
        [f"{row[question]}\n{row[answer]}\n" for row in source_rows]
        for source in sources
        if (source_rows := rows(source, limit // len(sources)))
        for question, answer in [_known_columns(_PAIRS, source_rows[0])]
    ]
    return [text for texts in zip(*texts_by_source, strict=False) for text in texts]


def labelled_sentences(source: Source = UNDERSTANDING, limit: int = 2000) -> list[tuple[str, int]]:
    """Return labelled sentences, or joined pairs of them; those with hidden labels (-1) dropped."""
    source_rows = rows(source, limit)
    columns = _known_columns(_SENTENCES, source_rows[0])
    return [
        (" [SEP] ".join(row[column] for column in columns), row["label"])
        for row in source_rows
        if row["label"] >= 0
    ]


def labelled_images(
    source: Source = IMAGES, limit: int = 3000, size: int = 16
) -> tuple[Tensor, Tensor]:
    """Return images (count, 3, size, size), values from -1 to 1, and labels (count,)."""
    import numpy

    source_rows = rows(source, limit)
    (image,) = _known_columns([(name,) for name in _IMAGES], source_rows[0])
    (label,) = _known_columns([(name,) for name in _LABELS], source_rows[0])
    pixels = [numpy.asarray(row[image].convert("RGB").resize((size, size))) for row in source_rows]
    images = torch.from_numpy(numpy.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, torch.tensor([row[label] for row in source_rows])


def trajectories(
    sources: tuple[Source, Source] = TRAJECTORIES, limit: int = 200, steps: int = 20
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return old and new trajectories, cut from the episodes; tensors (count, steps, ...)."""
    old, new = (_cut_episodes(rows(source, limit), steps) for source in sources)
    mean, scale = (f(old["states"].flatten(0, 1), 0) for f in (torch.mean, torch.std))
    for trajectory in (old, new):  # both normalised by the statistics of the pre-training data
        trajectory["states"] = (trajectory["states"] - mean) / (scale + 1e-6)
    return old, new


def _cut_episodes(episodes: Sequence[Mapping[str, Any]], steps: int) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {"states": [], "actions": [], "rewards": []}
    for episode in episodes:
        for key, column in zip(parts, ("observations", "actions", "rewards"), strict=True):
            value = torch.tensor(episode[column], dtype=torch.float32)
            value = value[..., None] if value.ndim == 1 else value
            num_pieces = len(value) // steps
            parts[key].append(value[: num_pieces * steps].reshape(num_pieces, steps, -1))
    return {key: torch.cat(value) for key, value in parts.items()}


def _known_columns(known: Sequence[tuple[str, ...]], row: Mapping[str, Any]) -> tuple[str, ...]:
    for columns in known:
        if all(column in row for column in columns):
            return columns
    raise ValueError(f"the data set has the columns {list(row)}, but needs one of {list(known)}")
