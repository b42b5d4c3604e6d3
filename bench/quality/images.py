"""Image classification: small ViT, pre-trained on upright digits, adapted to rotated negatives."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from ..methods import Batch
from . import hub
from .descent import descend
from .domain import Domain, Recipe, classification_task, linear_layers

RECIPE = Recipe(
    title="Image classification",
    what=(
        "A ViT (3 layers, width 64) that the harness pre-trains on handwritten digits of "
        "scikit-learn, adapted to other digits of the same set, turned by a quarter and inverted; "
        "the head is not trained. Old task: upright digits held out from the pre-training."
    ),
    loss="cross entropy, nats",
    score="accuracy",
    old="cross entropy and accuracy on upright images",
    steps=60,
    every=10,
    batch=32,
    r=4,
    calibration=8,
)
PRETRAINING = {"steps": 300, "batch": 32, "rate": 2e-3}


def build(data: str = "embedded", seed: int = 0) -> Domain:
    """Build the domain; with ``data="hub"`` the images are those of ``hub.IMAGES``."""
    images, labels = hub.labelled_images() if data == "hub" else digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    edges = (torch.tensor([0.0, 0.42, 0.5, 0.78, 0.86, 1.0]) * len(images)).long().tolist()
    old_train, old_test, train, validation, test = (
        order[low:high] for low, high in itertools.pairwise(edges)
    )

    def batch(rows: Tensor, shifted: bool) -> Batch:
        pixels = rotated_negatives(images[rows]) if shifted else images[rows]
        return {"pixel_values": pixels, "labels": labels[rows]}

    base = pretrain_base(batch(old_train, False), seed)
    return Domain(
        recipe=RECIPE,
        base=base,
        targets=linear_layers(base, without=["classifier"]),
        train=batch(train, True),
        validation=classification_task(batch(validation, True)),
        test=classification_task(batch(test, True)),
        old=classification_task(batch(old_test, False)),
    )


def digits() -> tuple[Tensor, Tensor]:
    """Return the images (1797, 1, 8, 8), values from -1 to 1, and their labels."""
    from sklearn.datasets import load_digits

    digit_set = load_digits()
    images = torch.tensor(digit_set.images, dtype=torch.float32)[:, None] / 8 - 1
    return images, torch.tensor(digit_set.target, dtype=torch.int64)


def rotated_negatives(images: Tensor) -> Tensor:
    """Return the negatives, rotated by 90 degrees."""
    return -images.rot90(1, (-2, -1))


def pretrain_base(train: Batch, seed: int) -> nn.Module:
    """Train the base on upright images."""
    images, labels = train["pixel_values"], train["labels"]
    config = ViTConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=images.shape[-1],
        patch_size=max(2, images.shape[-1] // 8),
        num_channels=images.shape[1],
        num_labels=int(labels.max()) + 1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = ViTForImageClassification(config)
        descend(model, train, seed=seed, **PRETRAINING)  # type: ignore[arg-type]
    return model.eval()
