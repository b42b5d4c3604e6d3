"""Language understanding: a sentence encoder with a new head classifies docstrings by package."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.utils import ModelOutput

from .. import minilm
from ..methods import Batch
from . import hub
from .domain import Domain, Recipe, Task, classification_task, linear_layers
from .language import documentation

LENGTH = 16  # tokens of a paragraph, at most
CLASSES = 12
SIZES = {"train": 80, "validation": 10, "test": 16}  # paragraphs per class
SCALE = 20.0  # factor on cosines with which the encoder was trained
RECIPE = Recipe(
    title="Language understanding",
    what=(
        "MiniLM (all-MiniLM-L6-v2, 6 layers, width 384) with mean pooling and a new head, adapted "
        f"to tell which of the {CLASSES} best documented packages of the standard library "
        f"a paragraph of a docstring, cut after {LENGTH} tokens, is from. Old task: to find "
        "the second half of a paragraph of the reference documentation among 48, by the cosine of "
        "sentence embeddings."
    ),
    loss="cross entropy, nats",
    score="accuracy",
    old=(
        f"contrastive loss (cosines times {SCALE:g}, nats) and accuracy in finding the second half "
        "of a paragraph; the head has no part in it"
    ),
    steps=30,
    every=10,
    batch=8,
    r=8,
    calibration=8,
)
Labelled = list[tuple[str, int]]


@dataclass
class Output(ModelOutput):
    """Attributes: scalar loss, logits (batch, classes), embedding (batch, D) of length one."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    embedding: Tensor | None = None


class SentenceClassifier(nn.Module):
    """A linear head on mean-pooled, normalised token states."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(width, classes)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, classes: Tensor | None = None
    ) -> Output:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[..., None].to(states.dtype)
        mean = (states * weights).sum(1) / weights.sum(1)
        logits = self.classifier(mean)
        loss = None if classes is None else nn.functional.cross_entropy(logits, classes)
        return Output(loss=loss, logits=logits, embedding=nn.functional.normalize(mean, dim=-1))


def build(data: str = "embedded", seed: int = 0) -> Domain:
    """Build the domain; with ``data="hub"`` the sentences are those of ``hub.UNDERSTANDING``."""
    texts = documentation()
    if data == "hub":
        train, validation, test = hub.split_7_1_2(hub.labelled_sentences())
    else:
        train, validation, test = docstrings(texts, seed)
    encoder: Any = minilm.load_model()
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    classes = 1 + max(label for _, label in [*train, *validation, *test])
    model = SentenceClassifier(encoder, encoder.config.hidden_size, classes).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.classifier.reset_parameters()
    return Domain(
        recipe=RECIPE,
        base=model,
        targets=linear_layers(model, without=["classifier", "encoder.pooler"]),
        train=labelled(train),
        validation=classification_task(labelled(_by_length(validation)), "classes"),
        test=classification_task(labelled(_by_length(test)), "classes"),
        old=halves_task([text for name, text in texts.items() if name.startswith("topics/")], seed),
        text=True,
        head=("classifier",),
    )


def docstrings(texts: dict[str, str], seed: int) -> tuple[Labelled, Labelled, Labelled]:
    """Return paragraphs with their package's number: training, validation and test split."""
    packages: dict[str, list[str]] = defaultdict(list)
    for name, text in texts.items():
        if name.startswith("docstrings/"):
            package = name.split("/")[1].removesuffix(".py")
            parts = (" ".join(part.split()) for part in text.split("\n\n"))
            packages[package] += [part for part in parts if len(part) >= 60]
    best_documented = sorted(packages, key=lambda name: (-len(packages[name]), name))[:CLASSES]
    splits: tuple[Labelled, Labelled, Labelled] = ([], [], [])
    for label, package in enumerate(best_documented):
        paragraphs = list(packages[package])
        random.Random(seed).shuffle(paragraphs)
        for split, size in zip(splits, SIZES.values(), strict=True):
            split += [(text, label) for text in paragraphs[:size]]
            del paragraphs[:size]
    return splits


def labelled(split: Labelled) -> Batch:
    """Return encoded texts with their classes, int64 (texts,).

    The key is not ``labels``, which PEFT's EVA takes for labels of tokens.
    """
    encoded = encode([text for text, _ in split], LENGTH)
    return {**encoded, "classes": torch.tensor([label for _, label in split])}


def encode(texts: Sequence[str], length: int) -> Batch:
    """Return token ids and attention mask, int64 (texts, at most ``length``)."""
    tokenizer = AutoTokenizer.from_pretrained(minilm.model_folder())
    encoding = tokenizer(
        list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt"
    )
    return {"input_ids": encoding["input_ids"], "attention_mask": encoding["attention_mask"]}


def halves_task(texts: Sequence[str], seed: int, count: int = 48) -> Task:
    """Return the task to find a paragraph's second half among all second halves."""
    paragraphs = [" ".join(part.split()) for text in texts for part in text.split("\n\n")]
    long_paragraphs = [words for p in paragraphs if len(words := p.split()) >= 24]
    random.Random(seed).shuffle(long_paragraphs)
    first_halves, second_halves = [], []
    for words in long_paragraphs[:count]:
        middle = len(words) // 2
        first_halves.append(" ".join(words[max(0, middle - 16) : middle]))
        second_halves.append(" ".join(words[middle : middle + 16]))
    first, second = encode(first_halves, 24), encode(second_halves, 24)

    @torch.no_grad()
    def loss_and_score(model: nn.Module) -> tuple[float, float]:
        training = model.training
        model.eval()
        logits = SCALE * model(**first).embedding @ model(**second).embedding.T
        model.train(training)
        correct_index = torch.arange(len(logits))
        correct = (logits.argmax(1) == correct_index).double().mean()
        return float(nn.functional.cross_entropy(logits, correct_index)), float(correct)

    return Task(lambda model: loss_and_score(model)[0], loss_and_score)


def _by_length(split: Labelled) -> Labelled:
    return sorted(split, key=lambda pair: len(pair[0]))
