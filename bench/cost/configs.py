"""The models, data and sizes for which costs are measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from ..common import default_device
from ..end_to_end import load_ids
from ..methods import Batch, Job
from ..models import MODELS, TARGETS


@dataclass(frozen=True)
class Config:
    """One configuration.

    Attributes:
        make_config: returns the transformers config.
        hub: name of the weights on the hub; if it cannot be reached, weights are random.
        samples: total number, the same samples for every method.
        length: tokens per sample.
        batches: batch sizes for data-driven methods.
        passes: over the samples, after which EVA is stopped, converged or not.
        epoch: samples in a training epoch, with whose time costs are compared.
        train_batch: batch size of that training.
        r: rank.
        dtype: of the weights.
        min_repeats, repeats: minimum and maximum number of measured runs per row.
        seconds: after which a row is not repeated again.
        gpu: needs a GPU.
    """

    make_config: Callable[[], PretrainedConfig]
    hub: str | None
    samples: int
    length: int
    batches: tuple[int, ...]
    passes: int
    epoch: int
    train_batch: int
    r: int
    dtype: torch.dtype
    min_repeats: int
    repeats: int
    seconds: float
    gpu: bool = True

    def device(self) -> torch.device:
        """Return the device on which it runs.

        Raises:
            RuntimeError: it needs a GPU, and torch finds none.
        """
        device = default_device()
        if self.gpu and device.type == "cpu":
            raise RuntimeError("this configuration needs a GPU, and torch sees none")
        return device

    def make_model(self, use_hub_weights: bool) -> nn.Module:
        """Return the model, with the same weights at every call, in eval mode.

        Args:
            use_hub_weights: use the hub's weights.
        """
        device = self.device()
        if use_hub_weights:
            model = AutoModelForCausalLM.from_pretrained(self.hub, dtype=self.dtype)
            return model.to(device).eval()
        torch.manual_seed(0)
        with torch.device(device):  # created there, without a second copy
            model = AutoModelForCausalLM.from_config(self.make_config(), dtype=self.dtype)
        return model.eval()

    def has_weights(self) -> bool:
        """Return whether the weights can be loaded from the hub or its cache."""
        if self.hub is None:
            return False
        try:
            AutoModelForCausalLM.from_pretrained(self.hub, dtype=self.dtype, device_map="meta")
        except (OSError, ValueError):
            return False
        return True

    def make_batches(self, size: int, device: torch.device) -> list[Batch]:
        """Return the samples in batches: source code, tokenized by the embedded tokenizer."""
        vocabulary = self.make_config().vocab_size
        ids = load_ids(vocabulary, self.samples * self.length).view(self.samples, self.length)
        parts = ids.to(device).split(size)
        return [
            {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part}
            for part in parts
        ]

    def with_depth(self, count: int) -> Config:
        """Return the same configuration with ``count`` layers, and random weights."""

        def make_config() -> PretrainedConfig:
            config = self.make_config()
            old_depth, config.num_hidden_layers = config.num_hidden_layers, count
            for key, value in vars(config).items():
                if isinstance(value, list) and len(value) == old_depth:  # one entry per layer
                    setattr(config, key, value[:count])
            return config

        return replace(self, make_config=make_config, hub=None)

    def job(self, batches: list[Batch]) -> Job:
        """Return the input of a method."""
        max_forwards = self.passes * len(batches)
        steps = max(1, self.epoch // self.train_batch)
        return Job(TARGETS, batches, causal_loss, r=self.r, max_forwards=max_forwards, steps=steps)


def causal_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean next-token loss."""
    loss: Tensor = model(**batch, use_cache=False).loss
    return loss


def _tiny() -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
    )


def warm_up_model(device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return a small model for a first run, which loads all code of a method."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def _large(name: str, hub: str | None) -> Config:
    # An epoch is the paper's common-sense training set: 170,420 samples.
    sizes: dict[str, Any] = {"samples": 64, "length": 512, "batches": (16, 8, 4), "passes": 2}
    train: dict[str, Any] = {"epoch": 170_420, "train_batch": 8, "r": 16}
    run: dict[str, Any] = {"dtype": torch.bfloat16, "min_repeats": 1, "repeats": 3, "seconds": 60.0}
    return Config(MODELS[name], hub, **sizes, **train, **run)


CONFIGS = {
    "tiny": Config(
        make_config=_tiny,
        hub=None,
        samples=32,
        length=96,
        batches=(16, 8, 4),
        passes=2,
        epoch=8192,
        train_batch=4,
        r=16,
        dtype=torch.float32,
        min_repeats=2,
        repeats=3,
        seconds=4.0,
        gpu=False,
    ),
    "llama-2-7b": _large("Llama-2-7B", "meta-llama/Llama-2-7b-hf"),
    "llama-3.1-8b": _large("Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
    "gemma-2-9b": _large("Gemma-2-9B", "google/gemma-2-9b"),
    "llama-3.1-70b": _large("Llama-3.1-70B", None),  # whole, it needs 132 GiB for its weights
}
